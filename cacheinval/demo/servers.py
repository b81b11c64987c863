"""The story on private servers: one service and three readers, each a process, with RabbitMQ and Postgres between."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from importlib.util import find_spec
from typing import TYPE_CHECKING

import asyncpg

from cacheinval.demo.acts import events, polling, without_invalidation
from cacheinval.demo.outage import Tally, outage
from cacheinval.demo.page import Page
from cacheinval.demo.process import Process
from cacheinval.demo.stage import CATALOGUE, LAMP, Wrong, new_price
from cacheinval.demo.waiting import together
from cacheinval.errors import CacheinvalError
from cacheinval.products import product_key
from cacheinval.sandbox import RabbitMQ, Sandbox
from cacheinval.sandbox.processes import LOOPBACK, Guard
from cacheinval.settings import mask_url

if TYPE_CHECKING:
    Pool = asyncpg.Pool[asyncpg.Record]

__all__ = ["ServerStage", "tell"]

TTL = 300.0
NAMESPACE = "demo"
DATABASE_TIMEOUT = 10.0


class ProcessReader:
    """A process that reads through its cache what the service changes."""

    def __init__(self, process: Process) -> None:
        self.name = process.name
        self._process = process

    async def read(self, product_id: str) -> Decimal:
        """See `stage.Reader`."""
        return Decimal((await self._process.ask("GET", f"/products/{product_id}"))["price"])

    async def loads(self) -> int:
        """See `stage.Reader`."""
        loads: int = (await self._process.ask("GET", "/status"))["counters"]["cache"]["loads"]
        return loads

    async def latencies(self, product_id: str) -> Sequence[float]:
        """See `stage.Reader`; as its log says."""
        key = product_key(product_id)
        evicted = [event for event in self._process.events() if event["event"] == "evicted"]
        return [event["latency_ms"] / 1e3 for event in evicted if event.get("key") == key]

    async def trusts(self) -> bool:
        """See `outage.SubscribedReader`."""
        return await self._process.trusts()


class ServerStage:
    """The processes and what they share."""

    ttl = TTL

    def __init__(self, service: Process, readers: Sequence[Process], pool: "Pool", broker: RabbitMQ) -> None:
        self.readers = [ProcessReader(reader) for reader in readers]
        self.broker = broker
        self._service = service
        self._processes = (service, *readers)
        self._pool = pool

    async def put(self, product_id: str, price: Decimal) -> None:
        """See `stage.Stage`."""
        body = {"name": product_id, "price": str(price)}
        await self._service.ask("PUT", f"/products/{product_id}", body)

    async def change_and_tell_nobody(self, product_id: str, price: Decimal) -> None:
        """See `stage.Stage`."""
        await self._pool.execute("UPDATE products SET price = $2 WHERE id = $1", product_id, price)

    async def tell(self, product_id: str) -> None:
        """See `stage.Stage`; as any program may that can speak SQL."""
        key = product_key(product_id)
        await self._pool.execute("SELECT cacheinval.invalidate(ARRAY[$1], namespace => $2)", key, NAMESPACE)

    async def prices(self, product_ids: Sequence[str]) -> Mapping[str, Decimal]:
        """See `stage.Stage`."""
        rows = await self._pool.fetch("SELECT id, price FROM products WHERE id = ANY ($1)", list(product_ids))
        return {row["id"]: row["price"] for row in rows}

    async def outbox_is_empty(self) -> bool:
        """See `outage.BrokerStage`."""
        return not await self._pool.fetchval("SELECT count(*) FROM cacheinval.outbox")

    async def tally(self) -> Tally:
        """See `outage.BrokerStage`; the relay is led by any one of the processes."""
        counters = [(await process.ask("GET", "/status"))["counters"] for process in self._processes]
        return Tally(
            published_at_once=sum(one["publisher"]["confirmed_writes"] for one in counters),
            recovered=sum(one["relay"]["published_rows"] for one in counters),
        )


async def tell(page: Page) -> list[Wrong]:
    """Tells all four acts; returns what was wrong at the end of each.

    Raises:
        SandboxError: a server is not installed, or did not start.
        CacheinvalError: a process did not do what it should.
    """
    if find_spec("fastapi") is None:
        raise CacheinvalError("the demo serves HTTP: pip install 'cacheinval[http]'")
    page.title(
        "cacheinval demo",
        "One product service writes, three readers read, each a process with a cache of its own; RabbitMQ and "
        "Postgres are private servers on free ports. Every figure is measured now.",
    )
    async with _stage(page) as stage:
        wrong = await without_invalidation(stage, page, seconds=1.0)
        wrong += await polling(stage, page, seconds=3.0, changes=4)
        wrong += await events(stage, page, "RabbitMQ")
        return wrong + await outage(stage, page)


@asynccontextmanager
async def _stage(page: Page) -> AsyncIterator[ServerStage]:
    async with AsyncExitStack() as stack:
        with page.busy("starting RabbitMQ and Postgres"):
            sandbox = await stack.enter_async_context(Sandbox(("rabbitmq", "postgres")))
        guard = Guard(None)
        stack.callback(guard.close)
        environment = sandbox.environment() | {
            "CACHEINVAL_CACHE_TTL": str(TTL),
            "CACHEINVAL_NAMESPACE": NAMESPACE,
            "CACHEINVAL_SECRETS_DIR": str(sandbox.folder),  # where there are none
        }
        names = ("service", "reader-1", "reader-2", "reader-3")
        processes = [Process(name, sandbox.folder, environment, guard) for name in names]
        stack.push_async_callback(_stop, processes)
        began = time.monotonic()
        with page.busy("starting the product service and three readers"):
            await together(*(process.start() for process in processes))
        took = time.monotonic() - began
        pool = await asyncpg.create_pool(
            sandbox.postgres.url, min_size=0, max_size=4, command_timeout=DATABASE_TIMEOUT
        )
        stack.callback(pool.terminate)
        stage = ServerStage(processes[0], processes[1:], pool, sandbox.rabbitmq)
        for product_id in (LAMP, *CATALOGUE):
            await stage.put(product_id, new_price())
        page.facts([*_servers(sandbox), *_started(processes, took)], to_right=False)
        yield stage


async def _stop(processes: Sequence[Process]) -> None:
    await asyncio.gather(*(process.stop() for process in processes))


def _servers(sandbox: Sandbox) -> list[tuple[str, str]]:
    return [
        (server.name, f"{server.boot_seconds:4.1f} s  {mask_url(server.url)}") for server in sandbox.servers
    ]


def _started(processes: Sequence[Process], took: float) -> list[tuple[str, str]]:
    return [(process.name, f"{took:4.1f} s  http://{LOOPBACK}:{process.port}") for process in processes]
