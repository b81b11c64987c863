"""A small world in which a writer waits for the others: the table of instances, a lease, and an instance that may be late.

The rules of the instance and of the writer are the real ones. The table
does what `outbox/instances.py` asks of it; a statement may take its time between being executed and being committed, and
its answer may be late. Between any two steps of anybody any time can pass, which is all that a frozen process sees.
"""

import math
import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from cacheinval.coherence.registration import Registered
from cacheinval.messages import Invalidate

from .changing import part
from .explore import BrokenError

KEY = "k"
WHO = ("one", "")


@dataclass
class Waiting:
    """How much can happen."""

    staleness: float = 2
    lease: int = 4
    until: int = 7
    registrations: int = 2
    loads: int = 2
    restarts: int = 0
    leaves: int = 0
    hung_loads: bool = False
    starts_registered: bool = False
    apart: float = 0
    """Seconds by which the database's clock is ahead."""
    # Faults: of the writer, and of the statement in `outbox/instances.py`
    counts_before_commit: bool = False
    keeps_since_to_the_end: bool = False
    since_when_executed: bool = False


@dataclass
class Row:
    since: float
    expires_at: float


@dataclass
class Registering:
    """The state."""

    rules: str
    span: Waiting
    coherence: Any
    question: Any
    left: dict[str, int]
    now: float = 0
    version: int = 1
    row: Row | None = None
    executed: tuple[Row, float] | None = None  # and not committed yet
    answer: tuple[float, float] | None = None  # on its way to the instance
    asked: bool = False  # the instance has sent a statement that is not executed yet
    committed: bool = False
    counted: bool = False
    queue: list[Any] = field(default_factory=list)
    entry: Any = None
    load: Any = None
    loaded: int | None = None
    joined: Any = None  # the load that a late reader waits for, and whether it began after a complete receipt
    complete: bool = False

    # What can happen

    def actions(self) -> Iterator[tuple[str, Callable[["Registering"], None]]]:
        old_value_is_held = self.loaded == 1 or (self.entry is not None and self.entry[0] == 1)
        if not old_value_is_held and (self.committed or (self.load is None and not self.left["loads"])):
            return  # nor ever will be
        if self.now < self.span.until:
            yield "a second passes", Registering.wait
        yield from self._registering()
        yield from self._writing()
        yield from self._reading()
        if self.left["restarts"] and self.load is None:
            yield "the process is killed, and another one takes over", Registering.restart

    def _registering(self) -> Iterator[tuple[str, Callable[["Registering"], None]]]:
        idle = not self.asked and self.executed is None and self.answer is None
        if idle and self.left["registrations"]:
            yield "a registration is sent", Registering.send
        if self.asked and self.executed is None:
            yield "it is executed", Registering.execute
        if self.executed is not None:
            yield "it is committed", Registering.commit_row
        if self.answer is not None:
            yield "it is answered", Registering.answered
        if idle and self.left["leaves"] and self.row is not None:
            yield "the instance leaves", Registering.leave

    def _writing(self) -> Iterator[tuple[str, Callable[["Registering"], None]]]:
        if not self.committed:
            yield "the writer commits", Registering.commit
        if not self.counted and (self.committed or self.span.counts_before_commit):
            yield "the writer counts", Registering.count
        if self.queue:
            yield "the message is evicted and answered", Registering.evict

    def _reading(self) -> Iterator[tuple[str, Callable[["Registering"], None]]]:
        if self.load is None:
            if self.left["loads"] or self._served() is not None:
                yield "read", Registering.read
        elif self.loaded is None:
            yield "the load reads the database", Registering.load_reads
        else:
            yield "the load returns", Registering.load_returns
        if (
            self.load is not None
            and self.joined is None
            and self.coherence.loads.joinable(KEY, self.now) is self.load
        ):
            yield "another read joins the load", Registering.join

    # Time, and the table

    def wait(self) -> None:
        self.now += 1

    def send(self) -> None:
        self.left["registrations"] -= 1
        self.coherence.registration.sending(self.now)
        self.asked = True

    def execute(self) -> None:
        self.asked = False
        old, lease, now = self.row, self.span.lease, self.now + self.span.apart
        least = now if self.span.keeps_since_to_the_end else now + lease / 2
        if old is None or old.expires_at <= least:
            since = now if self.span.since_when_executed else math.inf
        elif old.since == math.inf:
            since = now
        else:
            since = old.since
        self.executed = Row(since, now + lease), now

    def commit_row(self) -> None:
        assert self.executed is not None
        (self.row, told), self.executed = self.executed, None
        if self.coherence.registration._sent is not None:
            self.answer = told, self.row.since

    def answered(self) -> None:
        assert self.answer is not None
        told, since = self.answer
        self.answer = None
        self.coherence.registration.answered(told, since, self.now)

    def leave(self) -> None:
        self.left["leaves"] -= 1
        self.coherence.registration.forget()
        self.row = None

    def restart(self) -> None:
        """What was sent is still executed; what is in the cache stays, and so does the queue."""
        self.left["restarts"] -= 1
        self.answer = None
        self.coherence = rules_of(self.rules, self.span)

    # The writer

    def commit(self) -> None:
        self.version = 2
        self.committed = True
        self.question.committed(self.now)
        self.question.sent(["m"])
        self.queue.append(Invalidate(v=1, keys=[KEY]))

    def count(self) -> None:
        self.counted = True
        found = self.row is not None and self.row.expires_at > self.now + self.span.apart
        self.question.counted([Registered(*WHO, self.span.staleness)] if found else [])

    def _settle(self) -> None:
        self.complete = self.complete or (
            self.committed and self.counted and self.question.complete(self.now)
        )

    # The instance

    def evict(self) -> None:
        eviction = self.coherence.received(self.queue.pop(0), self.now)
        self.coherence.evict(eviction, self.now)
        self.entry = None
        self.coherence.evicted(self.now)
        self.question.answered(WHO, "m")

    def _served(self) -> int | None:
        if self.entry is None:
            return None
        value, load_started, expires_at = self.entry
        entry = rules_entry(self.coherence, value, load_started, expires_at)
        return value if self.coherence.serving.may_serve(entry, self.now) else None

    def read(self) -> None:
        self._settle()
        value = self._served()
        if value is not None:
            self._returned(value, self.complete, "hit")
            return
        self.left["loads"] -= 1
        self.load = self.coherence.loads.begin(KEY, self.now)
        if not self.span.hung_loads:
            self.load_reads()
            self.load_returns()

    def _returned(self, value: int | None, late: bool, how: str) -> None:
        if late and value == 1:
            raise BrokenError(f"a {how} gave the old value to a read that began after a complete receipt")

    def join(self) -> None:
        self._settle()
        if self.coherence.loads.may_give(self.load, self.now):
            self.joined = self.load, self.complete

    def load_reads(self) -> None:
        self.loaded = self.version

    def load_returns(self) -> None:
        if self.coherence.loads.may_store(self.load):
            self.entry = self.loaded, self.load.started, 1e9
        self.coherence.loads.end(self.load)
        if self.joined is not None:
            self._returned(self.loaded, self.joined[1], "joined load")
        self.load = self.loaded = self.joined = None

    def arrive(self) -> None:
        self._settle()

    def check(self) -> None:
        """Nothing but what a read gives, which is asked where it ends."""

    def key(self) -> Hashable:
        r, q = self.coherence.registration, self.question
        return (
            self.now, self.version, tuple(self.left.values()), self.committed, self.counted, self.complete, len(self.queue),
            None if self.row is None else (self.row.since, self.row.expires_at),
            None if self.executed is None else (self.executed[0].since, self.executed[1]), self.answer, self.asked,
            self.entry, None if self.load is None else (self.load.started, self.load.voided), self.loaded,
            None if self.joined is None else self.joined[1],
            r.until, r.since, r._counted_until, r._hole, r._sent,
            q.committed_at, tuple(q._evicted), None if q._registered is None else tuple(q._registered),
        )  # fmt: skip


def rules_entry(coherence: Any, value: Any, load_started: float, expires_at: float) -> Any:
    """The entry as a cache outside the process would bring it back."""
    load = coherence.loads.begin("another", load_started)
    coherence.loads.end(load)
    return load.entry(value, expires_at)


def rules_of(name: str, span: Waiting) -> Any:
    """The rules of a process that has just begun, and has joined."""
    rules = sys.modules[name]
    registration = part(rules, "registration").Registration(
        span.staleness, 0, required=True, outlives=span.restarts > 0
    )
    registration.lease = span.lease
    coherence = rules.Coherence(max_staleness=span.staleness, max_clock_skew=0, registration=registration)
    coherence.evict(coherence.joined_anew(0), 0)
    coherence.trust()
    return coherence


def registering(rules: ModuleType, span: Waiting) -> Registering:
    """The world at its start."""
    left = {name: getattr(span, name) for name in ("registrations", "loads", "restarts", "leaves")}
    question = part(rules, "receipts").Question(9, 0)
    world = Registering(rules.__name__, span, rules_of(rules.__name__, span), question, left)
    if span.starts_registered:
        for _ in range(2 if span.restarts else 1):
            world.left["registrations"] += 1
            world.send()
            world.execute()
            world.commit_row()
            world.answered()
        world.now += 1
    return world
