"""A message that an instance did not get is noticed, also when nothing further is written and its writer is dead."""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from actors import KEYS, Observed
from aio_pika import ExchangeType, Message
from aio_pika.abc import AbstractChannel
from history import now
from scene import EVENTUAL, OUTBOX, Clients, Eventually, Programs, operating
from waiting import until
from workload import Work, Working

from cacheinval import receiver
from cacheinval.bus import rabbitmq as bus
from cacheinval.bus.consuming import Subscription
from cacheinval.sandbox import RabbitMQ, Redis

pytest_plugins = ("scene", "workload")

DB = asyncpg.Connection
OF_NUMBERS = {"messages missing before a tick", "missing messages"}
"""Why a gap is noticed with the next tick, or the next message, rather than by silence or not at all."""


@pytest.fixture
async def operator(rabbitmq: RabbitMQ) -> AsyncIterator[AbstractChannel]:
    async with operating(rabbitmq.url) as channel:
        yield channel


@pytest.fixture
def deaf_and_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is kept from taking in what he gets would else find that he hears nothing, and subscribe anew."""
    monkeypatch.setattr(receiver, "PROBE_TIMEOUT", EVENTUAL)


@pytest.fixture
async def work(working: Working, stock: DB, rabbitmq: RabbitMQ, database_url: str) -> Work:
    """With a relay that leads."""
    work = working(stock, broker_url=rabbitmq.url, database_url=database_url)
    await work.relay()
    return work


def epoch(reader: Observed) -> int:
    return int(reader.client.status()["cache"]["epoch"])


def queue_of(reader: Observed) -> str:
    return str(reader.client.status()["broker"]["queue"])


@asynccontextmanager
async def holding(reader: Observed, eventually: Eventually) -> AsyncIterator[None]:
    """Within this block the instance has one message in hand, and what is published waits in its queue."""
    reader.free.clear()
    await eventually(lambda: reader.held > 0, EVENTUAL)
    try:
        yield
    finally:
        reader.free.set()


async def is_hit(reader: Observed, key: str) -> bool:
    return (await reader.read(key)).outcome == "hit"


async def is_baselined(reader: Observed) -> bool:
    return reader.client.watermark_age is not None


# What is lost between the broker and one queue


Lose = Callable[[RabbitMQ, AbstractChannel, Observed], Awaitable[None]]


async def purge(broker: RabbitMQ, operator: AbstractChannel, reader: Observed) -> None:
    await broker.ctl("purge_queue", queue_of(reader))


async def drop(broker: RabbitMQ, operator: AbstractChannel, reader: Observed) -> None:
    """The queue is too long, by a policy: what is oldest goes."""
    pattern, definition = re.escape(queue_of(reader)), json.dumps({"max-length": 1})
    await broker.ctl("set_policy", "--apply-to", "queues", "too-long", f"^{pattern}$", definition)

    async def is_short() -> bool:
        listed = await broker.ctl("list_queues", "--silent", "name", "messages_ready")
        return f"{queue_of(reader)}\t1" in listed.splitlines()

    await until(is_short, EVENTUAL)
    await broker.ctl("clear_policy", "too-long")


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("deaf_and_not_silent")
@pytest.mark.parametrize("lose", [purge, drop])
@pytest.mark.parametrize("cache", ["memory", "redis"])
async def test_a_message_is_lost_from_one_queue_and_its_writer_is_dead(
    lose: Lose,
    cache: str,
    work: Work,
    rabbitmq: RabbitMQ,
    operator: AbstractChannel,
    clients: Clients,
    eventually: Eventually,
    request: pytest.FixtureRequest,
) -> None:
    await work.reader("untroubled")
    outside: dict[str, Any] = {}
    if cache == "redis":
        outside = {"cache_url": request.getfixturevalue("redis").url, "instance_id": "troubled"}
    reader = await work.reader("troubled", prefetch=1, **outside)
    await eventually(lambda: is_baselined(reader), EVENTUAL)
    writer = await work.writer()
    before = epoch(reader)
    async with holding(reader, eventually):
        assert await writer.write(KEYS[0])
        assert await writer.client.publisher.flush(
            EVENTUAL
        )  # confirmed, and noted with the deletion of its row
        await writer.client.__aexit__(None, None, None)
        work.history.fault(lose.__name__)
        await lose(rabbitmq, operator, reader)
    await eventually(lambda: epoch(reader) > before, EVENTUAL)
    assert set(reader.client.stats()["coherence"]["gap_reasons"]) <= OF_NUMBERS
    assert reader.client.status()["broker"]["sessions"] == 1
    await work.check()


DIES = """
import asyncio, os, signal, sys
from cacheinval import Client
from cacheinval.outbox import Outbox

delete = Outbox.delete

async def die(self, *arguments, **options):
    if sys.argv[1] == "after":
        await delete(self, *arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

Outbox.delete = die

async def main():
    async with Client(subscribe=False) as client, client.transaction() as tx:
        version = await tx.fetchval("UPDATE stock SET version = version + 1 WHERE id = $1 RETURNING version", sys.argv[2])
        tx.invalidate(sys.argv[2], versions=[version])
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("deaf_and_not_silent")
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_writer_is_killed_right_after_its_confirm_and_its_message_purged(
    when: str,
    work: Work,
    stock: DB,
    rabbitmq: RabbitMQ,
    database_url: str,
    operator: AbstractChannel,
    programs: Programs,
    eventually: Eventually,
) -> None:
    reader = await work.reader("troubled", prefetch=1)
    await eventually(lambda: is_baselined(reader), EVENTUAL)
    before = epoch(reader)
    async with holding(reader, eventually):
        writer = programs(
            "-c", DIES, when, KEYS[0], broker_url=rabbitmq.url, database_url=database_url, relay="off"
        )
        async with asyncio.timeout(EVENTUAL):
            assert await writer.ended() == -signal.SIGKILL
        if when == "before":  # the row is still there, and what the relay makes of it is purged as well
            await eventually(lambda: stock.fetchval(f"SELECT ({OUTBOX}) = 0"), EVENTUAL)
        work.history.fault("purged")
        await purge(rabbitmq, operator, reader)
    await eventually(lambda: epoch(reader) > before, EVENTUAL)
    assert set(reader.client.stats()["coherence"]["gap_reasons"]) <= OF_NUMBERS
    assert (await reader.read(KEYS[0])).version == 2
    assert await (await work.writer()).write(KEYS[1])
    await work.check()


# Queue, exchange, consumer, channel


@pytest.fixture
def subscriptions(monkeypatch: pytest.MonkeyPatch) -> list[Subscription]:
    """Those that are made from now on."""
    made: list[Subscription] = []

    class Noted(Subscription):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(bus, "Subscription", Noted)
    return made


class Trouble:
    """What an operator, or a defect, can do to one instance that subscribes."""

    def __init__(
        self, broker: RabbitMQ, operator: AbstractChannel, reader: Observed, subscriptions: list[Subscription]
    ) -> None:
        self.broker, self.operator, self.reader = broker, operator, reader
        self.subscription = subscriptions[-1]
        self.exchange = f"cacheinval.{reader.client.settings.namespace}"

    async def delete_the_queue(self) -> None:
        await self.broker.ctl("delete_queue", queue_of(self.reader))

    async def delete_the_exchange(self) -> None:
        """And nobody declares it again: the instance itself does, when it notices."""
        await self.operator.exchange_delete(self.exchange)

    async def delete_the_exchange_and_declare_it_again(self) -> None:
        await self.operator.exchange_delete(self.exchange)
        await self.operator.declare_exchange(self.exchange, ExchangeType.FANOUT, durable=True)

    async def acknowledge_what_was_never_delivered(self) -> None:
        """Which the broker answers by closing the channel: 406."""
        assert self.subscription._underlay is not None
        await self.subscription._underlay.basic_ack(1 << 40)

    async def send_what_nobody_understands(self) -> None:
        exchange = await self.operator.get_exchange(self.exchange)
        await exchange.publish(Message(b"{"), routing_key="")


NOTICED = {
    Trouble.delete_the_queue: "queue deleted",
    Trouble.delete_the_exchange: "silence",
    Trouble.delete_the_exchange_and_declare_it_again: "silence",
    Trouble.acknowledge_what_was_never_delivered: "PRECONDITION_FAILED",
    Trouble.send_what_nobody_understands: "malformed message",
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("trouble", NOTICED, ids=lambda trouble: trouble.__name__)
async def test_it_is_noticed_and_a_new_epoch_begins(
    trouble: Callable[[Trouble], Awaitable[None]],
    work: Work,
    rabbitmq: RabbitMQ,
    operator: AbstractChannel,
    subscriptions: list[Subscription],
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reader = await work.reader("troubled")
    await eventually(lambda: is_baselined(reader), EVENTUAL)
    writer = await work.writer()
    async with work.writing(writer):
        await eventually(lambda: writer.done > 5, EVENTUAL)
        before = epoch(reader)
        work.history.fault(trouble.__name__)
        await trouble(Trouble(rabbitmq, operator, reader, subscriptions))
        await eventually(lambda: epoch(reader) > before, EVENTUAL)
        await reader.client.wait_ready(EVENTUAL)
        assert NOTICED[trouble] in caplog.text
        done = writer.done
        await eventually(lambda: writer.done > done + 5, EVENTUAL)
    await work.check()


@pytest.mark.timeout(180)
async def test_an_exchange_of_another_type_is_said_loudly_and_repaired_by_an_operator(
    work: Work,
    operator: AbstractChannel,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reader = await work.reader("troubled")
    await eventually(lambda: is_baselined(reader), EVENTUAL)
    exchange = f"cacheinval.{reader.client.settings.namespace}"
    writer = await work.writer()
    async with work.writing(writer):
        before = epoch(reader)
        work.history.fault("an exchange of another type")
        await operator.exchange_delete(exchange)
        await operator.declare_exchange(exchange, ExchangeType.TOPIC, durable=True)
        await eventually(lambda: "subscription refused, retrying" in caplog.text, EVENTUAL)
        assert not reader.client.ready
        assert "inequivalent arg 'type'" in str(reader.client.status()["broker"]["reason"])
        began = now()
        await work.sees("troubled", "bypass", began)
        await eventually(lambda: work.truth.fetchval(f"SELECT ({OUTBOX}) > 0"), EVENTUAL)
        done = writer.done
        await eventually(lambda: writer.done > done + 5, EVENTUAL)
        work.history.fault("deleted by an operator")
        await operator.exchange_delete(exchange)
        await eventually(lambda: epoch(reader) > before, EVENTUAL)
        await reader.client.wait_ready(EVENTUAL)
    await work.check()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("loss", ["expired", "purged"])
async def test_a_queue_loses_what_it_held_while_its_instance_is_away(
    loss: str,
    work: Work,
    redis: Redis,
    rabbitmq: RabbitMQ,
    operator: AbstractChannel,
    namespace: str,
    clients: Clients,
    eventually: Eventually,
) -> None:
    """Nobody writes any more when it comes back, and the writer is dead."""
    queue = f"cacheinval.{namespace}.one"
    settings = work.settings | {"cache_url": redis.url, "instance_id": "one"}
    first = await clients(**settings)
    await first.wait_ready(EVENTUAL)
    old = Observed("first", first, work.history)
    await eventually(lambda: is_hit(old, KEYS[0]), EVENTUAL)
    await eventually(lambda: is_baselined(old), EVENTUAL)
    await first.__aexit__(None, None, None)

    async def write() -> None:
        writer = await work.writer()
        assert await writer.write(KEYS[0])
        assert await writer.client.publisher.flush(EVENTUAL)
        await writer.client.__aexit__(None, None, None)

    work.history.fault(loss)
    if loss == "expired":
        definition = json.dumps({"expires": 200})
        await rabbitmq.ctl("set_policy", "--apply-to", "queues", "soon", f"^{re.escape(queue)}$", definition)

        async def is_gone() -> bool:
            return queue not in await rabbitmq.ctl("list_queues", "--silent", "name")

        await eventually(is_gone, EVENTUAL)
        await rabbitmq.ctl("clear_policy", "soon")
        await write()
    else:
        await write()
        await rabbitmq.ctl("purge_queue", queue)
    second = await work.reader("second", cache_url=redis.url, instance_id="one")
    await eventually(lambda: second.client.stats()["coherence"]["epochs"] >= 1, EVENTUAL)
    if loss == "purged":
        counters = second.client.stats()["coherence"]
        assert counters["gap_reasons"] == {"messages missing before a tick": 1}
    await eventually(lambda: gives(second, KEYS[0], 2), EVENTUAL)
    await work.check("second")


async def gives(reader: Observed, key: str, version: int) -> bool:
    return (await reader.read(key)).version == version
