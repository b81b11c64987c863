"""Fan-out under load: how many keys a second are evicted in each of N instances, and what that takes of the processor.

cacheinval runs with everything on: a transaction with its outbox row for each write, fsync, confirms, gap detection, an
eviction before each acknowledgement, the relay, Δ and registrations. What a write names is told in each row of a table: one
key, or as many as a call of `invalidate` is given. The peers publish one key a message and do nothing else.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from contextlib import AsyncExitStack
from functools import partial

from cacheinval.sandbox import Sandbox

from .crowd import Crowd
from .fleet import LOOK_AGAIN, WRITERS, Fleet, make_items, many, names
from .measuring import Figure, Figures, Variant, take_turns
from .peers import CALLERS, FLOOR, PEERS, Peer
from .reporting import Cell, Report
from .servers import PARTS, Processor, Urls, private_servers

__all__ = ["run"]

RIVAL = "aio-pika"
OURS = "cacheinval"
NO_DATABASE = "cacheinval without a database"

BATCHES = (1, 10, 100, 1000)
"""Keys a write: one in a transaction with its UPDATE; more in one call of `invalidate`."""
APART = (1, 100)

KEYS: Mapping[int, Mapping[int, int]] = {
    1: {1: 2000, 10: 10_000, 100: 30_000, 1000: 50_000},
    4: {1: 1500, 10: 6_000, 100: 12_000, 1000: 20_000},
    16: {1: 1000, 10: 2_000, 100: 4_000, 1000: 8_000},
    64: {1: 300, 10: 600, 100: 1_000, 1000: 2_000},
}
"""By instances, then by keys a write: a tenth of a second of work, or more."""

MESSAGES = {1: 1500, 4: 500, 16: 150, 64: 40}
"""For the slower peers; the faster ones have so many times as many."""
PEERS_APART = (FLOOR, RIVAL, "Redis pub/sub", "LISTEN/NOTIFY")
FASTER = {"pika": 3, "Redis pub/sub": 3, "LISTEN/NOTIFY": 3, FLOOR: 8}


async def run(report: Report, rounds: int) -> None:
    """Measures, and reports."""
    async with private_servers("rabbitmq", "postgres", "redis") as servers:
        urls = Urls.of(servers)
        await make_items(urls)
        found, apart = {}, {}
        for size in KEYS:
            variants: dict[str, Variant] = {OURS: partial(_ours, servers, urls, size)}
            variants |= {name: partial(_peer, servers, urls, name, size) for name in PEERS}
            variants[NO_DATABASE] = partial(_without_database, servers, urls, size)
            with report.part(f"N = {size}"):
                found[size] = await take_turns(
                    variants, rounds, lambda text, n=size: report.progress(f"N={n} {text}")
                )
        for size in KEYS:
            with report.part(f"{size} processes"):
                apart[size] = await _apart(report, servers, urls, size, rounds)
    _report(report, found, apart)


def _measured(count: int, seconds: float, processor: Mapping[str, float], batch: int = 1) -> dict[str, float]:
    return {f"rate {batch}": count / seconds} | {f"{part} {batch}": used for part, used in processor.items()}


async def _timed(work: Awaitable[None], done: Awaitable[None]) -> float:
    """Seconds from the start of `work` until it and `done` have ended."""
    waiting = asyncio.ensure_future(done)
    began = time.perf_counter()
    await work
    await waiting
    return time.perf_counter() - began


# cacheinval


async def _ours(servers: Sandbox, urls: Urls, size: int) -> dict[str, float]:
    measured: dict[str, float] = {}
    async with Fleet(urls, size) as fleet:
        for batch in BATCHES:
            keys = names(KEYS[size][batch])
            await fleet.fill(keys)
            processor = Processor(servers, "rabbitmq", "postgres")
            seconds = await _timed(_writes(fleet, keys, batch), fleet.gone())
            await fleet.writer.publisher.flush(10)  # deleting the rows is part of the cost
            measured |= _measured(len(keys), seconds, processor.milliseconds(len(keys)), batch)
    return measured


def _writes(fleet: Fleet, keys: list[str], batch: int) -> Awaitable[None]:
    if batch == 1:
        return many(partial(fleet.change, key) for key in keys)
    calls = (keys[at : at + batch] for at in range(0, len(keys), batch))
    return many(partial(fleet.writer.invalidate, *call) for call in calls)


async def _without_database(servers: Sandbox, urls: Urls, size: int) -> dict[str, float]:
    """One key a call, by many callers at once: what gathers while a confirm is awaited goes out together."""
    async with Fleet(urls._replace(postgres=""), size) as fleet:
        keys = names(KEYS[size][10])
        await fleet.fill(keys)
        processor = Processor(servers, "rabbitmq")
        work = many((partial(fleet.writer.invalidate, key) for key in keys), at_a_time=CALLERS)
        seconds = await _timed(work, fleet.gone())
        return _measured(len(keys), seconds, processor.milliseconds(len(keys)))


# Peers


async def _peer(servers: Sandbox, urls: Urls, name: str, size: int) -> dict[str, float]:
    keys = names(_messages(name, size))
    caches = [dict.fromkeys(keys, "value") for _ in range(size)]
    async with PEERS[name](urls) as peer:
        await asyncio.gather(*(peer.subscribe(cache.__delitem__) for cache in caches))
        processor = Processor(servers, peer.server)
        seconds = await _timed(_publish(peer, keys), _emptied(caches))
        return _measured(len(keys), seconds, processor.milliseconds(len(keys)))


def _messages(name: str, size: int) -> int:
    return MESSAGES[size] * FASTER.get(name, 1)


async def _publish(peer: Peer, keys: list[str]) -> None:
    await many((partial(peer.publish, key) for key in keys), at_a_time=peer.writers)


async def _emptied(caches: list[dict[str, str]]) -> None:
    async with asyncio.timeout(60):
        while any(caches):
            await asyncio.sleep(LOOK_AGAIN)


# In processes of their own


async def _apart(report: Report, servers: Sandbox, urls: Urls, size: int, rounds: int) -> Figures:
    namespace = f"apart-{size}"
    async with AsyncExitStack() as stack:
        crowd = await stack.enter_async_context(Crowd(size, urls))
        async with crowd.subscribed(OURS, namespace):  # which makes the exchange
            fleet = await stack.enter_async_context(Fleet(urls, 0, namespace))

        async def told(
            work: Awaitable[None], processor: Processor, count: int, batch: int
        ) -> dict[str, float]:
            began = time.perf_counter()
            await work
            emptied = await crowd.emptied()
            await fleet.writer.publisher.flush(10)
            used = processor.milliseconds(count, emptied.processor)
            return _measured(count, emptied.at - began, used, batch)

        async def ours() -> dict[str, float]:
            measured: dict[str, float] = {}
            async with crowd.subscribed(OURS, namespace):
                for batch in APART:
                    count = KEYS[size][batch]
                    await crowd.fill(count)
                    processor = Processor(servers, "rabbitmq", "postgres")
                    measured |= await told(_writes(fleet, names(count), batch), processor, count, batch)
            return measured

        async def theirs(name: str) -> dict[str, float]:
            count = _messages(name, size)
            async with PEERS[name](urls) as peer, crowd.subscribed(name, ""):
                await crowd.fill(count)
                processor = Processor(servers, peer.server)
                return await told(_publish(peer, names(count)), processor, count, 1)

        variants: dict[str, Variant] = {OURS: ours} | {name: partial(theirs, name) for name in PEERS_APART}
        return await take_turns(variants, rounds, lambda text: report.progress(f"{size} processes, {text}"))


# Tables


def _report(report: Report, found: dict[int, Figures], apart: dict[int, Figures]) -> None:
    rates = _rates(found, BATCHES)
    report.table(
        "Keys a second evicted in each of N instances, all in one process",
        [f"N = {size}" for size in found],
        rates,
        f"{OURS}: {WRITERS} writers, each write in a transaction with its outbox row, fsync on; confirmed, and acknowledged "
        f"after the eviction. `{NO_DATABASE}` and `{FLOOR}`: {CALLERS} callers, each waits for the broker's confirm of its "
        "one key. The others: one key a message, and no confirm unless they say so.",
    )
    report.table(
        "The same, each instance in a process of its own",
        [f"N = {size}" for size in apart],
        _rates(apart, APART),
    )
    for each, batches, where in ((found, BATCHES, "instances in one process"), (apart, APART, "processes")):
        for size, figures in each.items():
            report.table(
                f"Processor milliseconds for a thousand keys evicted in {size} {where}",
                PARTS,
                _processor(figures, batches),
                "The client is the writer and all instances together; Redis is a broker here.",
            )
    _targets(report, found)
    report.pictures["scaling"] = {
        name: {
            size: figure.median for size, figure in zip(found, row, strict=True) if isinstance(figure, Figure)
        }
        for name, row in rates.items()
    }


def _rates(found: dict[int, Figures], batches: tuple[int, ...]) -> dict[str, list[Cell]]:
    rows: dict[str, list[Cell]] = {}
    for batch in batches:
        rows[_said(batch)] = [each[OURS][f"rate {batch}"] for each in found.values()]
    for name in (NO_DATABASE, *PEERS):
        if any(name in each for each in found.values()):
            rows[name] = [each[name]["rate 1"] for each in found.values()]
    return rows


def _processor(found: Figures, batches: tuple[int, ...]) -> dict[str, list[Cell]]:
    rows: dict[str, list[Cell]] = {
        _said(batch): [found[OURS][f"{part} {batch}"] for part in PARTS] for batch in batches
    }
    for name in (one for one in found if one != OURS):
        rows[name] = [found[name].get(f"{part} 1") for part in PARTS]
    return rows


def _said(batch: int) -> str:
    return f"{OURS}, one key a transaction" if batch == 1 else f"{OURS}, {batch} keys a call"


TARGET_BATCH = 100


def _targets(report: Report, found: dict[int, Figures]) -> None:
    for size in (1, 4, 16):
        ours = found[size][OURS][f"rate {TARGET_BATCH}"]
        what = f"N = {size}: keys/s with {TARGET_BATCH} keys a call"
        report.at_least(
            f"{what}, against {RIVAL} with one key a message", ours / found[size][RIVAL]["rate 1"], 30
        )
        for name in ("Redis pub/sub", "LISTEN/NOTIFY", FLOOR):
            report.at_least(f"{what}, against {name}", ours / found[size][name]["rate 1"], 1)
