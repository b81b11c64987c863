"""The relay on a real Postgres, with a channel of the tests' own."""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from unittest.mock import patch

import asyncpg
import pytest

from cacheinval.errors import PublishError
from cacheinval.messages import Invalidate, Tick, decode
from cacheinval.outbox import apply_schema
from cacheinval.outbox import relay as relay_module
from cacheinval.outbox.relay import Relay
from cacheinval.outbox.session import ROWS_PER_ROUND, Session

TICK = 0.4
Eventually = Callable[..., Awaitable[Any]]


class Broker:
    """Takes what is sent; can refuse, hang, and lose its exchange."""

    def __init__(self) -> None:
        self.messages: list[Invalidate] = []
        self.ticks: list[Tick] = []
        self.channels: list[Channel] = []
        self.refuses: str | None = None
        self.confirms = asyncio.Event()
        self.confirms.set()
        self.in_flight = self.most_in_flight = 0

    async def open_channel(self) -> "Channel":
        if self.refuses == "no channel":
            raise PublishError("cannot be reached")
        self.channels.append(Channel(self, f"origin-{len(self.channels)}"))
        return self.channels[-1]

    @property
    def keys(self) -> set[str]:
        return {key for message in self.messages for key in message.keys}

    def of(self, origin: str) -> list[Invalidate]:
        return [message for message in self.messages if message.origin == origin]


class Channel:
    def __init__(self, broker: Broker, origin: str) -> None:
        self.origin = origin
        self.closed = False
        self._broker = broker

    async def send(self, body: bytes) -> None:
        assert not self.closed
        broker = self._broker
        message = decode(body)
        if isinstance(message, Tick):
            broker.ticks.append(message)
        else:
            assert isinstance(message, Invalidate)
            broker.messages.append(message)
        broker.in_flight += 1
        broker.most_in_flight = max(broker.most_in_flight, broker.in_flight)
        try:
            await asyncio.sleep(0)
            await broker.confirms.wait()
            if broker.refuses:
                raise PublishError(broker.refuses)
        finally:
            broker.in_flight -= 1

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
async def bare(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def db(bare: asyncpg.Connection) -> asyncpg.Connection:
    await apply_schema(bare)
    return bare


class Patient(Session):
    """The server does not end it where the machine stands still for a moment. What is about that has processes of its own."""

    async def prepare(self, idle_timeout: float) -> None:
        await super().prepare(max(idle_timeout, 20.0))


@asynccontextmanager
async def running(
    url: str, broker: Broker, namespace: str = "shop", session: type[Session] = Patient, **options: Any
) -> AsyncIterator[Relay]:
    with patch.object(relay_module, "Session", session):
        async with _running(url, broker, namespace, **options) as relay:
            yield relay


@asynccontextmanager
async def _running(url: str, broker: Broker, namespace: str, **options: Any) -> AsyncIterator[Relay]:
    relay = Relay(
        lambda: asyncpg.connect(url),
        broker.open_channel,
        namespace=namespace,
        **{"tick_interval": TICK, "publish_timeout": 20.0} | options,
    )
    task = asyncio.create_task(relay.run())
    try:
        yield relay
        assert not task.done() or task.result()
    finally:
        task.cancel()
        async with asyncio.timeout(30):
            with suppress(asyncio.CancelledError):
                await task
        assert relay.state["state"] == "stopped"


def doing(relay: Relay, state: str) -> Callable[[], bool]:
    return lambda: relay.state["state"] == state


async def add(db: asyncpg.Connection, *keys: str, namespace: str = "shop", after: float = 0.0) -> None:
    await db.executemany(
        "INSERT INTO cacheinval.outbox (namespace, keys, publish_at)"
        " VALUES ($1, ARRAY[$2], clock_timestamp() + $3 * interval '1 s')",
        [(namespace, key, after) for key in keys],
    )


def left(db: asyncpg.Connection) -> Callable[[], Awaitable[int]]:
    return lambda: db.fetchval("SELECT count(*) FROM cacheinval.outbox")


def empty(db: asyncpg.Connection) -> Callable[[], Awaitable[bool]]:
    return lambda: db.fetchval("SELECT NOT EXISTS (SELECT FROM cacheinval.outbox)")


RELAY_SESSIONS = (
    "FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'cacheinval relay%'"
)
LEADER = f"SELECT pid {RELAY_SESSIONS} AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')"


# What is published


async def test_rows_are_published_stamped_and_deleted(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    began = time.time()
    await db.execute("SELECT cacheinval.invalidate(ARRAY['a', 'b'], ARRAY[1, NULL], ARRAY['t'], 'shop')")
    recorded = await db.fetchval("SELECT extract(epoch FROM recorded_at)::float8 FROM cacheinval.outbox")
    await db.execute("SELECT cacheinval.invalidate(ARRAY['b', 'c'], ARRAY[5, 6], namespace => 'shop')")
    await add(db, "foreign", namespace="other")
    async with running(database_url, broker) as relay:
        await eventually(lambda: relay.counters["published_rows"] == 2)
        await add(db, "later")
        await eventually(lambda: relay.counters["published_rows"] == 3)
        await eventually(lambda: relay.state["oldest_row_age"] is None)
        assert relay.counters.items() >= {"published_rows": 3, "published_messages": 2, "errors": 0}.items()
        assert relay.leads
    first, second = broker.messages
    assert (first.origin, first.seq, first.keys, first.versions, first.tags) == (
        "origin-0",
        1,
        ["a", "b", "c"],
        [1, None, 6],
        ["t"],
    )
    assert first.committed_at == pytest.approx(recorded, abs=1e-5)
    assert first.at is not None
    assert began <= recorded <= first.at <= time.time()
    assert (second.origin, second.seq, second.keys) == ("origin-0", 2, ["later"])
    assert await db.fetch("SELECT namespace FROM cacheinval.outbox") == [("other",)]
    assert broker.channels[0].closed


async def test_a_row_that_becomes_visible_late_is_published(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    """Of two rows the first in the table commits long after the second was published and deleted."""
    slow = await asyncpg.connect(database_url)
    try:
        transaction = slow.transaction()
        await transaction.start()
        await add(slow, "slow")
        await add(db, "fast")
        async with running(database_url, broker) as relay:
            await eventually(lambda: relay.counters["published_rows"] == 1)
            await eventually(empty(db))
            assert broker.keys == {"fast"}
            await transaction.commit()
            await eventually(empty(db))
            assert broker.keys == {"fast", "slow"}
    finally:
        await slow.close()


async def test_a_row_is_left_to_its_client_for_a_moment(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    await add(db, "graceful", after=0.6)
    await add(db, "never", after=3_600)
    due = await db.fetchval("SELECT extract(epoch FROM min(publish_at))::float8 FROM cacheinval.outbox")
    await add(db, "at once")
    async with running(database_url, broker) as relay:
        await eventually(lambda: relay.counters["published_rows"] == 2)
        assert await left(db)() == 1
    at_once, graceful = broker.messages
    assert at_once.keys == ["at once"]
    assert at_once.at is not None
    assert at_once.at < due
    assert graceful.keys == ["graceful"]
    assert graceful.at is not None
    assert graceful.at >= due


async def test_a_bad_row_invalidates_everything_once(
    db: asyncpg.Connection,
    database_url: str,
    broker: Broker,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await db.execute("INSERT INTO cacheinval.outbox (namespace, keys) VALUES ('shop', ARRAY['x', NULL])")
    await db.execute(
        "INSERT INTO cacheinval.outbox (namespace, keys) VALUES ('shop', ARRAY[repeat('x', 600)])"
    )
    await db.execute("INSERT INTO cacheinval.outbox (namespace) VALUES ('shop')")
    await add(db, "good")
    async with running(database_url, broker) as relay:
        await eventually(empty(db))
        assert relay.counters["bad_rows"] == 3
        assert relay.counters["errors"] == 0
    assert [(message.all, message.keys) for message in broker.messages] == [(True, []), (False, ["good"])]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert "rows=3" in said[0]
    assert "is a NoneType" in said[0]


async def test_bytes_that_are_no_text_stop_nobody(
    bare: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    name = f"{database_url.rpartition('/')[2]}_ascii"
    await bare.execute(
        f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    url = f"{database_url.rpartition('/')[0]}/{name}"
    ascii_db = await asyncpg.connect(url)
    try:
        await apply_schema(ascii_db)
        await ascii_db.execute(
            "INSERT INTO cacheinval.outbox (namespace, keys) VALUES ('shop', ARRAY[E'\\xff'])"
        )
        async with running(url, broker) as relay:
            await eventually(empty(ascii_db))
            await add(ascii_db, "good")
            await eventually(empty(ascii_db))
            assert relay.counters["bad_rows"] == 1
        assert [(message.all, message.keys) for message in broker.messages] == [(True, []), (False, ["good"])]
    finally:
        await ascii_db.close()
        await bare.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def test_a_backlog_is_published_in_bounded_rounds(
    db: asyncpg.Connection,
    database_url: str,
    broker: Broker,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds: list[int] = []
    real = Session.due

    async def due(self: Session, **limit: int) -> Any:
        rows = await real(self, **limit)
        rounds.append(len(rows))
        return rows

    monkeypatch.setattr(Session, "due", due)
    await db.execute(
        "INSERT INTO cacheinval.outbox (namespace, keys) SELECT 'shop', ARRAY['k' || n] FROM generate_series(1, 12000) n"
    )
    # Incompressible, so that a round takes few of them; and one that is larger than a round.
    await db.execute(
        "INSERT INTO cacheinval.outbox (namespace, keys) SELECT 'shop',"
        " ARRAY(SELECT md5(n || '-' || m) FROM generate_series(1, CASE n WHEN 1 THEN 60000 ELSE 1000 END) m)"
        " FROM generate_series(1, 60) n"
    )
    async with running(database_url, broker) as relay:
        await eventually(empty(db), 30)
        assert relay.counters["published_rows"] == 12_060
    assert len(broker.keys) == 12_000 + 59 * 1_000 + 60_000
    assert all(len(message.keys) <= 1_000 for message in broker.messages)
    assert max(rounds) <= ROWS_PER_ROUND
    assert sum(1 for size in rounds if 0 < size <= 40) >= 2
    assert 1 < broker.most_in_flight <= 8
    for channel in broker.channels:
        seqs = [message.seq for message in broker.of(channel.origin)]
        assert seqs == list(range(1, len(seqs) + 1))


# When the broker fails


async def test_rows_are_deleted_only_when_confirmed(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    """A broker that hangs for longer than the session may be idle costs neither rows nor leadership."""
    broker.confirms.clear()
    await add(db, "a")
    options: Any = {"tick_interval": 1.0, "session": Session}  # with less a busy machine ends it, too
    async with (
        running(database_url, broker, **options) as relay,
        running(database_url, broker, **options) as other,
    ):
        await eventually(lambda: len(broker.messages) == 1)
        session = await db.fetchval(LEADER)
        hung_until = time.monotonic() + 2.0
        while time.monotonic() < hung_until:
            assert await left(db)() == 1
            assert await db.fetchval(LEADER) == session
            await asyncio.sleep(0.05)
        broker.confirms.set()
        await eventually(empty(db))
        assert len(broker.messages) == 1
        rows = {one.state["state"]: one.state["rows"] for one in (relay, other)}
        assert rows == {"leader": 1, "standby": None}  # as it was counted last
        assert await db.fetchval(LEADER) == session


@pytest.mark.parametrize("trouble", ["no channel", "the exchange cacheinval.shop is missing"])
async def test_what_the_broker_refuses_stays(
    db: asyncpg.Connection,
    database_url: str,
    broker: Broker,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
    trouble: str,
) -> None:
    caplog.set_level(logging.INFO, "cacheinval")
    broker.refuses = trouble
    await add(db, "a")
    async with running(database_url, broker) as relay:
        await eventually(lambda: relay.counters["errors"] >= 4)
        assert relay.state["state"] == "blocked"
        assert relay.leads
        assert relay.state["reason"] == ("cannot be reached" if trouble == "no channel" else trouble)
        assert relay.state["oldest_row_age"] > 0.5
        assert relay.state["rows"] == await left(db)() == 1
        assert all(channel.closed for channel in broker.channels)
        broker.refuses = None
        await eventually(empty(db))
        assert relay.state["state"] == "leader"
        await add(db, "b")
        await eventually(empty(db))
    last = broker.channels[-1].origin
    assert [(message.seq, message.keys) for message in broker.of(last)] == [(1, ["a"]), (2, ["b"])]
    assert len({message.origin for message in broker.messages}) == len(broker.channels)
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" namespace")[0] for line in said] == [
        "leading the relay",
        "the outbox waits for the broker",
        "leading the relay",
    ]
    assert trouble in said[1] or "cannot be reached" in said[1]


class Refusal:
    """Messages whose keys begin with `bad` are not confirmed, while `stands`."""

    stands = True


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Refusal:
    real, refusal = Channel.send, Refusal()

    async def send(self: Channel, body: bytes) -> None:
        await real(self, body)
        if refusal.stands and '"bad' in body.decode():
            raise PublishError("not this one")

    monkeypatch.setattr(Channel, "send", send)
    return refusal


async def add_a_message_of(db: asyncpg.Connection, name: str) -> None:
    """As many rows as one message holds, each with a key of its own."""
    await db.execute(
        "INSERT INTO cacheinval.outbox (namespace, keys) SELECT 'shop', ARRAY[$1 || n] FROM generate_series(1, 1000) n",
        name,
    )


@pytest.mark.usefixtures("refusal")
async def test_what_was_confirmed_before_the_failure_is_deleted(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    for name in ("good", "bad"):
        await add_a_message_of(db, name)
    async with running(database_url, broker) as relay:
        await eventually(lambda: relay.counters["errors"] >= 2)
        assert await left(db)() == 1_000
        assert await db.fetchval("SELECT count(*) FROM cacheinval.outbox WHERE keys[1] LIKE 'good%'") == 0
        # And told: a tick has to say what was confirmed, also of a channel that is closed.
        assert await db.fetch("SELECT seq FROM cacheinval.origins") == [(1,)]


async def test_what_comes_after_a_failure_is_not_deleted(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually, refusal: Refusal
) -> None:
    """Its number would claim the one before it, which was not confirmed."""
    for name in ("bad", "good"):
        await add_a_message_of(db, name)
    async with running(database_url, broker) as relay:
        await eventually(lambda: relay.counters["errors"] >= 2)
        assert await left(db)() == 2_000
        refusal.stands = False
        await eventually(empty(db))


async def test_a_relay_that_only_makes_ready_forgets_no_numbers(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    """By a clock of the database that is wrong all of them might look old."""
    await db.execute(
        "INSERT INTO cacheinval.origins VALUES ('shop', 'o', 7, clock_timestamp() - interval '2 hours')"
    )
    async with running(database_url, broker) as relay:
        await eventually(lambda: relay.counters["ticks"] > 0)
        assert await db.fetchval("SELECT seq FROM cacheinval.origins WHERE origin = 'o'") == 7
        assert broker.ticks[0].seqs == {"o": 7}


async def test_a_host_that_is_slow_is_not_taken_for_one_whose_clock_is_wrong(
    db: asyncpg.Connection,
    database_url: str,
    broker: Broker,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The database tells when the transaction began; that it is asked for this long after says nothing about clocks."""
    execute = asyncpg.Connection.execute

    async def begin_and_be_busy(self: asyncpg.Connection, query: str, *args: Any, **options: Any) -> str:
        done: str = await execute(self, query, *args, **options)
        if query.startswith("BEGIN"):
            await asyncio.sleep(0.2)
        return done

    monkeypatch.setattr(asyncpg.Connection, "execute", begin_and_be_busy)
    async with running(database_url, broker, tick_interval=1.0, max_clock_skew=0.1):
        await eventually(lambda: broker.ticks)
    assert "differ" not in caplog.text


async def test_more_channels_than_a_tick_can_tell_are_said_and_not_ticked(
    db: asyncpg.Connection,
    database_url: str,
    broker: Broker,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(relay_module, "MOST_ORIGINS", 3)
    await db.execute(
        "INSERT INTO cacheinval.origins (namespace, origin, seq) SELECT 'shop', 'o' || n, n FROM generate_series(1, 4) n"
    )
    async with running(database_url, broker) as relay:
        await eventually(lambda: "too many channels" in caplog.text)
        assert relay.counters["ticks"] == 0
        await db.execute("DELETE FROM cacheinval.origins WHERE origin = 'o1'")
        await eventually(lambda: relay.counters["ticks"] > 0)
    assert caplog.text.count("too many channels") == 1


async def test_a_channel_that_never_answers_is_given_up(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    broker.confirms.clear()
    await add(db, "a")
    async with running(database_url, broker, publish_timeout=0.1) as relay:
        await eventually(doing(relay, "blocked"))
        assert "did not confirm within" in relay.state["reason"]
        broker.confirms.set()
        await eventually(empty(db))


# Who leads


async def test_one_leads_and_another_takes_over(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    async with running(database_url, broker) as first:
        await eventually(doing(first, "leader"))
        async with running(database_url, broker) as second:
            await eventually(doing(second, "standby"))
            # It dies in the middle of a publish: the other publishes the row again.
            broker.confirms.clear()
            await add(db, "a")
            await eventually(lambda: len(broker.messages) == 1)
            await db.execute(f"SELECT pg_terminate_backend(({LEADER}))")
            await eventually(lambda: len(broker.messages) == 2)
            broker.confirms.set()
            await eventually(empty(db))
            await eventually(lambda: {first.state["state"], second.state["state"]} == {"leader", "standby"})
        await eventually(doing(first, "leader"))


async def test_each_namespace_has_a_leader(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    async with running(database_url, broker) as first, running(database_url, broker, "other") as second:
        await eventually(doing(first, "leader"))
        await eventually(doing(second, "leader"))


PROCESS = """
import asyncio, asyncpg
from cacheinval.outbox.relay import Relay

class Channel:
    origin = "frozen"
    async def send(self, body):
        print("sent", flush=True)
        await asyncio.sleep(3600)
    async def close(self): ...

async def open_channel():
    return Channel()

relay = Relay(lambda: asyncpg.connect({url!r}), open_channel, namespace="shop", tick_interval={tick}, publish_timeout=60)
asyncio.run(relay.run())
"""


async def test_a_frozen_leader_loses_the_lead(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    await add(db, "a")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROCESS.format(url=database_url, tick=TICK), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"sent\n"
        async with running(database_url, broker) as relay:
            await eventually(doing(relay, "standby"))
            os.kill(process.pid, signal.SIGSTOP)
            await eventually(empty(db))
            assert relay.state["state"] == "leader"
            assert broker.keys == {"a"}
    finally:
        process.kill()
        await process.wait()


async def test_a_leader_that_reads_no_result_loses_the_lead(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    """The server is not idle while it waits to hand over a large result."""
    frozen = await asyncpg.connect(database_url)
    unread = None
    try:
        session = Session(frozen, "shop")
        await session.prepare(1.5 * TICK)
        large = await frozen.prepare("SELECT repeat('x', 1000000) FROM generate_series(1, 50)")
        assert await session.lead()
        frozen._transport.pause_reading()
        unread = asyncio.create_task(large.fetch())
        async with running(database_url, broker) as other:
            await eventually(
                lambda: db.fetchval(
                    "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'ClientWrite'"
                )
            )
            await eventually(doing(other, "standby"))
            await eventually(doing(other, "leader"), 20)
    finally:
        frozen.terminate()
        if unread is not None:
            await asyncio.gather(unread, return_exceptions=True)


async def test_a_leader_that_cannot_publish_lets_another_try(
    db: asyncpg.Connection,
    database_url: str,
    broker: Broker,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay_module, "PATIENCE", (0.5, 300.0))
    cut_off = Broker()
    cut_off.refuses = "no channel"
    await add(db, "a")
    async with running(database_url, cut_off) as first:
        await eventually(doing(first, "blocked"))
        async with running(database_url, broker) as second:
            await eventually(empty(db))
            assert broker.keys == {"a"}
            await eventually(lambda: (first.state["state"], second.state["state"]) == ("standby", "leader"))


# When the database fails


async def test_a_missing_schema_is_said_once_and_waited_for(
    bare: asyncpg.Connection,
    database_url: str,
    broker: Broker,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "cacheinval")
    async with running(database_url, broker) as relay:
        await eventually(lambda: relay.counters["errors"] >= 3)
        assert relay.state["state"] == "unready"
        assert "cacheinval schema apply" in relay.state["reason"]
        assert len(caplog.records) == 1
        await apply_schema(bare)
        await add(bare, "a")
        await eventually(empty(bare))
        await eventually(doing(relay, "leader"))
    assert len(caplog.records) == 2


async def test_missing_rights_are_said_and_do_not_spin(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually, namespace: str
) -> None:
    """Who may not delete rows never leads: others may."""
    await db.execute(f"CREATE ROLE {namespace} LOGIN; GRANT SELECT ON cacheinval.outbox TO {namespace}")
    try:
        await add(db, "a")
        async with running(database_url.replace("postgres@", f"{namespace}@"), broker) as relay:
            await eventually(lambda: relay.counters["errors"] >= 3)
            assert relay.state["state"] == "unready"
            assert "`cacheinval schema grant ROLE`" in relay.state["reason"]
            assert broker.messages == []
            await db.execute(
                f"GRANT DELETE ON cacheinval.outbox TO {namespace};"
                f"GRANT SELECT, INSERT, UPDATE, DELETE ON cacheinval.origins TO {namespace}"
            )
            await eventually(empty(db))
            await eventually(doing(relay, "leader"))
    finally:
        await db.execute(f"DROP OWNED BY {namespace}; DROP ROLE {namespace}")


async def test_outages_of_the_database(
    own_postgres: Any, broker: Broker, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed and started again, then in recovery, then a primary again: one line for each."""
    caplog.set_level(logging.INFO, "cacheinval")
    recovery = own_postgres.folder / "data" / "standby.signal"
    connection = await asyncpg.connect(own_postgres.url)
    await apply_schema(connection)
    await connection.execute("SELECT cacheinval.invalidate(ARRAY['a'], namespace => 'shop')")
    await connection.close()
    async with running(own_postgres.url, broker) as relay:
        await eventually(lambda: broker.keys == {"a"})
        await own_postgres.kill()
        await eventually(lambda: relay.counters["errors"] >= 3)
        assert relay.state["state"] == "disconnected"
        await own_postgres.start()
        await eventually(doing(relay, "leader"))
        await own_postgres.stop()
        recovery.touch()
        await own_postgres.start()
        await eventually(doing(relay, "unready"))
        assert "is a standby" in relay.state["reason"]
        await own_postgres.stop()
        recovery.unlink()
        await own_postgres.start()
        await eventually(doing(relay, "leader"))
    states = [record.getMessage().partition(" namespace")[0] for record in caplog.records]
    assert states == [
        "leading the relay",
        "the relay has no database",
        "leading the relay",
        "the relay has no database",
        "the relay cannot use the database",
        "leading the relay",
    ]


async def test_a_relay_stops_while_the_database_is_frozen(
    own_postgres: Any, broker: Broker, eventually: Eventually
) -> None:
    connection = await asyncpg.connect(own_postgres.url)
    await apply_schema(connection)
    await connection.close()
    try:
        async with running(own_postgres.url, broker) as relay:
            await eventually(doing(relay, "leader"))
            own_postgres.pause()
    finally:
        own_postgres.resume()


async def test_stopping_frees_the_lock_at_once(
    db: asyncpg.Connection, database_url: str, broker: Broker, eventually: Eventually
) -> None:
    broker.confirms.clear()
    await add(db, "a")
    async with running(database_url, broker, tick_interval=60.0):
        await eventually(lambda: len(broker.messages) == 1)
    await eventually(lambda: db.fetchval(f"SELECT count(*) = 0 {RELAY_SESSIONS}"))
    assert await left(db)() == 1
    assert broker.channels[0].closed
