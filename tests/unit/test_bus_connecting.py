"""What of the bus on RabbitMQ can be told without a broker: deadlines, the words of errors, and the order of tags."""

import asyncio
import ssl
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

import pytest
from aio_pika.exceptions import AMQPConnectionError, ChannelPreconditionFailed, ConnectionClosed
from recorder import Recorder
from waiting import Eventually
from yarl import URL

from cacheinval.bus import Delivery, connecting
from cacheinval.bus.connecting import Broker, Counts, explain, within
from cacheinval.bus.consuming import Subscription
from cacheinval.bus.streaming import StreamSubscription
from cacheinval.settings import Settings


async def test_within_gives_results_and_errors_on() -> None:
    async def works() -> int:
        return 1

    async def fails() -> int:
        raise ValueError("no")

    assert await within(1, works()) == 1
    with pytest.raises(ValueError, match="no"):
        await within(1, fails())


async def test_within_keeps_its_deadline_even_if_the_work_does_not_end() -> None:
    released = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await released.wait()  # as an aiormq call does, on a connection that takes no more bytes
            raise ConnectionError("nobody looks at this any more") from None

    async with asyncio.timeout(30):
        with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
            await within(0.05, stubborn())
    released.set()


async def test_within_passes_cancellation_on(eventually: Eventually) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            began.set()
            await asyncio.sleep(60)
        finally:
            ended.set()

    task = asyncio.create_task(within(60, work()))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(ended.is_set)


async def test_within_does_not_take_a_cancellation_inside_the_library_for_its_own() -> None:
    rejected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    rejected.set_exception(asyncio.CancelledError())

    async def waits_for(future: Awaitable[None]) -> None:
        await future

    with pytest.raises(ConnectionError, match="no sign of life"):
        await within(1, waits_for(rejected))


async def test_a_connection_that_comes_after_all_is_closed(
    eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = asyncio.Event()

    class Late:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        async def connect(self) -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

        async def close(self) -> None:
            closed.set()

    monkeypatch.setattr(connecting, "Connection", Late)
    monkeypatch.setattr(connecting, "CONNECT_WITHIN", 0.05)
    with pytest.raises(TimeoutError):
        await Broker(Settings()).connect("test")
    await eventually(closed.is_set)


class Nodes:
    """Stands for the connections to a cluster: who is tried, in which order, and who is there."""

    def __init__(self) -> None:
        self.up: set[str] = set()
        self.hanging: set[str] = set()
        self.tried: list[str] = []

    def __call__(self, url: URL, *_: Any, **__: Any) -> "Nodes.Connection":
        return Nodes.Connection(self, url)

    class Connection:
        def __init__(self, nodes: "Nodes", url: URL) -> None:
            self.nodes, self.url = nodes, url

        async def connect(self) -> None:
            host = self.url.host or ""
            self.nodes.tried.append(host)
            if host in self.nodes.hanging:
                await asyncio.sleep(60)
            if host not in self.nodes.up:
                raise ConnectionRefusedError(111, "Connection refused")

        async def close(self) -> None: ...

        @property
        def wire(self) -> "Nodes.Connection":
            return self

        def abort(self) -> None: ...


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    nodes = Nodes()
    monkeypatch.setattr(connecting, "Connection", nodes)
    monkeypatch.setattr(connecting, "CONNECT_TO_EACH_WITHIN", 0.05)
    return nodes


CLUSTER = Settings(broker_url="amqp://u:s3cr3t@a:1,b:2,c:3/")


async def test_any_node_of_a_cluster_will_do_and_each_is_tried_first(nodes: Nodes) -> None:
    broker = Broker(CLUSTER)
    nodes.up = {"a", "b", "c"}
    for _ in range(100):
        await broker.connect("test")
    assert len(nodes.tried) == 100
    assert set(nodes.tried) == {"a", "b", "c"}


async def test_a_node_that_was_away_is_tried_after_the_others_for_a_while(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker(CLUSTER)
    nodes.up, nodes.hanging = {"c"}, {"b"}
    async with asyncio.timeout(30):
        while set(nodes.tried) != {"a", "b", "c"}:
            assert (await broker.connect("test")).url.host == "c"
        nodes.tried.clear()
        for _ in range(100):
            assert (await broker.connect("test")).url.host == "c"
        assert nodes.tried == ["c"] * 100
        monkeypatch.setattr(connecting, "AVOID_FOR", 0)
        nodes.up, nodes.hanging = {"a", "b", "c"}, set()
        for _ in range(100):
            await broker.connect("test")
        assert set(nodes.tried) == {"a", "b", "c"}


async def test_where_no_node_is_there_each_is_told_always_in_the_same_words(nodes: Nodes) -> None:
    broker = Broker(CLUSTER)
    nodes.hanging = {"b"}
    for _ in range(10):
        with pytest.raises(ConnectionError) as caught:
            await broker.connect("test")
        assert str(caught.value) == (
            "a:1: Connection refused; b:2: no answer from the broker within 0.05 s; c:3: Connection refused"
        )
    assert len(nodes.tried) == 30


async def test_which_nodes_cannot_be_reached(nodes: Nodes) -> None:
    nodes.up, nodes.hanging = {"c"}, {"b"}
    broker = Broker(CLUSTER)
    assert await broker.unreachable("test") == {
        "a:1": "Connection refused",
        "b:2": "no answer from the broker within 0.05 s",
    }
    await broker.close()
    assert await Broker(Settings()).unreachable("test") == {}  # of one that is alone, `connect` says it


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            AMQPConnectionError(111, "Connect call failed ('127.0.0.1', 1)"),
            "Connect call failed ('127.0.0.1', 1)",
        ),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (ConnectionClosed(320, "CONNECTION_FORCED - shutdown"), "CONNECTION_FORCED - shutdown"),
        (ChannelPreconditionFailed("PRECONDITION_FAILED - other\n type"), "PRECONDITION_FAILED - other type"),
        (AMQPConnectionError(), "AMQPConnectionError"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong"), "[SSL: WRONG_VERSION_NUMBER] wrong"),
        (asyncio.CancelledError(), "no sign of life from the broker"),
        (TimeoutError(), "TimeoutError"),
        (None, "closed"),
        (ValueError("amqp://me:secret@host/"), "amqp://me:***@host/"),
    ],
)
def test_errors_are_told_in_one_line(error: BaseException | None, words: str) -> None:
    assert explain(error) == words


async def test_a_delivery_out_of_order_ends_the_subscription() -> None:
    subscription = Subscription(
        Broker(Settings()), Recorder(), counts := Counts(), name=None, prefetch=10, lost=lambda reason: None
    )
    for tag in (1, 2, 4, 5):
        subscription._arrive([(tag, Delivery(b""))])
    assert counts.deliveries == 2
    assert subscription._reception.ended == "delivery 4 came after 2"


async def test_a_delivery_of_a_stream_without_its_offset_ends_the_subscription() -> None:
    subscription = StreamSubscription(
        Broker(Settings()), Recorder(), counts := Counts(), prefetch=10, lost=lambda reason: None
    )
    subscription._arrive([(1, Delivery(b"", offset=7))])
    subscription._arrive([(2, Delivery(b"", offset=8)), (3, Delivery(b""))])
    assert counts.deliveries == 1
    assert subscription._reception.ended == "a delivery of the stream without its offset"
