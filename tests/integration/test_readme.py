"""What the README shows works as it is pasted, on real servers."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aio_pika
import asyncpg
import pytest

from cacheinval import Client, Settings
from cacheinval.outbox.grants import grants
from cacheinval.sandbox import RabbitMQ

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


async def run(environment: dict[str, str], *command: str) -> str:
    """The stdout of a program that ends well within half a minute and has nothing to complain of."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(30):
            said, complained = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, complained.decode()) == (0, ""), complained.decode()
    return said.decode()


async def test_the_first_example_prints_what_it_says(
    rabbitmq: RabbitMQ, database_url: str, namespace: str
) -> None:
    example = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0]
    environment = {
        "CACHEINVAL_BROKER_URL": rabbitmq.url,
        "CACHEINVAL_DATABASE_URL": database_url,
        "CACHEINVAL_NAMESPACE": namespace,
    }
    await run(environment, sys.executable, "-m", "cacheinval", "schema", "apply")
    printed = await run(environment, sys.executable, "-c", example)
    assert printed.split() == re.findall(r"^ *print\(.*\)  # (\w+)", example, re.MULTILINE) == ["99", "109"]


async def test_the_grants_are_what_a_client_needs(
    rabbitmq: RabbitMQ, database_url: str, namespace: str, eventually: Callable[..., Awaitable[object]]
) -> None:
    (statements,) = re.findall(r"^```sql\n(GRANT .*?)^```", README, re.MULTILINE | re.DOTALL)
    assert statements.splitlines() == grants("shop"), "as `schema grant shop --print` has them"
    role = f"shop_{namespace}"
    async with Client(Settings(broker_url="memory://", database_url=database_url, relay="off")) as owner:
        await owner.apply_schema()
        await owner.pool.execute(
            f"CREATE ROLE {role} LOGIN; CREATE TABLE prices AS SELECT 'a' AS id, 1 AS price"
        )
        await owner.pool.execute(f"GRANT SELECT, UPDATE ON prices TO {role}")
        try:
            await owner.pool.execute(re.sub(r"\bshop\b", role, statements))
            url = re.sub(r"//[^@]+@", f"//{role}@", database_url)
            settings = Settings(
                broker_url=rabbitmq.url, database_url=url, namespace=namespace, max_staleness=5
            )
            async with Client(settings) as client:
                await client.wait_ready(30)
                await client.apply_schema()
                await client.execute("UPDATE prices SET price = 2", invalidate=["price:a"])
                async with client.transaction() as tx:
                    await client.record(tx.connection, "price:b")
                await eventually(lambda: client.pool.fetchval("SELECT count(*) = 0 FROM cacheinval.outbox"))
                assert client.stats()["relay"]["published_rows"] >= 1
                assert (await client.invalidate("price:a", wait=30)).complete
                registered = "SELECT count(*) FROM cacheinval.instances WHERE namespace = $1"
                assert await client.pool.fetchval(registered, namespace) == 1
        finally:
            await owner.pool.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_anybody_may_call_the_function(database_url: str, namespace: str) -> None:
    role = f"nobody_{namespace}"
    async with Client(Settings(broker_url="memory://", database_url=database_url, relay="off")) as owner:
        await owner.apply_schema()
        await owner.pool.execute(f"CREATE ROLE {role} LOGIN")
        try:
            connection = await asyncpg.connect(re.sub(r"//[^@]+@", f"//{role}@", database_url))
            try:
                await connection.execute("SELECT cacheinval.invalidate(ARRAY['product:abc-123'])")
            finally:
                await connection.close()
            assert await owner.pool.fetchval("SELECT keys FROM cacheinval.outbox") == ["product:abc-123"]
        finally:
            await owner.pool.execute(f"DROP ROLE {role}")


@pytest.fixture
async def least_rights(rabbitmq: RabbitMQ) -> AsyncIterator[RabbitMQ]:
    """The shared broker with what `config/definitions.json` brings."""
    await rabbitmq.ctl("import_definitions", str(ROOT / "config/definitions.json"))
    try:
        yield rabbitmq
    finally:
        await rabbitmq.ctl("delete_vhost", "cacheinval")
        await rabbitmq.ctl("delete_user", "cacheinval")


async def test_the_definitions_make_a_user_who_can_do_everything_that_is_needed(
    least_rights: RabbitMQ, namespace: str, eventually: Callable[..., Awaitable[object]]
) -> None:
    url = least_rights.url.replace("guest:guest@", "cacheinval:{}@") + "cacheinval"
    with pytest.raises(aio_pika.exceptions.AMQPError, match="ACCESS_REFUSED"):
        await aio_pika.connect(url.format(""), timeout=10)
    await least_rights.ctl("change_password", "cacheinval", "opensesame")

    settings = Settings(
        broker_url=url.format("opensesame"), database_url="", namespace=namespace, instance_id="one"
    )
    async with Client(settings) as one, Client(settings.model_copy(update={"instance_id": "two"})) as two:
        await one.wait_ready(30)
        await two.wait_ready(30)
        await one.invalidate("price:a")
        await eventually(lambda: two.stats()["receiver"]["messages"] == 1)
        assert [instance["id"] for instance in await one.ask_instances()] == ["one", "two"]
        assert (await one.invalidate("price:a", wait=2)).answered == ("one", "two")
        channel = await one.bus.open_channel()
        await channel.send(b"nonsense")
        await eventually(lambda: two.stats()["receiver"]["malformed"] == 1)
        dead = f"cacheinval.{namespace}.dead\t2"
        await eventually(lambda: _has(least_rights, dead))


async def _has(broker: RabbitMQ, line: str) -> bool:
    return line in await broker.ctl("list_queues", "-p", "cacheinval", "name", "messages")
