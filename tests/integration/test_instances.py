"""The table of live instances on a real Postgres: when a row stands, and who is counted."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest
from proxy import Proxy
from waiting import Eventually

from cacheinval import Client, DatabaseError, SchemaMissingError, Settings
from cacheinval.clock import Clock
from cacheinval.coherence import registration
from cacheinval.coherence.registration import Registered, Registration
from cacheinval.outbox import apply_schema
from cacheinval.outbox import instances as registering
from cacheinval.outbox.instances import Instances, Registrar
from cacheinval.outbox.looking import look
from cacheinval.outbox.pool import OwnConnection, connect
from cacheinval.sandbox import Postgres

NAMESPACE = "shop"
LEASE = 10.0
ONE = Registered("one", "", 5.0)
OTHER = Registered("other", "s0", None)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    await apply_schema(connection)
    yield connection
    await connection.close()


@pytest.fixture
def instances(db: asyncpg.Connection) -> Instances:
    return Instances(lambda: db, NAMESPACE, 0.5)


async def since(instances: Instances, one: Registered = ONE) -> float:
    return (await instances.register(one, LEASE, 5.0))[1]


async def is_left(db: asyncpg.Connection, seconds: float) -> None:
    await db.execute(
        "UPDATE cacheinval.instances SET expires_at = clock_timestamp() + make_interval(secs => $1)", seconds
    )


async def test_a_database_that_answers_nothing_any_more_keeps_nobody_waiting(
    postgres: Postgres, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registering, "COUNT_WITHIN", 0.2)
    port = int(postgres.url.partition("127.0.0.1:")[2].partition("/")[0])
    async with Proxy("127.0.0.1", port) as proxy:
        pool = await asyncpg.create_pool(database_url.replace(f":{port}/", f":{proxy.port}/"), min_size=1)
        try:
            proxy.swallow()
            async with asyncio.timeout(15):
                with pytest.raises(DatabaseError, match="no answer in time"):
                    await Instances(lambda: pool, NAMESPACE, 0.5).registered()
        finally:
            pool.terminate()


class TestSince:
    async def test_it_is_told_by_the_second_statement_and_stays(self, instances: Instances) -> None:
        assert await since(instances) == math.inf
        told, first = await instances.register(ONE, LEASE, 5.0)
        assert first <= told
        assert await since(instances) == first

    async def test_a_row_that_was_renewed_too_late_stands_anew(
        self, instances: Instances, db: asyncpg.Connection
    ) -> None:
        await since(instances)
        first = await since(instances)
        await is_left(db, LEASE / 2 + 1)
        assert await since(instances) == first
        await is_left(db, LEASE / 2 - 0.001)
        assert await since(instances) == math.inf
        assert await since(instances) > first

    async def test_a_row_that_has_ended_stands_anew(
        self, instances: Instances, db: asyncpg.Connection
    ) -> None:
        await since(instances)
        await since(instances)
        await is_left(db, -1)
        assert await since(instances) == math.inf

    async def test_another_staleness_makes_another_instance_of_it(self, instances: Instances) -> None:
        await since(instances)
        await since(instances)
        assert await since(instances, Registered("one", "", 6.0)) == math.inf

    async def test_one_that_had_to_wait_for_another_statement_tells_the_time_after_it(
        self, instances: Instances, db: asyncpg.Connection, database_url: str, eventually: Eventually
    ) -> None:
        await since(instances)
        holder = await asyncpg.connect(database_url)
        try:
            transaction = holder.transaction()
            await transaction.start()
            await holder.execute("UPDATE cacheinval.instances SET session = ''")
            renewing = asyncio.create_task(since(instances))
            await eventually(
                lambda: holder.fetchval(
                    "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'transactionid'"
                )
            )
            released = await holder.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
            await transaction.commit()
            assert await renewing > released
        finally:
            await holder.close()


class TestCounting:
    async def test_whoever_is_registered_in_this_namespace_counts(
        self, instances: Instances, db: asyncpg.Connection
    ) -> None:
        await since(instances)
        await since(instances, OTHER)
        await Instances(lambda: db, "another", 0.5).register(ONE, LEASE, 5.0)
        assert await instances.count() == [ONE, OTHER]
        await instances.leave(OTHER)
        assert await instances.count() == [ONE]

    async def test_whose_lease_has_ended_does_not(self, instances: Instances, db: asyncpg.Connection) -> None:
        await since(instances)
        await is_left(db, -0.001)
        assert await instances.count() == []

    async def test_whoever_has_been_there_for_a_while_is_expected_to_answer(
        self, instances: Instances, db: asyncpg.Connection
    ) -> None:
        await since(instances)  # nobody has seen it yet
        assert await instances.registered() == []
        await since(instances)
        assert await instances.registered() == []
        await db.execute("UPDATE cacheinval.instances SET since = since - interval '1 minute'")
        assert await instances.registered() == [ONE]
        assert await Instances(lambda: db, "another", 0.5).registered() == []
        await is_left(db, -0.001)
        assert await instances.registered() == []

    async def test_whoever_ends_without_a_word_is_told_of(
        self, instances: Instances, db: asyncpg.Connection
    ) -> None:
        await since(instances)
        await since(instances, OTHER)
        assert (await look(lambda: db, NAMESPACE)).lapsed == []
        await is_left(db, -20)
        told = (await look(lambda: db, NAMESPACE)).lapsed
        assert {one.id for one in told} == {ONE.id, OTHER.id}
        assert all(20 <= one.seconds < 80 for one in told)
        await since(instances, Registered(OTHER.id, "the next one of this name", None))
        assert [one.id for one in (await look(lambda: db, NAMESPACE)).lapsed] == [ONE.id]
        assert (await look(lambda: db, "another")).lapsed == []

    async def test_whoever_stops_is_neither_waited_for_nor_missed(
        self, instances: Instances, db: asyncpg.Connection
    ) -> None:
        """Its cache outlives it, so that its row stands until its lease ends; and then it has not ended without a word."""
        for _ in range(2):
            await since(instances)
        await db.execute("UPDATE cacheinval.instances SET since = since - interval '1 minute'")
        assert (await look(lambda: db, NAMESPACE)).settled == [ONE]
        await instances.leave(ONE)
        assert await instances.count() == [ONE]
        assert await instances.registered() == []
        seen = await look(lambda: db, NAMESPACE)
        assert (seen.registered, seen.settled, seen.lapsed) == ([], [], [])
        await is_left(db, -20)
        assert (await look(lambda: db, NAMESPACE)).lapsed == []
        await instances.goes_on(ONE)
        assert [one.id for one in (await look(lambda: db, NAMESPACE)).lapsed] == [ONE.id]

    async def test_rows_that_ended_long_ago_are_taken_away(
        self, instances: Instances, db: asyncpg.Connection
    ) -> None:
        await since(instances)
        await is_left(db, -3590)
        await instances.forget_old()
        assert await db.fetchval("SELECT count(*) FROM cacheinval.instances") == 1
        await is_left(db, -3610)
        await instances.forget_old()
        assert await db.fetchval("SELECT count(*) FROM cacheinval.instances") == 0

    async def test_nobody_is_counted_by_a_clock_that_is_wrong(self, db: asyncpg.Connection) -> None:
        doubting = Instances(lambda: db, NAMESPACE, -1.0)  # differs by more than that, whatever it is
        with pytest.raises(DatabaseError, match="this clock and the database's differ by"):
            await doubting.count()


class TestProblems:
    async def test_a_missing_schema(self, database_url: str) -> None:
        connection = await asyncpg.connect(database_url)
        try:
            with pytest.raises(SchemaMissingError):
                await Instances(lambda: connection, NAMESPACE, 0.5).count()
        finally:
            await connection.close()

    async def test_missing_rights(self, instances: Instances, db: asyncpg.Connection) -> None:
        await db.execute("CREATE ROLE nobody_of_instances")
        try:
            await db.execute("SET ROLE nobody_of_instances")
            with pytest.raises(DatabaseError, match="needs what `cacheinval schema grant ROLE` gives"):
                await since(instances)
            await db.execute("RESET ROLE")
            await db.execute(
                "GRANT SELECT, INSERT, UPDATE, DELETE ON cacheinval.instances TO nobody_of_instances"
            )
            await db.execute("SET ROLE nobody_of_instances")
            await since(instances)
            assert await instances.count() == [ONE]
            await instances.forget_old()
            await instances.leave(ONE)
        finally:
            await db.execute("RESET ROLE")
            await db.execute("DROP OWNED BY nobody_of_instances")
            await db.execute("DROP ROLE nobody_of_instances")

    async def test_a_database_that_does_not_answer(self) -> None:
        class Silent:
            async def fetchrow(self, query: str, *args: object, timeout: float | None = None) -> Any:
                await asyncio.Event().wait()

            async def execute(self, query: str, *args: object, timeout: float | None = None) -> str:
                raise OSError("no route")

        silent = Instances(Silent, NAMESPACE, 0.5)
        with pytest.raises(DatabaseError, match="cannot be used: no answer in time"):
            await silent.register(ONE, LEASE, 0.01)
        with pytest.raises(DatabaseError, match="cannot be used: no route"):
            await silent.leave(ONE)


class Database:
    """Postgres, until it is away."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.away = False

    async def fetchrow(self, query: str, *args: object, timeout: float | None = None) -> Any:
        if self.away:
            raise OSError("no route")
        return await self.connection.fetchrow(query, *args)

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> str:
        if self.away:
            raise OSError("no route")
        return await self.connection.execute(query, *args)


async def test_it_is_told_once_that_it_lapses_and_once_that_it_stands_again(
    db: asyncpg.Connection,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "cacheinval.registration")
    monkeypatch.setattr(registration, "SHORTEST_LEASE", 1.2)
    database = Database(db)
    told: list[str | None] = []
    one = Registration(None, 0.1)
    registrar = Registrar(
        Instances(lambda: database, NAMESPACE, 0.5),
        Registered("one", "s0", None),
        one,
        Clock().now,
        lambda: True,
        told.append,
    )

    async def logged(count: int) -> bool:
        return len(caplog.messages) == count

    database.away = True
    task = asyncio.create_task(registrar.run())
    await eventually(lambda: logged(1))
    assert "not registered: no writer waits for this instance" in caplog.messages[-1]
    assert registrar.state["reason"] == "the database cannot be used: no route"
    database.away = False
    await eventually(lambda: logged(2))
    assert registrar.state["state"] == "registered"
    database.away = True
    await eventually(lambda: registrar.state["state"] == "unregistered")
    await eventually(lambda: logged(3))
    database.away = False
    await eventually(lambda: logged(4))
    assert [why for why in told if why is None] == [None, None]
    task.cancel()
    await asyncio.wait([task])
    await registrar.leave()
    assert await db.fetchval("SELECT count(*) FROM cacheinval.instances") == 0
    assert registrar.state["reason"] == "not registered any more"


async def test_a_stand_by_says_nothing_when_it_stops_and_who_goes_on_takes_back_what_another_said(
    db: asyncpg.Connection, database_url: str, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = await asyncpg.create_pool(database_url, min_size=1, max_size=2)
    instances = Instances(lambda: pool, NAMESPACE, 0.5)

    def registrar(*, may_begin: bool) -> Registrar:
        return Registrar(
            instances, ONE, Registration(None, 0.1), Clock().now, lambda: may_begin, lambda why: None
        )

    monkeypatch.setattr(registration, "SHORTEST_LEASE", 1.2)
    stopped = "SELECT count(*) = 1 FROM cacheinval.instances WHERE session = 'stopped'"
    running, standing_by = registrar(may_begin=True), registrar(may_begin=False)
    tasks = [asyncio.create_task(one.run()) for one in (running, standing_by)]
    await eventually(lambda: running.state["state"] == "registered")
    tasks[1].cancel()
    await standing_by.leave()
    assert not await db.fetchval(stopped)

    await instances.leave(ONE)  # by one that had been frozen, and whose place was taken
    assert await db.fetchval(stopped)
    await eventually(lambda: db.fetchval(stopped.replace("= 1", "= 0")))
    tasks[0].cancel()
    await asyncio.wait(tasks)
    await running.leave()
    assert await db.fetchval(stopped)
    await pool.close()


@pytest.fixture
async def own(database_url: str) -> AsyncIterator[OwnConnection]:
    own = OwnConnection(database_url)
    yield own
    await own.close()


class TestOwnConnection:
    PID = "SELECT pg_backend_pid() AS pid"

    async def pid(self, own: OwnConnection) -> int:
        row = await own.fetchrow(self.PID)
        assert row is not None
        return int(row["pid"])

    async def test_it_is_one_connection_also_after_an_error(self, own: OwnConnection) -> None:
        first = await self.pid(own)
        with pytest.raises(asyncpg.PostgresError):
            await own.execute("SELECT 1 / 0")
        assert await own.execute("SELECT 1") == "SELECT 1"
        assert await self.pid(own) == first

    async def test_it_is_made_anew_when_the_server_has_ended_it(
        self, own: OwnConnection, db: asyncpg.Connection, eventually: Eventually
    ) -> None:
        first = await self.pid(own)
        connection = own._connection
        assert connection is not None
        await db.execute("SELECT pg_terminate_backend($1)", first)
        await eventually(connection.is_closed)
        assert await self.pid(own) != first

    async def test_one_that_did_not_answer_is_given_up(self, postgres: Postgres, database_url: str) -> None:
        port = int(postgres.url.partition("127.0.0.1:")[2].partition("/")[0])
        async with Proxy("127.0.0.1", port) as proxy:
            own = OwnConnection(database_url.replace(f":{port}/", f":{proxy.port}/"))
            first = await self.pid(own)
            proxy.swallow()
            instances = Instances(lambda: own, NAMESPACE, 0.5)
            with pytest.raises(DatabaseError, match="no answer in time"):
                await instances.register(ONE, LEASE, 0.1)
            proxy.pass_()
            assert await self.pid(own) != first
            proxy.swallow()
            async with asyncio.timeout(30):
                await own.close()

    async def test_a_host_that_swallows_everything_leaves_time_to_the_next(
        self, postgres: Postgres, database_url: str
    ) -> None:
        port = int(postgres.url.partition("127.0.0.1:")[2].partition("/")[0])
        async with Proxy("127.0.0.1", port) as proxy:
            proxy.swallow()
            url = database_url.replace(f":{port}/", f":{proxy.port},127.0.0.1:{port}/")
            connection = await connect(url, timeout=10.0)
            assert await connection.fetchval("SELECT inet_server_port()") == port
            await connection.close()
            with pytest.raises((TimeoutError, OSError)):
                await connect(database_url.replace(f":{port}/", f":{proxy.port}/"), timeout=0.2)

    async def test_it_is_not_made_before_it_is_needed(self) -> None:
        await OwnConnection("postgresql://nowhere.invalid/").close()


ClientOf = Callable[..., Client]


@pytest.fixture
def client_of(database_url: str, namespace: str) -> ClientOf:
    def make(**settings: Any) -> Client:
        given = {
            "broker_url": "memory://",
            "relay": "off",
            "database_url": database_url,
            "namespace": namespace,
        }
        return Client(Settings(**given, **settings))

    return make


ROWS = "SELECT id, session, max_staleness FROM cacheinval.instances"


async def test_an_instance_is_in_the_table_as_long_as_it_lives(
    db: asyncpg.Connection, client_of: ClientOf
) -> None:
    async with client_of(instance_id="one", max_staleness=5) as client:
        await client.wait_ready(30)
        (row,) = await db.fetch(ROWS)
        assert (row["id"], row["max_staleness"]) == ("one", 5.0)
        assert client.status()["registration"] == {
            "state": "registered",
            "reason": None,
            "session": row["session"],
            "required": True,
        }
    assert await db.fetch(ROWS) == []


async def test_one_that_promises_freshness_is_not_ready_before_it_is_registered(
    db: asyncpg.Connection, client_of: ClientOf, eventually: Eventually
) -> None:
    await db.execute("ALTER TABLE cacheinval.instances RENAME TO elsewhere")
    async with client_of(max_staleness=5) as client, client_of() as eventual:
        await eventual.wait_ready(30)
        await eventually(lambda: client.reason == str(SchemaMissingError()))

        async def load() -> int:
            return 1

        for one, outcomes in ((client, ["bypass", "bypass"]), (eventual, ["miss", "hit"])):
            assert [(await one.cache.read("k", load)).outcome for _ in outcomes] == outcomes
        await db.execute("ALTER TABLE cacheinval.elsewhere RENAME TO instances")
        await client.wait_ready(30)
        assert (await client.cache.read("k", load)).outcome == "bypass", "it was loaded before"
        assert (await client.cache.read("k", load)).outcome == "hit"


async def test_a_pool_that_is_exhausted_costs_no_registration(
    db: asyncpg.Connection, client_of: ClientOf, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "SHORTEST_LEASE", 5.0)
    monkeypatch.setattr(registration, "LEASE_IN_STALENESS", 0.0)

    async def load() -> int:
        return 1

    async def has_ended(at: float) -> bool:
        return bool(await db.fetchval("SELECT clock_timestamp() > to_timestamp($1)", at))

    async with client_of(max_staleness=60) as client, AsyncExitStack() as occupied:
        await client.wait_ready(30)
        for _ in range(client.pool.get_max_size()):
            await occupied.enter_async_context(client.pool.acquire())
        with pytest.raises(TimeoutError):
            await client.pool.acquire(timeout=0.1)
        await client.cache.read("k", load)
        # As long as the row would have stood without having been renewed since, and longer.
        ends = await db.fetchval(
            "SELECT extract(epoch FROM max(expires_at))::float8 FROM cacheinval.instances"
        )
        await eventually(lambda: has_ended(ends + 1.0), 30)
        assert client.status()["registration"]["state"] == "registered"
        assert (await client.cache.read("k", load)).outcome == "hit", "nor was there a hole"
    assert await db.fetch(ROWS) == []


async def test_the_connection_of_the_registration_is_made_by_instances_only_and_ends_with_them(
    db: asyncpg.Connection, database_url: str, namespace: str, eventually: Eventually
) -> None:
    others = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%cacheinval.instances%'"
        " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    settings = Settings(broker_url="memory://", relay="off", database_url=database_url, namespace=namespace)

    async def are(count: int) -> bool:
        return bool(await db.fetchval(others) == count)

    async with Client(settings, subscribe=False) as writer:
        assert writer._connections._own_connection._connection is None
    async with (
        asyncpg.create_pool(database_url, min_size=1) as pool,
        Client(settings, pool=pool) as borrowing,
    ):
        await eventually(lambda: borrowing.status()["registration"]["state"] == "registered")
        assert borrowing._connections._own_connection._connection is None
    async with Client(settings) as client:
        await eventually(lambda: client.status()["registration"]["state"] == "registered")
        await eventually(lambda: are(1))
    await eventually(lambda: are(0))
