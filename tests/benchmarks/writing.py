"""A write with its invalidation, beside a bare transaction of asyncpg.

All variants change one row of the same table, through asyncpg's pool as it comes or the client's own, both of ten
connections, on a server that makes each commit durable. Each write names a key of its own, so that what arrives at a subscriber can be counted: its queue is read after the clock.
"""

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aio_pika
import asyncpg

from cacheinval import Client, Settings
from cacheinval.outbox import Outbox, apply_schema
from cacheinval.outbox.session import Session
from cacheinval.outbox.writing import Insert
from cacheinval.sandbox import Sandbox

from .measuring import Figures, cpu_seconds, percentile, take_turns
from .reporting import Cell, Report
from .servers import private_servers

ROWS = 10_000
WRITERS = (1, 16, 64)
SECONDS = 0.5
OUTBOX_ROWS = int(os.environ.get("BENCH_OUTBOX_ROWS", "1000000"))
"""Rows that pass through the outbox which is then compared with a new one; ten million take two minutes."""
ROWS_AT_ONCE = 2_000
AUTOVACUUM_THRESHOLD = 2_000  # dead rows, as the schema sets it

DURABLE = ("fsync", "synchronous_commit", "full_page_writes")

TABLE = f"""
    CREATE TABLE products (id integer PRIMARY KEY, price bigint NOT NULL, version bigint NOT NULL);
    INSERT INTO products SELECT id, 100, 1 FROM generate_series(0, {ROWS - 1}) AS id
"""
TRACKED_TABLE = """
    CREATE TABLE tracked (LIKE products INCLUDING ALL);
    INSERT INTO tracked SELECT * FROM products;
    SELECT cacheinval.track('tracked', 'tracked:{id}', 'version')
"""
UPDATE = "UPDATE products SET price = price + 1, version = version + 1 WHERE id = $1"
UPDATE_TRACKED = UPDATE.replace("products", "tracked")
INSERT = Insert("default").sql()
TRANSACTION = "client.transaction, tx.execute(…, invalidate=)"
CHANGES = "SELECT (SELECT sum(version) FROM products) + (SELECT sum(version) FROM tracked)"

Write = Callable[[int, str], Awaitable[Any]]
"""Changes the row with this number, and tells whoever has to know that this key is stale."""


class Scene:
    """A client at work, a table, and a subscriber's queue."""

    def __init__(self, sandbox: Sandbox, client: Client, pool: Any, channel: Any, queue: Any) -> None:
        self.client = client
        self.pool = pool
        self._sandbox = sandbox
        self._channel = channel
        self._exchange: Any = None
        self._queue = queue
        self._numbers = itertools.count()

    async def bare(self, row: int, key: str) -> None:
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute(UPDATE, row)

    async def bare_with_row(self, row: int, key: str) -> None:
        """The floor for `client.transaction`: what the row costs by itself, with nobody to publish it but the relay."""
        values = Outbox("default").rows([key], publish_here=False)
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute(UPDATE, row)
            await connection.execute(INSERT, *values[0].arguments)

    async def update(self, row: int, key: str) -> None:
        await self.pool.execute(UPDATE, row)

    async def tracked(self, row: int, key: str) -> None:
        await self.pool.execute(UPDATE_TRACKED, row)

    async def transaction(self, row: int, key: str) -> None:
        async with self.client.transaction() as tx:
            await tx.execute(UPDATE, row)
            tx.invalidate(key)

    async def transaction_at_once(self, row: int, key: str) -> None:
        async with self.client.transaction() as tx:
            await tx.execute(UPDATE, row, invalidate=[key])

    async def execute(self, row: int, key: str) -> None:
        await self.client.execute(UPDATE, row, invalidate=[key])

    async def fetchrow(self, row: int, key: str) -> None:
        assert await self.client.fetchrow(f"{UPDATE} RETURNING version", row, invalidate=[key]) is not None

    async def publish_each(self, row: int, key: str) -> None:
        await self.bare(row, key)
        body = b'{"v": 1, "kind": "invalidate", "keys": ["%s"]}' % key.encode()
        message = aio_pika.Message(body, content_type="application/json")
        if self._exchange is None:
            name = f"cacheinval.{self.client.settings.namespace}"
            self._exchange = await self._channel.get_exchange(name, ensure=False)
        await self._exchange.publish(message, "")

    async def measure(self, write: Write, writers: int, seconds: float = SECONDS) -> dict[str, float]:
        """Writes from so many tasks at once, and then sees whether it was all done."""
        await self._write(write, writers, time.perf_counter() + 0.05)  # connects, and prepares the statements
        await self._drained()
        await self._arrived()
        changes = await self.pool.fetchval(CHANGES)
        broker, database = self._sandbox.rabbitmq.pids, self._sandbox.postgres.pids
        used = time.process_time(), cpu_seconds(*broker[:1]), cpu_seconds(*database[:1])
        began = time.perf_counter()
        took, keys = await self._write(write, writers, began + seconds)
        written = time.perf_counter()
        await self._drained()
        drained = time.perf_counter()
        cpu = [
            now - before
            for now, before in zip(
                (time.process_time(), cpu_seconds(*broker[:1]), cpu_seconds(*database[:1])), used, strict=True
            )
        ]
        done = await self.pool.fetchval(CHANGES) - changes
        if done != len(took):
            raise AssertionError(f"{len(took)} writes, but {done} rows were changed")
        if missing := await self._missing(write, keys):
            raise AssertionError(
                f"{len(missing)} of {len(keys)} keys did not arrive: {sorted(missing)[:3]} …"
            )
        return {
            "p50": 1_000 * percentile(took, 0.5),
            "p99": 1_000 * percentile(took, 0.99),
            "rate": len(took) / (written - began),
            "drained": len(took) / (drained - began),
            "client": 1_000_000 * cpu[0] / len(took),
            "broker": 1_000_000 * cpu[1] / len(took),
            "database": 1_000_000 * cpu[2] / len(took),
        }

    async def _write(self, write: Write, writers: int, until: float) -> tuple[list[float], set[str]]:
        took: list[float] = []
        keys: set[str] = set()

        async def writer(number: int) -> None:
            rows = list(range(number, ROWS, writers))  # nobody waits for another's lock
            random.Random(number).shuffle(rows)
            for row in itertools.cycle(rows):
                key = f"product:{row}:{next(self._numbers)}"
                began = time.perf_counter()
                await write(row, key)
                ended = time.perf_counter()
                took.append(ended - began)
                keys.add(f"tracked:{row}" if write == self.tracked else key)
                if ended > until:
                    return

        await asyncio.gather(*map(writer, range(writers)))
        return took, keys

    async def _drained(self) -> None:
        """Until all that was written is published, confirmed and deleted."""
        async with asyncio.timeout(60):
            await self.client.publisher.flush(60)
            while await self.pool.fetchval("SELECT EXISTS (SELECT FROM cacheinval.outbox)"):
                await asyncio.sleep(0.005)

    async def _missing(self, write: Write, keys: set[str]) -> set[str]:
        return set() if write in (self.bare, self.update) else keys - await self._arrived()

    async def _arrived(self) -> set[str]:
        """All keys that the subscriber's queue holds; it is empty then."""
        return named(await received(self._channel, self._queue))


async def received(channel: Any, queue: Any) -> list[dict[str, Any]]:
    """All messages that the queue holds, which is read up to one that is sent now."""
    messages: list[dict[str, Any]] = []
    end = asyncio.Event()

    async def receive(message: Any) -> None:
        if message.body == b"end":
            end.set()
        else:
            messages.append(json.loads(message.body))

    tag = await queue.consume(receive, no_ack=True)
    await channel.default_exchange.publish(aio_pika.Message(b"end"), queue.name)
    async with asyncio.timeout(60):
        await end.wait()
    await queue.cancel(tag)
    return messages


def named(messages: list[dict[str, Any]]) -> set[str]:
    """The keys that these messages name."""
    return {key for message in messages for key in message.get("keys", ())}


@asynccontextmanager
async def subscriber(url: str, namespace: str) -> AsyncIterator[tuple[Any, Any]]:
    """A channel, and a queue that gets what every instance gets."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(f"cacheinval.{namespace}", "fanout", durable=True)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange)
        yield channel, queue


async def check_durable(connection: Any) -> None:
    """Raises where a commit would not wait for the disk: nothing could be said about writes."""
    for name in DURABLE:
        value = await connection.fetchval(f"SHOW {name}")
        if value != "on":
            raise AssertionError(f"{name} is {value}; accepted: on")


async def run(report: Report, rounds: int) -> None:
    """Runs it."""
    async with private_servers("rabbitmq", "postgres") as sandbox:
        used = UsedOutbox(sandbox.postgres.url)
        with report.part(f"{OUTBOX_ROWS:,} rows through an outbox"):
            await used.use(report)
        await beside_bare(report, sandbox, rounds)  # while autovacuum comes to that one in its own time
        with report.part("an outbox that is new beside one that is not"):
            await used.compare(sandbox, report, rounds)


async def beside_bare(report: Report, sandbox: Sandbox, rounds: int) -> None:
    """Every sort of write, by so many writers at once."""
    url = await database(sandbox.postgres.url, "writing")
    pool = await asyncpg.create_pool(url)  # of ten connections, as the client's own
    await check_durable(pool)
    await pool.execute(f"{TABLE}; {TRACKED_TABLE}")
    await pool.execute("VACUUM ANALYZE products, tracked")
    settings = Settings(broker_url=sandbox.rabbitmq.url, database_url=url)
    async with Client(settings) as client, subscriber(sandbox.rabbitmq.url, "default") as bound:
        await client.wait_ready(10)
        scene = Scene(sandbox, client, pool, *bound)
        for writers in WRITERS:
            with report.part(f"{writers} writers"):
                found = await take_turns(variants(scene, writers), rounds, report.progress)
            show(report, writers, found)
    await pool.close()


def variants(scene: Scene, writers: int) -> dict[str, Any]:
    """All that are compared with so many writers."""
    writes = {
        "BEGIN, UPDATE, COMMIT": scene.bare,
        "BEGIN, UPDATE, INSERT, COMMIT": scene.bare_with_row,
        TRANSACTION: scene.transaction_at_once,
        "client.transaction, tx.invalidate": scene.transaction,
        "client.execute": scene.execute,
        "client.fetchrow": scene.fetchrow,
        "BEGIN, UPDATE, COMMIT, publish, confirm": scene.publish_each,
        "UPDATE": scene.update,
        "UPDATE of a tracked table": scene.tracked,
    }

    def variant(write: Write) -> Any:
        return lambda: scene.measure(write, writers)

    return {name: variant(write) for name, write in writes.items()}


def show(report: Report, writers: int, found: Figures) -> None:
    """The table for so many writers, and whether the targets hold."""
    bare = found["BEGIN, UPDATE, COMMIT"]
    columns = {
        "p50, ms": "p50",
        "p99, ms": "p99",
        "writes/s": "rate",
        "until drained": "drained",
        "client, ms of CPU for 1000": "client",
        "broker": "broker",
        "database": "database",
    }
    rows: dict[str, list[Cell]] = {
        name: [
            *(figures[what] for what in columns.values()),
            figures["p50"] / bare["p50"],
            figures["rate"] / bare["rate"],
        ]
        for name, figures in found.items()
    }
    report.table(f"{writers} writers" if writers > 1 else "1 writer", [*columns, "x p50", "x writes/s"], rows)
    if writers == 1:
        for name, limit in (
            (TRANSACTION, 1.35),
            ("client.execute", 0.75),
            ("client.fetchrow", 0.75),
        ):
            report.at_most(f"{name}, p50 with 1 writer", found[name]["p50"] / bare["p50"], limit)
    else:
        limits = {TRANSACTION: 0.8} | (
            {"client.execute": 1.2, "client.fetchrow": 1.2} if writers == 16 else {}
        )
        for name, limit in limits.items():
            report.at_least(
                f"{name}, writes/s with {writers} writers", found[name]["rate"] / bare["rate"], limit
            )


class UsedOutbox:
    """An outbox that as many rows went through as in days of service, at the pace of a bulk load."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.took = 0.0
        self.largest = 0

    async def use(self, report: Report) -> None:
        """Has rows inserted as writes leave them, and deleted as a publisher does, with autovacuum as it is set."""
        connection = await asyncpg.connect(await database(self._server, "used"))
        outbox = Outbox("default")
        began = time.perf_counter()
        await connection.execute("SET synchronous_commit = off")
        for done in range(0, OUTBOX_ROWS, ROWS_AT_ONCE):
            rows = await connection.fetch(
                "INSERT INTO cacheinval.outbox (namespace, keys) "
                "SELECT 'default', ARRAY['product:' || n] FROM generate_series($1::int + 1, $1 + $2) AS n RETURNING id",
                done,
                ROWS_AT_ONCE,
            )
            await outbox.delete(connection, [row["id"] for row in rows])
            if done % (10 * ROWS_AT_ONCE) == 0:
                report.progress(f"{done:,} of {OUTBOX_ROWS:,} rows through the outbox")
                self.largest = max(self.largest, (await sizes(connection))["total"])
        self.took = time.perf_counter() - began
        await connection.close()

    async def compare(self, sandbox: Sandbox, report: Report, rounds: int) -> None:
        """Writes and polls, there and in a new database."""
        urls = {"new": await database(self._server, "new"), "used": address(self._server, "used")}
        async with AsyncExitStack() as stack:
            outboxes = {}
            for name, url in urls.items():
                settings = Settings(
                    broker_url=sandbox.rabbitmq.url, database_url=url, namespace=name, relay="off"
                )
                client = await stack.enter_async_context(Client(settings, subscribe=False))
                await client.pool.execute(f"{TABLE}; CHECKPOINT")
                await check_durable(client.pool)
                await stack.enter_async_context(subscriber(sandbox.rabbitmq.url, name))
                outboxes[name] = client
            await vacuumed(outboxes["used"].pool, report)
            found = await take_turns(
                {name: lambda client=client: write_and_poll(client) for name, client in outboxes.items()},
                rounds,
                report.progress,
            )
            state = {name: await sizes(client.pool) for name, client in outboxes.items()}
            options = await outboxes["new"].pool.fetchval(
                "SELECT array_to_string(reloptions, ', ') FROM pg_class WHERE oid = 'cacheinval.outbox'::regclass"
            )
        report.table(
            f"An outbox after {OUTBOX_ROWS:,} rows",
            ["write p50, ms", "poll p50, ms", "table, kB", "index, kB", "dead rows", "autovacuums"],
            {
                name: [
                    figures["write"],
                    figures["poll"],
                    *(f"{state[name][what]:,}" for what in ("table", "index", "dead", "vacuums")),
                ]
                for name, figures in found.items()
            },
            note=f"{options}\n{OUTBOX_ROWS / self.took:,.0f} rows/s went through; then it had up to {self.largest:,} kB",
        )
        for what in ("write", "poll"):
            ratio = found["used"][what] / found["new"][what]
            report.at_most(f"{what} with an outbox that {OUTBOX_ROWS:,} rows went through", ratio, 1.1)


async def write_and_poll(client: Client) -> dict[str, float]:
    """What a write takes, and a look of the relay at the outbox while it is empty; in milliseconds."""
    began = time.perf_counter()
    took = []
    while time.perf_counter() < began + SECONDS:
        before = time.perf_counter()
        row = len(took) % ROWS
        tag = await client.execute(UPDATE, row, invalidate=[f"product:{row}"])
        took.append(time.perf_counter() - before)
        assert tag == "UPDATE 1"
    assert await client.publisher.flush(10)
    session = Session(await asyncpg.connect(client.settings.database_url), client.settings.namespace)
    await session.prepare(60)
    looks = []
    for _ in range(1_000):
        before = time.perf_counter()
        rows = await session.due()
        looks.append(time.perf_counter() - before)
        assert not rows
    await session.close()
    return {"write": 1_000 * percentile(took, 0.5), "poll": 1_000 * percentile(looks, 0.5)}


async def vacuumed(connection: Any, report: Report) -> None:
    """Until autovacuum has come by itself, since the last rows were deleted; by default it looks once a minute."""
    async with asyncio.timeout(150):
        while (await sizes(connection))["dead"] > AUTOVACUUM_THRESHOLD:
            report.progress("waiting for autovacuum")
            await asyncio.sleep(1)
    if not (await sizes(connection))["vacuums"]:
        raise AssertionError("autovacuum has not been there: nothing is known of an outbox in use")


async def sizes(connection: Any) -> dict[str, int]:
    """The outbox, in kB and rows."""
    row = await connection.fetchrow("""
        SELECT pg_table_size(relid) / 1024 AS "table", pg_indexes_size(relid) / 1024 AS "index",
            pg_total_relation_size(relid) / 1024 AS total, n_dead_tup AS dead, autovacuum_count AS vacuums
        FROM pg_stat_user_tables WHERE relid = 'cacheinval.outbox'::regclass
    """)
    return dict(row)


def address(server: str, name: str) -> str:
    """The URL of another database on this server."""
    return f"{server.rpartition('/')[0]}/{name}"


async def database(server: str, name: str) -> str:
    """Makes a database with the schema, and returns its URL."""
    connection = await asyncpg.connect(server)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    connection = await asyncpg.connect(address(server, name))
    await apply_schema(connection)
    await connection.close()
    return address(server, name)
