"""Figures of several rounds, and variants that take turns."""

import asyncio
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Self

__all__ = ["Figure", "Figures", "Holds", "Variant", "cpu_seconds", "machine", "percentile", "take_turns"]

Variant = Callable[[], Awaitable[Mapping[str, float]]]
"""Runs one round and returns what it measured, by name. It raises if the work was not done."""

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Figure:
    """One figure, a value for each round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def __truediv__(self, other: "Figure") -> "Figure":
        """The ratio, round by round: what the machine did in one round, it did to both."""
        return Figure(tuple(one / two for one, two in zip(self.values, other.values, strict=True)))

    def __sub__(self, other: "Figure") -> "Figure":
        return Figure(tuple(one - two for one, two in zip(self.values, other.values, strict=True)))

    def __add__(self, other: "Figure") -> "Figure":
        return Figure(tuple(one + two for one, two in zip(self.values, other.values, strict=True)))


Figures = dict[str, dict[str, Figure]]
"""By variant, then by what was measured."""


async def take_turns(
    variants: Mapping[str, Variant], rounds: int = 5, progress: Callable[[str], None] = lambda text: None
) -> Figures:
    """Runs each variant once in each round, in an order that turns around from round to round."""
    measured: dict[str, list[Mapping[str, float]]] = {name: [] for name in variants}
    for turn in range(rounds):
        order = list(variants.items())
        for name, variant in order if turn % 2 == 0 else reversed(order):
            progress(f"{name}, round {turn + 1} of {rounds}")
            gc.collect()
            measured[name].append(await variant())
    return {
        name: {what: Figure(tuple(one[what] for one in each)) for what in each[0]}
        for name, each in measured.items()
    }


class Holds:
    """The longest time for which the event loop ran nothing else, seen by a callback in each of its turns."""

    def __init__(self) -> None:
        self.longest = 0.0

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._last = time.perf_counter()
        self._handle = self._loop.call_soon(self._tick)
        return self

    def _tick(self) -> None:
        self._look()
        self._handle = self._loop.call_soon(self._tick)

    def _look(self) -> None:
        now = time.perf_counter()
        self.longest = max(self.longest, now - self._last)
        self._last = now

    def __exit__(self, *exc_info: object) -> None:
        self._handle.cancel()
        self._look()  # also where the work has never suspended


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of `values` lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def cpu_seconds(*roots: int) -> float:
    """Processor time that these processes and all their descendants have used so far, those that have ended included."""
    children: dict[int, list[int]] = {}
    used: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        children.setdefault(int(fields[1]), []).append(int(folder.name))
        used[int(folder.name)] = sum(map(int, fields[11:15]))
    total, left = 0, list(roots)
    while left:
        one = left.pop()
        total += used.get(one, 0)
        left += children.get(one, ())
    return total / TICKS


def machine() -> str:
    """What this ran on, by cores and versions."""
    names = ("cacheinval", "aio-pika", "aiormq", "asyncpg", "uvloop")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {sys.version.split()[0]}, {versions}"
