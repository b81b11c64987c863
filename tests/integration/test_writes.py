"""Changing a real Postgres: what is committed is published and its rows deleted, what is not is never heard of."""

import asyncio
import contextvars
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from proxy import Proxy
from recorder import Recorder
from waiting import Eventually

from cacheinval import (
    Client,
    DatabaseError,
    InvalidKeyError,
    PublishError,
    SchemaMissingError,
    Settings,
    Transaction,
    transactions,
    writes,
)
from cacheinval.bus.memory import EventBus, EventChannel
from cacheinval.cache import Read
from cacheinval.messages import Invalidate, decode
from cacheinval.outbox import apply_schema, checkout, refusals
from cacheinval.outbox import pool as pools
from cacheinval.outbox.grants import grants

TABLES = """
    CREATE TABLE things (id text PRIMARY KEY, n int NOT NULL);
    CREATE TABLE owners (
        id int PRIMARY KEY,
        thing text REFERENCES things (id) DEFERRABLE INITIALLY DEFERRED
    );
    INSERT INTO things VALUES ('a', 0), ('b', 0);
"""
UPDATE = "UPDATE things SET n = n + 1 WHERE id = $1"


class Listener(Recorder):
    """Somebody else on the bus: what was published, in order."""

    @property
    def messages(self) -> list[Invalidate]:
        return [message for body in self.bodies if isinstance(message := decode(body), Invalidate)]

    @property
    def keys(self) -> list[str]:
        return [key for message in self.messages for key in message.keys]


@pytest.fixture
async def bare(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection beside the client's, to look at the database; it has no schema yet."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(TABLES)
    yield connection
    await connection.close()


@pytest.fixture
async def db(bare: asyncpg.Connection) -> asyncpg.Connection:
    await apply_schema(bare)
    return bare


@pytest.fixture
def settings(database_url: str, namespace: str) -> Settings:
    # Without a relay: what is left in the outbox stays to be seen.
    return Settings(database_url=database_url, broker_url="memory://", namespace=namespace, relay="off")


@pytest.fixture
async def heard(namespace: str, eventually: Eventually) -> AsyncIterator[Listener]:
    listener = Listener()
    bus = EventBus.of(namespace)
    task = asyncio.create_task(bus.run(listener))
    await eventually(lambda: listener.ready)
    yield listener
    task.cancel()
    await asyncio.wait([task])


@pytest.fixture
async def client(settings: Settings, db: asyncpg.Connection, heard: Listener) -> AsyncIterator[Client]:
    async with Client(settings) as client:
        await client.wait_ready(30)
        yield client


@pytest.fixture
async def limited(
    settings: Settings, db: asyncpg.Connection, namespace: str, heard: Listener
) -> AsyncIterator[Client]:
    """A client whose role, called as the namespace, has what it needs and no more."""
    await db.execute(f"CREATE ROLE {namespace} LOGIN; GRANT ALL ON things TO {namespace}")
    try:
        for statement in grants(namespace):
            await db.execute(statement)
        url = settings.database_url.replace("postgres@", f"{namespace}@")
        async with Client(settings.model_copy(update={"database_url": url})) as client:
            await client.wait_ready(30)
            yield client
    finally:
        await db.execute(f"DROP OWNED BY {namespace}; DROP ROLE {namespace}")


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[Proxy]:
    async with Proxy("127.0.0.1", urlsplit(database_url).port or 0) as proxy:
        yield proxy


@pytest.fixture
async def far_client(
    settings: Settings, db: asyncpg.Connection, heard: Listener, proxy: Proxy
) -> AsyncIterator[Client]:
    """A client whose database is behind the proxy."""
    parts = urlsplit(settings.database_url)
    url = urlunsplit(parts._replace(netloc=f"postgres@127.0.0.1:{proxy.port}"))
    async with Client(settings.model_copy(update={"database_url": url})) as client:
        await client.wait_ready(30)
        yield client


async def rows(db: asyncpg.Connection) -> int:
    count: int = await db.fetchval("SELECT count(*) FROM cacheinval.outbox")
    return count


async def number(db: asyncpg.Connection, thing: str = "a") -> int:
    value: int = await db.fetchval("SELECT n FROM things WHERE id = $1", thing)
    return value


# What a decorated function makes stale


async def test_within_a_transaction_what_a_function_invalidates_is_recorded_in_it(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    @client.cached("a")
    async def read() -> int:
        return await number(db)

    @client.invalidates("a", tags=["t"])
    async def change(connection: Any) -> None:
        await connection.execute(UPDATE, "a")

    assert await read() == 0
    with suppress(LookupError):
        async with client.transaction() as tx:
            await change(tx)
            raise LookupError
    assert await client.cache.would_serve("a"), "rolled back, so nothing is stale"

    async with client.transaction() as tx:
        await change(tx)
        await read.invalidate()
        assert (tx.invalidations.keys, tx.invalidations.tags) == (["a", "a"], ["t"])
        assert await client.cache.would_serve("a"), "not committed yet"
    assert await client.cache.would_serve("a") is None
    assert await read() == 1
    await eventually(lambda: len(heard.messages) == 1)
    assert heard.messages[0].tags == ["t"]


async def test_within_a_transaction_invalidate_evicts_at_once_and_when_that_commits(
    client: Client, settings: Settings, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    async def read() -> int:
        return await client.cache.get_or_set("a", lambda: number(db))

    assert await read() == 0
    async with client.transaction() as tx:
        await tx.execute(UPDATE, "a")
        await client.invalidate("a")
        assert await client.cache.would_serve("a") is None
        assert await asyncio.create_task(read(), context=contextvars.Context()) == 0, "not committed yet"
        assert await client.cache.would_serve("a")
    assert await read() == 1
    await eventually(lambda: heard.keys == ["a", "a"])


async def test_outside_of_its_own_clients_transaction_a_function_invalidates_at_once(
    client: Client, settings: Settings, heard: Listener, eventually: Eventually
) -> None:
    @client.invalidates("a")
    async def change() -> None: ...

    over = asyncio.Event()

    async def later() -> None:
        await over.wait()
        await change()

    await change()
    await eventually(lambda: heard.keys == ["a"])
    async with Client(settings) as other, other.transaction() as tx:
        await change()
        assert not tx.invalidations
    await eventually(lambda: heard.keys == ["a", "a"])
    async with client.transaction():
        outliving = asyncio.create_task(later())
        await asyncio.sleep(0)
    over.set()
    await outliving
    await eventually(lambda: heard.keys == ["a", "a", "a"])


async def nothing_else_was_heard(client: Client, heard: Listener, eventually: Eventually, *keys: str) -> None:
    """A later write is heard, and before it nothing but `keys`."""
    await client.execute(UPDATE, "b", invalidate=["the end"])
    await eventually(lambda: "the end" in heard.keys)
    assert heard.keys == [*keys, "the end"]


async def keep(client: Client, key: str = "k") -> None:
    async def load() -> str:
        return "cached"

    await client.cache.get_or_set(key, load)
    assert await outcome(client, key) == "hit"


async def outcome(client: Client, key: str = "k") -> str:
    async def load() -> str:
        return "loaded"

    read: Read = await client.cache.read(key, load)
    return read.outcome


async def write(
    client: Client, *keys: str, change: str = UPDATE, last: Callable[[], object] = bool, **names: Any
) -> None:
    """A transaction that makes a change, invalidates, and does something `last` before its COMMIT."""
    async with client.transaction() as tx:
        await tx.execute(change, *(["a"] if "$1" in change else []))
        tx.invalidate(*keys, **names)
        last()


def fail() -> None:
    raise LookupError


CONNECTION_LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)


# Transactions


async def test_a_commit_is_published_and_its_row_deleted(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    await keep(client)
    before = time.time()
    async with client.transaction() as tx:
        assert await tx.execute(UPDATE, "a") == "UPDATE 1"
        assert await tx.fetchval("SELECT n FROM things WHERE id = 'a'") == 1
        tx.invalidate("k", "l", versions=[7, None], tags=["t"])
        assert await outcome(client, "k") == "bypass"
        assert heard.messages == []
    assert await number(db) == 1
    assert await outcome(client) == "miss", "evicted here before it returns"
    await eventually(lambda: heard.messages)
    (message,) = heard.messages
    assert (message.keys, message.versions, message.tags, message.all) == (
        ["k", "l"],
        [7, None],
        ["t"],
        False,
    )
    assert (message.seq, len(message.origin or "")) == (1, 32)
    assert before <= (message.committed_at or 0) <= (message.at or 0) <= time.time()
    await eventually(lambda: rows_are(db, 0))
    assert client.stats()["coherence"]["skipped_echoes"] == 1


async def rows_are(db: asyncpg.Connection, count: int) -> bool:
    return await rows(db) == count


async def test_the_row_is_in_the_same_transaction_and_has_a_grace(
    client: Client, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    async def wait(self: EventChannel, body: bytes) -> None:
        await release.wait()

    monkeypatch.setattr(EventChannel, "send", wait)
    async with client.transaction() as tx:
        tx.invalidate("k", tags=["t"])
    row = await db.fetchrow("SELECT * FROM cacheinval.outbox")
    assert row is not None
    assert (row["namespace"], row["keys"], row["tags"]) == (client.settings.namespace, ["k"], ["t"])
    assert (row["publish_at"] - row["recorded_at"]).total_seconds() == pytest.approx(0.25, abs=0.05)
    release.set()


async def test_a_rollback_is_never_heard_of(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    await keep(client)
    with pytest.raises(LookupError):
        await write(client, "k", everything=True, last=fail)
    assert await outcome(client) == "hit"
    assert (await number(db), await rows(db)) == (0, 0)
    await nothing_else_was_heard(client, heard, eventually)


@pytest.mark.parametrize("how", ["a foreign key", "a conflict"])
async def test_an_error_at_commit_is_a_rollback(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually, how: str
) -> None:
    await keep(client)
    if how == "a foreign key":
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await write(client, "k", change="INSERT INTO owners VALUES (1, 'missing')")
    else:
        with pytest.raises(asyncpg.SerializationError):
            await write_what_another_has_overtaken(client, db)
    assert await outcome(client) == "hit"
    assert await rows(db) == 0
    assert await db.fetchval("SELECT count(*) FROM owners") == 0
    await nothing_else_was_heard(client, heard, eventually)


async def write_what_another_has_overtaken(client: Client, db: asyncpg.Connection) -> None:
    async with client.transaction(isolation="serializable") as tx:
        await tx.fetch("SELECT sum(n) FROM things")
        await tx.execute("INSERT INTO things VALUES ('c', 1)")
        tx.invalidate("k")
        async with db.transaction(isolation="serializable"):
            await db.fetch("SELECT sum(n) FROM things")
            await db.execute("INSERT INTO things VALUES ('d', 1)")


async def test_a_body_that_is_cancelled_is_a_rollback(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    inside = asyncio.Event()

    async def write() -> None:
        async with client.transaction() as tx:
            await tx.execute(UPDATE, "a")
            tx.invalidate("k")
            inside.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(write())
    await inside.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (await number(db), await rows(db)) == (0, 0)
    await nothing_else_was_heard(client, heard, eventually)


async def test_a_transaction_that_invalidates_nothing_publishes_nothing(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    async with client.transaction() as tx:
        await tx.execute(UPDATE, "a")
    assert (await number(db), await rows(db)) == (1, 0)
    await nothing_else_was_heard(client, heard, eventually)


@pytest.mark.parametrize("names", [("",), ("a\0",), ("k" * 513,), (7,)])
async def test_names_that_nobody_could_understand_roll_back(
    client: Client, db: asyncpg.Connection, names: tuple[Any, ...]
) -> None:
    with pytest.raises(InvalidKeyError):
        await write(client, *names)
    with pytest.raises(InvalidKeyError):
        await client.execute(UPDATE, "a", invalidate=names)
    with pytest.raises(InvalidKeyError):
        await client.execute(UPDATE, "a", tags=names)
    with pytest.raises(InvalidKeyError, match="must be a list of strings"):
        await client.execute(UPDATE, "a", invalidate="k")
    assert await number(db) == 0


async def test_as_many_versions_as_keys(client: Client) -> None:
    with pytest.raises(ValueError, match="1 versions for 2 keys; accepted: one for each, or None"):
        await write(client, "k", "l", versions=[1])


async def test_5000_keys_in_one_transaction(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    keys = [f"k{n}" for n in range(5_000)]
    async with client.transaction() as tx:
        tx.invalidate(*keys[:2_500], tags=["t"])
        tx.invalidate(*keys[2_500:], versions=list(range(2_500)))
    await eventually(lambda: len(heard.keys) == 5_000)
    assert heard.keys == keys
    assert [message.seq for message in heard.messages] == [1, 2, 3, 4, 5, 6]
    assert all(len(message.keys) + len(message.tags) <= 1_000 for message in heard.messages)
    versions = [
        version for message in heard.messages for version in message.versions or [None] * len(message.keys)
    ]
    assert versions == [None] * 2_500 + list(range(2_500))
    await eventually(lambda: rows_are(db, 0))


async def test_everything(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    await keep(client)
    async with client.transaction() as tx:
        tx.invalidate("k", tags=["t"], everything=True)
    assert await outcome(client) == "miss"
    await eventually(lambda: heard.messages)
    assert heard.messages[0].all
    await eventually(lambda: rows_are(db, 0))


async def test_many_writers_at_once(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    async def write(n: int) -> None:
        async with client.transaction() as tx:
            await tx.execute("INSERT INTO things VALUES ($1, $2)", f"new{n}", n)
            tx.invalidate(f"k{n}")

    await asyncio.gather(*(write(n) for n in range(60)))
    await eventually(lambda: len(heard.keys) == 60)
    assert sorted(heard.keys) == sorted(f"k{n}" for n in range(60))
    assert [message.seq for message in heard.messages] == list(range(1, len(heard.messages) + 1))
    await eventually(lambda: rows_are(db, 0))


# A commit whose outcome is not known


async def test_a_commit_whose_reply_is_lost_is_published_and_its_row_kept(
    far_client: Client, db: asyncpg.Connection, proxy: Proxy, heard: Listener, eventually: Eventually
) -> None:
    await keep(far_client)
    cut = proxy.cut_reply_after(b"COMMIT")
    with pytest.raises(CONNECTION_LOST):
        await write(far_client, "k")
    assert cut.is_set()
    assert await outcome(far_client) == "miss"
    assert await number(db) == 1
    await eventually(lambda: heard.keys == ["k"])
    assert await far_client.publisher.flush(60)
    assert await rows(db) == 1
    await eventually(lambda: far_client.stats()["receiver"]["messages"] == 1)
    assert far_client.stats()["coherence"]["skipped_echoes"] == 0


async def test_a_commit_that_is_cancelled_is_published_and_its_row_kept(
    far_client: Client,
    db: asyncpg.Connection,
    proxy: Proxy,
    heard: Listener,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkout, "RELEASE_TIMEOUT", 0.2)
    monkeypatch.setattr(writes, "ROLLBACK_TIMEOUT", 0.2)
    await keep(far_client)
    deleted: list[Any] = []

    async def delete(ids: list[Any]) -> None:  # the real one could not get through
        deleted.extend(ids)

    far_client.publisher._delete_rows = delete
    record = far_client._outbox.record  # after which only the COMMIT is left, and its reply never comes

    async def record_then_deafen(*args: Any, **options: Any) -> None:
        await record(*args, **options)
        proxy.swallow("reply")

    far_client._outbox.record = record_then_deafen  # type: ignore[method-assign]
    task = asyncio.create_task(write(far_client, "k"))
    await eventually(lambda: committed(db))
    assert heard.keys == []
    task.cancel()
    await eventually(lambda: heard.keys == ["k"])
    assert await outcome(far_client) == "miss"
    await asyncio.wait([task])
    assert task.cancelled()
    proxy.pass_()
    assert await far_client.publisher.flush(60)
    assert deleted == []
    assert await rows(db) == 1
    assert far_client.stats()["coherence"]["skipped_echoes"] == 0


async def committed(db: asyncpg.Connection) -> bool:
    return await number(db) == 1


async def test_a_connection_that_is_cut_before_the_commit_is_a_rollback(
    far_client: Client, db: asyncpg.Connection, proxy: Proxy, heard: Listener, eventually: Eventually
) -> None:
    await keep(far_client)
    with pytest.raises(CONNECTION_LOST):
        await write(far_client, "k", last=proxy.cut_open)
    assert await outcome(far_client) == "hit"
    assert await number(db) == 0
    await nothing_else_was_heard(far_client, heard, eventually)


# One statement


async def test_one_statement(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    await keep(client)
    assert await client.execute(UPDATE, "a", invalidate=["k"], tags=["t"]) == "UPDATE 1"
    assert await outcome(client) == "miss"
    row = await client.fetchrow(UPDATE + " RETURNING *", "a", invalidate=["l"])
    assert row is not None
    assert dict(row) == {"id": "a", "n": 2}
    fetched = await client.fetch("DELETE FROM things RETURNING id", invalidate=["m"])
    assert sorted(row["id"] for row in fetched) == ["a", "b"]
    assert await client.execute("INSERT INTO things VALUES ('c', 1)", invalidate=["n"]) == "INSERT 0 1"
    assert await client.fetchrow(UPDATE + " RETURNING *", "missing", invalidate=["o"]) is None
    await eventually(lambda: heard.keys == ["k", "l", "m", "n", "o"])
    assert heard.messages[0].tags == ["t"]
    await eventually(lambda: rows_are(db, 0))


async def test_one_statement_is_one_round_trip(
    far_client: Client, db: asyncpg.Connection, proxy: Proxy
) -> None:
    """With one, its reply can be lost; with BEGIN … COMMIT the pattern below would be in a statement before the last."""
    await far_client.execute(UPDATE, "a", invalidate=["warm"])
    cut = proxy.cut_reply_after(b"only-statement")
    with pytest.raises(CONNECTION_LOST):
        await far_client.execute(UPDATE, "a", invalidate=["only-statement"])
    assert cut.is_set()
    assert await number(db) == 2, "it was committed by the message that carried its arguments"


async def test_a_statement_whose_reply_is_lost_is_published_and_its_row_kept(
    far_client: Client, db: asyncpg.Connection, proxy: Proxy, heard: Listener, eventually: Eventually
) -> None:
    await keep(far_client)
    proxy.cut_reply_after(b"only-here")
    with pytest.raises(CONNECTION_LOST):
        await far_client.execute(UPDATE, "a", invalidate=["k", "only-here"])
    await eventually(lambda: heard.keys == ["k", "only-here"])
    assert await outcome(far_client) == "miss"
    assert await far_client.publisher.flush(60)
    assert (await number(db), await rows(db)) == (1, 1)


async def test_a_statement_that_times_out_is_published_and_its_row_kept(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    """Whoever stops waiting cannot know; here it was not committed, and a needless eviction is all it cost."""
    async with db.transaction():
        await db.execute(UPDATE, "a")  # holds the lock
        with pytest.raises(TimeoutError):
            await client.execute(UPDATE, "a", invalidate=["k"], timeout=0.1)
    await eventually(lambda: heard.keys == ["k"])
    assert await number(db) == 1


async def test_a_pool_that_is_exhausted_is_named(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "ACQUIRE_TIMEOUT", 0.1)
    async with AsyncExitStack() as stack:
        for _ in range(client.pool.get_max_size()):
            await stack.enter_async_context(client.pool.acquire())
        with pytest.raises(TimeoutError, match=r"CACHEINVAL_DATABASE_URL.*all 10 of the pool are in use"):
            await client.execute(UPDATE, "a", invalidate=["k"])


@pytest.mark.parametrize("whose", ["ours", "borrowed"])
async def test_a_commit_that_is_not_answered_is_named(
    settings: Settings,
    db: asyncpg.Connection,
    database_url: str,
    heard: Listener,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    whose: str,
) -> None:
    """Here it waits for somebody's lock on the row that a deferred constraint has COMMIT look for."""
    monkeypatch.setattr(pools, "STATEMENT_TIMEOUT", 5.0)  # of our own, whichever statement it is
    monkeypatch.setattr(writes, "COMMIT_TIMEOUT", 0.2)
    async with AsyncExitStack() as stack:
        pool = None
        if whose == "borrowed":
            pool = await stack.enter_async_context(asyncpg.create_pool(database_url, min_size=0))
        client = await stack.enter_async_context(Client(settings, pool=pool, subscribe=False))
        await stack.enter_async_context(db.transaction())
        await db.execute("DELETE FROM things WHERE id = 'b'")

        async def write() -> None:
            async with client.transaction() as tx:
                await tx.execute("INSERT INTO owners VALUES (1, 'b')")
                tx.invalidate("k")

        with pytest.raises(TimeoutError, match="COMMIT was not answered in time; it may have been made"):
            await write()
        await eventually(lambda: heard.keys == ["k"])


async def test_a_begin_that_is_not_answered_is_named(
    far_client: Client, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    await far_client.execute(UPDATE, "a", invalidate=["warm"])
    monkeypatch.setattr(checkout, "ACQUIRE_TIMEOUT", 0.2)
    monkeypatch.setattr(checkout, "RELEASE_TIMEOUT", 0.2)
    proxy.swallow("both")
    with pytest.raises(TimeoutError, match=r"CACHEINVAL_DATABASE_URL.*or none answers"):
        async with far_client.transaction():
            raise AssertionError("it has not begun")


async def test_where_no_transaction_can_begin_the_connection_is_given_back(
    client: Client, eventually: Eventually
) -> None:
    for _ in range(client.pool.get_max_size() + 1):
        with pytest.raises(ValueError, match="isolation"):
            async with client.transaction(isolation="perfect"):
                raise AssertionError("it has not begun")
    await eventually(lambda: client.pool.get_idle_size() == client.pool.get_size())


async def test_a_statement_that_fails_is_never_heard_of(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    await keep(client)
    with pytest.raises(asyncpg.UniqueViolationError):
        await client.execute("INSERT INTO things VALUES ('a', 1)", invalidate=["k"])
    with pytest.raises(asyncpg.UndefinedTableError):
        await client.execute("UPDATE nowhere SET n = 1", invalidate=["k"])
    with pytest.raises(asyncpg.DataError):
        await client.execute(UPDATE, 7, invalidate=["k"])
    assert await outcome(client) == "hit"
    assert await rows(db) == 0
    await nothing_else_was_heard(client, heard, eventually)


@pytest.mark.parametrize(
    ("query", "args", "tag"),
    [
        ("WITH old AS (SELECT n FROM things) UPDATE things SET n = 5 WHERE id = $1", ("a",), "UPDATE 1"),
        (
            "MERGE INTO things USING (SELECT 'a' AS id) AS new ON things.id = new.id "
            "WHEN MATCHED THEN UPDATE SET n = 5",
            (),
            "MERGE 1",
        ),
        ("UPDATE things SET n = 4; UPDATE things SET n = 5 WHERE id = 'a'", (), "UPDATE 1"),
        ("TRUNCATE owners", (), "TRUNCATE TABLE"),
    ],
    ids=["with", "merge", "several", "truncate"],
)
async def test_statements_that_cannot_be_combined_run_in_a_transaction(
    client: Client,
    db: asyncpg.Connection,
    heard: Listener,
    eventually: Eventually,
    query: str,
    args: tuple[Any, ...],
    tag: str,
) -> None:
    await keep(client)
    assert await client.execute(query, *args, invalidate=["k"]) == tag
    if tag != "TRUNCATE TABLE":
        assert await number(db) == 5
    assert await outcome(client) == "miss"
    await eventually(lambda: heard.keys == ["k"])
    await eventually(lambda: rows_are(db, 0))


async def test_half_of_several_statements_is_nothing(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    with pytest.raises(asyncpg.DivisionByZeroError):
        await client.execute("UPDATE things SET n = 4; SELECT 1 / 0", invalidate=["k"])
    assert await number(db) == 0
    await nothing_else_was_heard(client, heard, eventually)


async def test_a_statement_without_invalidations_is_only_executed(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    assert await client.execute(UPDATE, "a") == "UPDATE 1"
    assert len(await client.fetch("SELECT * FROM things")) == 2
    await nothing_else_was_heard(client, heard, eventually)


async def test_a_statement_with_2500_keys(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    keys = [f"k{n}" for n in range(2_500)]
    assert await client.execute(UPDATE, "a", invalidate=keys) == "UPDATE 1"
    await eventually(lambda: heard.keys == keys)
    await eventually(lambda: rows_are(db, 0))


# A statement within a transaction that says what it makes stale


async def test_what_a_statement_of_a_transaction_makes_stale(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    await keep(client)
    async with client.transaction() as tx:
        assert await tx.execute(UPDATE, "a", invalidate=["k"], tags=["t"]) == "UPDATE 1"
        row = await tx.fetchrow(f"{UPDATE} RETURNING n", "a", invalidate=["l"])
        assert row is not None
        assert row["n"] == 2
        assert await tx.fetchval(f"{UPDATE} RETURNING n", "a", invalidate=["m"]) == 3
        assert len(await tx.fetch("UPDATE things SET n = 3 RETURNING id", invalidate=["n"])) == 2
        tx.invalidate("o", versions=[8])
        assert await client.cache.would_serve("k"), "not committed yet"
        assert heard.messages == []
    assert await outcome(client) == "miss", "evicted here before it returns"
    await eventually(lambda: heard.keys == ["k", "l", "m", "n", "o"])
    assert (heard.messages[0].tags, heard.messages[0].versions) == (["t"], [None, None, None, None, 8])
    await eventually(lambda: rows_are(db, 0))
    assert client.stats()["coherence"]["skipped_echoes"] == 1


async def test_its_row_goes_along_with_the_statement(client: Client, db: asyncpg.Connection) -> None:
    """So that the COMMIT needs no round trip before it."""
    async with client.transaction() as tx:
        before = await tx.fetchval("SELECT count(*) FROM cacheinval.outbox")
        await tx.execute(UPDATE, "a", invalidate=["k"])
        assert await tx.fetchval("SELECT count(*) FROM cacheinval.outbox") - before == 1
        assert tx.unrecorded == []
        await tx.execute(UPDATE, "a", invalidate=[f"k{n}" for n in range(2_000)])
        assert await tx.fetchval("SELECT count(*) FROM cacheinval.outbox") - before == 1
        assert [len(row.arguments[1]) for row in tx.unrecorded] == [1_000, 1_000]
        await tx.execute(
            "MERGE INTO things USING things AS new ON false WHEN MATCHED THEN DELETE", invalidate=["l"]
        )
        assert {"k", "l"} <= {key for row in tx.unrecorded for key in row.arguments[1]}, (
            "both are written then"
        )


@pytest.mark.parametrize("how", ["tx", "connection", "nested"])
async def test_a_row_that_was_rolled_back_to_a_savepoint_is_written_again(
    client: Client,
    db: asyncpg.Connection,
    heard: Listener,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """What is named stays named, as by `tx.invalidate`: another statement may have changed it, too."""
    release = asyncio.Event()
    send = EventChannel.send

    async def wait(self: EventChannel, body: bytes) -> None:
        await release.wait()
        await send(self, body)

    monkeypatch.setattr(EventChannel, "send", wait)
    async with client.transaction() as tx:
        connection = tx.connection if how == "connection" else tx
        if how == "nested":
            with suppress(LookupError):
                async with tx.transaction():
                    await tx.execute(UPDATE, "a", invalidate=["k"])
                    fail()
        else:
            await connection.execute("SAVEPOINT here")
            await tx.execute(UPDATE, "a", invalidate=["k"])
            await connection.execute("ROLLBACK TO here")
        await tx.execute(UPDATE, "a")
    recorded = await db.fetch("SELECT keys FROM cacheinval.outbox")
    assert ["k"] in [row["keys"] for row in recorded]
    release.set()
    await eventually(lambda: heard.keys == ["k"])
    await eventually(lambda: rows_are(db, 0))


async def test_an_error_that_was_caught_does_not_end_as_if_it_had_committed(
    client: Client, db: asyncpg.Connection
) -> None:
    """Postgres answers such a COMMIT by a rollback, and asyncpg does not say so."""

    async def write() -> None:
        async with client.transaction() as tx:
            await tx.execute(UPDATE, "a", invalidate=["k"])
            with suppress(asyncpg.DivisionByZeroError):
                await tx.execute("SELECT 1 / 0")

    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        await write()
    await rows_are(db, 0)


async def test_a_statement_that_fails_before_it_is_sent_is_recorded_at_commit(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    """The transaction can go on; who has caught the error may have done the change in another way."""
    await keep(client)
    async with client.transaction() as tx:
        with pytest.raises(asyncpg.DataError):
            await tx.execute(UPDATE, 5, invalidate=["k"])
        assert len(tx.unrecorded) == 1
        await tx.execute(UPDATE, "a")
    assert await outcome(client) == "miss"
    await eventually(lambda: heard.keys == ["k"])
    await eventually(lambda: rows_are(db, 0))


async def test_a_rollback_takes_the_row_of_its_statement_along(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    await keep(client)
    with suppress(LookupError):
        async with client.transaction() as tx:
            await tx.execute(UPDATE, "a", invalidate=["k"])
            fail()
    with pytest.raises(asyncpg.DivisionByZeroError):
        async with client.transaction() as tx:
            await tx.execute("UPDATE things SET n = 1 / 0", invalidate=["k"])
    with pytest.raises(InvalidKeyError):
        async with client.transaction() as tx:
            await tx.execute(UPDATE, "a", invalidate=[""])
    assert await outcome(client) == "hit"
    assert (await number(db), await rows(db)) == (0, 0)
    await nothing_else_was_heard(client, heard, eventually)


async def test_after_a_lost_commit_the_row_of_a_statement_is_kept(
    far_client: Client, db: asyncpg.Connection, proxy: Proxy, heard: Listener, eventually: Eventually
) -> None:
    await keep(far_client)
    cut = proxy.cut_reply_after(b"COMMIT")
    with pytest.raises(CONNECTION_LOST):
        async with far_client.transaction() as tx:
            await tx.execute(UPDATE, "a", invalidate=["k"])
    assert cut.is_set()
    await eventually(lambda: heard.keys == ["k"])
    assert await outcome(far_client) == "miss"
    assert await far_client.publisher.flush(5)
    assert (await number(db), await rows(db)) == (1, 1)


# Other ways


async def test_record_in_a_transaction_of_ones_own(
    settings: Settings, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    """Its commit cannot be seen, so nothing is published here; the relay tells everyone, this instance too."""
    async with Client(settings) as client:
        await client.wait_ready(30)
        await keep(client)
        async with client.pool.acquire() as connection, connection.transaction():
            await connection.execute(UPDATE, "a")
            await client.record(connection, "k", tags=["t"])
        row = await db.fetchrow("SELECT * FROM cacheinval.outbox")
        assert row is not None
        assert (row["keys"], row["tags"], row["everything"]) == (["k"], ["t"], False)
        assert (row["publish_at"] - row["recorded_at"]).total_seconds() == pytest.approx(0, abs=0.01)
        assert await outcome(client) == "hit"
        assert heard.messages == []
        with pytest.raises(InvalidKeyError):
            await client.record(db, "")
        await client.record(db)
        assert await rows(db) == 1
        async with Client(settings.model_copy(update={"relay": "auto"}), subscribe=False):
            await eventually(lambda: heard.keys == ["k"])
            await eventually(lambda: outcome_is(client, "miss"))
            await eventually(lambda: rows_are(db, 0))
    assert client.stats()["coherence"]["skipped_echoes"] == 0


async def outcome_is(client: Client, expected: str) -> bool:
    return await outcome(client) == expected


async def test_a_large_write_is_warned_of_once_before_it_is_committed(
    client: Client, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transactions, "LARGE", 1_500)
    keys = [f"k{n}" for n in range(1_501)]

    def warned() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.name == "cacheinval.writes"]
        caplog.clear()
        return lines

    await client.execute(UPDATE, "a", invalidate=keys)
    (line,) = warned()
    assert line == (
        "a large write: give these entries a tag and invalidate that, or everything keys=1501 tags=0 above=1500"
    )
    with suppress(LookupError):
        async with client.transaction() as tx:
            tx.invalidate(*keys)
            raise LookupError
    assert warned() == [], "it never came to that"
    async with client.transaction() as tx:
        for key in keys:
            tx.invalidate(key, tags=[key])
    assert len(warned()) == 1
    async with client.pool.acquire() as connection, connection.transaction():
        await client.record(connection, *keys)
    assert len(warned()) == 1
    await client.invalidate(*keys)
    assert len(warned()) == 1
    async with client.transaction() as tx:
        tx.invalidate(*keys, everything=True)
    await client.invalidate(*keys[:1_500])
    assert warned() == []


async def test_record_is_rolled_back_with_the_rest(client: Client, db: asyncpg.Connection) -> None:
    transaction = db.transaction()
    await transaction.start()
    await client.record(db, "k")
    assert await rows(db) == 1
    await transaction.rollback()
    assert await rows(db) == 0


async def test_invalidate_commits_its_row(
    client: Client, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    await keep(client)
    await client.invalidate("k", tags=["t"])
    assert await outcome(client) == "miss"
    await client.invalidate(*[f"k{n}" for n in range(2_500)])
    await client.invalidate(everything=True)
    await eventually(lambda: bool(heard.messages) and heard.messages[-1].all)
    assert heard.messages[0].keys == ["k"]
    assert heard.keys[1:] == [f"k{n}" for n in range(2_500)]
    await eventually(lambda: rows_are(db, 0))


async def test_a_pool_of_ones_own_is_used_and_not_closed(
    settings: Settings, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    async with asyncpg.create_pool(settings.database_url, min_size=1, max_size=2) as pool:
        nowhere = settings.model_copy(update={"database_url": "postgresql://127.0.0.1:1/nowhere"})
        async with Client(nowhere, pool=pool) as client:
            assert client.pool is pool
            await client.execute(UPDATE, "a", invalidate=["k"])
            await eventually(lambda: heard.keys == ["k"])
        assert await pool.fetchval("SELECT n FROM things WHERE id = 'a'") == 1
        assert pool.get_idle_size() == pool.get_size()


async def test_every_connection_is_given_back(
    client: Client, db: asyncpg.Connection, eventually: Eventually
) -> None:
    for _ in range(30):  # more than the pool has
        with pytest.raises(LookupError):
            await write(client, last=fail)
        with pytest.raises(asyncpg.UniqueViolationError):
            await client.execute("INSERT INTO things VALUES ('a', 1)", invalidate=["k"])
        await client.execute(UPDATE, "b", invalidate=["k"])
    await eventually(lambda: client.pool.get_idle_size() == client.pool.get_size())


# What is missing or down


async def test_without_the_schema_nothing_is_changed(
    settings: Settings, bare: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    async with Client(settings) as client:
        await client.wait_ready(30)
        await keep(client)
        with pytest.raises(SchemaMissingError, match="cacheinval schema apply"):
            await write(client, "k")
        with pytest.raises(SchemaMissingError):
            await client.execute(UPDATE, "a", invalidate=["k"])
        with pytest.raises(SchemaMissingError):
            async with client.transaction() as tx:
                await tx.execute(UPDATE, "a", invalidate=["k"])
        with pytest.raises(SchemaMissingError):
            await client.invalidate("k")
        with pytest.raises(SchemaMissingError):
            await client.record(bare, "k")
        assert await number(bare) == 0
        assert await outcome(client) == "hit"
        await eventually(lambda: client.status()["writing"]["failing"])
        assert "cacheinval schema apply" in client.status()["writing"]["reason"]
        await client.apply_schema()
        await client.apply_schema()
        await nothing_else_was_heard(client, heard, eventually)


async def one_statement(client: Client) -> None:
    await client.execute(UPDATE, "a", invalidate=["k"])


async def in_a_transaction(client: Client) -> None:
    await write(client, "k")


async def with_a_statement_of_a_transaction(client: Client) -> None:
    async with client.transaction() as tx:
        await tx.execute(UPDATE, "a", invalidate=["k"])


async def caught_within_a_transaction(client: Client) -> None:
    async with client.transaction() as tx:
        with suppress(DatabaseError):
            await tx.execute(UPDATE, "a", invalidate=["k"])


async def alone(client: Client) -> None:
    await client.invalidate("k")


async def recorded(client: Client) -> None:
    async with client.pool.acquire() as connection, connection.transaction():
        await client.record(connection, "k")


WELL = {"failing": False, "since": None, "reason": None}
REFUSES, TAKES = "the outbox refuses what is written", "the outbox takes what is written"


def said_of_the_outbox(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.split(" reason=")[0] for line in caplog.messages if line.startswith("the outbox")]


WAYS_TO_WRITE = (
    one_statement,
    in_a_transaction,
    with_a_statement_of_a_transaction,
    caught_within_a_transaction,
    alone,
    recorded,
)


@pytest.mark.parametrize("writes_so", WAYS_TO_WRITE, ids=lambda way: way.__name__)
async def test_a_refusal_of_the_outbox_is_told_until_it_takes_a_row(
    limited: Client,
    db: asyncpg.Connection,
    namespace: str,
    writes_so: Callable[[Client], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusals, "PAUSE", 600.0)
    caplog.set_level("INFO")
    await writes_so(limited)
    assert limited.status()["writing"] == WELL
    await db.execute(f"REVOKE INSERT ON cacheinval.outbox FROM {namespace}")
    began = time.time()
    for _ in range(2):
        with pytest.raises((DatabaseError, asyncpg.InFailedSQLTransactionError)):
            await writes_so(limited)
    await eventually(lambda: limited.status()["writing"]["failing"])
    refused = limited.status()["writing"]
    assert began <= refused["since"] <= time.time()
    assert refused["reason"].startswith("permission denied for table outbox")
    async with limited.transaction() as tx:
        await tx.execute(UPDATE, "a")
    assert limited.status()["writing"] == refused, "what names nothing says nothing of the outbox"
    await db.execute(f"GRANT INSERT ON cacheinval.outbox TO {namespace}")
    await writes_so(limited)
    if writes_so is recorded:  # whose commit is not seen here
        await limited._outbox.ask(limited.pool)
    assert limited.status()["writing"] == WELL
    assert said_of_the_outbox(caplog) == [REFUSES, TAKES]


@pytest.fixture
def answers(limited: Client, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each time that the client has asked whether it could write: whether it could. It asks often."""
    monkeypatch.setattr(refusals, "PAUSE", 0.02)
    answers: list[bool] = []
    ask = limited._outbox.ask

    async def note(pool: Any) -> None:
        try:
            await ask(pool)
        finally:
            answers.append(limited._outbox.refused is None)

    monkeypatch.setattr(limited._outbox, "ask", note)
    return answers


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        ("REVOKE INSERT ON cacheinval.outbox FROM {}", "GRANT INSERT ON cacheinval.outbox TO {}"),
        ("REVOKE USAGE ON SCHEMA cacheinval FROM PUBLIC, {}", "GRANT USAGE ON SCHEMA cacheinval TO PUBLIC"),
        ("ALTER TABLE cacheinval.outbox RENAME tags TO t", "ALTER TABLE cacheinval.outbox RENAME t TO tags"),
        ("ALTER TABLE cacheinval.outbox RENAME TO o", "ALTER TABLE cacheinval.o RENAME TO outbox"),
    ],
)
async def test_an_instance_that_writes_no_more_finds_out_that_it_could(
    limited: Client,
    db: asyncpg.Connection,
    namespace: str,
    answers: list[bool],
    eventually: Eventually,
    fault: str,
    remedy: str,
) -> None:
    for _ in range(2):
        await db.execute(fault.format(namespace))
        with pytest.raises(DatabaseError):
            await limited.execute(UPDATE, "a", invalidate=["k"], tags=["t"])
        await eventually(lambda: limited.status()["writing"]["failing"])
        refused, known = limited.status()["writing"], len(answers)
        await eventually(lambda known=known: len(answers) >= known + 3)
        assert limited.status()["writing"] == refused
        await db.execute(remedy.format(namespace))
        await eventually(lambda: not limited.status()["writing"]["failing"])
    assert (await number(db), await rows(db)) == (0, 0)
    known = len(answers)
    await limited.execute(UPDATE, "a", invalidate=["k"], tags=["t"])
    assert len(answers) == known, "nobody asks where all is well"


async def test_a_client_that_asks_whether_it_could_write_ends_all_the_same(
    settings: Settings, bare: asyncpg.Connection, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking: list[asyncio.Task[Any]] = []

    async def hang(executor: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        asking.append(task)
        await asyncio.Event().wait()

    async with asyncio.timeout(60), Client(settings) as client:
        monkeypatch.setattr(client._outbox, "ask", hang)
        with pytest.raises(SchemaMissingError):
            await client.invalidate("k")
        await eventually(lambda: asking)
    assert [task.cancelled() for task in asking] == [True]


async def test_errors_of_a_statement_are_no_refusal_of_the_outbox(
    limited: Client, db: asyncpg.Connection, namespace: str
) -> None:
    await db.execute("CREATE TABLE instances (id int)")  # as one of ours is called
    for query in (
        "INSERT INTO instances VALUES (1)",
        "INSERT INTO things VALUES ('a', 1)",
        "DELETE FROM nowhere",
    ):
        with pytest.raises(asyncpg.PostgresError):
            await limited.execute(query, invalidate=["k"])
        with pytest.raises(asyncpg.PostgresError):
            async with limited.transaction() as tx:
                await tx.execute(query, invalidate=["k"])
    assert not limited.status()["writing"]["failing"]


@pytest.mark.parametrize("query", ["UPDATE outbox SET nope = 1", "INSERT INTO outbox VALUES (1)"])
async def test_errors_of_a_table_that_is_called_the_same_are_no_refusal_of_the_outbox(
    limited: Client,
    db: asyncpg.Connection,
    answers: list[bool],
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
    query: str,
) -> None:
    await db.execute("CREATE TABLE public.outbox (id int)")  # which the role may not write, either
    with pytest.raises(DatabaseError):
        await limited.execute(query, invalidate=["k"])
    assert limited.status()["writing"] == WELL
    await eventually(lambda: answers)
    assert limited.status()["writing"] == WELL
    assert said_of_the_outbox(caplog) == []


async def test_what_another_role_may_or_may_not_write_says_nothing_of_the_clients_own(
    limited: Client,
    db: asyncpg.Connection,
    namespace: str,
    answers: list[bool],
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    await db.execute("SET ROLE pg_monitor")
    with pytest.raises(DatabaseError, match="permission denied for table outbox"):
        await limited.record(db, "k")
    await db.execute("RESET ROLE")
    assert limited.status()["writing"] == WELL
    await eventually(lambda: answers)
    assert limited.status()["writing"] == WELL
    await db.execute(f"REVOKE INSERT ON cacheinval.outbox FROM {namespace}")
    with pytest.raises(DatabaseError):
        await limited.invalidate("k")
    await eventually(lambda: limited.status()["writing"]["failing"])
    await limited.record(db, "k")
    assert limited.status()["writing"]["failing"]
    assert said_of_the_outbox(caplog) == [REFUSES]


async def test_a_broker_that_is_down_neither_fails_nor_delays_a_write(
    client: Client, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    async def refuse() -> Any:
        raise PublishError("no broker there")

    monkeypatch.setattr(client.bus, "open_channel", refuse)
    await keep(client)
    async with asyncio.timeout(60):
        for _ in range(10):
            async with client.transaction() as tx:
                await tx.execute(UPDATE, "a")
                tx.invalidate("k")
            await client.execute(UPDATE, "a", invalidate=["k"])
            await client.invalidate("k")
    assert await outcome(client) == "miss"
    assert await client.publisher.flush(60)
    assert (await number(db), await rows(db)) == (20, 30)
    assert client.publisher.failing


async def test_a_broker_that_hangs_does_not_delay_a_write(
    client: Client, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    async def hang() -> Any:
        await release.wait()
        raise PublishError("it was no broker")

    monkeypatch.setattr(client.bus, "open_channel", hang)
    async with asyncio.timeout(60):
        for _ in range(10):
            await client.execute(UPDATE, "a", invalidate=["k"])
    assert await rows(db) == 10
    release.set()


async def test_a_database_that_is_down_is_an_error_and_reads_go_on(
    far_client: Client, proxy: Proxy, heard: Listener
) -> None:
    await keep(far_client)
    proxy.cut()
    async with asyncio.timeout(60):
        with pytest.raises(CONNECTION_LOST):
            await far_client.execute(UPDATE, "a", invalidate=["k"])
        with pytest.raises(CONNECTION_LOST):
            async with far_client.transaction():
                pytest.fail("entered")
    assert await outcome(far_client) in ("hit", "miss")


async def test_what_is_under_way_is_published_before_the_client_ends(
    settings: Settings, db: asyncpg.Connection, heard: Listener, eventually: Eventually
) -> None:
    async with Client(settings) as client:
        for n in range(20):
            await client.execute(UPDATE, "a", invalidate=[f"k{n}"])
    await eventually(lambda: len(heard.keys) == 20)
    assert await rows(db) == 0, "rows are deleted before it ends"


async def test_who_writes_alone_does_not_wait_until_its_connection_is_reset(
    settings: Settings, db: asyncpg.Connection, eventually: Eventually
) -> None:
    may_reset = asyncio.Event()

    async def reset(connection: object) -> None:
        await may_reset.wait()

    pool = await asyncpg.create_pool(settings.database_url, min_size=0, max_size=2, reset=reset)
    async with pool, Client(settings, pool=pool) as client:
        try:
            async with asyncio.timeout(60), client.transaction() as tx:
                await tx.execute(UPDATE, "a")
                tx.invalidate("k")
            assert pool.get_idle_size() == 0, "it is still being reset"
            assert await number(db) == 1
        finally:
            may_reset.set()
        await eventually(lambda: pool.get_idle_size() == pool.get_size())


@pytest.mark.parametrize("name", ["execute", "fetch", "fetchrow", "fetchval"])
def test_a_transaction_takes_the_arguments_that_asyncpg_takes(name: str) -> None:
    def taken(owner: type) -> dict[str, Any]:
        parameters = inspect.signature(getattr(owner, name)).parameters
        return {one.name: (one.kind, one.default) for one in parameters.values()}

    ours = taken(Transaction)
    assert (ours.pop("invalidate"), ours.pop("tags")) == 2 * ((inspect.Parameter.KEYWORD_ONLY, ()),)
    assert ours == taken(asyncpg.Connection)


async def test_what_asyncpg_is_asked_for_in_a_transaction_is_what_it_gives(client: Client) -> None:
    class Ours(asyncpg.Record):
        pass

    async with client.transaction() as tx:
        assert await tx.fetchval("SELECT 1, 2", column=1) == 2
        assert type(await tx.fetchrow("SELECT 1", record_class=Ours)) is Ours
        assert [type(one) for one in await tx.fetch("SELECT 1", record_class=Ours)] == [Ours]


async def test_a_connection_that_is_given_back_as_the_client_ends_is_given_back(
    settings: Settings, db: asyncpg.Connection, eventually: Eventually
) -> None:
    async with asyncpg.create_pool(settings.database_url, min_size=0, max_size=2) as pool:
        async with Client(settings, pool=pool, subscribe=False) as client, client.transaction() as tx:
            await tx.execute(UPDATE, "a")  # and no names, for which the publisher would be waited for
        try:
            await eventually(lambda: pool.get_idle_size() == pool.get_size() == 1)
        except BaseException:
            pool.terminate()  # closing it would wait for ever
            raise


SETTING = "SELECT current_setting('app.tenant', true)"
LEAK = "UPDATE things SET n = 1 WHERE set_config('app.tenant', 'one', false) IS NULL"


async def leaked(client: Client, eventually: Eventually) -> set[str]:
    """What is set in the sessions of all connections that the client has."""
    await eventually(lambda: client.pool.get_idle_size() == client.pool.get_size())
    async with AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(client.pool.acquire()) for _ in range(client.pool.get_size())
        ]
        return {await one.fetchval(SETTING) or "" for one in sessions} - {""}


async def test_a_session_is_reset_only_where_something_may_have_changed_it(
    settings: Settings, db: asyncpg.Connection, eventually: Eventually
) -> None:
    class Counting:
        """How often asyncpg asks for what resets a session, and is given something."""

        def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
            self.resets = 0
            real = asyncpg.Connection.get_reset_query

            def counted(connection: asyncpg.Connection) -> str:
                self.resets += 1
                return real(connection)

            monkeypatch.setattr(asyncpg.Connection, "get_reset_query", counted)

    with pytest.MonkeyPatch.context() as patch:
        async with Client(settings, subscribe=False) as client:
            counting = Counting(patch)
            await client.execute(UPDATE, "a", invalidate=["k"])
            async with client.transaction() as tx:
                await tx.execute(UPDATE, "a")
                assert await tx.fetchval("SELECT count(*) FROM things") > 0
                tx.invalidate("k")
            assert counting.resets == 0
            assert await client.publisher.flush(60)
            for change in (
                lambda tx: tx.fetchval("SELECT set_config('app.tenant', 'one', false)"),
                lambda tx: tx.connection.execute("SET app.tenant = 'one'"),
                lambda tx: tx.executemany("SELECT set_config('app.tenant', $1, false)", [["one"]]),
            ):
                async with client.transaction() as tx:
                    await change(tx)
                assert not await leaked(client, eventually)
            await client.execute(LEAK, invalidate=["k"])
            assert not await leaked(client, eventually)


async def test_many_who_write_at_once_take_a_connection_each_and_no_more(
    settings: Settings, db: asyncpg.Connection
) -> None:
    pool = await asyncpg.create_pool(settings.database_url, min_size=0, max_size=20)
    async with pool, Client(settings, pool=pool, subscribe=False) as client:

        async def writer() -> None:
            for _ in range(30):
                await client.execute(UPDATE, "a", invalidate=["k"])

        await asyncio.gather(*(writer() for _ in range(4)))
        # One more for the publisher, which deletes rows.
        assert pool.get_size() <= 5
        assert await number(db) == 120
