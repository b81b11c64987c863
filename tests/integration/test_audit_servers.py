"""Audits on a real Postgres, RabbitMQ, Redis and Memcached."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import asyncpg
import msgspec
import pytest
from waiting import Eventually

from cacheinval import AuditReport, Client, Settings
from cacheinval.outbox import apply_schema
from cacheinval.sandbox import Memcached, RabbitMQ, Redis

UPDATE = "UPDATE things SET n = n + 1 WHERE id = $1"


class Thing(msgspec.Struct):
    """A row; what comes out of JSON is one only with its model."""

    id: str
    n: int


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    await apply_schema(connection)
    await connection.execute("CREATE TABLE things (id text PRIMARY KEY, n int NOT NULL)")
    await connection.execute("INSERT INTO things VALUES ('a', 0), ('b', 0)")
    yield connection
    await connection.close()


@pytest.fixture
def settings(rabbitmq: RabbitMQ, database_url: str, namespace: str) -> Settings:
    return Settings(
        broker_url=rabbitmq.url, database_url=database_url, namespace=namespace, instance_id=namespace
    )


async def read(client: Client, thing: str) -> Thing:
    async def load() -> Thing:
        row = await client.pool.fetchrow("SELECT id, n FROM things WHERE id = $1", thing)
        assert row is not None
        return Thing(*row)

    found: Thing = await client.cache.get_or_set(f"thing:{thing}", load, tags=["things"], model=Thing)
    return found


@pytest.fixture(params=["memory", "redis", "memcached"])
def cache_url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory://"
    server: Redis | Memcached = request.getfixturevalue(request.param)
    return server.url


async def test_only_what_nobody_recorded_is_inconsistent(
    settings: Settings, db: asyncpg.Connection, cache_url: str, eventually: Eventually
) -> None:
    writer = Client(settings.model_copy(update={"instance_id": f"{settings.namespace}-w"}))
    reader = Client(settings.model_copy(update={"cache_url": cache_url}))
    async with writer, reader:
        await asyncio.gather(writer.wait_ready(30), reader.wait_ready(30))
        for thing in ("a", "b"):
            await read(reader, thing)
        assert await reader.audit() == AuditReport(checked=2, consistent=2)

        await writer.execute(UPDATE, "a", invalidate=["thing:a"])
        await eventually(lambda: reader.stats()["cache"]["evicted_entries"] >= 1)
        assert (await read(reader, "a")).n == 1
        assert await reader.audit() == AuditReport(checked=2, consistent=2)

        await db.execute(UPDATE, "b")
        hits = reader.stats()["cache"]["hits"]
        found = AuditReport(checked=2, consistent=1, inconsistent=1, examples=("thing:b",))
        assert await reader.audit(delay=0) == found
        assert (await read(reader, "b")).n == 0, "an audit observes"
        assert reader.stats()["cache"]["hits"] == hits + 1


@pytest.mark.parametrize("cache_url", ["redis", "memcached"], indirect=True)
async def test_what_json_makes_of_a_value_is_no_difference(settings: Settings, cache_url: str) -> None:
    async def load() -> dict[str, Any]:
        return {"pair": (1, 2), "price": Decimal("1.50")}

    async with Client(settings.model_copy(update={"cache_url": cache_url})) as reader:
        await reader.wait_ready(30)
        assert await reader.cache.get_or_set("k", load) == {"pair": [1, 2], "price": "1.50"}
        assert await reader.audit() == AuditReport(checked=1, consistent=1)


async def test_an_instance_that_has_not_heard_yet_is_not_accused(
    settings: Settings, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit whose message is held up at one instance until that has seen the difference."""
    writer = Client(settings.model_copy(update={"instance_id": f"{settings.namespace}-w"}))
    async with writer, Client(settings) as reader:
        await asyncio.gather(writer.wait_ready(30), reader.wait_ready(30))
        await read(reader, "a")
        seen, evict = asyncio.Event(), reader.instance._evict
        fetch = reader.cache.read_source

        async def hold_up(eviction: Any) -> None:
            await seen.wait()
            await evict(eviction)

        async def see(*args: Any) -> Any:
            value = await fetch(*args)
            seen.set()
            return value

        monkeypatch.setattr(reader.instance, "_evict", hold_up)
        monkeypatch.setattr(reader.cache, "read_source", see)
        await writer.execute(UPDATE, "a", invalidate=["thing:a"])
        assert await reader.audit() == AuditReport(checked=1, settling=1)


async def test_a_database_that_is_gone_accuses_nobody(
    settings: Settings, db: asyncpg.Connection, database_url: str
) -> None:
    async with Client(settings) as reader:
        await reader.wait_ready(30)
        await read(reader, "a")
        await db.execute("ALTER TABLE things RENAME TO others")
        assert await reader.audit() == AuditReport(checked=1, failed=1)


async def test_a_cache_that_cannot_be_reached_leaves_nothing_to_audit(
    settings: Settings, db: asyncpg.Connection, own_redis: Redis
) -> None:
    async with Client(settings.model_copy(update={"cache_url": own_redis.url})) as reader:
        await reader.wait_ready(30)
        await read(reader, "a")
        assert (await reader.audit()).consistent == 1
        await own_redis.kill()
        assert await reader.audit() == AuditReport()
