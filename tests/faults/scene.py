"""What fault tests are made of: real processes, clients in this process, and an operator's view of the servers.

A plugin of the test modules beside it (`pytest_plugins`), and not a conftest.py, since that would hide the one above.
They import it before pytest sees it, too late for what pytest does to assertions: PYTEST_DONT_REWRITE
"""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import aio_pika
import asyncpg
import httpx
import pytest
import redis.asyncio
from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel
from proxy import Proxy

from cacheinval import Client, Read, Settings
from cacheinval.outbox import apply_schema
from cacheinval.sandbox.processes import Guard

EVENTUAL = 60.0  # seconds for what takes a second on a machine that has nothing else to do
SHARED = (str(Path(__file__).parent), str(Path(__file__).parent.parent))  # where tests have what they share
FOREVER = 3600.0  # for the ttl of entries, so that no test is right because something expired

Eventually = Callable[..., Awaitable[Any]]
"""The fixture `eventually` (not imported from the conftest above, whose name another folder's may have taken)."""


def through(proxy: Proxy, url: str) -> str:
    """`url` with the proxy in place of the server on this host."""
    before, _, rest = url.partition("127.0.0.1:")
    return f"{before}127.0.0.1:{proxy.port}{rest.lstrip('0123456789')}"


# Processes


class Program:
    """A process of its own, whose log is read as JSON and whose HTTP is asked."""

    def __init__(self, arguments: Sequence[str], log: Path, settings: dict[str, Any]) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CACHEINVAL_")
        }
        settings = {"http_port": 0, "log_format": "json", **settings}
        environment |= {f"CACHEINVAL_{name.upper()}": str(value) for name, value in settings.items()}
        environment["PYTHONPATH"] = os.pathsep.join((*SHARED, *filter(None, [environment.get("PYTHONPATH")])))
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=log.parent,
                start_new_session=True,
            )
        self._http = httpx.AsyncClient(timeout=EVENTUAL, trust_env=False)
        self._url = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Negative where a signal ended it; None while it runs."""
        return self._process.poll()

    def said(self, event: str) -> list[dict[str, Any]]:
        """The lines of its log that say this."""
        return [line for line in self._lines() if line.get("event") == event]

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for line in self._log.read_text().splitlines():
            with suppress(ValueError):  # the last one may be half written, and a traceback is not JSON
                lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict)]

    @property
    def last_words(self) -> str:
        """The end of its log, under the name of that."""
        return f"--- {self._log.name}\n{self._log.read_text()[-6000:]}"

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        """The answer, or None while there is none to be had."""
        if not self._url:
            found = [line["url"] for line in self._lines() if "url" in line]
            self._url = found[0] if found else ""
        if not self._url:
            assert self.returncode is None, f"ended with {self.returncode}:\n{self._log.read_text()}"
            return None
        try:
            return await self._http.request(method, self._url + path, **options)
        except httpx.TransportError:
            return None

    async def ready(self) -> bool:
        """Whether it says that it is ready, and not just degraded."""
        answer = await self.request("GET", "/readyz")
        return answer is not None and answer.status_code == 200 and answer.json()["status"] == "ready"

    async def status(self) -> dict[str, Any]:
        answer = await self.request("GET", "/status")
        assert answer is not None, "no answer"
        status: dict[str, Any] = answer.json()
        return status

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Its return code, once it has one."""
        while (code := self.returncode) is None:
            await asyncio.sleep(0.01)
        return code

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.signal(signal.SIGKILL)
        await self.ended()

    async def close(self) -> None:
        if self.returncode is None:
            await self.kill()
        await self._http.aclose()


class Programs(Protocol):
    """The fixture `programs`: starts `python` with these arguments, keyword arguments are settings."""

    def __call__(self, *arguments: str, **settings: Any) -> Program: ...


@pytest.fixture
async def programs(tmp_path: Path, namespace: str) -> AsyncIterator[Programs]:
    """Starts processes in the test's namespace, and kills those that are left in the end."""
    started: list[Program] = []
    guard = Guard(None)

    def start(*arguments: str, **settings: Any) -> Program:
        log = tmp_path / f"{len(started)}.log"
        program = Program(arguments, log, {"namespace": namespace, "cache_ttl": FOREVER, **settings})
        started.append(program)
        guard.watch(*(one.pid for one in started if one.returncode is None))
        return program

    try:
        yield start
    finally:
        for program in started:
            await program.close()
            print(program.last_words)  # pytest shows it if the test failed
        guard.forget(*(program.pid for program in started))
        guard.close()


# Clients in this process


NOT_OURS = (
    # CPython 3.11 about a handler of a stream server that is cancelled, which is how the proxy ends
    "StreamReaderProtocol.connection_made",
    # asyncpg about the future of a query that was cancelled, when its connection is lost after that
    "unexpected connection_lost() call",
)


class Clients(Protocol):
    """The fixture `clients`: enters a client of the test's namespace, `over` a bus of its own or the one that its settings
    name; other keyword arguments are settings."""

    async def __call__(self, *, over: Any = None, subscribe: bool = True, **settings: Any) -> Client: ...


@pytest.fixture
async def clients(namespace: str) -> AsyncIterator[Clients]:
    """Makes clients without a relay and, unless `database_url` is given, without a database; waits for none of them.

    A test that leaves exceptions of tasks behind which nobody has looked at fails in the end.
    """
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with AsyncExitStack() as stack:

        async def enter(*, over: Any = None, subscribe: bool = True, **settings: Any) -> Client:
            settings = {
                "namespace": namespace,
                "database_url": "",
                "relay": "off",
                "cache_ttl": FOREVER,
                **settings,
            }
            return await stack.enter_async_context(
                Client(Settings(**settings), bus=over, subscribe=subscribe)
            )

        yield enter
    gc.collect()
    await asyncio.sleep(0)
    unseen = [one for one in complaints if not any(words in str(one) for words in NOT_OURS)]
    assert not unseen, unseen


# The source of truth


@pytest.fixture
async def db(database_url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection to the test's database, which has the schema and a table of prices: `a`, `b` and `c` cost 1."""
    connection = await asyncpg.connect(database_url, timeout=30, command_timeout=30)
    try:
        await make_prices(connection)
        yield connection
    finally:
        connection.terminate()


async def make_prices(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """The schema, and a table of prices: `a`, `b` and `c` cost 1."""
    await apply_schema(connection)
    await connection.execute("CREATE TABLE prices (id text PRIMARY KEY, price integer NOT NULL)")
    await connection.execute("INSERT INTO prices VALUES ('a', 1), ('b', 1), ('c', 1)")


SET_PRICE = "UPDATE prices SET price = $2 WHERE id = $1"
OUTBOX = "SELECT count(*) FROM cacheinval.outbox"


async def price(client: Client, key: str, *, refresh: bool = False) -> Read:
    """The price of `key`, through the cache of `client`."""

    def load() -> Any:
        return client.pool.fetchval("SELECT price FROM prices WHERE id = $1", key)

    return await client.cache.read(key, load, refresh=refresh)


async def has_price(client: Client, key: str, value: int) -> bool:
    """Whether the price of `key` is this, as the cache of `client` has it."""
    return bool((await price(client, key)).value == value)


def evicted(client: Client) -> int:
    """How many entries of its cache an invalidation has dropped."""
    return client.cache.counters.evicted_entries


def giving(value: Any) -> Callable[[], Awaitable[Any]]:
    """A loader that gives `value`."""

    async def load() -> Any:
        return value

    return load


class NotCachedError(Exception):
    """The cache wanted to load."""


async def is_refused(client: Client, key: str) -> bool:
    """Whether the cache does not give what it holds of `key`; it is left as it is."""

    async def load() -> None:
        raise NotCachedError

    try:
        await client.cache.get_or_set(key, load)
    except NotCachedError:
        return True
    return False


# An operator's view


@asynccontextmanager
async def operating(url: str) -> AsyncIterator[AbstractChannel]:
    """A channel of somebody else, who looks at queues, meddles, and publishes what no client would."""
    async with asyncio.timeout(EVENTUAL):
        connection = await aio_pika.connect(url)
    try:
        yield await connection.channel()
    finally:
        async with asyncio.timeout(EVENTUAL):
            await connection.close()


async def ready_messages(operator: AbstractChannel, queue: str) -> int:
    """How many messages are in `queue` that no consumer has got."""
    found = await operator.declare_queue(queue, passive=True)
    return found.declaration_result.message_count or 0


@asynccontextmanager
async def listening(url: str, namespace: str) -> AsyncIterator[list[dict[str, Any]]]:
    """Every invalidation that is published in the namespace, as a list that grows."""
    heard: list[dict[str, Any]] = []

    async def hear(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        said = json.loads(message.body)
        if said["kind"] == "invalidate":
            heard.append(said)

    async with operating(url) as channel:
        exchange = await channel.declare_exchange(
            f"cacheinval.{namespace}", ExchangeType.FANOUT, durable=True
        )
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange)
        await queue.consume(hear, no_ack=True)
        yield heard


class SharedCacheView:
    """What is in Redis, whoever put it there."""

    def __init__(self, connection: "redis.asyncio.Redis", namespace: str) -> None:
        self._connection = connection
        self._prefix = f"cacheinval:{namespace}:"

    async def has(self, key: str) -> bool:
        return bool(await self._connection.exists(f"{self._prefix}entry:{key}"))

    async def epoch(self) -> object:
        return await self._connection.get(f"{self._prefix}epoch")

    async def copy(self) -> dict[bytes, bytes]:
        """All that is there now."""
        names = [name async for name in self._connection.scan_iter(f"{self._prefix}*", count=1000)]
        return {name: await self._connection.dump(name) for name in names}

    async def save(self) -> None:
        """Makes a snapshot, which the server takes up when it starts again."""
        await self._connection.save()

    async def proof(self, instance_id: str) -> bytes | None:
        """What is kept of that instance."""
        kept: bytes | None = await self._connection.get(f"{self._prefix}proof:{instance_id}")
        return kept

    async def go_back_to(self, copy: dict[bytes, bytes]) -> None:
        """Makes it as it was, at once."""
        async with self._connection.pipeline(transaction=True) as pipeline:
            for name in await self.copy():
                pipeline.delete(name)
            for name, value in copy.items():
                pipeline.restore(name, 0, value)
            await pipeline.execute()


@asynccontextmanager
async def looking_into(url: str, namespace: str) -> AsyncIterator[SharedCacheView]:
    """A look into the Redis at `url`, for the test's namespace."""
    connection = redis.asyncio.Redis.from_url(url, socket_timeout=10)
    try:
        yield SharedCacheView(connection, namespace)
    finally:
        await connection.aclose()
