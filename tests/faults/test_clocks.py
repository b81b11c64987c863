"""Clocks that are wrong, and ticks that are not what they seem: distrusted, and said so, and never trusted too much."""

import json
import time
from functools import partial
from typing import Any

import asyncpg
import pytest
from actors import DELTA, Observed, make_stock
from aio_pika import Message
from clocks import WrongClock, shifted
from history import now
from scene import EVENTUAL, Eventually, operating
from workload import Work, Working

from cacheinval.outbox import session
from cacheinval.sandbox import Postgres, RabbitMQ

pytest_plugins = ("scene", "workload")

DB = asyncpg.Connection
HOUR = 3600.0
SELDOM = 0.5  # seconds between writes: entries are to grow old


@pytest.fixture
def work(working: Working, stock: DB, rabbitmq: RabbitMQ, database_url: str) -> Work:
    return working(stock, broker_url=rabbitmq.url, database_url=database_url)


async def distrusts(work: Work, name: str, eventually: Eventually) -> None:
    """Waits until an instance reads the database because it cannot prove that what it has is fresh."""
    began = now()
    await eventually(lambda: any(read.outcome == "bypass" for read in work.reads(name, began)), EVENTUAL)


async def trusts(work: Work, reader: Observed, eventually: Eventually) -> None:
    """Waits until an entry is a hit that was loaded longer ago than its own age would allow."""

    def is_proven() -> bool:
        last = {key: max(loads, default=now()) for key, loads in reader.loads.items()}
        proven = [read for read in work.history.reads[-100:] if read.instance == reader.name]
        return any(read.outcome == "hit" and read.begun - last[read.key] > DELTA for read in proven)

    await eventually(is_proven, EVENTUAL)


# The clock of an instance


@pytest.mark.timeout(180)
@pytest.mark.parametrize("hours", [1, -1])
async def test_an_instance_whose_clock_was_always_wrong(
    hours: int, work: Work, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    await work.relay()
    right = await work.reader("right")
    with monkeypatch.context() as patch:
        patch.setattr("cacheinval.client.Clock", partial(WrongClock, hours * HOUR))
        wrong = await work.reader("wrong")
    async with work.writing(await work.writer(), pause=SELDOM):
        for _ in range(2):
            await distrusts(work, "wrong", eventually)
        await trusts(work, right, eventually)
    if hours > 0:  # so the last commit that is known to be evicted was long ago
        assert wrong.client.status()["watermark_age"] > HOUR - 10
    else:
        assert wrong.client.status()["tick_refused"].startswith("a tick from the future")
    await work.check("right")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("hours", [1, -1])
async def test_the_clock_of_an_instance_is_set(
    hours: int, work: Work, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    await work.relay()
    reader = await work.reader("reader")
    async with work.writing(await work.writer(), pause=SELDOM):
        await work.sees("reader", "hit", now())
        await eventually(lambda: reader.client.watermark_age is not None, EVENTUAL)
        before = work.says("reader").epoch
        with monkeypatch.context() as patch:
            work.history.fault("the clock is set")
            patch.setattr("cacheinval.clock.time", shifted(hours * HOUR))
            await eventually(lambda: work.says("reader").epoch == before + 1, EVENTUAL)
            await distrusts(work, "reader", eventually)
            work.history.fault("and set right")
        await eventually(lambda: work.says("reader").epoch == before + 2, EVENTUAL)
    await trusts(work, reader, eventually)
    await work.check()
    assert reader.client.stats()["coherence"]["gap_reasons"] == {"clock stepped": 2}


# The clock of the database, and of the relay's host


@pytest.mark.timeout(180)
@pytest.mark.parametrize("hours", [1, -1])
async def test_the_clock_of_the_database_is_wrong(
    hours: int,
    work: Work,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    eventually: Eventually,
) -> None:
    reader = await work.reader("reader")
    with monkeypatch.context() as patch:
        wrong = session._TIME.replace("now()", f"now() + interval '{hours} hour'")
        patch.setattr(session, "_TIME", wrong)
        relay = await work.relay()
        async with work.writing(await work.writer(), pause=SELDOM):
            # The leader sees that one of the two clocks is wrong, and says nothing that may be a lie.
            await eventually(
                lambda: "no ticks: this clock and the database's differ" in caplog.text, EVENTUAL
            )
            await distrusts(work, "reader", eventually)
            assert relay.stats()["relay"]["ticks"] == 0
            # If its own clock is wrong in the same way it sees nothing: then it is for the instances to see.
            patch.setattr(session, "time", shifted(hours * HOUR))
            await eventually(lambda: relay.stats()["relay"]["ticks"] > 2, EVENTUAL)
            for _ in range(2):
                await distrusts(work, "reader", eventually)
            if hours > 0:
                assert reader.client.status()["tick_refused"].startswith("a tick from the future")
                assert "a tick is not believed" in caplog.text
            else:
                assert reader.client.status()["watermark_age"] > HOUR - 10
        await relay.__aexit__(None, None, None)
    await work.relay()
    await eventually(lambda: reader.client.status()["tick_refused"] is None, EVENTUAL)
    await trusts(work, reader, eventually)
    await work.check()


# Ticks that nobody's relay has sent, or another one's


@pytest.mark.timeout(180)
async def test_forged_ticks(
    work: Work, rabbitmq: RabbitMQ, database_url: str, stock: DB, namespace: str, eventually: Eventually
) -> None:
    """The database's own relay is dead; what others say in its stead proves nothing."""
    reader = await work.reader("reader")
    source = await stock.fetchval("SELECT cacheinval.source()")
    async with operating(rabbitmq.url) as operator, work.writing(await work.writer(), pause=SELDOM):
        exchange = await operator.get_exchange(f"cacheinval.{namespace}")

        async def tick(**fields: Any) -> None:
            body = {
                "v": 1,
                "kind": "tick",
                "origin": "forger",
                "seq": 0,
                "as_of": time.time(),
                "source": source,
            }
            await exchange.publish(Message(json.dumps({**body, **fields}).encode()), routing_key="")

        await work.sees("reader", "hit", now())
        for fields, said in (
            ({"as_of": time.time() + HOUR}, "a tick from the future"),
            ({"as_of": time.time() - HOUR}, None),
            ({"source": "another database"}, "a tick of another database"),
            ({"source": None}, "a tick of another database"),
        ):
            work.history.fault(f"forged: {fields}")
            heard = reader.client.stats()["coherence"]["ticks"]
            for _ in range(3):
                await tick(**fields)
            await eventually(lambda heard=heard: reader.client.stats()["coherence"]["ticks"] == heard + 3)
            await distrusts(work, "reader", eventually)
            refused = reader.client.status()["tick_refused"]
            assert refused is None if said is None else refused.startswith(said)
    await work.relay()
    await work.check()


@pytest.mark.timeout(180)
async def test_the_relay_of_a_second_database_speaks_in_the_same_namespace(
    work: Work,
    rabbitmq: RabbitMQ,
    postgres: Postgres,
    database_url: str,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    another = f"{database_url}_another"
    name = another.rpartition("/")[2]
    administrator = await asyncpg.connect(postgres.url, timeout=30)
    await administrator.execute(f"CREATE DATABASE {name}")
    try:
        connection = await asyncpg.connect(another, timeout=30)
        await make_stock(connection)
        await connection.close()
        own = await work.relay()
        reader = await work.reader("reader")
        async with work.writing(await work.writer(), pause=SELDOM):
            await work.sees("reader", "hit", now())
            work.history.fault("a second database")
            stranger = await work.relay(database_url=another)
            await eventually(lambda: "a tick is not believed" in caplog.text, EVENTUAL)
            await eventually(lambda: reader.client.stats()["coherence"]["refused_ticks"] > 3, EVENTUAL)
            # Its own database's ticks prove something until the next one of the other; without them nothing does.
            await own.__aexit__(None, None, None)
            await eventually(lambda: reader.client.watermark_age is None, EVENTUAL)
            await distrusts(work, "reader", eventually)
            assert "a tick of another database" in reader.client.status()["tick_refused"]
            await stranger.__aexit__(None, None, None)
            await work.relay()
        await work.check()
    finally:
        await administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await administrator.close()
