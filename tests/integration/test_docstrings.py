"""Every public name and method has an example, and each of them prints what it says."""

import asyncpg
import pytest
from docstrings import WITH_DATABASE, WITHOUT_EXAMPLE, WITHOUT_SCHEMA, differences, documented, examples

from cacheinval import Client, Settings
from cacheinval.outbox import apply_schema

DOCUMENTED = documented()


def test_everything_has_an_example_but_what_needs_none() -> None:
    assert {name for name, value in DOCUMENTED.items() if not examples(value)} == WITHOUT_EXAMPLE
    assert DOCUMENTED.keys() >= WITH_DATABASE.union(WITHOUT_SCHEMA)


@pytest.mark.parametrize(
    "name", sorted(DOCUMENTED.keys() - WITHOUT_EXAMPLE - WITH_DATABASE - {*WITHOUT_SCHEMA})
)
async def test_an_example_prints_what_it_says(name: str, namespace: str) -> None:
    settings = Settings(broker_url="memory://", database_url="", namespace=namespace, instance_id="shop-1")
    async with Client(settings) as client:
        await client.wait_ready(30)
        assert await differences(DOCUMENTED[name], client) == []


@pytest.fixture
def settings(database_url: str, namespace: str) -> Settings:
    return Settings(broker_url="memory://", database_url=database_url, namespace=namespace, relay="off")


async def test_examples_with_a_database_print_what_they_say(settings: Settings) -> None:
    connection = await asyncpg.connect(settings.database_url, timeout=30)
    try:
        await apply_schema(connection)
        await connection.execute("CREATE TABLE prices (id text, price int)")
        async with Client(settings) as client:
            assert (await client.invalidate("anything", wait=30)).complete, "it is not registered"
            for name in sorted(WITH_DATABASE):
                await connection.execute("DELETE FROM prices")
                await connection.execute("INSERT INTO prices VALUES ('abc-123', 99)")
                assert await differences(DOCUMENTED[name], client) == [], name
    finally:
        await connection.close()


async def test_examples_about_the_schema_print_what_they_say(settings: Settings) -> None:
    async with Client(settings) as client:
        for name in WITHOUT_SCHEMA:
            assert await differences(DOCUMENTED[name], client) == [], name
