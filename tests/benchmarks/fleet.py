"""Instances of cacheinval with everything on, as a service would have them."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Self

import asyncpg

from cacheinval import Client, Settings
from cacheinval.cache import InProcessCache

from .servers import Urls

__all__ = [
    "LOOK_AGAIN",
    "WRITERS",
    "Fleet",
    "committing",
    "fill",
    "gone",
    "make_items",
    "many",
    "name",
    "names",
    "note_evictions",
    "settings",
]

WRITERS = 32
"""Writes under way at a time."""

LOOK_AGAIN = 0.002
"""Seconds between two looks at whether everything is evicted: rarely enough to cost nothing, in sixteen processes too."""

ITEMS = 10_000
"""Rows of the table that is changed."""

UPDATE = "UPDATE items SET price = price + 1 WHERE id = $1"


def name(number: int) -> str:
    """The key of an item."""
    return f"product:{number:08d}"


def names(count: int) -> list[str]:
    """The keys of as many items."""
    return [name(number) for number in range(count)]


async def make_items(urls: Urls) -> None:
    """The schema, and a table to change."""
    connection = await asyncpg.connect(urls.postgres)
    try:
        client = Client(settings(urls, "schema", relay="off"), subscribe=False)
        async with client:
            await client.apply_schema()
        await connection.execute("CREATE TABLE items (id text PRIMARY KEY, price int NOT NULL)")
        await connection.executemany("INSERT INTO items VALUES ($1, 1)", [(key,) for key in names(ITEMS)])
    finally:
        await connection.close()


def settings(urls: Urls, namespace: str, **others: Any) -> Settings:
    """Nothing is left out: a database with the outbox, Δ, and so the registration of each instance."""
    return Settings(
        broker_url=urls.rabbitmq,
        database_url=urls.postgres,
        namespace=namespace,
        max_staleness=5,
        cache_max_entries=200_000,
        **others,
    )


@asynccontextmanager
async def committing(urls: Urls) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """What changes a row and commits, as `Fleet.change` does, and tells nobody."""
    size = WRITERS + 2
    async with asyncpg.create_pool(urls.postgres, min_size=size, max_size=size) as pool:

        async def change(key: str) -> None:
            await pool.execute(UPDATE, key)

        await many([lambda: change(name(0))] * (4 * WRITERS))
        yield change


class Fleet:
    """Instances in this process, on one event loop, and a client that writes and runs the relay.

    The writer has no cache of its own, so whatever is evicted was told by the broker.
    """

    def __init__(self, urls: Urls, size: int, namespace: str | None = None) -> None:
        self.instances: list[Client] = []
        self.namespace = namespace or f"bench-{secrets.token_hex(4)}"
        self.writer: Client
        self._urls = urls
        self._size = size
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            # Instances hardly need the database: together they have a pool as one of them would have alone.
            pool, writing = [await self._pool(stack, size) for size in (10, WRITERS + 2)]
            for _ in range(self._size):
                client = Client(settings(self._urls, self.namespace, relay="off"), pool=pool)
                self.instances.append(await stack.enter_async_context(client))
            self.writer = Client(settings(self._urls, self.namespace), pool=writing, subscribe=False)
            await asyncio.gather(*(client.wait_ready(10) for client in self.instances))
            await stack.enter_async_context(self.writer)
            if writing is not None:
                # A connection that is new to Postgres takes milliseconds for its first statement of each sort.
                await many([lambda: self.change(name(0))] * (4 * WRITERS))
                await many([lambda: self.writer.invalidate(name(0))] * (4 * WRITERS))
                await self.writer.publisher.flush(10)
            self._stack = stack.pop_all()
        return self

    async def _pool(self, stack: AsyncExitStack, size: int) -> Any:
        if not self._urls.postgres:
            return None
        pool = asyncpg.create_pool(self._urls.postgres, min_size=size, max_size=size)
        return await stack.enter_async_context(pool)

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def change(self, key: str) -> None:
        """One write of one row, with its invalidation."""
        await self.writer.execute(UPDATE, key, invalidate=[key])

    async def fill(self, keys: Sequence[str]) -> None:
        """Every instance loads every key, and serves it from its cache from then on."""
        for client in self.instances:
            await fill(client, keys)

    async def gone(self) -> None:
        """Waits until every key is evicted from every instance."""
        await asyncio.gather(*(gone(client) for client in self.instances))


async def _load() -> str:
    return "value"


async def fill(client: Client, keys: Sequence[str]) -> None:
    """Loads all keys through the cache, which is empty.

    Raises:
        AssertionError: they are not served from it then.
    """
    for key in keys:
        await client.cache.get_or_set(key, _load)
    if len(client.cache) != len(keys):
        raise AssertionError(f"{len(client.cache)} entries, not {len(keys)}")
    for key in keys[:: max(1, len(keys) // 10)]:
        read = await client.cache.read(key, _load)
        if read.outcome != "hit":
            raise AssertionError(f"{key}: {read.outcome}, before anything was evicted")


async def gone(client: Client) -> None:
    """Waits until the cache is empty.

    Raises:
        AssertionError: something else than evictions of keys has emptied it.
    """
    epoch = client.status()["cache"]["epoch"]
    async with asyncio.timeout(60):
        while len(client.cache):
            await asyncio.sleep(LOOK_AGAIN)
    if client.status()["cache"]["epoch"] != epoch:
        raise AssertionError("a new epoch has emptied the cache, not the invalidations")


def note_evictions(client: Client, evicted: Callable[[str], None]) -> None:
    """From now on `evicted` is called with each key that a message evicts from the cache: not a second time with one that
    the relay has published as well."""
    cache = client.cache
    assert isinstance(cache, InProcessCache)
    evict, look = cache.evict_now, cache._backend.look

    def noting(eviction: Any) -> None:
        there = [key for key in eviction.keys if look(key) is not None]
        evict(eviction)
        for key in there:
            if look(key) is not None:
                raise AssertionError(f"{key} is still there")
            evicted(key)

    cache.evict_now = noting  # type: ignore[method-assign]


async def many(work: Iterable[Callable[[], Awaitable[Any]]], at_a_time: int = WRITERS) -> None:
    """Does all of it, so much at a time."""
    todo = iter(work)

    async def one_by_one() -> None:
        for do in todo:
            await do()

    async with asyncio.TaskGroup() as group:
        for _ in range(at_a_time):
            group.create_task(one_by_one())
