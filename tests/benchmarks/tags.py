"""Evicting a tag, and clearing, and what grows with the number of entries: how long the event loop is held, what garbage collection costs, when memory is back.

Each variant proves before that its entries were served, and afterwards that none is.
"""

import asyncio
import gc
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Self

import aiocache
import cachebox
import cashews
import moka_py
import theine

from cacheinval import Client, Settings
from cacheinval.messages import Invalidate, encode

from .measuring import Figure, Figures, Holds, take_turns
from .reporting import Report

TAGGED = (100, 1_000, 10_000, 100_000)
CLEARED = (10_000, 100_000, 1_000_000)
CACHED = (1_000, 100_000, 1_000_000)
READ = 1_000  # entries, from all over the cache
EVICTED = 100  # of these, by one message
PATIENCE = 15.0  # seconds that a cleared cache has to give its memory back


async def run(report: Report, rounds: int) -> None:
    gc.freeze()  # what is there anyway is not to be collected again and again
    try:
        for name, part in (("growing", _grow), ("tags", _evict_tags), ("clearing", _clear)):
            with report.part(name):
                await part(report, rounds)
    finally:
        gc.unfreeze()


async def _grow(report: Report, rounds: int) -> None:
    sizes = {Cacheinval: CACHED, Moka: CACHED[:2], Aiocache: CACHED[:2]}
    found = await _turns(report, rounds, sizes, _read_and_evict)
    for what, title in (
        ("hit", "A hit while so many entries are cached, ns"),
        (
            "eviction",
            f"Evicting a key of {EVICTED} that are named together while so many entries are cached, ns",
        ),
    ):
        report.table(
            title,
            [f"{size:,} entries" for size in CACHED],
            {kind.title: _row(found, kind, CACHED, what) for kind in sizes},
        )


async def _evict_tags(report: Report, rounds: int) -> None:
    sizes: dict[type[Cache], Sequence[int]] = {
        Cacheinval: TAGGED,
        Cashews: TAGGED[:3],
        Moka: TAGGED[:3],
        Theine: TAGGED[:3],
        Aiocache: TAGGED[:3],
    }
    found = await _turns(report, rounds, sizes, _evict_tag)
    report.table(
        "Evicting a tag: longest hold of the event loop, ms",
        [f"{size:,} entries" for size in TAGGED],
        {kind.title: _row(found, kind, TAGGED, "hold") for kind in sizes},
        "Peers without tags delete what a set of keys names that their user keeps.",
    )
    report.table(
        "Evicting a tag: until it is done, ms",
        [f"{size:,} entries" for size in TAGGED],
        {kind.title: _row(found, kind, TAGGED, "took") for kind in sizes},
    )
    hold = found[_name(Cacheinval, 10_000)]["hold"]
    report.at_most("evicting a tag of 10,000 entries, longest hold of the event loop", hold, 5, "ms")


async def _clear(report: Report, rounds: int) -> None:
    sizes = {
        Cacheinval: CLEARED,
        Cachebox: CLEARED,
        Moka: CLEARED[:2],
        Theine: CLEARED[:2],
        Aiocache: CLEARED[:2],
        Cashews: CLEARED[:1],
    }
    found = await _turns(report, rounds, sizes, _clear_all)
    for what, title in (
        ("took", "Clearing: until nothing is served any more, ms"),
        ("hold", "Clearing: longest hold of the event loop until the memory is back, ms"),
        ("freed", "Clearing: until the last value is freed, while others read and write, ms"),
        ("collection", "By how much the entries prolong a full garbage collection, ms"),
    ):
        report.table(
            title,
            [f"{size:,} entries" for size in CLEARED],
            {kind.title: _row(found, kind, CLEARED, what) for kind in sizes},
        )
    million = found[_name(Cacheinval, 1_000_000)]
    report.at_most("clearing a million entries", million["took"], 1, "ms")
    report.at_most("giving their memory back, longest hold of the event loop", million["hold"], 5, "ms")


async def _turns(
    report: Report, rounds: int, sizes: "dict[Any, Sequence[int]]", measure: Callable[..., Any]
) -> Figures:
    variants = {
        _name(kind, size): partial(measure, kind, size) for kind, each in sizes.items() for size in each
    }
    return await take_turns(variants, rounds, report.progress)


def _name(kind: Any, size: int) -> str:
    return f"{kind.title}, {size}"


def _row(found: Figures, kind: Any, sizes: Sequence[int], what: str) -> list[Figure | None]:
    return [found[name][what] if (name := _name(kind, size)) in found else None for size in sizes]


# What is measured


async def _read_and_evict(kind: "type[Cache]", size: int) -> dict[str, float]:
    keys = [f"product:{n}" for n in range(0, size, size // READ)]
    async with kind.open(size) as cache:
        await cache.fill(_entries(size, asyncio.Event()))
        await _prove_there(cache, keys)
        hits, evictions = [], []
        for at in range(0, READ, EVICTED):
            some = keys[at : at + EVICTED]
            began = time.perf_counter()
            for key in some:
                await cache.read(key)
            read = time.perf_counter()
            await cache.evict(some)
            evictions.append(time.perf_counter() - read)
            hits.append(read - began)
            await _prove_gone(cache, some)
            await asyncio.sleep(0)
    return {name: median(each) / EVICTED * 1e9 for name, each in (("hit", hits), ("eviction", evictions))}


async def _evict_tag(kind: "type[Cache]", size: int) -> dict[str, float]:
    keys = [f"product:{n}" for n in range(size)]
    async with kind.open(2 * size) as cache:
        for key in keys:
            await cache.store(key, {"id": key, "price": 99}, "products")
        await cache.store("other", {"id": "other"}, "others")
        await _prove_there(cache, keys)
        gc.collect()
        with Holds() as holds:
            await asyncio.sleep(0)
            began = time.perf_counter()
            await cache.evict_tag("products", keys)
            took = time.perf_counter() - began
            await asyncio.sleep(0)
        await _prove_gone(cache, keys)
        if not await cache.has("other"):
            raise AssertionError(f"{kind.title} has evicted what does not carry the tag")
    return {"hold": holds.longest * 1e3, "took": took * 1e3}


class Last:
    """The value that was stored last, and so is freed last; compared by nobody."""


def _entries(size: int, freed: asyncio.Event) -> Iterator[tuple[str, Any]]:
    for n in range(size - 1):
        yield f"product:{n}", ("price", n)
    last = Last()
    weakref.finalize(last, freed.set).atexit = False
    yield f"product:{size - 1}", last


def _collection() -> float:
    """Seconds that a full garbage collection takes where there is nothing to collect."""
    gc.collect()
    began = time.perf_counter()
    gc.collect()
    return time.perf_counter() - began


async def _clear_all(kind: "type[Cache]", size: int) -> dict[str, float]:
    some = [f"product:{n}" for n in (*range(0, size, size // 1000), size - 1)]
    async with kind.open(size) as cache:
        before = _collection()
        freed = asyncio.Event()
        await cache.fill(_entries(size, freed))
        await _prove_there(cache, some)
        collection = _collection() - before
        with Holds() as holds:
            await asyncio.sleep(0)
            began = time.perf_counter()
            await cache.clear()
            took = time.perf_counter() - began
            await _go_on_until(freed, cache, began)
            until_freed = time.perf_counter() - began
            await asyncio.sleep(0.01)  # what comes after the last value: its map
        await _prove_gone(cache, some)
    return {
        "took": took * 1e3,
        "hold": holds.longest * 1e3,
        "freed": until_freed * 1e3,
        "collection": collection * 1e3,
    }


async def _go_on_until(freed: asyncio.Event, cache: "Cache", began: float) -> None:
    """Reads and writes, since there are caches that free only while they are used."""
    n = 0
    while not freed.is_set():
        if time.perf_counter() - began > PATIENCE:
            raise AssertionError(f"{cache.title} has not freed its last value within {PATIENCE:g} s")
        await cache.store(f"later:{n % 1000}", n, "products")
        await cache.has(f"later:{n % 1000}")
        await asyncio.sleep(0)
        n += 1


async def _prove_there(cache: "Cache", keys: Sequence[str]) -> None:
    for key in keys[:: max(1, len(keys) // 1000)]:
        if not await cache.has(key):
            raise AssertionError(f"{cache.title} has not kept {key}")


async def _prove_gone(cache: "Cache", keys: Sequence[str]) -> None:
    for key in keys:
        if await cache.has(key):
            raise AssertionError(f"{cache.title} still serves {key}")


# Variants


class Cache(ABC):
    """What this benchmark asks of a cache."""

    title: str

    @classmethod
    @asynccontextmanager
    async def open(cls, most: int) -> AsyncIterator[Self]:
        """With room for `most` entries."""
        yield cls(most)

    def __init__(self, most: int) -> None:
        self.most = most

    @abstractmethod
    async def store(self, key: str, value: Any, tag: str) -> None: ...

    @abstractmethod
    async def fill(self, entries: Any) -> None:
        """Stores many, as fast as can be, in the form in which `store` would."""

    @abstractmethod
    async def has(self, key: str) -> bool:
        """Whether a read of `key` would be answered from the cache."""

    async def read(self, key: str) -> None:
        """Reads what is there."""
        await self.has(key)

    async def evict(self, keys: Sequence[str]) -> None:
        """Evicts these."""
        await self.evict_tag("", keys)

    async def evict_tag(self, tag: str, keys: Sequence[str]) -> None:
        """`keys` is what a user has noted of `tag`, where the cache itself knows no tags."""
        raise NotImplementedError

    @abstractmethod
    async def clear(self) -> None: ...


@dataclass
class Arriving:
    """A message as the bus hands it over."""

    body: bytes
    reply_to: str | None = None
    offset: int | None = None
    contexts: tuple[str, ...] = ()


async def _never() -> Any:
    raise AssertionError("a miss, where a hit was to be measured")


class Cacheinval(Cache):
    """Told by messages, as they arrive from the bus."""

    title = "cacheinval"

    @classmethod
    @asynccontextmanager
    async def open(cls, most: int) -> AsyncIterator[Self]:
        settings = Settings(broker_url="memory://", database_url="", cache_max_entries=most)
        async with Client(settings) as client:
            await client.wait_ready(timeout=5)
            cache = cls(most)
            cache.client = client
            yield cache

    async def store(self, key: str, value: Any, tag: str) -> None:
        async def load() -> Any:
            return value

        await self.client.cache.get_or_set(key, load, tags=[tag])

    async def fill(self, entries: Any) -> None:
        coherence, cache = self.client._coherence, self.client.cache
        now = self.client._clock.now()
        load = coherence.loads.begin("fill", now, frozenset(["products"]), None)
        for key, value in entries:
            cache._backend.put(key, load.entry(value, now + 300))
        coherence.loads.end(load)

    async def has(self, key: str) -> bool:
        return await self.client.cache.would_serve(key) is not None

    async def read(self, key: str) -> None:
        await self.client.cache.get_or_set(key, _never)

    async def evict(self, keys: Sequence[str]) -> None:
        await self.client.instance.receive([Arriving(encode(Invalidate(v=1, keys=list(keys))))])

    async def evict_tag(self, tag: str, keys: Sequence[str]) -> None:
        await self.client.instance.receive([Arriving(encode(Invalidate(v=1, tags=[tag])))])

    async def clear(self) -> None:
        await self.client.instance.receive([Arriving(encode(Invalidate(v=1, all=True)))])


class Cachebox(Cache):
    """The bounded map that cacheinval keeps its entries in, by itself: what a clear costs without any care."""

    title = "cachebox, a new map"

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._map = cachebox.LRUCache(most)

    async def store(self, key: str, value: Any, tag: str) -> None:
        self._map.insert(key, value)

    async def fill(self, entries: Any) -> None:
        for key, value in entries:
            self._map.insert(key, value)

    async def has(self, key: str) -> bool:
        return self._map.get(key) is not None

    async def clear(self) -> None:
        self._map = cachebox.LRUCache(self.most)


class Moka(Cache):
    title = "moka-py"

    def __init__(self, most: int) -> None:
        self._cache = moka_py.Moka(most + 1000, ttl=300)

    async def store(self, key: str, value: Any, tag: str) -> None:
        self._cache.set(key, value)

    async def fill(self, entries: Any) -> None:
        for key, value in entries:
            self._cache.set(key, value)

    async def has(self, key: str) -> bool:
        return self._cache.get(key) is not None

    async def evict_tag(self, tag: str, keys: Sequence[str]) -> None:
        for key in keys:
            self._cache.remove(key)

    async def clear(self) -> None:
        self._cache.clear()


class Theine(Cache):
    title = "theine"

    @classmethod
    @asynccontextmanager
    async def open(cls, most: int) -> AsyncIterator[Self]:
        cache = cls(most)
        try:
            yield cache
        finally:
            cache._cache.close()

    def __init__(self, most: int) -> None:
        self._cache: Any = theine.Cache(2 * most + 1000)

    async def store(self, key: str, value: Any, tag: str) -> None:
        self._cache.set(key, value)

    async def fill(self, entries: Any) -> None:
        for key, value in entries:
            self._cache.set(key, value)

    async def has(self, key: str) -> bool:
        return self._cache.get(key)[1]

    async def evict_tag(self, tag: str, keys: Sequence[str]) -> None:
        for key in keys:
            self._cache.delete(key)

    async def clear(self) -> None:
        self._cache.clear()


class Aiocache(Cache):
    title = "aiocache, memory"

    def __init__(self, most: int) -> None:
        self._cache = aiocache.SimpleMemoryCache(timeout=0)  # else each operation is a task of its own

    async def store(self, key: str, value: Any, tag: str) -> None:
        await self._cache.set(key, value)

    async def fill(self, entries: Any) -> None:
        self._cache._cache.update(entries)

    async def has(self, key: str) -> bool:
        return await self._cache.get(key) is not None

    async def evict_tag(self, tag: str, keys: Sequence[str]) -> None:
        for key in keys:
            await self._cache.delete(key)

    async def clear(self) -> None:
        await self._cache.clear()


class Cashews(Cache):
    title = "cashews, memory"

    @classmethod
    @asynccontextmanager
    async def open(cls, most: int) -> AsyncIterator[Self]:
        cache = cls(most)
        try:
            yield cache
        finally:
            await cache._cache.close()

    def __init__(self, most: int) -> None:
        self._cache = cashews.Cache()
        self._cache.setup("mem://", size=2 * most)
        self._cache.register_tag("products", "product:{n}")
        self._cache.register_tag("others", "other")

    async def store(self, key: str, value: Any, tag: str) -> None:
        tags = () if key.startswith("later:") else (tag,)
        await self._cache.set(key, value, expire=300, tags=tags)

    async def fill(self, entries: Any) -> None:
        for key, value in entries:
            await self.store(key, value, "products")

    async def has(self, key: str) -> bool:
        return await self._cache.get(key) is not None

    async def evict_tag(self, tag: str, keys: Sequence[str]) -> None:
        await self._cache.delete_tags(tag)

    async def clear(self) -> None:
        await self._cache.clear()
