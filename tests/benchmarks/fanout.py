"""Fan-out under load: how many keys a second are evicted in each of N instances.

cacheinval runs with everything on: a transaction with its outbox row for each write, fsync, confirms, gap detection, an
eviction before each acknowledgement, the relay, Δ and registrations. What a write names is told in each row of a table: one
key, or as many as a call of `invalidate` is given. The peers publish one key a message and do nothing else.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from functools import partial

from cacheinval.sandbox import Sandbox

from .crowd import Crowd
from .fleet import LOOK_AGAIN, WRITERS, Fleet, make_items, many, names
from .measuring import Figure, Figures, Variant, cpu_seconds, take_turns
from .peers import PEERS, AioPika, Peer
from .reporting import Cell, Report
from .servers import Urls, private_servers

__all__ = ["run"]

RIVAL = "aio-pika"
OURS = "cacheinval"

BATCHES = (1, 10, 100, 1000)
"""Keys a write: one in a transaction with its UPDATE; more in one call of `invalidate`."""

KEYS: Mapping[int, Mapping[int, int]] = {
    1: {1: 3000, 10: 10_000, 100: 30_000, 1000: 50_000},
    4: {1: 2000, 10: 6_000, 100: 12_000, 1000: 20_000},
    16: {1: 1000, 10: 2_000, 100: 4_000, 1000: 8_000},
    64: {1: 300, 10: 600, 100: 1_000, 1000: 2_000},
}
"""By instances, then by keys a write: a tenth of a second of work, or more."""

MESSAGES = {1: 1500, 4: 500, 16: 150, 64: 40}
"""For the slower peers; the others have three times as many."""

FAST = ("pika", "Redis pub/sub", "LISTEN/NOTIFY")
CHEAP = (RIVAL, *FAST)
"""Those that also run with 64 instances."""


async def run(report: Report, rounds: int) -> None:
    """Measures, and reports."""
    async with private_servers("rabbitmq", "postgres", "redis") as servers:
        urls = Urls.of(servers)
        await make_items(urls)
        found: dict[int, Figures] = {}
        for size in KEYS:
            peers = {name: kind for name, kind in PEERS.items() if size < 64 or name in CHEAP}
            variants: dict[str, Variant] = {OURS: partial(_ours, servers, urls, size)}
            variants |= {name: partial(_peer, urls, kind, size, name) for name, kind in peers.items()}
            variants[NO_DATABASE] = partial(_without_database, urls, size)
            found[size] = await take_turns(
                variants, rounds, lambda text, n=size: report.progress(f"N={n} {text}")
            )
        apart = {size: await _apart(report, urls, size, rounds) for size in (4, 16)}
    _report(report, found, apart)


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
            before = _processor(servers)
            seconds = await _timed(_writes(fleet, keys, batch), fleet.gone())
            measured[f"{batch}"] = len(keys) / seconds
            await fleet.writer.publisher.flush(10)  # deleting the rows is part of the cost
            for part, used in _processor(servers).items():
                measured[f"{part} {batch}"] = (
                    (used - before[part]) / len(keys) * 1e6
                )  # µs a key, ms a thousand
    return measured


def _processor(servers: Sandbox) -> dict[str, float]:
    return {
        "client": time.process_time(),
        "broker": cpu_seconds(servers.rabbitmq.pids[0]),
        "database": cpu_seconds(servers.postgres.pids[0]),
    }


def _writes(fleet: Fleet, keys: list[str], batch: int) -> Awaitable[None]:
    if batch == 1:
        return many(partial(fleet.change, key) for key in keys)
    calls = (keys[at : at + batch] for at in range(0, len(keys), batch))
    return many(partial(fleet.writer.invalidate, *call) for call in calls)


NO_DATABASE = "cacheinval without a database"


async def _without_database(urls: Urls, size: int) -> dict[str, float]:
    """One key a call, by many callers at once: what gathers while a confirm is awaited goes out together."""
    urls = urls._replace(postgres="")
    async with Fleet(urls, size) as fleet:
        keys = names(KEYS[size][10])
        await fleet.fill(keys)
        work = many((partial(fleet.writer.invalidate, key) for key in keys), at_a_time=CALLERS)
        return {"1": len(keys) / await _timed(work, fleet.gone())}


CALLERS = 500


# Peers


async def _peer(urls: Urls, kind: type[Peer], size: int, name: str) -> dict[str, float]:
    keys = names(MESSAGES[size] * (3 if name in FAST else 1))
    caches = [dict.fromkeys(keys, "value") for _ in range(size)]
    async with kind(urls) as peer:
        for cache in caches:
            await peer.subscribe(cache.__delitem__)
        return {"1": len(keys) / await _timed(_publish(peer, keys), _emptied(caches))}


async def _publish(peer: Peer, keys: list[str]) -> None:
    await many((partial(peer.publish, key) for key in keys), at_a_time=peer.writers)


async def _emptied(caches: list[dict[str, str]]) -> None:
    async with asyncio.timeout(60):
        while any(caches):
            await asyncio.sleep(LOOK_AGAIN)


# In processes of their own


async def _apart(report: Report, urls: Urls, size: int, rounds: int) -> Figures:
    namespace = f"apart-{size}"
    async with (
        Crowd(OURS, size, namespace, urls) as ours,
        Fleet(urls, 0, namespace) as writing,
        AioPika(urls) as peer,
        Crowd(RIVAL, size, "", urls) as theirs,
    ):

        async def cacheinval() -> dict[str, float]:
            return {f"{batch}": await told(ours, KEYS[size][batch], batch) for batch in (1, 100)}

        async def told(crowd: Crowd, count: int, batch: int) -> float:
            await crowd.fill(count)
            began = time.perf_counter()
            await _writes(writing, names(count), batch)
            return count / ((await crowd.emptied()).at - began)

        async def aio_pika() -> dict[str, float]:
            count = 2 * MESSAGES[1]
            await theirs.fill(count)
            began = time.perf_counter()
            await _publish(peer, names(count))
            return {"1": count / ((await theirs.emptied()).at - began)}

        variants: dict[str, Variant] = {OURS: cacheinval, RIVAL: aio_pika}
        return await take_turns(variants, rounds, lambda text: report.progress(f"{size} processes, {text}"))


# Tables


def _report(report: Report, found: dict[int, Figures], apart: dict[int, Figures]) -> None:
    sizes = [f"N = {size}" for size in found]
    rows: dict[str, list[Cell]] = {}
    for batch in BATCHES:
        rows[_said(batch)] = [each[OURS][f"{batch}"] for each in found.values()]
    for name in (NO_DATABASE, *PEERS):
        rows[name] = [each[name]["1"] if name in each else None for each in found.values()]
    report.table(
        "Keys a second evicted in each of N instances, all in one process",
        sizes,
        rows,
        f"{OURS}: {WRITERS} writers, each write in a transaction with its outbox row, fsync on; confirmed, and acknowledged "
        f"after the eviction. `{NO_DATABASE}`: {CALLERS} callers, each waits for the broker's confirm of its one key. "
        "The others: one key a message.",
    )
    report.table(
        "The same, each instance in a process of its own",
        [f"N = {size}" for size in apart],
        {
            **{_said(batch): [each[OURS][f"{batch}"] for each in apart.values()] for batch in (1, 100)},
            RIVAL: [each[RIVAL]["1"] for each in apart.values()],
        },
    )
    for size, each in found.items():
        report.table(
            f"Processor milliseconds for a thousand keys evicted in {size} instances",
            ["client", "broker", "database"],
            {
                _said(batch): [each[OURS][f"{part} {batch}"] for part in ("client", "broker", "database")]
                for batch in BATCHES
            },
            "The client is the writer and all instances together.",
        )
    _targets(report, found)
    report.pictures["scaling"] = {
        name: {
            size: figure.median for size, figure in zip(found, row, strict=True) if isinstance(figure, Figure)
        }
        for name, row in rows.items()
    }


def _said(batch: int) -> str:
    return f"{OURS}, one key a transaction" if batch == 1 else f"{OURS}, {batch} keys a call"


TARGET_BATCH = 100


def _targets(report: Report, found: dict[int, Figures]) -> None:
    for size in (1, 4, 16):
        ours = found[size][OURS][f"{TARGET_BATCH}"]
        what = f"N = {size}: keys/s with {TARGET_BATCH} keys a call"
        report.at_least(f"{what}, against {RIVAL} with one key a message", ours / found[size][RIVAL]["1"], 30)
        for name in ("Redis pub/sub", "LISTEN/NOTIFY"):
            report.at_least(f"{what}, against {name}", ours / found[size][name]["1"], 1)
