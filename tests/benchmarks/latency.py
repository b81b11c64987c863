"""Latency at a low rate: from COMMIT until the key is evicted in each of N instances, at 200 writes a second.

For cacheinval the time begins when COMMIT has returned, for the peers when they begin to publish. They know of no commit, so
they have the processor to themselves; one of them runs once more with what a service would do that uses it for its cache:
it changes the row, commits, and publishes then. It ends when the last instance has evicted the key. All instances run in this
process, or each in a process of its own; writes come at their time, whether those before them have arrived or not.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from cacheinval import Client
from cacheinval.sandbox import Sandbox

from .crowd import Crowd
from .fleet import Fleet, committing, make_items, names, note_evictions
from .measuring import Figures, Variant, percentile, take_turns
from .peers import FLOOR, PEERS, Peer
from .reporting import Cell, Report
from .servers import PARTS, Processor, Urls, private_servers

__all__ = ["run"]

RATE = 200
WRITES = {1: 200, 4: 200, 16: 200, 64: 100}
"""By the number of instances."""
APART = (16,)

FORGOTTEN_AFTER = 0.2
"""Seconds after which those that warmed it up are no crowd any more, for which whoever comes next would wait (`pace.py`)."""

OURS = "cacheinval"
RIVAL = "aio-pika"
RIVALS = (FLOOR, RIVAL, "Redis pub/sub", "LISTEN/NOTIFY")
COMMITTING = f"{RIVAL}, after a COMMIT"
MOST_COMMITTING = 16  # instances: with more it is saturated anyway

Samples = dict[str, list[float]]


async def run(report: Report, rounds: int) -> None:
    """Measures, and reports."""
    async with private_servers("rabbitmq", "postgres", "redis") as servers:
        urls = Urls.of(servers)
        await make_items(urls)
        found: dict[int, Figures] = {}
        apart: dict[int, Figures] = {}
        samples: dict[int, Samples] = {}
        for size in WRITES:
            raw = samples[size] = {}
            variants: dict[str, Variant] = {OURS: partial(_ours, servers, urls, size, raw)}
            variants |= {name: partial(_peer, servers, urls, name, size, raw) for name in RIVALS}
            if size <= MOST_COMMITTING:
                variants[COMMITTING] = partial(_committing, servers, urls, size, raw)
            with report.part(f"N = {size}"):
                found[size] = await take_turns(
                    variants, rounds, lambda text, n=size: report.progress(f"N={n} {text}")
                )
        for size in APART:
            with report.part(f"{size} processes"):
                apart[size] = await _apart(report, servers, urls, size, rounds)
    _report(report, found, apart, samples)


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


async def _ours(servers: Sandbox, urls: Urls, size: int, raw: Samples) -> dict[str, float]:
    keys = names(WRITES[size])
    watch = _Watch(keys, size)
    async with Fleet(urls, size) as fleet:
        await fleet.fill(keys)
        _note_commits(fleet.writer, watch.begin)
        for client in fleet.instances:
            note_evictions(client, watch.evicted)
        await asyncio.sleep(FORGOTTEN_AFTER)
        processor = Processor(servers, "rabbitmq", "postgres")
        await _at_their_time(fleet.change, keys)
        await fleet.gone()
        return _judged(OURS, await watch.milliseconds(), raw) | processor.milliseconds(len(keys))


def _note_commits(writer: Client, committed: Callable[[str], None]) -> None:
    # Handing over what is to be published is the first thing that happens when COMMIT has returned.
    submit = writer.publisher.submit

    def noting(unpublished: Any) -> None:
        for key in unpublished.keys:
            committed(key)
        submit(unpublished)

    writer.publisher.submit = noting  # type: ignore[method-assign]


async def _peer(servers: Sandbox, urls: Urls, name: str, size: int, raw: Samples) -> dict[str, float]:
    async with PEERS[name](urls) as peer:
        return await _published(peer, name, size, raw, lambda: Processor(servers, peer.server))


async def _committing(servers: Sandbox, urls: Urls, size: int, raw: Samples) -> dict[str, float]:
    """As `RIVAL`, by a writer that changes the row first, through a pool as large as that of cacheinval's."""
    async with PEERS[RIVAL](urls) as peer, committing(urls) as commit:
        processor = partial(Processor, servers, peer.server, "postgres")
        return await _published(peer, COMMITTING, size, raw, processor, commit)


async def _published(
    peer: Peer,
    name: str,
    size: int,
    raw: Samples,
    processor: Callable[[], Processor],
    commit: Callable[[str], Awaitable[Any]] | None = None,
) -> dict[str, float]:
    keys = names(WRITES[size])
    watch = _Watch(keys, size)
    caches = [dict.fromkeys(keys, "value") for _ in range(size)]
    for cache in caches:
        await peer.subscribe(partial(_evict, cache, watch))

    async def write(key: str) -> None:
        if commit is not None:
            await commit(key)
        watch.begin(key)
        await peer.publish(key)

    used = processor()
    await _at_their_time(write, keys)
    return _judged(name, await watch.milliseconds(), raw) | used.milliseconds(len(keys))


def _evict(cache: dict[str, str], watch: _Watch, key: str) -> None:
    del cache[key]
    watch.evicted(key)


async def _apart(report: Report, servers: Sandbox, urls: Urls, size: int, rounds: int) -> Figures:
    """Each instance in a process of its own."""
    namespace = f"latency-{size}"
    keys = names(WRITES[size])
    async with AsyncExitStack() as stack:
        crowd = await stack.enter_async_context(Crowd(size, urls))
        async with crowd.subscribed(OURS, namespace):  # which makes the exchange
            fleet = await stack.enter_async_context(Fleet(urls, 0, namespace))
        began: dict[str, float] = {}

        def begin(key: str) -> None:
            began[key] = time.perf_counter()

        _note_commits(fleet.writer, begin)

        async def watched(write: Callable[[str], Awaitable[Any]], *services: str) -> dict[str, float]:
            await crowd.fill(len(keys))
            processor = Processor(servers, *services)
            await _at_their_time(write, keys)
            emptied = await crowd.emptied()
            milliseconds = [(at - began[key]) * 1e3 for key, at in emptied.times.items()]
            return _judged(OURS, milliseconds, {}) | processor.milliseconds(len(keys), emptied.processor)

        async def ours() -> dict[str, float]:
            async with crowd.subscribed(OURS, namespace):
                await asyncio.sleep(FORGOTTEN_AFTER)
                return await watched(fleet.change, "rabbitmq", "postgres")

        async def theirs(name: str) -> dict[str, float]:
            async with PEERS[name](urls) as peer, crowd.subscribed(name, ""):

                async def write(key: str) -> None:
                    begin(key)
                    await peer.publish(key)

                return await watched(write, peer.server)

        variants: dict[str, Variant] = {OURS: ours} | {name: partial(theirs, name) for name in RIVALS}
        return await take_turns(variants, rounds, lambda text: report.progress(f"{size} processes, {text}"))


def _judged(name: str, milliseconds: list[float], raw: Samples) -> dict[str, float]:
    raw.setdefault(name, []).extend(milliseconds)
    return {"p50": percentile(milliseconds, 0.5), "p99": percentile(milliseconds, 0.99)}


def _report(
    report: Report, found: Mapping[int, Figures], apart: Mapping[int, Figures], samples: Mapping[int, Samples]
) -> None:
    for each, where in ((found, "one process"), (apart, "a process of its own for each")):
        report.table(
            f"Milliseconds until a key is evicted in all of N instances, at {RATE} writes a second, in {where}",
            [f"N = {size}, {what}" for size in each for what in ("p50", "p99")],
            _cells(each, ("p50", "p99")),
            f"{OURS} and {COMMITTING}: from when COMMIT has returned; the others: from when publishing begins. Each figure is the median of "
            f"the rounds, of {WRITES[1]} writes each ({WRITES[64]} for 64 instances).",
        )
        report.table(
            f"Processor milliseconds for a thousand keys evicted at that rate in all of N instances, in {where}",
            [f"N = {size}, {part}" for size in each for part in PARTS],
            _cells(each, PARTS),
        )
    for size, limit in ((1, 1.0), (4, 1.0), (16, 0.5)):
        for what in ("p50", "p99"):
            for rival in (RIVAL, COMMITTING):
                ratio = found[size][OURS][what] / found[size][rival][what]
                report.at_most(f"N = {size}: {what} of the latency, against {rival}", ratio, limit)
    for size, values in samples.items():
        report.pictures[f"latency N = {size}"] = values


def _cells(found: Mapping[int, Figures], whats: tuple[str, ...]) -> dict[str, list[Cell]]:
    return {
        name: [each.get(name, {}).get(what) for each in found.values() for what in whats]
        for name in (OURS, COMMITTING, *RIVALS)
        if any(name in each for each in found.values())
    }
