"""The examples of `examples`: services of three frameworks, and programs that write past `cacheinval`'s client."""

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import httpx
import pytest
from running import Process, environment
from waiting import Eventually, until

from cacheinval import Client, Settings
from cacheinval.outbox import apply_schema
from cacheinval.sandbox import RabbitMQ, Redis

pytestmark = pytest.mark.timeout(240)

EXAMPLES = Path(__file__).parent / "examples"
README = (Path(__file__).parents[2] / "README.md").read_text()
SERVICES = {
    "fastapi_app": ("uvicorn", "fastapi_app:app", "--port", "0"),
    "litestar_app": ("uvicorn", "litestar_app:app", "--port", "0"),
    "aiohttp_app": ("aiohttp.web", "-H", "127.0.0.1", "-P", "0", "aiohttp_app:make_app"),
}
COMMANDS = SERVICES | {"two_levels_app": ("uvicorn", "two_levels_app:app", "--port", "0")}
WRITERS = ("psycopg_write", "sqlalchemy_write", "sqlalchemy_function", "django_write")


@pytest.fixture
async def settings(rabbitmq: RabbitMQ, database_url: str, namespace: str) -> AsyncIterator[dict[str, object]]:
    """What every program of a test is set up with; the database has the schema, and a table of prices."""
    connection = await asyncpg.connect(database_url, timeout=30)
    try:
        await apply_schema(connection)
        # Two prices that are the same are noticed at COMMIT, when both the change and its record have been made.
        await connection.execute(
            "CREATE TABLE prices (id text PRIMARY KEY, price integer UNIQUE DEFERRABLE INITIALLY DEFERRED)"
        )
        await connection.execute("INSERT INTO prices VALUES ('abc-123', 99), ('other', 1)")
    finally:
        await connection.close()
    return {"broker_url": rabbitmq.url, "database_url": database_url, "namespace": namespace}


@pytest.fixture
async def database(settings: dict[str, object]) -> AsyncIterator[asyncpg.Connection]:
    """Somebody who changes prices without a cache."""
    connection = await asyncpg.connect(str(settings["database_url"]), timeout=30)
    try:
        yield connection
    finally:
        await connection.close()


async def change(database: asyncpg.Connection, price: int, *, namespace: str | None) -> None:
    """Changes the price, and records it for this namespace, or makes the mistake not to."""
    async with database.transaction():
        await database.execute("UPDATE prices SET price = $1 WHERE id = 'abc-123'", price)
        if namespace:
            await database.execute(
                "SELECT cacheinval.invalidate(ARRAY['price:abc-123'], namespace => $1)", namespace
            )


# Services


@asynccontextmanager
async def running(module: str, folder: Path, **settings: object) -> AsyncIterator["Service"]:
    """One of the examples, in a process of its own, as soon as it can rely on its cache."""
    program, *arguments = COMMANDS[module]
    process = Process(folder, *arguments, module=program, cwd=EXAMPLES, tick_interval=0.2, **settings)
    observer = Client(
        Settings(**{name: settings[name] for name in ("broker_url", "namespace")}, database_url="")
    )
    try:
        async with observer, httpx.AsyncClient(timeout=15, trust_env=False) as http:

            def url() -> str | None:
                assert process.popen.poll() is None, process.said
                found = re.search(r"unning on (http://127\.0\.0\.1:\d+)", process.said)
                return found and found[1]

            started = Service(process, http, await until(url, 60))

            async def is_ready() -> bool:
                return any(
                    (one["id"], one["state"]) == (settings["instance_id"], "ready")
                    for one in await observer.ask_instances(0.2)
                )

            await observer.wait_ready(30)
            await until(is_ready, 30)
            yield started
    finally:
        process.kill()


@pytest.fixture
async def service(
    request: pytest.FixtureRequest, settings: dict[str, object], tmp_path: Path
) -> AsyncIterator["Service"]:
    """The example that the test names."""
    async with running(request.param, tmp_path, **settings, instance_id="service") as service:
        yield service


@dataclass
class Service:
    process: Process
    http: httpx.AsyncClient
    url: str

    async def price(self, product_id: str = "abc-123") -> int | None:
        """What it says; None where it says that there is none."""
        answer = await self.http.get(f"{self.url}/prices/{product_id}")
        assert answer.status_code in (200, 404), answer.text
        return answer.json() if answer.status_code == 200 else None

    async def read(self) -> tuple[int, str]:
        """What `two_levels_app` says, and where it had it from."""
        answer = await self.http.get(f"{self.url}/prices/abc-123")
        answer.raise_for_status()
        return answer.json(), answer.headers["x-cache"]

    async def put(self, price: int) -> None:
        answer = await self.http.put(f"{self.url}/prices/abc-123", params={"price": price})
        answer.raise_for_status()


@pytest.mark.parametrize("service", SERVICES, indirect=True)
async def test_a_service_forgets_what_another_process_changes(
    service: Service, database: asyncpg.Connection, namespace: str, eventually: Eventually
) -> None:
    assert await service.price() == 99
    await change(database, 100, namespace=None)
    assert await service.price() == 99, "nobody has told it, so what it gives is from its cache"
    await change(database, 109, namespace=namespace)
    await eventually(lambda: _is(service, 109))
    await change(database, 110, namespace=None)
    assert await service.price() == 109, "cached again"
    await service.put(111)
    assert await service.price() == 111, "its own change is evicted before the answer"
    assert await service.price("nobody") is None

    registered = "SELECT id FROM cacheinval.instances"
    assert await database.fetchval(registered) == "service"
    service.process.signal(signal.SIGTERM)
    await service.process.ended(30)
    assert await database.fetchval(registered) is None, "it has closed its client"
    assert "Traceback" not in service.process.said


async def _is(service: Service, price: int) -> bool:
    return await service.price() == price


async def test_two_services_share_a_redis_and_each_keeps_what_it_reads(
    settings: dict[str, object], redis: Redis, tmp_path: Path, eventually: Eventually
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    settings |= {"cache_url": redis.url, "cache_local_entries": 10_000}
    async with (
        running("two_levels_app", folders[0], **settings, instance_id="one") as one,
        running("two_levels_app", folders[1], **settings, instance_id="two") as two,
    ):
        assert await one.read() == (99, "miss")
        assert await two.read() == (99, "shared")
        assert [await one.read(), await two.read()] == [(99, "hit")] * 2
        await one.put(109)
        assert await one.read() == (109, "miss")

        async def both_have_it() -> bool:  # its own message makes the writer evict once more
            return [await one.read(), await two.read()] == [(109, "hit")] * 2

        await eventually(both_have_it, 30)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_service_takes_less_than_forty_lines(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) < 40


def test_the_readme_shows_the_first_of_them() -> None:
    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.strip()]

    (shown,) = re.findall(r"^```python\n((?:(?!^```).)*FastAPI.*?)^```", README, re.MULTILINE | re.DOTALL)
    _, *example = lines((EXAMPLES / "fastapi_app.py").read_text())
    assert lines(shown) == example


# Writers


class Prices:
    """A cache of prices in this process, and how often they were loaded."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.loads = 0

    async def price(self, product_id: str = "abc-123") -> int | None:
        async def load() -> int | None:
            self.loads += 1
            return await self.client.pool.fetchval("SELECT price FROM prices WHERE id = $1", product_id)

        return await self.client.cache.get_or_set(f"price:{product_id}", load)


@pytest.fixture
async def prices(settings: dict[str, object]) -> AsyncIterator[Prices]:
    async with Client(Settings(**settings)) as client:  # type: ignore[arg-type]
        await client.wait_ready(30)
        yield Prices(client)


async def ran(name: str, *arguments: str, **settings: object) -> int:
    """Runs an example to its end; the exit code."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLES / f"{name}.py"), *arguments),
        env=environment(**settings),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    assert process.returncode == 0 or "UniqueViolation" in said.decode(), said.decode()
    return process.returncode


@pytest.mark.parametrize("name", WRITERS)
async def test_what_another_program_commits_is_evicted_and_what_it_rolls_back_is_not(
    prices: Prices, settings: dict[str, object], name: str, eventually: Eventually
) -> None:
    async def is_other(price: int) -> bool:
        return await prices.price("other") == price

    assert (await prices.price(), await prices.price("other")) == (99, 1)
    assert await ran(name, "abc-123", "1", **settings) == 1, "the database refuses it at COMMIT"
    assert await ran(name, "other", "2", **settings) == 0
    await eventually(lambda: is_other(2))
    assert prices.loads == 3
    assert await prices.price() == 99
    assert prices.loads == 3, "what was rolled back has evicted nothing"

    assert await ran(name, "abc-123", "109", **settings) == 0
    await eventually(lambda: _price_is(prices, 109))
    assert prices.loads == 4


async def _price_is(prices: Prices, price: int) -> bool:
    return await prices.price() == price


async def test_what_a_plain_amqp_client_publishes_is_evicted(
    prices: Prices, settings: dict[str, object], database: asyncpg.Connection, eventually: Eventually
) -> None:
    assert await prices.price() == 99
    await change(database, 109, namespace=None)
    assert await prices.price() == 99
    assert await ran("pika_publish", "abc-123", **settings) == 0
    await eventually(lambda: _price_is(prices, 109))
    assert prices.loads == 2
