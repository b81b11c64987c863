"""Latency at a low rate: from COMMIT until the key is evicted in each of N instances, at 200 writes a second.

For cacheinval the time begins when COMMIT has returned, for the peers when they begin to publish, as they know of no commit.
It ends when the last instance has evicted the key. Everything runs in one process; writes come at their time, whether those
before them have arrived or not.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from cacheinval import Client
from cacheinval.cache import InProcessCache

from .fleet import Fleet, make_items, names
from .measuring import Figures, Variant, percentile, take_turns
from .peers import AioPika, ListenNotify, Peer, RedisPubSub
from .reporting import Report
from .servers import Urls, private_servers

__all__ = ["run"]

RATE = 200
WRITES = 300
SIZES = (1, 4, 16)

OURS = "cacheinval"
RIVAL = "aio-pika"
PEERS: dict[str, type[Peer]] = {
    RIVAL: AioPika,
    "Redis pub/sub": RedisPubSub,
    "LISTEN/NOTIFY": ListenNotify,
}

Samples = dict[str, list[float]]


async def run(report: Report, rounds: int) -> None:
    """Measures, and reports."""
    async with private_servers("rabbitmq", "postgres", "redis") as servers:
        urls = Urls.of(servers)
        await make_items(urls)
        found: dict[int, Figures] = {}
        samples: dict[int, Samples] = {}
        for size in SIZES:
            raw = samples[size] = {}
            variants: dict[str, Variant] = {OURS: partial(_ours, urls, size, raw)}
            variants |= {name: partial(_peer, urls, name, size, raw) for name in PEERS}
            found[size] = await take_turns(
                variants, rounds, lambda text, n=size: report.progress(f"N={n} {text}")
            )
    _report(report, found, samples)


class _Watch:
    """When each key began, and when the last instance had evicted it."""

    def __init__(self, keys: list[str], size: int) -> None:
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self._left = dict.fromkeys(keys, size)
        self._finished = asyncio.Event()

    def begin(self, key: str) -> None:
        self.began[key] = time.perf_counter()

    def evicted(self, key: str) -> None:
        """One instance has evicted `key`."""
        self._left[key] -= 1
        if not self._left[key]:
            self.ended[key] = time.perf_counter()
            if len(self.ended) == len(self._left):
                self._finished.set()

    async def milliseconds(self) -> list[float]:
        """Of each key, when all of them are evicted everywhere."""
        async with asyncio.timeout(30):
            await self._finished.wait()
        return [(end - self.began[key]) * 1e3 for key, end in self.ended.items()]


async def _at_their_time(write: Callable[[str], Awaitable[Any]], keys: list[str]) -> None:
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, key in enumerate(keys):
            await asyncio.sleep(began + number / RATE - time.perf_counter())
            group.create_task(_write(write, key))


async def _write(write: Callable[[str], Awaitable[Any]], key: str) -> None:
    await write(key)


async def _ours(urls: Urls, size: int, raw: Samples) -> dict[str, float]:
    keys = names(WRITES)
    watch = _Watch(keys, size)
    async with Fleet(urls, size) as fleet:
        await fleet.fill(keys)
        _note_commits(fleet.writer, watch)
        for client in fleet.instances:
            _note_evictions(client, watch)
        await _at_their_time(fleet.change, keys)
        await fleet.gone()
        return _judged(OURS, await watch.milliseconds(), raw)


def _note_commits(writer: Client, watch: _Watch) -> None:
    # Handing over what is to be published is the first thing that happens when COMMIT has returned.
    submit = writer.publisher.submit

    def noting(unpublished: Any) -> None:
        for key in unpublished.keys:
            watch.begin(key)
        submit(unpublished)

    writer.publisher.submit = noting  # type: ignore[method-assign]


def _note_evictions(client: Client, watch: _Watch) -> None:
    cache = client.cache
    assert isinstance(cache, InProcessCache)
    evict = cache.evict_now

    def noting(eviction: Any) -> None:
        before = len(cache)
        evict(eviction)
        if before - len(cache) != len(eviction.keys):
            raise AssertionError(f"{before - len(cache)} of {len(eviction.keys)} keys were evicted")
        for key in eviction.keys:
            watch.evicted(key)

    cache.evict_now = noting  # type: ignore[method-assign]


async def _peer(urls: Urls, name: str, size: int, raw: Samples) -> dict[str, float]:
    keys = names(WRITES)
    watch = _Watch(keys, size)
    caches = [dict.fromkeys(keys, "value") for _ in range(size)]
    async with PEERS[name](urls) as peer:
        for cache in caches:
            await peer.subscribe(partial(_evict, cache, watch))

        async def write(key: str) -> None:
            watch.begin(key)
            await peer.publish(key)

        await _at_their_time(write, keys)
        return _judged(name, await watch.milliseconds(), raw)


def _evict(cache: dict[str, str], watch: _Watch, key: str) -> None:
    del cache[key]
    watch.evicted(key)


def _judged(name: str, milliseconds: list[float], raw: Samples) -> dict[str, float]:
    raw.setdefault(name, []).extend(milliseconds)
    return {"p50": percentile(milliseconds, 0.5), "p99": percentile(milliseconds, 0.99)}


def _report(report: Report, found: dict[int, Figures], samples: dict[int, Samples]) -> None:
    report.table(
        f"Milliseconds until a key is evicted in all of N instances, at {RATE} writes a second",
        [f"N = {size}, {what}" for size in found for what in ("p50", "p99")],
        {
            name: [each[name][what] for each in found.values() for what in ("p50", "p99")]
            for name in (OURS, *PEERS)
        },
        f"{OURS}: from when COMMIT has returned; the others: from when publishing begins. Each figure is the median of the "
        f"rounds, of {WRITES} writes each.",
    )
    for size, limit in ((1, 1.0), (4, 1.0), (16, 0.5)):
        for what in ("p50", "p99"):
            ratio = found[size][OURS][what] / found[size][RIVAL][what]
            report.at_most(f"N = {size}: {what} of the latency, against {RIVAL}", ratio, limit)
    for size, values in samples.items():
        report.pictures[f"latency N = {size}"] = values
