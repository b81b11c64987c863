"""The bus on a real broker, with everything that can happen to the broker, the queue and the wire."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from buses import Buses, Subscribe, stop
from proxy import Proxy
from recorder import Recorder
from waiting import Eventually

from cacheinval.bus import Bus, Delivery, consuming
from cacheinval.bus.consuming import Subscription
from cacheinval.bus.rabbitmq import RabbitBus
from cacheinval.errors import ConfigurationError, PublishError
from cacheinval.sandbox import RabbitMQ
from cacheinval.sandbox.processes import claim_port
from cacheinval.settings import Settings


@pytest.fixture(autouse=True)
async def nothing_unseen() -> AsyncIterator[None]:
    """Fails a test that leaves exceptions of tasks and futures behind which nobody has looked at."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    yield
    gc.collect()
    await asyncio.sleep(0)
    # CPython 3.11 complains so about a handler of a stream server that is cancelled, which is how the proxy ends.
    assert [one for one in complaints if "StreamReaderProtocol.connection_made" not in one["message"]] == []


OUTSIDE = {
    "cache_url": "redis://127.0.0.1:1/0",
    "instance_id": "one",
}  # a cache outside the process: a durable queue


def on_proxy(rabbitmq: RabbitMQ, proxy: Proxy, query: str = "") -> str:
    return rabbitmq.url.replace(f":{rabbitmq.port}/", f":{proxy.port}/{query}")


async def waiting(operator: AbstractChannel, queue: str) -> int:
    found = await operator.declare_queue(queue, passive=True)
    return found.declaration_result.message_count or 0


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "cacheinval.bus"]


# Delivering


async def test_everybody_receives_everything_in_order(
    buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    buses, receivers = [buses() for _ in range(3)], [Recorder() for _ in range(3)]
    for bus, receiver in zip(buses, receivers, strict=True):
        subscribe(bus, receiver)
    await eventually(lambda: all(receiver.ready for receiver in receivers))
    channel = await buses[0].open_channel()
    sent = [b"%d" % number for number in range(1000)]
    for first in range(0, 1000, 100):  # a hundred at a time under way
        await asyncio.gather(*map(channel.send, sent[first : first + 100]))
    await eventually(lambda: all(len(receiver.bodies) >= 1000 for receiver in receivers))
    assert all(receiver.bodies == sent for receiver in receivers)
    assert [receiver.told for receiver in receivers] == [["joined"]] * 3
    assert buses[1].state["deliveries"] == 1000
    await channel.close()


async def test_what_is_published_while_a_receiver_joins_waits_for_it(
    buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    bus, receiver = buses(), Recorder()
    receiver.may_join.clear()
    subscribe(bus, receiver)
    await eventually(receiver.joining.is_set)
    await (await bus.open_channel()).send(b"early")
    await eventually(lambda: bus.state["deliveries"] == 1)
    assert receiver.begun == []
    receiver.may_join.set()
    await eventually(lambda: receiver.bodies == [b"early"])


async def test_properties_of_a_message(
    buses: Buses,
    operator: AbstractChannel,
    namespace: str,
    subscribe: Subscribe,
    eventually: Eventually,
) -> None:
    bus, receiver = buses(), Recorder()
    subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    queue = await operator.declare_queue(exclusive=True)
    await queue.bind(f"cacheinval.{namespace}")
    channel = await bus.open_channel()
    before = int(time.time())
    await channel.send(b"{}")
    message = await eventually(lambda: queue.get(fail=False))
    assert message is not None
    assert (message.content_type, message.type, message.app_id) == (
        "application/json",
        "cacheinval.v1",
        channel.origin,
    )
    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert message.timestamp is not None
    assert before <= message.timestamp.timestamp() <= time.time()
    assert (await bus.open_channel()).origin != channel.origin


async def test_nothing_is_acknowledged_before_it_was_received(
    rabbitmq: RabbitMQ,
    buses: Buses,
    subscribe: Subscribe,
    operator: AbstractChannel,
    eventually: Eventually,
) -> None:
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        bus, receiver = buses(on_proxy(rabbitmq, proxy), **OUTSIDE), Recorder()
        receiver.open.clear()
        task = subscribe(bus, receiver)
        await eventually(lambda: receiver.ready)
        await (await buses().open_channel()).send(b"precious")
        await eventually(lambda: receiver.begun)
        proxy.cut_open()
        await eventually(lambda: receiver.told[1:] and receiver.told[1].startswith("lost"))
        receiver.open.set()
        await eventually(lambda: receiver.bodies == [b"precious"])
        assert [delivery.redelivered for delivery in receiver.begun] == [False, True]
        assert receiver.told[2:] == ["resumed"]
        await stop(task)
    assert await waiting(operator, str(bus.state["queue"])) == 0  # acknowledged by now


async def test_acknowledgements_that_wait_hold_nothing_up_and_are_sent_at_the_end(
    buses: Buses,
    subscribe: Subscribe,
    operator: AbstractChannel,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consuming, "ACKNOWLEDGE_WITHIN", 600.0)
    bus, receiver = buses(prefetch=8, **OUTSIDE), Recorder()
    task = subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    sent = [b"%d" % number for number in range(21)]
    for body in sent:
        await channel.send(body)
    await eventually(lambda: receiver.bodies == sent)  # a quarter of the prefetch is acknowledged at once
    await stop(task)
    assert await waiting(operator, str(bus.state["queue"])) == 0


async def test_no_more_than_the_prefetch_is_under_way(
    buses: Buses, subscribe: Subscribe, operator: AbstractChannel, eventually: Eventually
) -> None:
    bus, receiver = buses(prefetch=3, **OUTSIDE), Recorder()
    receiver.open.clear()
    subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    sent = [b"%d" % number for number in range(10)]
    for body in sent:
        await channel.send(body)
    await eventually(lambda: bus.state["deliveries"] == 3)
    assert await waiting(operator, str(bus.state["queue"])) == 7
    assert (bus.state["unsettled"], await bus.depth()) == (3, 10)
    receiver.open.set()
    await eventually(lambda: receiver.bodies == sent)
    await eventually(lambda: bus.state["unsettled"] == 0)
    assert await bus.depth() == 0


async def test_how_much_waits_in_a_queue_of_its_own_is_known_until_the_subscription_ends(
    buses: Buses, subscribe: Subscribe, operator: AbstractChannel, eventually: Eventually
) -> None:
    bus, receiver = buses(prefetch=1), Recorder()
    assert await bus.depth() is None
    receiver.open.clear()
    task = subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    for _ in range(3):
        await channel.send(b"{}")
    await eventually(lambda: bus.state["unsettled"] == 1)
    assert await bus.depth() == 3
    assert receiver.ready, "and asking costs no subscription"
    await stop(task)
    assert await bus.depth() is None


async def test_asking_a_slow_broker_how_much_waits_costs_no_subscription(
    rabbitmq: RabbitMQ,
    buses: Buses,
    subscribe: Subscribe,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Eventually,
) -> None:
    """A channel that was given up half-way is an error of the whole connection."""
    port = int(urlsplit(rabbitmq.url).port or 0)
    async with Proxy("127.0.0.1", port) as proxy:
        near, far = buses(), buses(rabbitmq.url.replace(str(port), str(proxy.port)))
        receiver = Recorder()
        subscribe(far, receiver)
        await eventually(lambda: receiver.ready)
        proxy.delay(0.1)  # both ways: to open a channel, to ask, and to close it takes 0.6 s
        monkeypatch.setattr(consuming, "DEPTH_WITHIN", 0.5)
        for _ in range(4):
            await far.depth()
        proxy.pass_()

        async def known() -> bool:
            return await far.depth() is not None

        await eventually(known)
        channel = await near.open_channel()
        await channel.send(b"{}")
        await eventually(lambda: receiver.bodies == [b"{}"])
        assert far.state["sessions"] == 1


async def test_malformed_messages_are_dead_lettered_and_their_neighbours_acknowledged(
    buses: Buses,
    subscribe: Subscribe,
    operator: AbstractChannel,
    namespace: str,
    eventually: Eventually,
) -> None:
    bus = buses(**OUTSIDE)
    receiver = Recorder(lambda body: "bad" if body.startswith(b"bad") else None)
    receiver.open.clear()  # so that the rest comes in one batch
    task = subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    sent = [b"good 0", b"bad 1", b"good 2", b"bad 3", b"bad 4", b"good 5", b"bad 6"]
    for body in sent:
        await channel.send(body)
    await eventually(lambda: bus.state["deliveries"] == len(sent))
    receiver.open.set()
    await eventually(lambda: receiver.bodies == sent)
    dead = f"cacheinval.{namespace}.dead"
    await eventually(lambda: bus.state["rejected"] == 4)
    letters = await operator.get_queue(dead)
    found = [await eventually(lambda: letters.get(fail=False)) for _ in range(4)]
    assert [letter.body for letter in found if letter] == [b"bad 1", b"bad 3", b"bad 4", b"bad 6"]
    await stop(task)  # the good ones have been acknowledged: nothing comes back
    assert await waiting(operator, dead) == 0
    assert await waiting(operator, str(bus.state["queue"])) == 0
    assert receiver.told == ["joined", "lost: stopped"]


async def test_stopping_finishes_and_acknowledges_what_is_in_hand_and_leaves_the_rest(
    buses: Buses, subscribe: Subscribe, operator: AbstractChannel, eventually: Eventually
) -> None:
    bus, receiver = buses(**OUTSIDE), Recorder()
    receiver.open.clear()
    task = subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    await channel.send(b"in hand")
    await eventually(lambda: receiver.begun)
    await channel.send(b"waits")
    await eventually(lambda: bus.state["deliveries"] == 2)
    task.cancel()
    await eventually(lambda: receiver.told == ["joined", "lost: stopped"])
    receiver.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert receiver.bodies == [b"in hand"]
    assert await waiting(operator, str(bus.state["queue"])) == 1


async def test_stopping_does_not_wait_for_ever(
    buses: Buses, subscribe: Subscribe, operator: AbstractChannel, eventually: Eventually
) -> None:
    bus, receiver = buses(**OUTSIDE), Recorder()
    receiver.open.clear()
    task = subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    await (await bus.open_channel()).send(b"in hand, for ever")
    await eventually(lambda: receiver.begun)
    async with asyncio.timeout(60):
        await stop(task)
    assert receiver.bodies == []
    assert await waiting(operator, str(bus.state["queue"])) == 1


async def test_a_receiver_that_fails_gets_it_again(
    buses: Buses, subscribe: Subscribe, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    bus, receiver = buses(**OUTSIDE), Recorder()
    receiver.failure = RuntimeError("redis is down")
    subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    await (await bus.open_channel()).send(b"1")
    await eventually(
        lambda: receiver.told[:3] == ["joined", "lost: receiving failed: redis is down", "resumed"]
    )
    receiver.failure = None
    await eventually(lambda: receiver.bodies == [b"1"])
    assert receiver.begun[-1].redelivered
    assert lines(caplog)[0] == """receiving failed, starting over reason="RuntimeError('redis is down')\""""


# Losing the subscription


async def test_an_operator_deletes_the_queue_of_a_process(
    rabbitmq: RabbitMQ, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    bus, receiver = buses(), Recorder()
    subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    queue = str(bus.state["queue"])
    assert queue.startswith("amq.gen-")
    await rabbitmq.ctl("delete_queue", queue)
    await eventually(lambda: receiver.told[2:] == ["joined"])
    assert receiver.told[1] == "lost: the broker cancelled the consumer: queue deleted"
    assert bus.state["queue"] != queue
    await (await bus.open_channel()).send(b"to the new one")
    await eventually(lambda: receiver.bodies == [b"to the new one"])


async def test_an_operator_deletes_a_durable_queue(
    buses: Buses, subscribe: Subscribe, operator: AbstractChannel, eventually: Eventually
) -> None:
    bus, receiver = buses(**OUTSIDE), Recorder()
    subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    assert receiver.renewals == 1
    await operator.queue_delete(str(bus.state["queue"]))
    await eventually(lambda: receiver.told[2:] == ["joined"])  # not resumed: what it held is gone
    assert receiver.renewals == 2
    await (await bus.open_channel()).send(b"to the new one")
    await eventually(lambda: receiver.bodies == [b"to the new one"])


async def test_the_broker_is_killed_and_comes_back(
    own_rabbitmq: RabbitMQ,
    buses: Buses,
    subscribe: Subscribe,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "cacheinval.bus")
    inside, outside = buses(own_rabbitmq.url), buses(own_rabbitmq.url, **OUTSIDE)
    receiver, durable = Recorder(), Recorder()
    subscribe(inside, receiver)
    subscribe(outside, durable)
    await eventually(lambda: receiver.ready and durable.ready)
    channel = await inside.open_channel()
    await channel.send(b"before")
    await eventually(lambda: receiver.bodies == durable.bodies == [b"before"])
    await own_rabbitmq.kill()
    await eventually(lambda: receiver.told[1:] and durable.told[1:])
    assert not receiver.ready
    with pytest.raises(PublishError):
        await channel.send(b"nowhere")
    await eventually(lambda: any("broker unreachable" in line for line in lines(caplog)))
    await own_rabbitmq.start()
    await eventually(lambda: receiver.ready and durable.ready)
    assert receiver.told[-1] == "joined"
    assert durable.told[-1] == "resumed"
    await (await inside.open_channel()).send(b"after")
    await eventually(lambda: receiver.bodies[-1] == durable.bodies[-1] == b"after")
    assert (
        receiver.bodies == list(dict.fromkeys(durable.bodies)) == [b"before", b"after"]
    )  # perhaps once more
    assert inside.state["sessions"] == 2
    for record in caplog.records:
        assert "guest:guest" not in record.getMessage()


async def test_a_cut_connection_is_noticed_at_once(
    rabbitmq: RabbitMQ, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        bus, receiver = buses(on_proxy(rabbitmq, proxy)), Recorder()
        subscribe(bus, receiver)
        await eventually(lambda: receiver.ready)
        proxy.cut()
        await eventually(lambda: not receiver.ready)
        assert "no sign of life" not in receiver.told[-1]  # nobody had to wait for a heartbeat that is missed
        proxy.pass_()
        await eventually(lambda: receiver.ready)
        assert [line for line in receiver.told if not line.startswith("lost")] == ["joined", "joined"]


async def test_a_cut_while_joining_is_lost_and_never_joined(
    rabbitmq: RabbitMQ, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        bus, receiver = buses(on_proxy(rabbitmq, proxy)), Recorder()
        receiver.may_join.clear()
        subscribe(bus, receiver)
        await eventually(receiver.joining.is_set)
        proxy.cut()
        await eventually(lambda: receiver.told)
        receiver.may_join.set()
        attempts = proxy.connections
        await eventually(lambda: proxy.connections > attempts)  # so what was in hand has ended
        assert [line.partition(":")[0] for line in receiver.told] == ["lost"]
        proxy.pass_()
        await eventually(lambda: receiver.ready)
        assert [line.partition(":")[0] for line in receiver.told] == ["lost", "joined"]


async def test_a_silent_connection_is_given_up(
    rabbitmq: RabbitMQ, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        bus = buses(on_proxy(rabbitmq, proxy, "?heartbeat=1"), publish_timeout=100)
        receiver = Recorder()
        subscribe(bus, receiver)
        await eventually(lambda: receiver.ready)
        channel = await bus.open_channel()
        proxy.swallow()
        sending = asyncio.create_task(channel.send(b"into the void"))
        await eventually(lambda: not receiver.ready)
        assert receiver.told[1] == "lost: no sign of life from the broker"
        async with asyncio.timeout(30):
            with pytest.raises(PublishError, match="no sign of life"):
                await sending
        proxy.pass_()
        await eventually(lambda: receiver.ready)
        await (await bus.open_channel()).send(b"anew")
        await eventually(lambda: receiver.bodies == [b"anew"])


async def test_what_came_while_a_durable_queue_had_no_consumer_is_received(
    buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    bus, receiver = buses(**OUTSIDE), Recorder()
    task = subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    await stop(task)
    channel = await bus.open_channel()
    sent = [b"%d" % number for number in range(20)]
    for body in sent:
        await channel.send(body)
    again, later = buses(**OUTSIDE), Recorder()
    subscribe(again, later)
    await eventually(lambda: len(later.bodies) >= 20)
    assert later.bodies == sent
    assert later.told == ["resumed"]
    assert receiver.bodies == []


async def test_a_second_process_with_the_same_name_stands_by_and_takes_over(
    buses: Buses,
    subscribe: Subscribe,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts: list[Subscription] = []
    consume = Subscription._consume

    async def counted(subscription: Subscription) -> bool:
        attempts.append(subscription)
        return await consume(subscription)

    monkeypatch.setattr(Subscription, "_consume", counted)
    monkeypatch.setattr(consuming, "STAND_BY", 0.2)
    first, receiver = buses(**OUTSIDE), Recorder()
    task = subscribe(first, receiver)
    await eventually(lambda: receiver.ready)
    second, standby = buses(**OUTSIDE), Recorder()
    caplog.clear()
    subscribe(second, standby)
    await eventually(lambda: second.state["consumer"] == "standby")
    channel = await first.open_channel()
    await channel.send(b"for the first")
    await eventually(lambda: receiver.bodies == [b"for the first"])
    attempts.clear()
    await eventually(lambda: len(attempts) >= 3)  # of which nothing is to be heard
    assert standby.told == []
    assert [line for line in lines(caplog) if "standing by" in line] == [
        f"standing by: another process consumes this queue broker={first.state['url']} queue={first.state['queue']}"
    ]
    await stop(task)
    await channel.send(b"for the second")
    await eventually(lambda: standby.bodies == [b"for the second"])
    assert standby.told == ["resumed"]
    assert second.state["consumer"] == "connected"


async def test_a_second_process_stands_by_also_where_quorum_queues_are_the_default(
    rabbitmq: RabbitMQ, namespace: str, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    """They let in all who consume, exclusively or not."""
    await rabbitmq.ctl("add_vhost", namespace, "--default-queue-type", "quorum")
    try:
        await rabbitmq.ctl("set_permissions", "-p", namespace, "guest", ".*", ".*", ".*")
        first, second = (buses(rabbitmq.url + namespace, **OUTSIDE) for _ in range(2))
        receiver = Recorder()
        subscribe(first, receiver)
        await eventually(lambda: receiver.ready)
        task = subscribe(second, Recorder())
        await eventually(lambda: second.state["consumer"] == "standby")
        await stop(task)
    finally:
        await rabbitmq.ctl("delete_vhost", namespace)


async def test_of_several_addresses_one_that_answers_is_enough(
    rabbitmq: RabbitMQ, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    async with Proxy("127.0.0.1", 1) as proxy:
        proxy.cut()
        bus = buses(f"amqp://guest:guest@127.0.0.1:{proxy.port},127.0.0.1:{rabbitmq.port},127.0.0.1:1/")
        for _ in range(5):
            receiver = Recorder()
            task = subscribe(bus, receiver)
            await eventually(lambda receiver=receiver: receiver.ready)
            assert bus.state["node"] == f"127.0.0.1:{rabbitmq.port}"
            channel = await bus.open_channel()
            await channel.send(b"hello")
            await eventually(lambda receiver=receiver: receiver.bodies == [b"hello"])
            await stop(task)
            assert bus.state["node"] is None


async def test_a_broker_that_was_never_there_is_told_once(
    namespace: str, subscribe: Subscribe, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    async with Proxy("127.0.0.1", 1) as proxy:
        proxy.cut()
        bus = RabbitBus(Settings(broker_url=f"amqp://me:secret@127.0.0.1:{proxy.port}/", namespace=namespace))
        receiver = Recorder()
        task = subscribe(bus, receiver)
        await eventually(lambda: proxy.connections >= 4)
        await stop(task)
    assert receiver.told == []
    assert sum("broker unreachable, retrying" in line for line in lines(caplog)) == 1
    assert "secret" not in caplog.text + str(bus.state)


async def test_an_exchange_of_another_type_is_refused_loudly(
    rabbitmq: RabbitMQ,
    buses: Buses,
    subscribe: Subscribe,
    operator: AbstractChannel,
    namespace: str,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await operator.declare_exchange(f"cacheinval.{namespace}", "direct", durable=True)
    with pytest.raises(PublishError, match=r"not a durable fanout.*'direct'"):
        await buses().open_channel()
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        bus, receiver = buses(on_proxy(rabbitmq, proxy)), Recorder()
        task = subscribe(bus, receiver)
        await eventually(lambda: proxy.connections >= 4)
        assert "PRECONDITION_FAILED" in str(bus.state["reason"])
        assert [record.levelname for record in caplog.records if "refused" in record.getMessage()] == [
            "ERROR"
        ]
        assert receiver.told == []
        await operator.exchange_delete(f"cacheinval.{namespace}")
        await eventually(lambda: receiver.told == ["joined"])
        await stop(task)


async def test_stopping_while_the_broker_does_not_answer(
    rabbitmq: RabbitMQ,
    buses: Buses,
    subscribe: Subscribe,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cacheinval.bus.connecting.CONNECT_WITHIN", 600.0)
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        proxy.swallow()
        task = subscribe(buses(on_proxy(rabbitmq, proxy)), Recorder())
        await eventually(lambda: proxy.open_links == 1)
        async with asyncio.timeout(30):
            await stop(task)
        await eventually(lambda: proxy.open_links == 0)  # the connection that was begun is closed


# Publishing


async def test_publishing_where_nobody_has_ever_subscribed(buses: Buses, namespace: str) -> None:
    bus = buses()
    with pytest.raises(PublishError, match=f"the exchange cacheinval.{namespace} is missing"):
        await bus.open_channel()
    with pytest.raises(PublishError, match=f"the exchange cacheinval.{namespace} is missing"):
        await bus.ask(b"anybody?", 0.1)
    with pytest.raises(PublishError):  # and asking did not declare it
        await bus.open_channel()


async def test_publishing_where_nobody_is_subscribed_now_succeeds(
    buses: Buses, operator: AbstractChannel, namespace: str
) -> None:
    await operator.declare_exchange(f"cacheinval.{namespace}", "fanout", durable=True)
    bus = buses()
    channel = await bus.open_channel()
    await channel.send(b"1")
    await asyncio.gather(*(channel.send(b"%d" % number) for number in range(99)))
    assert (bus.state["confirmed"], bus.state["unrouted"]) == (100, 100)


async def test_the_exchange_is_deleted_under_a_channel(
    buses: Buses, operator: AbstractChannel, namespace: str
) -> None:
    await operator.declare_exchange(f"cacheinval.{namespace}", "fanout", durable=True)
    bus = buses()
    channel = await bus.open_channel()
    await channel.send(b"1")
    await operator.exchange_delete(f"cacheinval.{namespace}")
    with pytest.raises(PublishError, match="is missing"):
        await channel.send(b"2")
    with pytest.raises(PublishError, match="is missing"):  # of no use any more
        await channel.send(b"3")
    await channel.close()


async def test_a_broker_that_reads_no_more_keeps_nobody_from_leaving(
    own_rabbitmq: RabbitMQ, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    receiver = Recorder()
    subscribe(buses(own_rabbitmq.url), receiver)
    await eventually(lambda: receiver.ready)  # there has to be an exchange
    before = asyncio.all_tasks()
    bus = buses(own_rabbitmq.url, publish_timeout=1)
    channel = await bus.open_channel()
    own_rabbitmq.pause()
    try:
        with pytest.raises(PublishError, match="did not confirm"):
            await channel.send(bytes(30_000_000))  # more than the sockets hold
        await bus.close()
        # Else the event loop could not end either, nor the process.
        await eventually(lambda: asyncio.all_tasks() <= before)
    finally:
        own_rabbitmq.resume()


async def test_a_frozen_broker_fails_publishing_in_time(
    own_rabbitmq: RabbitMQ, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    bus, receiver = buses(own_rabbitmq.url, publish_timeout=1), Recorder()
    subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    await channel.send(b"1")
    own_rabbitmq.pause()
    try:

        async def timed(work: Callable[[], Awaitable[Any]], words: str) -> None:
            began = time.monotonic()
            with pytest.raises(PublishError, match=words):
                await work()
            assert time.monotonic() - began > 0.9

        await timed(lambda: channel.send(b"2"), "did not confirm within 1 s")
        await timed(bus.open_channel, "does not answer")
        await timed(bus.open_channel, "cannot be reached within 1 s")
        async with asyncio.timeout(30):
            with pytest.raises(PublishError):
                await channel.send(b"3")
            await channel.close()
    finally:
        own_rabbitmq.resume()

    async def works() -> bool:
        with suppress(PublishError):
            await (await bus.open_channel()).send(b"4")
            return True
        return False

    await eventually(works)
    await eventually(lambda: b"4" in receiver.bodies)


async def test_an_alarm_blocks_publishing_but_not_the_subscription(
    own_rabbitmq: RabbitMQ, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    bus, receiver = buses(own_rabbitmq.url, publish_timeout=1), Recorder()
    subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    await own_rabbitmq.ctl("set_disk_free_limit", "1000000GB")
    try:
        with pytest.raises(PublishError, match="blocks publishers"):
            await channel.send(b"late")
        assert bus.state["publisher"] == "blocked"
        await channel.close()
        for _ in range(3):
            with pytest.raises(PublishError, match="blocks publishers"):
                await bus.open_channel()
        assert len((await own_rabbitmq.ctl("list_connections", "pid")).split()) <= 3  # with its heading
        assert receiver.told == ["joined"]
    finally:
        await own_rabbitmq.ctl("set_disk_free_limit", "1MB")
    await eventually(lambda: receiver.bodies == [b"late"])  # what timed out came all the same
    await (await bus.open_channel()).send(b"again")
    await eventually(lambda: receiver.bodies == [b"late", b"again"])


async def test_a_cut_fails_what_is_under_way_at_once_and_the_next_channel_works(
    rabbitmq: RabbitMQ, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        bus, receiver = buses(on_proxy(rabbitmq, proxy), publish_timeout=100), Recorder()
        subscribe(buses(), receiver)
        await eventually(lambda: receiver.ready)
        channel = await bus.open_channel()
        proxy.swallow("reply")
        sending = [asyncio.create_task(channel.send(b"under way")) for _ in range(10)]
        await eventually(lambda: len(receiver.bodies) == 10)
        proxy.cut_open()
        results = await asyncio.gather(*sending, return_exceptions=True)
        assert [type(result) for result in results] == [PublishError] * 10
        assert not any("within" in str(result) for result in results)  # nobody waited for that
        proxy.pass_()
        with pytest.raises(PublishError):
            await channel.send(b"never again")
        await channel.close()
        await (await bus.open_channel()).send(b"anew")
        await eventually(lambda: receiver.bodies[10:] == [b"anew"])


async def test_a_sender_that_is_cancelled_spoils_the_channel(
    rabbitmq: RabbitMQ, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        bus, receiver = buses(on_proxy(rabbitmq, proxy)), Recorder()
        subscribe(buses(), receiver)
        await eventually(lambda: receiver.ready)
        channel = await bus.open_channel()
        proxy.swallow("reply")
        sending = asyncio.create_task(channel.send(b"1"))
        await eventually(lambda: receiver.bodies == [b"1"])
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(PublishError, match="given up"):
            await channel.send(b"2")


async def test_channels_share_one_connection(
    rabbitmq: RabbitMQ,
    buses: Buses,
    operator: AbstractChannel,
    namespace: str,
    eventually: Eventually,
) -> None:
    await operator.declare_exchange(f"cacheinval.{namespace}", "fanout", durable=True)
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        bus = buses(on_proxy(rabbitmq, proxy))
        channels = await asyncio.gather(*(bus.open_channel() for _ in range(10)))
        assert proxy.connections == 1
        assert len({channel.origin for channel in channels}) == 10
        await asyncio.gather(*(channel.send(b"x") for channel in channels))
        await bus.close()
        await eventually(lambda: proxy.open_links == 0)
        with pytest.raises(PublishError, match="closed"):
            await bus.open_channel()


async def test_a_broker_that_cannot_be_reached(namespace: str) -> None:
    async with Proxy("127.0.0.1", 1) as proxy:
        proxy.cut()
        bus: Bus = RabbitBus(
            Settings(broker_url=f"amqp://me:secret@127.0.0.1:{proxy.port}/", namespace=namespace)
        )
        for work in (
            bus.open_channel(),
            bus.ask(b"anybody?", 0.1),
            bus.answer(Delivery(b"?", "somebody"), b"!"),
        ):
            with pytest.raises(PublishError, match="cannot be reached") as failure:
                await work
            assert "secret" not in str(failure.value)
        await bus.close()


# Asking


async def test_questions_are_answered_by_everybody(
    buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    class Answers(Recorder):
        def __init__(self, bus: RabbitBus, name: bytes) -> None:
            super().__init__()
            self.bus, self.name = bus, name

        async def receive(self, deliveries):  # type: ignore[no-untyped-def]
            for delivery in deliveries:
                await self.bus.answer(delivery, self.name)
            return await super().receive(deliveries)

    asker, receivers = buses(), [Answers(buses(), name) for name in (b"a", b"b", b"c")]
    for receiver in receivers:
        subscribe(receiver.bus, receiver)
    await eventually(lambda: all(receiver.ready for receiver in receivers))
    assert set(await asker.ask(b"who?", 0.5)) <= {b"a", b"b", b"c"}  # whoever has answered by then

    async def all_answer() -> None:
        answers = await asker.ask(b"who?", 600, lambda answers: len(answers) == 3)
        assert sorted(answers) == [b"a", b"b", b"c"]

    async with asyncio.timeout(60):
        for _ in range(2):
            await all_answer()
    question = receivers[0].begun[0]
    for _ in range(2):  # who asked is gone: no error, and the channel still works
        await receivers[0].bus.answer(question, b"too late")
    await receivers[0].bus.answer(Delivery(b"nobody asked"), b"x")
    async with asyncio.timeout(60):
        await all_answer()


# TLS


async def test_tls_with_an_authority_of_ones_own(
    rabbitmq: RabbitMQ, buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    bus, receiver = buses(rabbitmq.tls_url, broker_ca_file=str(rabbitmq.ca_file)), Recorder()
    task = subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    await (await bus.open_channel()).send(b"secretly")
    await eventually(lambda: receiver.bodies == [b"secretly"])
    await stop(task)


async def test_tls_refuses_a_stranger(rabbitmq: RabbitMQ, buses: Buses) -> None:
    with pytest.raises(PublishError, match="CERTIFICATE_VERIFY_FAILED"):
        await buses(rabbitmq.tls_url).open_channel()


async def test_tls_refuses_another_host_name(
    rabbitmq: RabbitMQ, buses: Buses, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    resolve = loop.getaddrinfo

    async def everything_is_here(host: Any, *rest: Any, **named: Any) -> Any:
        return await resolve("127.0.0.1", *rest, **named)

    monkeypatch.setattr(loop, "getaddrinfo", everything_is_here)
    url = rabbitmq.tls_url.replace("localhost", "rabbit.example")
    with pytest.raises(PublishError, match=r"(?i)hostname mismatch"):
        await buses(url, broker_ca_file=str(rabbitmq.ca_file)).open_channel()


@pytest.fixture
async def certificate(rabbitmq: RabbitMQ, tmp_path: Path) -> tuple[Path, Path]:
    """A client's certificate, signed by the authority of the broker's, and its key."""
    ca = rabbitmq.ca_file
    cert, key = tmp_path / "client.pem", tmp_path / "client.key"
    process = await asyncio.create_subprocess_exec(
        *("openssl", "req", "-x509", "-nodes", "-days", "1", "-newkey", "rsa:2048", "-subj", "/CN=shop"),
        *("-keyout", key, "-out", cert, "-CA", ca, "-CAkey", ca.with_name("ca.key")),
        *("-addext", "basicConstraints=CA:FALSE"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0
    return cert, key


@pytest.fixture
async def demanding_url(rabbitmq: RabbitMQ) -> AsyncIterator[str]:
    """A listener of the shared broker that lets in only who has a certificate of its authority."""
    with claim_port() as claim:
        port, folder = claim.getsockname()[1], rabbitmq.ca_file.parent
        options = (
            f'[{{cacertfile,"{folder}/ca.pem"}},{{certfile,"{folder}/server.pem"}},{{keyfile,"{folder}/server.key"}},'
            "{verify,verify_peer},{fail_if_no_peer_cert,true}]"
        )
        await rabbitmq.ctl(
            "eval", f'ok = rabbit_networking:start_ssl_listener({{"127.0.0.1",{port}}}, {options}, 2).'
        )
        yield f"amqps://guest:guest@localhost:{port}/"


async def test_tls_both_ways(
    demanding_url: str,
    certificate: tuple[Path, Path],
    rabbitmq: RabbitMQ,
    buses: Buses,
    subscribe: Subscribe,
    tmp_path: Path,
    eventually: Eventually,
) -> None:
    ca = {"broker_ca_file": str(rabbitmq.ca_file)}
    with pytest.raises(PublishError):
        await buses(demanding_url, **ca).open_channel()
    cert, key = certificate
    bus, receiver = (
        buses(demanding_url, **ca, broker_cert_file=str(cert), broker_key_file=str(key)),
        Recorder(),
    )
    subscribe(bus, receiver)
    await eventually(lambda: receiver.ready)
    await (await bus.open_channel()).send(b"{}")
    await eventually(lambda: receiver.bodies == [b"{}"])

    both = tmp_path / "both.pem"
    both.write_text(key.read_text() + cert.read_text())
    await buses(demanding_url, **ca, broker_cert_file=str(both)).open_channel()


def test_a_certificate_that_is_none_or_has_another_key_is_refused_at_once(
    certificate: tuple[Path, Path], rabbitmq: RabbitMQ, namespace: str
) -> None:
    cert, _ = certificate
    for key in (None, str(rabbitmq.ca_file.with_name("ca.key")), "/nowhere"):
        settings = Settings(
            broker_url="amqps://localhost/",
            broker_cert_file=str(cert),
            broker_key_file=key,
            namespace=namespace,
        )
        with pytest.raises(
            ConfigurationError, match=f"^CACHEINVAL_BROKER_CERT_FILE={cert}.*accepted: readable PEM"
        ):
            RabbitBus(settings)
    with pytest.raises(ConfigurationError, match=r"^CACHEINVAL_BROKER_KEY_FILE=k: accepted: unset unless"):
        Settings(broker_key_file="k")


def test_a_ca_file_that_is_none_is_refused_at_once(tmp_path: Path, namespace: str) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    for path in (tmp_path / "ca.pem", tmp_path / "missing.pem"):
        settings = Settings(broker_url="amqps://localhost/", broker_ca_file=str(path), namespace=namespace)
        with pytest.raises(ConfigurationError, match=f"CACHEINVAL_BROKER_CA_FILE={path}: accepted"):
            RabbitBus(settings)


# Answers


async def test_what_asks_is_answered_to_its_own_channel(
    buses: Buses, subscribe: Subscribe, eventually: Eventually
) -> None:
    near, far = buses(), buses()
    receivers = [Recorder(), Recorder()]
    for bus, receiver in zip((near, far), receivers, strict=True):
        subscribe(bus, receiver)
        await eventually(lambda receiver=receiver: receiver.ready)
    heard: list[tuple[str, bytes]] = []
    channel = await near.open_channel()
    await channel.listen(lambda message, body: heard.append((message, body)))
    await channel.send(b"stale?", "m1")
    await channel.send(b"no question")
    await eventually(lambda: [len(receiver.begun) for receiver in receivers] == [2, 2])
    assert [delivery.reply_to is None for delivery in receivers[0].begun] == [False, True]
    for number, (bus, receiver) in enumerate(zip((near, far), receivers, strict=True)):
        await bus.answer(receiver.begun[0], b"evicted by %d" % number)
    await eventually(lambda: sorted(heard) == [("m1", b"evicted by 0"), ("m1", b"evicted by 1")])
    await channel.close()
    await far.answer(receivers[1].begun[0], b"nobody is there any more")
    await far.answer(Delivery(b"", "amq.rabbitmq.reply-to.nonsense", "m1"), b"nor here")
    await far.answer(receivers[1].begun[0], b"and this channel is still good")


async def test_a_new_connection_is_asked_and_answered_anew(
    buses: Buses, subscribe: Subscribe, eventually: Eventually, rabbitmq: RabbitMQ
) -> None:
    async with Proxy("127.0.0.1", int(rabbitmq.url.rsplit(":", 1)[1].strip("/").split("/")[0])) as proxy:
        near, far, receiver = buses(), buses(_through(proxy, rabbitmq.url)), Recorder()
        subscribe(near, receiver)
        await eventually(lambda: receiver.ready)
        heard: list[tuple[str, bytes]] = []
        for number in range(2):
            channel = await far.open_channel()
            await channel.listen(lambda message, body: heard.append((message, body)))
            await channel.send(b"stale?", f"m{number}")
            await eventually(lambda number=number: len(receiver.begun) == number + 1)
            await near.answer(receiver.begun[number], b"evicted")
            await eventually(lambda number=number: heard[-1:] == [(f"m{number}", b"evicted")])
            proxy.cut_open()
            await eventually(lambda: far.state["publisher"] == "idle")


def _through(proxy: Proxy, url: str) -> str:
    before, _, rest = url.partition("127.0.0.1:")
    return f"{before}127.0.0.1:{proxy.port}{rest.lstrip('0123456789')}"
