"""Comparing what is cached with its source, as an observer: nothing is evicted, and nobody is accused of what is only in
flight (PROTOCOL.md, "Audit")."""

import asyncio
import enum
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import msgspec

from cacheinval import logs
from cacheinval.coherence import Entry

__all__ = [
    "LONGEST_DELAY",
    "LOOKS_TAKE",
    "MOST_ENTRIES",
    "AuditAnswer",
    "AuditCounters",
    "AuditReport",
    "Auditor",
    "Comparison",
    "Loaders",
    "Verdict",
    "verdict",
]

log = logging.getLogger("cacheinval.audit")

MOST_ENTRIES = 1_000
"""Entries that one audit compares, and keys whose loaders are remembered, at most."""

LONGEST_DELAY = 600.0
LOADS_AT_ONCE = 4
LOAD_TIMEOUT = 5.0
LOOKS_BEGIN_WITHIN = 10.0
LOOKS_TAKE = 2 * (LOOKS_BEGIN_WITHIN + 2 * LOAD_TIMEOUT)
"""Seconds that an audit takes at most beside its delay."""

MOST_EXAMPLES = 10
SAMPLE_OF_INTERVAL = 20
"""Entries that an audit compares which nobody asked for."""

Factory = Callable[[], Awaitable[Any]]


class Audited(Protocol):
    """A cache, as far as it can be observed."""

    async def would_serve(self, key: str, model: Any = None) -> Entry | None: ...
    async def read_source(self, key: str, factory: Factory, model: Any = None) -> Any: ...


# Judging


class Comparison(enum.Enum):
    """What one look saw of an entry."""

    SAME = "same"
    DIFFERENT = "different"
    UNKNOWN = "unknown"  # the source could not be read, or what it gave not compared
    GONE = "gone"  # evicted, replaced or refused


class Verdict(enum.Enum):
    """What an audit makes of an entry; its values are the fields of `AuditReport`."""

    CONSISTENT = "consistent"
    SETTLING = "settling"
    INCONSISTENT = "inconsistent"
    FAILED = "failed"


def verdict(first: Comparison, second: Comparison | None = None) -> Verdict | None:
    """What follows from two looks at an entry, `second` being None before the second; None: look again.

    Only an entry that differs at both is accused: it was stale at the first, and should have been gone by the second.
    """
    if first is Comparison.SAME:
        return Verdict.CONSISTENT
    if Comparison.UNKNOWN in (first, second):
        return Verdict.FAILED
    if first is Comparison.GONE:
        return Verdict.SETTLING
    if second is None:
        return None
    return Verdict.INCONSISTENT if second is Comparison.DIFFERENT else Verdict.SETTLING


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found: how many entries were compared with their source, and how they compared.

    `settling`: differed, and was evicted, replaced or right when looked at again. `inconsistent`: differed both times.
    `failed`: the source could not be read, or the values not be compared. `examples` are keys of inconsistent entries.

    >>> await client.audit()
    AuditReport(checked=0, consistent=0, settling=0, inconsistent=0, failed=0, examples=())
    """

    checked: int = 0
    consistent: int = 0
    settling: int = 0
    inconsistent: int = 0
    failed: int = 0
    examples: tuple[str, ...] = ()


class AuditAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an instance answers to a message of kind `audit`."""

    id: str
    loaders: int = 0
    report: AuditReport | None = None
    """None: it is busy with an audit that somebody else asked for."""


class AuditCounters:
    """What audits found, counted since the start; an entry counts each time it is found."""

    __slots__ = ("checked", "consistent", "failed", "inconsistent", "runs", "settling")

    def __init__(self) -> None:
        self.runs = self.checked = self.consistent = self.settling = self.inconsistent = self.failed = 0

    def add(self, report: AuditReport) -> None:
        """Counts one audit."""
        self.runs += 1
        for name in ("checked", "consistent", "settling", "inconsistent", "failed"):
            setattr(self, name, getattr(self, name) + getattr(report, name))


# Which entries


class Loader(NamedTuple):
    """How to read the source of one key."""

    factory: Factory
    model: Any


class Loaders:
    """The loaders of a random sample of the keys that were loaded lately, at most `most` of them.

    Args:
        most: how many keys are remembered.
        among: of how many loads they are a sample: as many as there may be entries.
    """

    def __init__(self, most: int = MOST_ENTRIES, among: int = 100_000) -> None:
        self._most = most
        self._among = max(most, among)
        self._loads = 0
        self._keys: list[str] = []
        self._loaders: dict[str, Loader] = {}

    def remember(self, key: str, factory: Factory, model: Any = None) -> None:
        """`factory` has just loaded what is cached under `key`."""
        self._loads = min(self._loads + 1, self._among)
        if key not in self._loaders:
            if len(self._keys) < self._most:
                self._keys.append(key)
            else:
                place = random.randrange(max(self._loads, self._most))
                if place >= self._most:
                    return
                del self._loaders[self._keys[place]]
                self._keys[place] = key
        self._loaders[key] = Loader(factory, model)

    def shuffled(self) -> list[tuple[str, Loader]]:
        """All that are remembered, in random order."""
        keys = random.sample(self._keys, len(self._keys))
        return [(key, self._loaders[key]) for key in keys]

    def forget(self, gone: dict[str, Loader]) -> None:
        """Makes room where nothing is cached any more, unless it has been loaded again meanwhile."""
        for key, loader in gone.items():
            if self._loaders.get(key) is loader:
                del self._loaders[key]
        self._keys = [key for key in self._keys if key in self._loaders]

    def __len__(self) -> int:
        return len(self._keys)


# Looking


@dataclass(slots=True)
class _Look:
    """An entry that was compared with its source."""

    key: str
    loader: Loader
    entry: Entry
    comparison: Comparison
    again: Comparison | None = None


class Auditor:
    """Audits one cache with its own loaders, one audit at a time.

    Args:
        least_delay: seconds for which the rules allow that a replaced value is served, so that nothing is accused before.
        interval: seconds between the audits that `run` makes.
    """

    def __init__(self, cache: Audited, loaders: Loaders, *, least_delay: float, interval: float) -> None:
        self.counters = AuditCounters()
        self._cache = cache
        self._loaders = loaders
        self._least_delay = least_delay
        self._delay = least_delay + 1
        self._interval = interval
        self._one_at_a_time = asyncio.Lock()
        self._last: dict[str, Any] | None = None

    @property
    def state(self) -> dict[str, Any]:
        """For status: how many loaders are known, the delay in seconds, whether an audit runs, and the last report."""
        return {
            "loaders": len(self._loaders),
            "least_delay": self._least_delay,
            "delay": self._delay,
            "running": self._one_at_a_time.locked(),
            "last": self._last,
        }

    async def run(self) -> None:
        """Audits a small sample again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._interval * random.uniform(0.5, 1.5))
            await self.audit(SAMPLE_OF_INTERVAL)

    async def audit(self, sample: int, delay: float | None = None) -> AuditReport:
        """Compares up to `sample` entries, at most 1,000; looks again after `delay` seconds at those that differ.

        A delay that is shorter than the rules allow an entry to be stale is made that long.
        """
        async with self._one_at_a_time:
            looks = await self._look(min(sample, MOST_ENTRIES))
            differing = [look for look in looks if verdict(look.comparison) is None]
            if differing:
                delay = self._delay if delay is None else min(delay, LONGEST_DELAY)
                await asyncio.sleep(max(self._least_delay, delay))
                await self._look_again(differing)
            report = _report(looks)
            self._last = asdict(report) | {"at": time.time()}
            self.counters.add(report)
            self._tell(looks, report)
            return report

    async def _look(self, sample: int) -> list[_Look]:
        looks: list[_Look] = []
        gone: dict[str, Loader] = {}
        wanted = sample

        async def look(remembered: tuple[str, Loader]) -> bool:
            nonlocal wanted
            if not wanted:
                return False
            wanted -= 1
            key, loader = remembered
            entry = await self._cache.would_serve(key, loader.model)
            if entry is None:
                wanted += 1
                gone[key] = loader
            else:
                looks.append(_Look(key, loader, entry, await self._compare(key, loader, entry)))
            return True

        await _few_at_once(iter(self._loaders.shuffled()), look)
        self._loaders.forget(gone)
        return looks

    async def _look_again(self, looks: list[_Look]) -> None:
        async def again(look: _Look) -> bool:
            entry = await self._cache.would_serve(look.key, look.loader.model)
            if entry is None or not _is_the_same_entry(entry, look.entry):
                look.again = Comparison.GONE
            else:
                look.again = await self._compare(look.key, look.loader, entry, twice=True)
            return True

        for look in looks:
            look.again = Comparison.UNKNOWN  # where its turn does not come in time
        await _few_at_once(iter(looks), again)

    async def _compare(self, key: str, loader: Loader, entry: Entry, *, twice: bool = False) -> Comparison:
        try:
            loaded = await self._load(key, loader)
            if entry.value == loaded:
                return Comparison.SAME
            # What differs from itself cannot be compared: it has no equality, or holds the time of the question.
            if twice and loaded != await self._load(key, loader):
                return Comparison.UNKNOWN
            return Comparison.DIFFERENT
        except (Exception, asyncio.CancelledError) as error:
            # The libraries cancel futures of their own; only who cancels this task means it.
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            logs.event(log, logging.DEBUG, "not compared", key=key, reason=repr(error))
            return Comparison.UNKNOWN

    async def _load(self, key: str, loader: Loader) -> Any:
        async with asyncio.timeout(LOAD_TIMEOUT):
            return await self._cache.read_source(key, loader.factory, loader.model)

    def _tell(self, looks: list[_Look], report: AuditReport) -> None:
        for look in looks:
            if look.key in report.examples:
                logs.event(log, logging.ERROR, "inconsistent entry", key=look.key)
        level = logging.INFO if report.checked else logging.DEBUG
        counts = {name: value for name, value in asdict(report).items() if name != "examples"}
        logs.event(log, level, "audited", **counts)


async def _few_at_once(work: Iterator[Any], look: Callable[[Any], Awaitable[bool]]) -> None:
    """Takes `look` through `work`, `LOADS_AT_ONCE` at a time, until it returns False or time is up."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + LOOKS_BEGIN_WITHIN

    async def take_turns() -> None:
        for one in work:  # each of the tasks takes the next
            if loop.time() > ends or not await look(one):
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(LOADS_AT_ONCE):
            group.create_task(take_turns())


def _is_the_same_entry(one: Entry, other: Entry) -> bool:
    # Not by identity: a cache outside the process makes a new object at each look.
    return (one.load_started, one.expires_at) == (other.load_started, other.expires_at)


def _report(looks: list[_Look]) -> AuditReport:
    counts: Counter[str] = Counter()
    examples: list[str] = []
    for look in looks:
        judged = verdict(look.comparison, look.again)
        assert judged is not None
        counts[judged.value] += 1
        if judged is Verdict.INCONSISTENT and len(examples) < MOST_EXAMPLES:
            examples.append(look.key)
    return AuditReport(checked=len(looks), examples=tuple(examples), **counts)
