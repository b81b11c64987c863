"""The relay: a backlog, a database where nothing happens, and rows that only a trigger recorded."""

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
from aiocache import SimpleMemoryCache

from cacheinval import Client, Settings
from cacheinval.sandbox import Sandbox

from .measuring import Figures, cpu_seconds, percentile, take_turns
from .reporting import Report
from .servers import private_servers
from .writing import check_durable, database, named, received, subscriber

BACKLOG = 100_000
ROWS_A_COMMIT = 500
IDLE_SECONDS = 6.0
INSTANCES = 4
TRIGGERED = 250
RATE = 100  # writes a second

INSERT = """
    INSERT INTO cacheinval.outbox (id, namespace, keys, tags, everything, publish_at)
    SELECT gen_random_uuid(), 'default', ARRAY['product:' || n], '{}', false, clock_timestamp() + interval '0.25 s'
    FROM generate_series($1::int, $2) AS n
"""
TABLE = """
    CREATE TABLE tracked (id integer PRIMARY KEY, price bigint NOT NULL, version bigint NOT NULL);
    INSERT INTO tracked SELECT id, 100, 1 FROM generate_series(1, 10000) AS id;
    SELECT cacheinval.track('tracked', 'tracked:{id}', 'version', namespace => 'triggered')
"""


async def run(report: Report, rounds: int) -> None:
    """Runs it."""
    async with private_servers("rabbitmq", "postgres") as sandbox:
        found = await take_turns(
            {
                "backlog": await backlog(sandbox),
                "idle": await idle(sandbox),
                "trigger": await triggered(sandbox),
            },
            rounds,
            report.progress,
        )
    show(report, found)


async def backlog(sandbox: Sandbox) -> Any:
    """From the start of a relay until the last of its backlog is confirmed and deleted."""
    url = await database(sandbox.postgres.url, "backlog")
    settings = Settings(broker_url=sandbox.rabbitmq.url, database_url=url)

    async def variant() -> dict[str, float]:
        connection = await asyncpg.connect(url)
        await check_durable(connection)
        for first in range(0, BACKLOG, ROWS_A_COMMIT):
            await connection.execute(INSERT, first, first + ROWS_A_COMMIT - 1)
        await asyncio.sleep(0.3)  # then the last of them is due
        broker, postgres = sandbox.rabbitmq.pids[0], sandbox.postgres.pids[0]
        async with subscriber(sandbox.rabbitmq.url, "default") as (channel, queue):
            used = time.process_time(), cpu_seconds(broker), cpu_seconds(postgres)
            began = time.perf_counter()
            async with Client(settings, subscribe=False) as client, asyncio.timeout(60):
                assert client.relay is not None
                while client.relay.counters["published_rows"] < BACKLOG:
                    await asyncio.sleep(0.01)
                while await connection.fetchval("SELECT EXISTS (SELECT FROM cacheinval.outbox)"):
                    await asyncio.sleep(0.01)
                took = time.perf_counter() - began
                cpu = (
                    time.process_time() - used[0],
                    cpu_seconds(broker) - used[1],
                    cpu_seconds(postgres) - used[2],
                )
            keys = named(await received(channel, queue))
        await connection.close()
        if len(keys) != BACKLOG:
            raise AssertionError(f"{len(keys)} of {BACKLOG} keys arrived")
        milliseconds = [1_000_000 * seconds / BACKLOG for seconds in cpu]
        return {
            "rate": BACKLOG / took,
            **dict(zip(("client", "broker", "database"), milliseconds, strict=True)),
        }

    return variant


async def idle(sandbox: Sandbox) -> Any:
    """What `cacheinval relay` takes of a core while there is nothing to relay, and what its database does."""
    url = await database(sandbox.postgres.url, "idle")

    async def variant() -> dict[str, float]:
        async with (
            relay(sandbox, url) as process,
            subscriber(sandbox.rabbitmq.url, "idle") as (channel, queue),
        ):
            pids = (process.pid, sandbox.postgres.pids[0], sandbox.rabbitmq.pids[0])
            await asyncio.sleep(1.5)  # what a start takes is over
            before, began = [cpu_seconds(pid) for pid in pids], time.perf_counter()
            await asyncio.sleep(IDLE_SECONDS)
            after, took = [cpu_seconds(pid) for pid in pids], time.perf_counter() - began
            if not any(message["kind"] == "tick" for message in await received(channel, queue)):
                raise AssertionError("the relay sent no tick")
        shares = [100 * (later - earlier) / took for earlier, later in zip(before, after, strict=True)]
        return dict(zip(("relay", "database", "broker"), shares, strict=True))

    return variant


@asynccontextmanager
async def relay(sandbox: Sandbox, url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`cacheinval relay` in a process of its own, leading."""
    environment = {
        **os.environ,
        "CACHEINVAL_BROKER_URL": sandbox.rabbitmq.url,
        "CACHEINVAL_DATABASE_URL": url,
        "CACHEINVAL_NAMESPACE": "idle",
    }
    command = (sys.executable, "-m", "cacheinval", "relay")
    process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(20):
            while b"leading the relay" not in (line := await process.stderr.readline()):
                if not line:
                    raise AssertionError("the relay has ended")
        yield process
    finally:
        process.terminate()
        await process.communicate()


async def triggered(sandbox: Sandbox) -> Any:
    """From the end of a commit until the last of all instances has evicted what only a trigger has recorded."""
    url = await database(sandbox.postgres.url, "triggered")
    setup = await asyncpg.connect(url)
    await setup.execute(TABLE)
    await setup.close()

    async def variant() -> dict[str, float]:
        async with AsyncExitStack() as stack:
            evicted = Evicted()
            for number in range(INSTANCES):
                settings = Settings(
                    broker_url=sandbox.rabbitmq.url,
                    database_url=url,
                    namespace="triggered",
                    instance_id=f"instance-{number}",
                )
                client = await stack.enter_async_context(Client(settings))
                client.attach(evicted.cache())
                await client.wait_ready(10)
            connection = await asyncpg.connect(url)
            await check_durable(connection)
            pauses = random.Random(INSTANCES)
            committed: dict[str, float] = {}
            for row in pauses.sample(range(1, 10_001), TRIGGERED):
                await connection.execute(
                    "UPDATE tracked SET price = price + 1, version = version + 1 WHERE id = $1", row
                )
                committed[f"tracked:{row}"] = time.perf_counter()
                await asyncio.sleep(pauses.uniform(0, 2 / RATE))
            await connection.close()
            async with asyncio.timeout(10):
                while not all(len(evicted.times.get(key, ())) >= INSTANCES for key in committed):
                    await asyncio.sleep(0.01)
        took = [1_000 * (max(evicted.times[key][:INSTANCES]) - since) for key, since in committed.items()]
        return {"p50": percentile(took, 0.5), "p99": percentile(took, 0.99), "max": max(took)}

    return variant


class Evicted:
    """When each key was evicted, in each instance."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def cache(self) -> SimpleMemoryCache:
        """A cache for one instance, which notes what is evicted from it."""
        times = self.times

        class Noting(SimpleMemoryCache):  # type: ignore[misc]
            async def delete(self, key: str, *args: Any, **options: Any) -> int:
                times.setdefault(key, []).append(time.perf_counter())
                return 0

        return Noting()


def show(report: Report, found: Figures) -> None:
    """The tables, and whether the targets hold."""
    figures = found["backlog"]
    report.table(
        f"A backlog of {BACKLOG:,} rows, one key each",
        ["rows/s", "relay, ms of CPU for 1000", "broker", "database"],
        {"relay": [figures[what] for what in ("rate", "client", "broker", "database")]},
    )
    report.at_least("rows of a backlog", figures["rate"], 20_000, "rows/s")
    figures = found["idle"]
    report.table(
        "Nothing to relay",
        ["relay, % of a core", "database", "broker"],
        {"cacheinval relay": [figures[what] for what in ("relay", "database", "broker")]},
        note="the database's and the broker's share holds all that they do meanwhile",
    )
    report.at_most("an idle relay", figures["relay"], 1.0, "% of a core")
    figures = found["trigger"]
    report.table(
        f"What only a trigger recorded, at {RATE} writes/s, until all of {INSTANCES} instances have evicted",
        ["p50, ms", "p99, ms", "max, ms"],
        {"UPDATE of a tracked table": [figures[what] for what in ("p50", "p99", "max")]},
    )
    report.at_most("evicted everywhere, p99", figures["p99"], 150, "ms")
