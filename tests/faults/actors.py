"""Who reads and who writes while something is broken, and notes what he sees."""

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import Any

import asyncpg
from history import Evicted, History, Read, State, Tick, Write, from_wall, now

from cacheinval import CacheinvalError, Client
from cacheinval.messages import Invalidate, decode
from cacheinval.outbox import apply_schema

DELTA = 1.0
TICK = 0.2
FRESH: dict[str, Any] = {
    "max_staleness": DELTA,
    "tick_interval": TICK,
    "max_clock_skew": 0.05,
    "publish_timeout": 1.0,
}
"""Settings of a client that has to prove freshness, with all durations scaled down."""

KEYS = tuple(f"k{number}" for number in range(6))
UNLUCKY = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
    CacheinvalError,
)
"""What reads and writes may raise while something is broken."""

WRITE = "UPDATE stock SET version = version + 1 WHERE id = $1 RETURNING version"
SELECT = "SELECT version FROM stock WHERE id = $1"
RECORD = "SELECT cacheinval.invalidate(ARRAY[$1], ARRAY[$2::bigint], namespace => $3)"
QUERY_TIMEOUT = 5.0


async def make_stock(connection: "asyncpg.Connection[asyncpg.Record]", keys: Sequence[str] = KEYS) -> None:
    """The schema, and a table in which each of `keys` has version 1."""
    await apply_schema(connection)
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS stock (id text PRIMARY KEY, version bigint NOT NULL)"
    )
    await connection.executemany(
        "INSERT INTO stock VALUES ($1, 1) ON CONFLICT DO NOTHING", [(key,) for key in keys]
    )


class Observed:
    """An instance in this process whose reads, evictions and ticks are noted under its name.

    While `free` is not set it takes in nothing of what is delivered to it; `held` tells how many messages that are.
    """

    def __init__(self, name: str, client: Client, history: History, keys: Sequence[str] = KEYS) -> None:
        self.name = name
        self.client = client
        self.loads: dict[str, list[float]] = {key: [] for key in keys}
        self.errors = 0
        self.free = asyncio.Event()
        self.free.set()
        self.held = 0
        self._history = history
        self._proven = (0.0, 0.0)
        self._receive = client.instance.receive
        client.instance.receive = self._observe
        self._receive_now = client.instance.receive_now
        client.instance.receive_now = self._observe_now

    def _observe_now(self, deliveries: Sequence[Any]) -> list[str | None] | None:
        if not self.free.is_set():
            return None
        answers = self._receive_now(deliveries)
        if answers is not None:
            self._note(deliveries, answers)
        return answers

    async def _observe(self, deliveries: Sequence[Any]) -> list[str | None]:
        self.held = 0 if self.free.is_set() else len(deliveries)
        await self.free.wait()
        self.held = 0
        answers = await self._receive(deliveries)
        self._note(deliveries, answers)
        return answers

    def _note(self, deliveries: Sequence[Any], answers: Sequence[str | None]) -> None:
        at = now()
        for delivery, problem in zip(deliveries, answers, strict=True):
            message = decode(delivery.body) if problem is None else None
            if isinstance(message, Invalidate):
                for key, version in zip(message.keys, message.versions, strict=False):
                    if version is not None:
                        self._history.note(Evicted(self.name, key, version, at))
        proof = self.client._coherence.proof
        if proof.baselined and (proof.watermark, proof.extends) != self._proven:
            self._proven = (proof.watermark, proof.extends)
            self._history.note(Tick(self.name, at, from_wall(proof.watermark), from_wall(proof.extends)))

    async def read(self, key: str) -> Read:
        """One read, noted."""
        begun = now()
        found = await self.client.cache.read(key, lambda: self._load(key))
        read = Read(self.name, key, begun, now(), found.value, found.outcome)
        self._history.note(read)
        return read

    async def _load(self, key: str) -> int:
        self.loads.setdefault(key, []).append(now())
        version: int = await self.client.pool.fetchval(SELECT, key, timeout=QUERY_TIMEOUT)
        return version

    async def keep_reading(self, pause: float = 0.004) -> None:
        """Reads one key after the other, until cancelled."""
        task = asyncio.current_task()
        for key in itertools.cycle(self.loads):
            try:
                async with asyncio.timeout(QUERY_TIMEOUT):
                    await self.read(key)
            except UNLUCKY:
                self.errors += 1
                if task is not None and task.cancelling():  # asyncpg may raise something else in its place
                    return
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))

    async def keep_telling(self, pause: float = 0.05) -> None:
        """Notes how the instance says that it is, until cancelled."""
        while True:
            self.tell()
            await asyncio.sleep(pause)

    def tell(self) -> None:
        """Notes how the instance says that it is."""
        status = self.client.status()
        age = status["watermark_age"]
        self._history.note(
            State(
                self.name,
                now(),
                self.client.ready,
                status["cache"]["epoch"],
                None if age is None else now() - age,
                status["reason"],
                status["tick_refused"],
            )
        )


class Writer:
    """Adds one to the versions, in each of the ways in which a service can, and notes what it was told.

    `done` counts the writes that were acknowledged, `failed` the others.
    """

    def __init__(self, name: str, client: Client, history: History, keys: Sequence[str] = KEYS) -> None:
        self.name = name
        self.client = client
        self.done = self.failed = 0
        self.slowest = 0.0
        self._history = history
        self._keys = keys

    async def write(self, key: str, how: str = "transaction") -> bool:
        """One write; whether it was acknowledged."""
        write = Write(key, now())
        self._history.note(write)
        try:
            async with asyncio.timeout(QUERY_TIMEOUT):
                await getattr(self, f"_in_{how}")(write)
        except UNLUCKY:
            self.failed += 1
            return False
        write.acknowledged = now()
        self.slowest = max(self.slowest, write.acknowledged - write.begun)
        self.done += 1
        if write.version is not None and how != "sql":
            # Whoever writes through a client has evicted there when the write returns.
            self._history.note(Evicted(self.name, key, write.version, write.acknowledged))
        return True

    async def _in_transaction(self, write: Write) -> None:
        async with self.client.transaction() as tx:
            write.version = await tx.fetchval(WRITE, write.key)
            tx.invalidate(write.key, versions=[write.version])

    async def _in_statement(self, write: Write) -> None:
        row = await self.client.fetchrow(WRITE, write.key, invalidate=[write.key])
        assert row is not None
        write.version = row["version"]

    async def _in_sql(self, write: Write) -> None:
        """As a program that knows no client would: only the relay can tell anybody."""
        async with self.client.pool.acquire(timeout=QUERY_TIMEOUT) as connection, connection.transaction():
            write.version = await connection.fetchval(WRITE, write.key)
            await connection.execute(RECORD, write.key, write.version, self.client.settings.namespace)

    async def keep_writing(
        self, pause: float = 0.03, ways: Sequence[str] = ("transaction", "statement", "sql")
    ) -> None:
        """Writes until cancelled; each write is finished."""
        for how in itertools.cycle(ways):
            writing = asyncio.ensure_future(self.write(random.choice(self._keys), how))
            try:
                await asyncio.shield(writing)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            except asyncio.CancelledError:
                await asyncio.wait({writing})
                raise
