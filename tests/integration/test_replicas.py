"""Loaders that read a replica (a copy of the table plays it) of a table in a real Postgres."""

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from waiting import Eventually

from cacheinval import Client, Settings
from cacheinval.coherence import Coherence
from cacheinval.coherence.floors import Floors
from cacheinval.outbox import apply_schema

LAG = 600.0


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Somebody who changes the tables and is no client."""
    connection = await asyncpg.connect(database_url, command_timeout=30)
    await apply_schema(connection)
    await connection.execute(
        "CREATE TABLE items (id text PRIMARY KEY, name text, version bigint NOT NULL);"
        "CREATE TABLE replica (LIKE items INCLUDING ALL);"
        "INSERT INTO items VALUES ('a', 'one', 1)"
    )
    yield connection
    connection.terminate()


async def catch_up(db: asyncpg.Connection) -> None:
    await db.execute("TRUNCATE replica; INSERT INTO replica SELECT * FROM items")


class Service:
    """A client and its loaders; `asked` tells which of them were called since it was looked at last."""

    def __init__(self, client: Client, as_json: bool) -> None:
        self.client = client
        self._asked: list[str] = []

        async def row_of(table: str, item_id: str) -> Any:
            self._asked.append(table)
            row = await client.pool.fetchrow(f"SELECT * FROM {table} WHERE id = $1", item_id)
            return dict(row) if as_json and row is not None else row

        async def from_primary(item_id: str) -> Any:
            return await row_of("items", item_id)

        @client.cached("item:{item_id}", version="version", primary=from_primary)
        async def item(item_id: str) -> Any:
            return await row_of("replica", item_id)

        self._item = item

    async def name(self, item_id: str = "a") -> str | None:
        row = await self._item(item_id)
        return None if row is None else row["name"]

    def asked(self) -> list[str]:
        asked, self._asked = self._asked, []
        return asked

    @property
    def rules(self) -> Coherence:
        return self.client._coherence

    def settle(self) -> None:
        """As if all that was evicted so far had been evicted long ago."""
        self.rules.loads.floors = Floors(LAG)


@pytest.fixture(params=["memory", "redis"])
async def service(
    request: pytest.FixtureRequest, db: asyncpg.Connection, database_url: str, namespace: str
) -> AsyncIterator[Service]:
    cache_url = "memory://" if request.param == "memory" else request.getfixturevalue("redis").url
    settings = Settings(
        broker_url="memory://",
        database_url=database_url,
        cache_url=cache_url,
        namespace=namespace,
        instance_id="one",
        max_replica_lag=LAG,
    )
    async with Client(settings) as client:
        await client.wait_ready(30)
        yield Service(client, as_json=request.param == "redis")


async def test_what_the_replica_has_not_applied_is_never_stored(
    service: Service, db: asyncpg.Connection, eventually: Eventually
) -> None:
    async def change(statement: str) -> None:
        """By somebody who is no client; until the service has heard of it."""
        before = service.client.instance.counters.evictions
        await db.execute(statement)
        await eventually(lambda: service.client.instance.counters.evictions > before)

    namespace = service.client.settings.namespace
    await change(f"SELECT cacheinval.track('items', 'item:{{id}}', 'version', '{{}}', '{namespace}')")
    await catch_up(db)
    assert (await service.name(), service.asked()) == ("one", ["items"])

    service.settle()
    assert (await service.name("b"), service.asked()) == (None, ["replica"])

    await change("UPDATE items SET name = 'two', version = 2")
    assert (await service.name(), service.asked()) == ("two", ["replica", "items"])
    assert (await service.name(), service.asked()) == ("two", [])

    await change("UPDATE items SET name = 'three', version = 3")
    await catch_up(db)
    assert (await service.name(), service.asked()) == ("three", ["replica"])

    await change("UPDATE items SET name = 'four'")  # and forgets the version
    assert (await service.name(), service.asked()) == ("four", ["replica", "items"])

    await change("DELETE FROM items")
    assert (await service.name(), service.asked()) == (None, ["replica", "items"])
    assert (await service.name(), service.asked()) == (None, [])

    await change("INSERT INTO items VALUES ('a', 'again', 1)")
    assert (await service.name(), service.asked()) == ("again", ["replica", "items"])
    await db.execute("DELETE FROM replica")
    assert (await service.name(), service.asked()) == ("again", [])
    assert service.rules.counters.below_floor == 4


async def test_what_this_client_wrote_itself_is_compared_as_well(
    service: Service, db: asyncpg.Connection
) -> None:
    await catch_up(db)
    service.settle()
    assert (await service.name(), service.asked()) == ("one", ["replica"])
    async with service.client.transaction() as tx:
        await tx.execute("UPDATE items SET name = 'two', version = 2")
        tx.invalidate("item:a", versions=[2])
    assert (await service.name(), service.asked()) == ("two", ["replica", "items"])


async def test_what_was_written_without_a_version_is_read_from_the_primary(
    service: Service, db: asyncpg.Connection
) -> None:
    await catch_up(db)
    service.settle()
    await service.client.execute("UPDATE items SET name = 'two', version = 2", invalidate=["item:a"])
    assert (await service.name(), service.asked()) == ("two", ["items"])
