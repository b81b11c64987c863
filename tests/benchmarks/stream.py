"""One stream for all instances, beside a queue for each of them: how many keys a second, how soon, at what cost to the broker.

Without a database, so that the two are all that differs: each write is confirmed by the broker, and evicted before it is
acknowledged. All instances are in one process, which bounds both; what the broker spends is counted by itself.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from cacheinval import Client
from cacheinval.sandbox import Sandbox

from .fleet import Fleet, many, names
from .measuring import Figures, Variant, cpu_seconds, percentile, take_turns
from .reporting import Report
from .servers import Urls, private_servers

__all__ = ["run"]

FANOUT, STREAM = BUSES = ("fanout", "stream")

KEYS: Mapping[int, Mapping[int, int]] = {
    1: {1: 3000, 100: 30_000},
    16: {1: 1000, 100: 4_000},
    64: {1: 300, 100: 2_000},
    256: {1: 150, 100: 600},
}
"""By instances, then by keys a write."""

RATE = 20
WRITES = 60


async def run(report: Report, rounds: int) -> None:
    """Measures, and reports."""
    async with private_servers("rabbitmq") as servers:
        urls = Urls(servers.rabbitmq.url, postgres="")
        found: dict[int, Figures] = {}
        for size in KEYS:
            variants: dict[str, Variant] = {bus: partial(_measure, servers, urls, size, bus) for bus in BUSES}
            found[size] = await take_turns(
                variants, rounds, lambda text, n=size: report.progress(f"N={n} {text}")
            )
    _report(report, found)


@contextmanager
def _configured(bus: str) -> Iterator[None]:
    """Clients that are made within this have the bus, as a service would by its environment."""
    # One process with 256 instances may be long in reading what the broker has confirmed.
    variables = {"CACHEINVAL_BUS": bus, "CACHEINVAL_PUBLISH_TIMEOUT": "60"}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


async def _measure(servers: Sandbox, urls: Urls, size: int, bus: str) -> dict[str, float]:
    measured: dict[str, float] = {}
    with _configured(bus):
        async with Fleet(urls, size) as fleet:
            _check(fleet, bus)
            for batch, count in KEYS[size].items():
                keys = names(count)
                await fleet.fill(keys)
                used, began = _broker(servers), time.perf_counter()
                await _write(fleet, keys, batch)
                await fleet.gone()
                measured[f"keys/s {batch}"] = count / (time.perf_counter() - began)
                measured[f"broker {batch}"] = (_broker(servers) - used) / count * 1e6  # ms a thousand
            used, began = _broker(servers), time.perf_counter()
            measured |= await _at_a_low_rate(fleet)
            measured["broker"] = (_broker(servers) - used) / (time.perf_counter() - began) * 100
    return measured


def _check(fleet: Fleet, bus: str) -> None:
    queues = {client.status()["broker"]["queue"] for client in fleet.instances}
    if len(queues) != (1 if bus == STREAM else len(fleet.instances)):
        raise AssertionError(f"{bus}: {len(queues)} queues for {len(fleet.instances)} instances")


def _broker(servers: Sandbox) -> float:
    return cpu_seconds(servers.rabbitmq.pids[0])


def _write(fleet: Fleet, keys: list[str], batch: int) -> Awaitable[None]:
    calls = (keys[at : at + batch] for at in range(0, len(keys), batch))
    return many(partial(fleet.writer.invalidate, *call) for call in calls)


async def _at_a_low_rate(fleet: Fleet) -> dict[str, float]:
    keys = names(WRITES)
    await fleet.fill(keys)
    left = dict.fromkeys(keys, len(fleet.instances))
    begun: dict[str, float] = {}
    ended: dict[str, float] = {}

    def evicted(key: str) -> None:
        left[key] -= 1
        if not left[key]:
            ended[key] = time.perf_counter()

    for client in fleet.instances:
        _note_evictions(client, evicted)
    began = time.perf_counter()
    for number, key in enumerate(keys):
        await asyncio.sleep(began + number / RATE - time.perf_counter())
        begun[key] = time.perf_counter()
        await fleet.writer.invalidate(key)
    await fleet.gone()
    milliseconds = [(ended[key] - begun[key]) * 1e3 for key in keys]
    return {"p50": percentile(milliseconds, 0.5), "p99": percentile(milliseconds, 0.99)}


def _note_evictions(client: Client, evicted: Any) -> None:
    cache = client.cache
    evict = cache.evict_now

    def noting(eviction: Any) -> None:
        evict(eviction)
        for key in eviction.keys:
            evicted(key)

    cache.evict_now = noting  # type: ignore[method-assign]


def _report(report: Report, found: dict[int, Figures]) -> None:
    sizes = [f"N = {size}" for size in found]

    def rows(*whats: tuple[str, str]) -> dict[str, list[Any]]:
        return {
            f"{bus}, {said}": [each[bus][what] for each in found.values()]
            for what, said in whats
            for bus in BUSES
        }

    report.table(
        "Keys a second evicted in each of N instances, all in one process",
        sizes,
        rows(("keys/s 1", "one key a call"), ("keys/s 100", "100 keys a call")),
    )
    report.table(
        "Processor milliseconds of the broker for a thousand keys evicted in N instances",
        sizes,
        rows(("broker 1", "one key a call"), ("broker 100", "100 keys a call")),
    )
    report.table(
        f"Milliseconds from the call until a key is evicted in all of N instances, at {RATE} writes a second",
        sizes,
        rows(("p50", "p50"), ("p99", "p99"), ("broker", "percent of a core that the broker takes")),
        f"{WRITES} writes a round.",
    )
