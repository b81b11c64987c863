"""The database restarts, hangs, answers nobody, or commits what its client has given up: everybody is told in the end."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import pytest
from actors import DELTA, KEYS, RECORD, WRITE, Writer, make_stock
from history import Write, now
from proxy import Proxy
from scene import EVENTUAL, OUTBOX, Clients, Eventually, has_price, price, through
from workload import Work, Working

from cacheinval import Client, Settings
from cacheinval.outbox import apply_schema
from cacheinval.sandbox import Postgres, RabbitMQ
from cacheinval.sandbox.processes import Guard

pytest_plugins = ("scene", "workload")

DB = asyncpg.Connection


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[DB]:
    connection = await asyncpg.connect(url, timeout=30, command_timeout=30)
    try:
        yield connection
    finally:
        connection.terminate()


@pytest.mark.timeout(240)
async def test_the_database_loses_replies_and_connections_and_dies_under_load(
    rabbitmq: RabbitMQ, own_postgres: Postgres, working: Working, eventually: Eventually
) -> None:
    async with (
        AsyncExitStack() as stack,
        Proxy("127.0.0.1", own_postgres.port) as proxy,
        connected(own_postgres.url) as first,
    ):
        await make_stock(first)
        work = working(first, broker_url=rabbitmq.url, database_url=own_postgres.url)
        await work.relay()
        reader = await work.reader("reader")
        writer = await work.writer(database_url=through(proxy, own_postgres.url))
        async with work.writing(writer):
            for _ in range(5):
                failed = writer.failed
                work.history.fault("a reply to COMMIT is cut")
                proxy.cut_reply_after(b"COMMIT")
                await eventually(lambda failed=failed: writer.failed > failed, EVENTUAL)
            # Published all the same, though nobody told the writer that they were committed, and again by the relay.
            unknown = [write for write in work.history.writes if write.acknowledged is None]
            assert len(unknown) >= 5

            await goes_on(work, writer, eventually)
            work.history.fault("no connection is left")
            async with every_connection_of(reader.client), every_connection_of(writer.client):
                errors, failed = reader.errors, writer.failed
                await eventually(lambda: reader.errors > errors and writer.failed > failed, EVENTUAL)

            await goes_on(work, writer, eventually)
            work.history.fault("killed")
            await own_postgres.kill()
            errors = reader.errors
            await eventually(lambda: reader.errors > errors, EVENTUAL)
            await own_postgres.start()
            work.truth = await stack.enter_async_context(connected(own_postgres.url))
            await goes_on(work, writer, eventually)
        checked = await work.check()
        assert checked.unknown_writes >= 7
        assert checked.ticks > 0


async def goes_on(work: Work, writer: Writer, eventually: Eventually) -> None:
    """Waits until writes are acknowledged, and reads are hits."""
    done = writer.done
    await eventually(lambda: writer.done > done + 5, EVENTUAL)
    await work.sees("reader", "hit", now())


@asynccontextmanager
async def every_connection_of(client: Client) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for _ in range(client.pool.get_max_size()):
            await stack.enter_async_context(client.pool.acquire(timeout=EVENTUAL))
        yield


@pytest.mark.timeout(120)
async def test_a_long_transaction_that_holds_the_oldest_row(
    rabbitmq: RabbitMQ, database_url: str, stock: DB, working: Working, eventually: Eventually
) -> None:
    held, *others = KEYS
    work = working(stock, broker_url=rabbitmq.url, database_url=database_url)
    await work.relay()
    reader = await work.reader("reader")
    writer = await work.writer()
    writer = Writer("writer", writer.client, work.history, others)
    async with connected(database_url) as long:
        write = Write(held, now())
        work.history.note(write)
        transaction = long.transaction()
        await transaction.start()
        write.version = await long.fetchval(WRITE, held)
        await long.execute(RECORD, held, write.version, reader.client.settings.namespace)
        async with work.writing(writer):
            began = work.history.fault("a transaction stays open")
            # Younger rows are published, and ticks say so: nothing waits for it.
            await eventually(lambda: writer.done > 20, EVENTUAL)
            await eventually(lambda: work.history.ticks[-1].as_of > began + DELTA, EVENTUAL)
            old = await reader.read(held)
            assert (old.version, old.outcome) == (1, "hit")
            await transaction.commit()
            write.acknowledged = now()
            await eventually(lambda: reads(reader, held, 2), EVENTUAL)
    await work.check()
    assert reader.client.stats()["coherence"]["epochs"] == 1


async def reads(reader: Any, key: str, version: int) -> bool:
    return bool((await reader.read(key)).version == version)


@pytest.mark.timeout(180)
async def test_a_commit_becomes_visible_after_its_client_gave_up_and_published(
    rabbitmq: RabbitMQ, own_postgres: Postgres, working: Working, eventually: Eventually
) -> None:
    key = KEYS[0]
    async with (
        Proxy("127.0.0.1", own_postgres.port) as proxy,
        connected(own_postgres.url) as truth,
    ):
        await make_stock(truth)
        work = working(truth, broker_url=rabbitmq.url, database_url=own_postgres.url)
        await work.relay()
        reader = await work.reader("reader")
        writer = await work.writer(database_url=through(proxy, own_postgres.url))
        await eventually(lambda: reads(reader, key, 1))

        # COMMIT waits for a copy that does not come, after it is on the disk and before anybody sees it.
        await truth.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        await truth.execute("SELECT pg_reload_conf()")
        await eventually(lambda: truth.fetchval("SELECT current_setting('synchronous_standby_names') <> ''"))
        writing = asyncio.create_task(writer.write(key))
        await eventually(
            lambda: truth.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"),
            EVENTUAL,
        )
        published = writer.client.publisher.counters
        work.history.fault("the writer is cut off")
        proxy.cut()
        assert not await writing
        await eventually(lambda: published.confirmed_writes == 1, EVENTUAL)
        await eventually(lambda: len(work.history.evictions) == 1, EVENTUAL)
        # Everybody has evicted, and has the old value again: there is no other to be had.
        assert await truth.fetchval(OUTBOX) == 0
        seen = await reader.read(key)
        assert seen.version == 1
        await work.sees("reader", "hit", now())

        work.history.fault("the commit becomes visible")
        await truth.execute("ALTER SYSTEM RESET synchronous_standby_names")
        await truth.execute("SELECT pg_reload_conf()")
        await eventually(lambda: reads(reader, key, 2), EVENTUAL)
        proxy.pass_()
        assert await writer.write(KEYS[1])
        await work.check()
        assert reader.client.stats()["coherence"]["epochs"] == 1


class Standby(Postgres):
    """A copy of another server, which follows it."""

    programs: ClassVar[Any] = {
        **Postgres.programs,
        "pg_basebackup": ("/usr/lib/postgresql/*/bin/pg_basebackup", "/usr/pgsql-*/bin/pg_basebackup"),
    }

    def __init__(self, folder: Path, guard: Guard, primary: str) -> None:
        super().__init__(folder, guard)
        self._primary = primary

    async def _prepare(self) -> None:
        if user := self._user():
            shutil.chown(self.folder, user)
        copy = ["--pgdata", str(self.folder / "data"), "--write-recovery-conf", "--checkpoint=fast"]
        await self._run([self.program("pg_basebackup"), "--dbname", self._primary, *copy])


@asynccontextmanager
async def followed(primary: Postgres) -> AsyncIterator[Standby]:
    """A server that follows `primary`."""
    folder = primary.folder.with_name("standby")
    folder.mkdir()
    guard = Guard(None)
    standby = Standby(folder, guard, primary.url)
    async with AsyncExitStack() as stack:
        stack.callback(guard.close)
        stack.push_async_callback(standby.close)
        await standby.start()
        yield standby


@pytest.mark.timeout(240)
async def test_the_primary_is_lost_and_its_standby_is_promoted(
    rabbitmq: RabbitMQ, own_postgres: Postgres, working: Working, eventually: Eventually
) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(connected(own_postgres.url))
        await make_stock(first)
        standby = await stack.enter_async_context(followed(own_postgres))
        await first.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await first.execute("SELECT pg_reload_conf()")
        synchronous = "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync')"
        await eventually(lambda: first.fetchval(synchronous), EVENTUAL)
        hosts = f"127.0.0.1:{own_postgres.port},127.0.0.1:{standby.port}"
        url = f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"
        work = working(first, broker_url=rabbitmq.url, database_url=url)
        await work.relay()
        reader = await work.reader("reader")
        writer = await work.writer()
        async with work.writing(writer):
            await goes_on(work, writer, eventually)
            work.history.fault("the primary is lost")
            await own_postgres.kill()
            errors = reader.errors
            await eventually(lambda: reader.errors > errors, EVENTUAL)
            work.truth = await stack.enter_async_context(connected(standby.url))
            assert await work.truth.fetchval("SELECT pg_promote(true, 60)")
            await goes_on(work, writer, eventually)
            # Its ticks are believed: by whoever asks it, it is the database that it was.
            heard = len(work.history.ticks)
            await eventually(lambda: len(work.history.ticks) > heard + 2, EVENTUAL)
        await work.check()
        assert reader.client.watermark_age is not None
        assert reader.client.status()["tick_refused"] is None


@pytest.mark.timeout(180)
async def test_a_relay_that_is_pointed_at_a_standby(
    rabbitmq: RabbitMQ, own_postgres: Postgres, working: Working, clients: Clients, eventually: Eventually
) -> None:
    async with connected(own_postgres.url) as truth, followed(own_postgres) as standby:
        await make_stock(truth)
        work = working(truth, broker_url=rabbitmq.url, database_url=own_postgres.url)
        reader = await work.reader("reader")
        work.history.fault("the relay has a standby")
        wrong = await clients(**work.settings | {"database_url": standby.url}, relay="auto", subscribe=False)
        relay = wrong.relay
        assert relay is not None
        await eventually(lambda: relay.state["state"] == "unready", EVENTUAL)
        assert "standby" in wrong.status()["relay"]["reason"]
        async with work.writing(await work.writer(), pause=0.5, ways=("transaction", "statement")):
            began = now()
            # Nothing proves that anything is fresh, however well it is heard.
            await eventually(
                lambda: [read for read in work.reads("reader", began) if read.outcome == "bypass"], EVENTUAL
            )
            assert reader.client.watermark_age is None
            await work.relay()
            await eventually(lambda: reader.client.watermark_age is not None, EVENTUAL)
        await work.check()


@pytest.mark.parametrize("max_staleness", [None, 2.0])
async def test_a_schema_that_is_dropped_takes_the_proof_along(
    rabbitmq: RabbitMQ,
    database_url: str,
    namespace: str,
    db: DB,
    clients: Clients,
    eventually: Eventually,
    max_staleness: float | None,
) -> None:
    """What waited in its outbox reaches nobody, so the relay's next tick must not prove that it has."""
    settings: dict[str, Any] = {
        "broker_url": rabbitmq.url,
        "database_url": database_url,
        "tick_interval": 0.2,
        "max_staleness": max_staleness,
    }
    reader = await clients(**settings, instance_id="reader")
    async with relaying(settings, namespace):
        await eventually(lambda: reader.ready and reader.watermark_age is not None, EVENTUAL)
        await eventually(lambda: has_price(reader, "a", 1), EVENTUAL)
        await reads_from_its_cache(reader, eventually)
    await db.execute("UPDATE prices SET price = 2 WHERE id = 'a'")
    await db.execute("SELECT cacheinval.invalidate('{a}', namespace => $1)", namespace)
    await db.execute("DROP SCHEMA cacheinval CASCADE")
    await apply_schema(db)
    before = reader.stats()["coherence"]["ticks"]
    async with relaying(settings, namespace):
        await eventually(lambda: reader.stats()["coherence"]["ticks"] > before, EVENTUAL)
        assert (await price(reader, "a")).value == 2
        await reads_from_its_cache(reader, eventually)


@asynccontextmanager
async def relaying(settings: dict[str, Any], namespace: str) -> AsyncIterator[None]:
    more = {"namespace": namespace, "relay": "auto", "instance_id": "relay"}
    async with Client(Settings(**settings | more), subscribe=False):
        yield


async def reads_from_its_cache(reader: Client, eventually: Eventually) -> None:
    async def hits() -> bool:
        return (await price(reader, "a")).outcome == "hit"

    await eventually(hits, EVENTUAL)
