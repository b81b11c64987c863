"""The bus over one stream on a real broker: reading on where one left it, and knowing when that cannot be done."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from buses import Buses, Subscribe, stop
from proxy import Proxy
from recorder import Recorder
from waiting import Eventually

from cacheinval import Client, PublishError, Read, Settings
from cacheinval import receiver as receiving
from cacheinval.bus import streaming
from cacheinval.messages import Invalidate, encode
from cacheinval.sandbox import RabbitMQ

EVENTUAL = 30.0
OURS = {"database_url": "", "relay": "off", "cache_ttl": 3600.0, "bus": "stream"}

Publish = Callable[..., Awaitable[None]]


@pytest.fixture
def buses(buses: Buses) -> Buses:
    """They read the stream unless they are told otherwise."""
    return partial(buses, bus="stream")


@pytest.fixture
def publish(operator: AbstractChannel, namespace: str) -> Publish:
    """Publishes bodies as a stranger would, and returns when the broker has confirmed them."""

    async def publish(*bodies: bytes) -> None:
        exchange = await operator.get_exchange(f"cacheinval.{namespace}")
        await asyncio.gather(*(exchange.publish(aio_pika.Message(body), routing_key="") for body in bodies))

    return publish


# The bus


async def test_everybody_receives_everything_in_order_and_acknowledges_it(
    buses: Buses,
    operator: AbstractChannel,
    subscribe: Subscribe,
    eventually: Eventually,
) -> None:
    readers = [buses(prefetch=prefetch) for prefetch in (1, 7, 500)]
    receivers = [Recorder(lambda body: "bad" if body.endswith(b"3") else None) for _ in readers]
    for bus, receiver in zip(readers, receivers, strict=True):
        subscribe(bus, receiver)
    await eventually(lambda: all(receiver.ready for receiver in receivers))
    channel = await readers[0].open_channel()
    sent = [b"%d" % number for number in range(100)]
    for body in sent:
        await channel.send(body)
    # With a prefetch of 1 nothing more is delivered unless what came before was acknowledged, understood or not.
    await eventually(lambda: all(receiver.bodies == sent for receiver in receivers))
    assert [receiver.told for receiver in receivers] == [["joined"]] * 3
    assert [[one.offset for one in receiver.begun] for receiver in receivers] == [list(range(100))] * 3
    assert [bus.state["rejected"] for bus in readers] == [10] * 3


@pytest.mark.timeout(60)
async def test_what_is_published_once_somebody_reads_is_not_missed(
    rabbitmq: RabbitMQ, namespace: str, buses: Buses, operator: AbstractChannel
) -> None:
    """ "From now on" has to be settled before the broker's answer: the cache is cleared then, and trusted."""
    publishing = buses()
    first = Recorder()
    reading = asyncio.create_task(publishing.run(first))
    async with asyncio.timeout(30):
        await first.joining.wait()
    noisy, channel = await publishing.open_channel(), await publishing.open_channel()

    async def make_noise() -> None:
        while True:
            await noisy.send(b"noise")

    noise = [asyncio.create_task(make_noise()) for _ in range(2)]
    async with asyncio.timeout(40), await aio_pika.connect(rabbitmq.url) as connection:
        for number in range(25):
            reader = await connection.channel(publisher_confirms=False)
            await reader.set_qos(10_000)
            underlay = await reader.get_underlay_channel()
            wanted, found = b"%d" % number, asyncio.Event()

            async def arrive(message: Any, wanted: bytes = wanted, found: asyncio.Event = found) -> None:
                if message.body == wanted:
                    found.set()

            arguments = {"x-stream-offset": "next"}
            await underlay.basic_consume(f"cacheinval.{namespace}.stream", arrive, arguments=arguments)
            await channel.send(wanted)
            async with asyncio.timeout(20):
                await found.wait()
            await reader.close()
    for task in [*noise, reading]:
        await stop(task)


async def test_reading_goes_on_at_the_position(
    buses: Buses,
    operator: AbstractChannel,
    subscribe: Subscribe,
    eventually: Eventually,
) -> None:
    bus, receiver = buses(), Recorder()
    task = subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    sent = [b"%d" % number for number in range(10)]
    for body in sent[:5]:
        await channel.send(body)
    await eventually(lambda: receiver.bodies == sent[:5])
    await stop(task)
    for body in sent[5:]:
        await channel.send(body)
    again = Recorder()
    again.position = 3
    subscribe(buses(), again)
    await eventually(lambda: again.bodies == sent[3:])
    assert (again.told, again.renewals) == (["resumed"], 0)


async def test_a_position_that_the_stream_has_not_reached_is_given_up(
    buses: Buses,
    operator: AbstractChannel,
    subscribe: Subscribe,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(streaming, "FOUND_WITHIN", 0.2)
    bus, receiver = buses(), Recorder()
    receiver.position = 1000
    subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    assert (receiver.told, receiver.renewals) == (["joined"], 1)
    assert "the stream was made again" in caplog.text
    await (await bus.open_channel()).send(b"new")
    await eventually(lambda: receiver.bodies == [b"new"])


async def test_a_position_is_kept_where_it_is_the_broker_that_is_silent(
    rabbitmq: RabbitMQ,
    buses: Buses,
    operator: AbstractChannel,
    subscribe: Subscribe,
    publish: Publish,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = Recorder()
    subscribe(buses(), first)
    await eventually(lambda: first.ready)
    await publish(b"0", b"1")
    monkeypatch.setattr(streaming, "FOUND_WITHIN", 0.3)
    monkeypatch.setattr(streaming, "ANSWER_WITHIN", 0.5)
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        bus, receiver = (
            buses(rabbitmq.url.replace(str(rabbitmq.port), str(proxy.port))),
            Recorder(),
        )
        receiver.position = 1
        read_from = streaming.StreamSubscription._read_from

        async def falls_silent(self: Any, offset: int | str) -> None:
            monkeypatch.setattr(streaming.StreamSubscription, "_read_from", read_from)
            proxy.swallow("reply")
            with suppress(TimeoutError):  # not even this is answered, as if it had been and then nothing more
                await read_from(self, offset)

        monkeypatch.setattr(streaming.StreamSubscription, "_read_from", falls_silent)
        subscribe(bus, receiver)
        await eventually(lambda: bus.state["reason"] is not None)
        proxy.pass_()
        await eventually(lambda: receiver.bodies == [b"1"], EVENTUAL)
        assert (receiver.told, receiver.renewals) == (["resumed"], 0)


async def test_instances_with_queues_and_with_the_stream_share_a_namespace(
    buses: Buses,
    operator: AbstractChannel,
    subscribe: Subscribe,
    eventually: Eventually,
) -> None:
    readers, receivers = [buses(bus="fanout"), buses()], [Recorder(), Recorder()]
    for bus, receiver in zip(readers, receivers, strict=True):
        subscribe(bus, receiver)
    await eventually(lambda: all(receiver.ready for receiver in receivers))
    for number, bus in enumerate(readers):
        await (await bus.open_channel()).send(b"%d" % number)
    await eventually(lambda: all(receiver.bodies == [b"0", b"1"] for receiver in receivers))
    assert [receiver.begun[0].offset for receiver in receivers] == [None, 0]


# Instances


@pytest.fixture
async def through(rabbitmq: RabbitMQ) -> AsyncIterator[Proxy]:
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        yield proxy


@pytest.fixture
async def client(
    rabbitmq: RabbitMQ, namespace: str, through: Proxy, operator: AbstractChannel
) -> AsyncIterator[Client]:
    """One that reads the stream through the proxy, and is ready."""
    url = rabbitmq.url.replace(str(rabbitmq.port), str(through.port))
    async with Client(Settings(broker_url=url, namespace=namespace, tick_interval=0.2, **OURS)) as client:
        await client.wait_ready(EVENTUAL)
        yield client


@pytest.fixture
async def writer(rabbitmq: RabbitMQ, namespace: str, client: Client) -> AsyncIterator[Client]:
    """One that only writes, past the proxy, and whose first message the client has got."""
    settings = Settings(broker_url=rabbitmq.url, namespace=namespace, **OURS)
    async with Client(settings, subscribe=False) as writer:
        await writer.invalidate("the first")
        async with asyncio.timeout(EVENTUAL):
            while client.instance.position is None:
                await asyncio.sleep(0.005)
        yield writer


async def fill(client: Client, *keys: str) -> None:
    for key in keys:
        assert await read(client, key, "old") == "miss"


async def read(client: Client, key: str, value: str = "new") -> str:
    """How the cache answered a read; the source of truth would give `value`."""

    async def load() -> str:
        return value

    found: Read = await client.cache.read(key, load)
    return found.outcome


def epoch(client: Client) -> int:
    return int(client.status()["cache"]["epoch"])


def reasons(client: Client) -> dict[str, int]:
    return dict(client.stats()["coherence"]["gap_reasons"])


async def test_a_connection_that_is_cut_costs_no_entry_and_loses_no_message(
    client: Client, writer: Client, through: Proxy, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "FOUND_WITHIN", EVENTUAL)
    before, keys = epoch(client), [f"k{number}" for number in range(60)]
    await fill(client, "other", *keys)

    async def write() -> None:
        for key in keys:
            await writer.invalidate(key)

    writing = asyncio.create_task(write())
    while not writing.done():
        through.cut_open()
        await eventually(lambda: client.state == "suspect", EVENTUAL)
        await client.wait_ready(EVENTUAL)
    await writing
    through.cut()
    await writer.invalidate("last of all")
    through.pass_()
    await eventually(lambda: client.ready, EVENTUAL)
    await eventually(lambda: client.cache.counters.evicted_entries == len(keys), EVENTUAL)
    assert [await read(client, key) for key in keys] == ["miss"] * len(keys)
    assert await read(client, "other") == "hit"
    assert (epoch(client), reasons(client)) == (before, {})


async def test_it_is_trusted_only_when_it_has_caught_up(
    client: Client,
    writer: Client,
    through: Proxy,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await fill(client, "a")
    monkeypatch.setattr(receiving, "MARKER_AGAIN", 0.1)
    publish, blocked = client.instance._publish_probe, True

    async def publish_unless_blocked(body: bytes) -> None:
        if blocked:
            raise PublishError("not now")
        await publish(body)

    client.instance._publish_probe = publish_unless_blocked  # type: ignore[method-assign]
    through.cut_open()
    await eventually(lambda: client.state == "suspect")
    await eventually(lambda: client._coherence.subscribed, EVENTUAL)
    await writer.invalidate("a")
    await eventually(lambda: client.cache.counters.evicted_entries == 1, EVENTUAL)
    assert client.status()["reason"] == "catching up with the stream"
    blocked = False
    await client.wait_ready(EVENTUAL)


@pytest.mark.parametrize("longer", [False, True])
async def test_a_stream_that_was_made_again_while_it_was_away(
    client: Client,
    writer: Client,
    through: Proxy,
    operator: AbstractChannel,
    namespace: str,
    eventually: Eventually,
    longer: bool,
) -> None:
    """The offsets start over; where there is none yet that was read, or another message has it."""
    for number in range(20):
        await writer.invalidate(f"other {number}")
    await eventually(lambda: (client.instance.position or 0) >= 20)
    before = epoch(client)
    await fill(client, "a")
    through.cut()
    await eventually(lambda: client.state == "suspect")
    await operator.queue_delete(f"cacheinval.{namespace}.stream")
    await writer.invalidate("a")  # which nobody has
    if longer:
        declared = await operator.declare_queue(
            f"cacheinval.{namespace}.stream", durable=True, arguments=streaming.STREAM
        )
        await declared.bind(f"cacheinval.{namespace}")
        for number in range(30):
            await writer.invalidate(f"other {number}")
    through.pass_()
    await client.wait_ready(EVENTUAL)
    assert await read(client, "a") == "miss"
    assert epoch(client) == before + 1
    assert reasons(client) == ({"the stream does not go on where it was left": 1} if longer else {})


async def test_an_operator_deletes_the_stream(
    client: Client,
    writer: Client,
    operator: AbstractChannel,
    namespace: str,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = epoch(client)
    await fill(client, "a")
    await operator.queue_delete(f"cacheinval.{namespace}.stream")
    await eventually(lambda: epoch(client) == before + 1, EVENTUAL)
    await client.wait_ready(EVENTUAL)
    assert "the broker cancelled the consumer: queue deleted" in caplog.text
    await fill(client, "a")
    await writer.invalidate("a")
    await eventually(lambda: client.cache.counters.evicted_entries == 2, EVENTUAL)


async def test_an_operator_deletes_the_exchange_and_makes_it_again(
    client: Client,
    writer: Client,
    operator: AbstractChannel,
    namespace: str,
    eventually: Eventually,
) -> None:
    """The stream stays, and nothing is put into it: reading on would find nothing missing."""
    before = epoch(client)
    await fill(client, "a")
    await operator.exchange_delete(f"cacheinval.{namespace}")
    await operator.declare_exchange(f"cacheinval.{namespace}", aio_pika.ExchangeType.FANOUT, durable=True)
    await eventually(lambda: epoch(client) == before + 1, EVENTUAL)
    await client.wait_ready(EVENTUAL)
    assert await read(client, "a") == "miss"


async def test_malformed_messages_are_gaps_and_stay_in_the_stream(
    client: Client,
    publish: Publish,
    writer: Client,
    operator: AbstractChannel,
    namespace: str,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = epoch(client)
    await fill(client, "a")
    await publish(b"nonsense")
    await eventually(lambda: epoch(client) == before + 1, EVENTUAL)
    await client.wait_ready(EVENTUAL)
    assert "malformed message in the stream" in caplog.text
    assert "offset=1" in caplog.text
    assert client.status()["broker"]["rejected"] == 1
    found: list[bytes] = []
    reader = await operator.declare_queue(f"cacheinval.{namespace}.stream", passive=True)
    await operator.set_qos(10)

    async def note(message: AbstractIncomingMessage) -> None:
        found.append(message.body)

    await reader.consume(note, arguments={"x-stream-offset": 1})
    await eventually(lambda: b"nonsense" in found)


# Retention

SHORT = {"x-max-length-bytes": 60_000, "x-stream-max-segment-size-bytes": 20_000}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that holds few messages; to be asked for before the client."""
    for name, value in SHORT.items():
        monkeypatch.setitem(streaming.STREAM, name, value)


def long_messages(count: int) -> list[bytes]:
    """More than a segment holds fifty of, without numbers."""
    return [encode(Invalidate(v=1, keys=["x" * 400, str(number)])) for number in range(count)]


async def test_what_retention_took_away_while_it_was_away_is_a_gap(
    short: None,
    client: Client,
    writer: Client,
    through: Proxy,
    publish: Publish,
    eventually: Eventually,
) -> None:
    before = epoch(client)
    await fill(client, "a")
    through.cut()
    await eventually(lambda: client.state == "suspect")
    await publish(encode(Invalidate(v=1, keys=["a"])))
    for _ in range(5):
        await publish(*long_messages(100))
    through.pass_()
    await client.wait_ready(EVENTUAL)
    assert await read(client, "a") == "miss"
    assert reasons(client) == {"the stream does not go on where it was left": 1}
    assert epoch(client) == before + 1


async def test_what_retention_takes_away_from_under_a_slow_reader_is_a_gap(
    short: None,
    rabbitmq: RabbitMQ,
    namespace: str,
    publish: Publish,
    eventually: Eventually,
) -> None:
    """The broker goes on with what it still has, and says nothing."""
    settings = Settings(broker_url=rabbitmq.url, namespace=namespace, prefetch=10, **OURS)
    async with Client(settings) as slow:
        await slow.wait_ready(EVENTUAL)
        before, go_on = epoch(slow), asyncio.Event()
        receive = slow.instance.receive

        async def receive_slowly(deliveries: Any) -> list[str | None]:
            await go_on.wait()
            return await receive(deliveries)

        slow.instance.receive_now = lambda deliveries: None  # type: ignore[method-assign]
        slow.instance.receive = receive_slowly  # type: ignore[method-assign]
        await publish(encode(Invalidate(v=1, keys=["to be held"])))
        for _ in range(8):
            await publish(*long_messages(100))
        await fill(slow, "a")
        go_on.set()
        # Mostly a jump in the offsets tells; now and then nothing more was seen to arrive, and then silence does.
        await eventually(lambda: epoch(slow) > before, EVENTUAL)
        await slow.wait_ready(EVENTUAL)
        why = slow.status()["last_gap"]["reason"]
        assert why == "messages missing in the stream" or why.startswith("new subscription: silence")
        assert await read(slow, "a") == "miss"


async def test_records_of_the_broker_between_messages_are_no_gap(
    short: None, client: Client, publish: Publish, eventually: Eventually
) -> None:
    """It puts one at the head of each segment, which takes an offset."""
    before = epoch(client)
    await fill(client, "a")
    for _ in range(20):
        await publish(*long_messages(20))
    await eventually(lambda: client.stats()["receiver"]["messages"] == 400, EVENTUAL)
    last = client._coherence.position._last
    assert last is not None
    assert last > 400  # so there were some
    assert (epoch(client), reasons(client)) == (before, {})
    assert await read(client, "a") == "hit"
