"""What happened in one run, by one clock, and whether it was right: the three promises, checked afterwards.

Clients, and processes of their own, note what they did; `check` looks at all of it together. Times are seconds of
CLOCK_MONOTONIC, which all processes of a machine share.
"""

import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import msgspec

__all__ = [
    "Checked",
    "Evicted",
    "Fault",
    "History",
    "Promised",
    "Read",
    "Seen",
    "State",
    "Tick",
    "Write",
    "now",
]

now = time.monotonic

CONVERSION = 0.001
"""Seconds by which a wall clock time can be wrong when it is told by the clock of the history."""


def from_wall(at: float) -> float:
    """The wall clock time `at` by the clock of the history."""
    return at - time.time() + now()


class Read(msgspec.Struct, tag="read"):
    """A read through the cache of `instance`; `outcome` is "hit", "miss" or "bypass"."""

    instance: str
    key: str
    begun: float
    ended: float
    version: int
    outcome: str


class Write(msgspec.Struct, tag="write"):
    """A write; `acknowledged` is when its writer knew that it was committed, None if it never did."""

    key: str
    begun: float
    version: int | None = None
    acknowledged: float | None = None


class Evicted(msgspec.Struct, tag="evicted"):
    """By `at` this instance had evicted `key` because of a message, or a write of its own, of this version."""

    instance: str
    key: str
    version: int
    at: float


class Tick(msgspec.Struct, tag="tick"):
    """At `at` this instance had processed a tick: all that was committed before `as_of` was evicted here.

    That holds for what was loaded since `extends`, the first tick of the subscription; what is older is served until it
    is older than a value may be.
    """

    instance: str
    at: float
    as_of: float
    extends: float


class State(msgspec.Struct, tag="state"):
    """What the instance says of itself."""

    instance: str
    at: float
    ready: bool
    epoch: int
    watermark: float | None = None
    reason: str | None = None
    tick_refused: str | None = None


class Fault(msgspec.Struct, tag="fault"):
    """What was done to the servers, the network or a process, for whoever reads a history that was kept."""

    at: float
    what: str


Seen = Read | Write | Evicted | Tick | State | Fault
_decoder = msgspec.json.Decoder(Seen)
_encoder = msgspec.json.Encoder()


@dataclass(frozen=True)
class Promised:
    """What `check` holds the run to.

    Args:
        max_staleness: seconds; None where no bound was set.
        settled_at: from when on everything was quiet: every write confirmed and evicted everywhere.
        truth: the version of each key that the database had then.
        instances: who must have had each key in its cache afterwards.
    """

    max_staleness: float | None = None
    settled_at: float | None = None
    truth: Mapping[str, int] = field(default_factory=dict)
    instances: Iterable[str] = ()


@dataclass
class Checked:
    """How much was looked at, so that a test can tell a history that proves something from an empty one."""

    reads: int = 0
    hits: int = 0
    writes: int = 0
    unknown_writes: int = 0
    evictions: int = 0
    ticks: int = 0
    settled_hits: int = 0
    breaches: list[str] = field(default_factory=list)


class History:
    """Notes of what happened, in any order.

    Args:
        sink: gets each note as a line of JSON at once, where another process is to read them.
    """

    def __init__(self, sink: TextIO | None = None) -> None:
        self.reads: list[Read] = []
        self.writes: list[Write] = []
        self.evictions: list[Evicted] = []
        self.ticks: list[Tick] = []
        self.states: list[State] = []
        self.faults: list[Fault] = []
        self.latest: dict[str, State] = {}
        self._sink = sink
        self._followed: dict[Path, int] = {}

    def note(self, seen: Seen) -> None:
        """Adds one note."""
        match seen:
            case Read():
                self.reads.append(seen)
            case Write():
                self.writes.append(seen)
            case Evicted():
                self.evictions.append(seen)
            case Tick():
                self.ticks.append(seen)
            case State():
                self.states.append(seen)
                self.latest[seen.instance] = seen
            case Fault():
                self.faults.append(seen)
        if self._sink is not None:
            self._sink.write(_encoder.encode(seen).decode() + "\n")

    def fault(self, what: str) -> float:
        """Notes a fault; returns when."""
        at = now()
        self.note(Fault(at, what))
        return at

    def follow(self, path: Path) -> None:
        """Adds what another process has written to `path` since this was last called."""
        with path.open("rb") as file:
            file.seek(self._followed.get(path, 0))
            whole, newline, _ = file.read().rpartition(b"\n")
        self._followed[path] = self._followed.get(path, 0) + len(whole) + len(newline)
        for line in whole.splitlines():
            self.note(_decoder.decode(line))

    def forget(self, promised: Promised) -> None:
        """Starts afresh from a moment at which everything was quiet and right."""
        assert promised.settled_at is not None
        for notes in (self.reads, self.evictions, self.ticks, self.states, self.faults):
            notes.clear()
        self.writes[:] = [
            Write(key, promised.settled_at, version, promised.settled_at)
            for key, version in promised.truth.items()
        ]

    def keep(self, path: Path) -> Path:
        """Writes all notes to a file, in the order of their times; returns its path."""
        notes: list[Seen] = [
            *self.reads,
            *self.writes,
            *self.evictions,
            *self.ticks,
            *self.states,
            *self.faults,
        ]
        notes.sort(key=lambda note: note.begun if isinstance(note, Read | Write) else note.at)
        with path.open("wb") as file:
            for note in notes:
                file.write(_encoder.encode(note) + b"\n")
        return path

    @classmethod
    def kept(cls, path: Path) -> "History":
        """The history that `keep` has written."""
        history = cls()
        history.follow(path)
        return history

    def check(self, promised: Promised) -> Checked:
        """Looks at the whole history; `breaches` says what broke a promise.

        - A hit that began at t never gave a version that was replaced by a write acknowledged before t - max_staleness.
        - A read that began after an eviction of a version was done at its instance never gave a lower one, if that
          version is known to have been committed.
        - A read that began after a tick was processed at its instance never gave a version replaced by a write that was
          acknowledged before the tick's time.
        - When everything was quiet, every read gave what the database has, and every key was a hit again.
        """
        checked = Checked(
            reads=len(self.reads),
            hits=sum(read.outcome == "hit" for read in self.reads),
            writes=sum(write.acknowledged is not None for write in self.writes),
            unknown_writes=sum(write.acknowledged is None for write in self.writes),
            evictions=len(self.evictions),
            ticks=len(self.ticks),
        )
        acknowledged: dict[str, _Floor] = defaultdict(_Floor)
        for write in self.writes:
            if write.acknowledged is not None and write.version is not None:
                acknowledged[write.key].add(write.acknowledged, write.version)
        evicted = self._evicted()
        ticks: dict[str, list[Tick]] = defaultdict(list)
        for tick in sorted(self.ticks, key=lambda tick: tick.at):
            ticks[tick.instance].append(tick)
        for read in self.reads:
            self._check_staleness(read, promised, acknowledged, checked)
            self._check_eviction(read, evicted, checked)
            self._check_tick(read, promised, ticks, acknowledged, checked)
        self._check_settled(promised, checked)
        return checked

    def _evicted(self) -> dict[tuple[str, str], "_Floor"]:
        """From when on each instance must not give less than what it evicted.

        A write whose outcome its client does not know is published at once, and may become visible later or never; its
        version may then be another write's, of which nobody has been told by then. So what was evicted for such a version
        before it was known to be committed says nothing.
        """
        known: dict[tuple[str, int | None], float] = {}
        unknown = {(write.key, write.version) for write in self.writes if write.acknowledged is None}
        for write in self.writes:
            if write.acknowledged is not None:
                known[write.key, write.version] = write.acknowledged
        evicted: dict[tuple[str, str], _Floor] = defaultdict(_Floor)
        for one in self.evictions:
            visible = known.get((one.key, one.version))
            if visible is not None and (one.at >= visible or (one.key, one.version) not in unknown):
                evicted[one.instance, one.key].add(one.at, one.version)
        return evicted

    def _check_staleness(
        self, read: Read, promised: Promised, acknowledged: Mapping[str, "_Floor"], checked: Checked
    ) -> None:
        if promised.max_staleness is None or read.outcome != "hit" or read.key not in acknowledged:
            return
        known = acknowledged[read.key]
        if read.version < known.before(read.begun - promised.max_staleness):
            replaced = known.first_above(read.version)
            checked.breaches.append(
                f"a hit staler than {promised.max_staleness:g} s: {_told(read)}, replaced {read.begun - replaced:.3f} s before"
            )

    def _check_eviction(
        self, read: Read, evicted: Mapping[tuple[str, str], "_Floor"], checked: Checked
    ) -> None:
        known = evicted.get((read.instance, read.key))
        if known is not None and read.version < (floor := known.before(read.begun)):
            checked.breaches.append(
                f"older than what was evicted: {_told(read)}, after {floor} was evicted there"
            )

    def _check_tick(
        self,
        read: Read,
        promised: Promised,
        ticks: Mapping[str, list[Tick]],
        acknowledged: Mapping[str, "_Floor"],
        checked: Checked,
    ) -> None:
        heard = ticks.get(read.instance, [])
        at = bisect_left(heard, read.begun, key=lambda tick: tick.at) - 1
        if at < 0 or promised.max_staleness is None or read.key not in acknowledged:
            return
        tick = heard[at]
        if read.begun <= tick.extends + promised.max_staleness:
            return
        floor = acknowledged[read.key].before(tick.as_of - CONVERSION)
        if read.version < floor:
            checked.breaches.append(
                f"a tick that was not true: {_told(read)}, though all up to {floor} was said to be evicted "
                f"by the tick of {tick.as_of:.3f}"
            )

    def _check_settled(self, promised: Promised, checked: Checked) -> None:
        if promised.settled_at is None:
            return
        hits: set[tuple[str, str]] = set()
        for read in self.reads:
            if read.begun < promised.settled_at or read.key not in promised.truth:
                continue
            if read.version != promised.truth[read.key]:
                checked.breaches.append(
                    f"settled, and not what the database has: {_told(read)}, not {promised.truth[read.key]}"
                )
            if read.outcome == "hit":
                checked.settled_hits += 1
                hits.add((read.instance, read.key))
        wanted = {(instance, key) for instance in promised.instances for key in promised.truth}
        missing = sorted(wanted - hits)
        if missing:
            checked.breaches.append(f"settled, and never a hit: {missing[:5]} and {len(missing)} in all")


class _Floor:
    """The highest version that was told before a time."""

    def __init__(self) -> None:
        self._told: list[tuple[float, int]] = []
        self._times: list[float] = []
        self._highest: list[int] = []

    def add(self, at: float, version: int) -> None:
        self._told.append((at, version))
        self._times = []

    def before(self, at: float) -> int:
        """Versions are above zero: zero is none."""
        self._arrange()
        known = bisect_left(self._times, at)
        return self._highest[known - 1] if known else 0

    def first_above(self, version: int) -> float:
        """When one that is higher than `version` was told first."""
        self._arrange()
        return self._times[bisect_right(self._highest, version)]

    def _arrange(self) -> None:
        if self._times:
            return
        self._told.sort()
        highest = 0
        self._highest = []
        for at, version in self._told:
            highest = max(highest, version)
            self._times.append(at)
            self._highest.append(highest)


def _told(read: Read) -> str:
    return f"{read.instance} gave version {read.version} of {read.key} ({read.outcome}) at {read.begun:.3f}"
