"""A small world with time: a writer, the outbox, a relay that ticks, and an instance that serves by proof.

The rules, and what decides when a tick may be sent (`outbox/ticks.py`), are the real ones.
"""

import pickle
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cacheinval.messages import Invalidate, Tick
from cacheinval.outbox.session import Look

from .explore import BrokenError

KEY = "k"
SOURCE = "the database"


@dataclass
class Span:
    """How much can happen."""

    staleness: int = 1
    until: int = 5
    writes: int = 1
    slow_writes: int = 0
    drops: int = 0
    losses: int = 0
    kills: int = 0
    looks: int = 1
    baselined: bool = True
    """A tick has been processed before anything else happens."""
    hung_loads: bool = False
    foreign_ticks: int = 0


@dataclass
class Relaying:
    """Where the relay could go wrong."""

    by_cursor: bool = False
    time_after_look: bool = False
    numbers_of_look: bool = False


@dataclass
class Timed:
    """The state."""

    rules: str
    deciding: str  # the module with `Ticks`
    span: Span
    relaying: Relaying
    coherence: Any
    ticks: Any
    left: dict[str, int]
    now: int = 1
    version: int = 1
    replaced_at: dict[int, int] = field(default_factory=dict)
    next_row: int = 1
    outbox: list[int] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)  # rows of transactions that have not committed yet
    to_publish: list[int] = field(default_factory=list)
    to_delete: list[tuple[int, int]] = field(default_factory=list)
    origins: dict[str, int] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=lambda: {"w": 0, "r": 0})
    cursor: int = 0
    half_look: set[int] | None = None
    seen: dict[str, int] = field(default_factory=dict)  # the numbers at the time of the look
    queue: list[Any] = field(default_factory=list)
    joined: bool = False
    entry: Any = None
    load: Any = None
    loaded: int | None = None
    joined_at: int | None = None

    # What can happen

    def actions(self) -> Iterator[tuple[str, Callable[["Timed"], None]]]:
        if self.now < self.span.until:
            yield "a second passes", Timed.wait
        if self.left["writes"]:
            yield "commit", Timed.commit
        if self.left["slow_writes"]:
            yield "a transaction takes its row", Timed.begin
        if self.begun:
            yield "the long transaction commits", Timed.commit_begun
        if self.to_publish:
            yield "the writer publishes", Timed.publish
            if self.left["kills"]:
                yield "the writer is killed", Timed.kill
        if self.to_delete:
            yield "the writer deletes its row", Timed.delete
            if self.left["kills"]:
                yield "the writer is killed", Timed.kill
        yield from self._relay_actions()
        if not self.joined:
            yield "joined", Timed.join
        elif self.left["losses"]:
            yield "subscription lost", Timed.lose
        if self.joined and self.queue:
            yield f"deliver {type(self.queue[0]).__name__.lower()}", Timed.deliver
            if self.left["drops"]:
                yield f"{type(self.queue[0]).__name__.lower()} is dropped", Timed.drop
        if self.left["foreign_ticks"] and self.joined:
            yield "another database ticks", Timed.foreign_tick
        if self.load is None:
            yield "read", Timed.read
        elif self.loaded is None:
            yield "the load reads the database", Timed.load_reads
        else:
            yield "the load returns", Timed.load_returns
            if self.joined_at is None and self.coherence.joinable(KEY, self.now) is self.load:
                yield "another read joins the load", Timed.join_load

    def _relay_actions(self) -> Iterator[tuple[str, Callable[["Timed"], None]]]:
        if self.half_look is not None:
            yield "the relay takes the time", Timed.finish_look
        elif self.left["looks"] and self.ticks.due(self.now):
            yield "the relay looks", Timed.look
        for row in self._relayed():
            yield f"the relay publishes row {row}", partial(Timed.relay, row=row)
        if self.ticks._look is not None and self._may_tick():
            yield "the relay ticks", Timed.tick

    def _relayed(self) -> list[int]:
        return [row for row in self.outbox if not self.relaying.by_cursor or row > self.cursor]

    # Time and the writer

    def wait(self) -> None:
        self.now += 1
        eviction = self.coherence.take_due_gap(self.now)
        if eviction is not None:
            self._evict(eviction)
            self.coherence.gap_done()

    def _change(self) -> None:
        self.replaced_at[self.version] = self.now
        self.version += 1

    def commit(self) -> None:
        self.left["writes"] -= 1
        self._change()
        self.outbox.append(self.next_row)
        self.to_publish.append(self.next_row)
        self.next_row += 1

    def begin(self) -> None:
        self.left["slow_writes"] -= 1
        self.begun.append(self.next_row)
        self.next_row += 1

    def commit_begun(self) -> None:
        """By a trigger, say: nobody but the relay publishes it."""
        self._change()
        self.outbox.append(self.begun.pop(0))

    def publish(self) -> None:
        row = self.to_publish.pop(0)
        self._send("w", Invalidate(v=1, origin="w", seq=self.seqs["w"] + 1, keys=[KEY]))
        self.to_delete.append((row, self.seqs["w"]))

    def delete(self) -> None:
        row, seq = self.to_delete.pop(0)
        if row in self.outbox:
            self.outbox.remove(row)
        self.origins["w"] = max(self.origins.get("w", 0), seq)

    def kill(self) -> None:
        self.left["kills"] -= 1
        self.to_publish.clear()
        self.to_delete.clear()

    # The relay

    def look(self) -> None:
        self.left["looks"] -= 1
        if self.relaying.time_after_look:
            self.half_look = set(self.outbox)
        else:
            self._begin(set(self.outbox))

    def finish_look(self) -> None:
        rows, self.half_look = self.half_look, None
        assert rows is not None
        self._begin(rows)

    def _begin(self, rows: set[Any]) -> None:
        rows = {row for row in rows if not self.relaying.by_cursor or row > self.cursor}
        self.seen = dict(self.origins)
        self.ticks.begin(Look(self.now, (self.now, self.now), SOURCE, rows), self.now - 1)

    def relay(self, row: int) -> None:
        self._send("r", Invalidate(v=1, origin="r", seq=self.seqs["r"] + 1, keys=[KEY]))
        self.outbox.remove(row)
        self.origins["r"] = self.seqs["r"]
        self.cursor = max(self.cursor, row)
        self.ticks.confirmed([row])

    def _may_tick(self) -> bool:
        """Asks the real rule, without using it up."""
        return pickle.loads(pickle.dumps(self))._take() is not None

    def _take(self) -> Any:
        numbers = self.seen if self.relaying.numbers_of_look else self.origins
        self.ticks.left(set(self.outbox), dict(numbers))
        return self.ticks.take()

    def tick(self) -> None:
        told = self._take()
        if told is not None:
            look, numbers = told
            seqs = {origin: seq for origin, seq in numbers.items() if origin != "r"}
            tick = Tick(v=1, origin="r", seq=self.seqs["r"], as_of=look.as_of, source=SOURCE, seqs=seqs)
            self._deliver_later(tick)

    def foreign_tick(self) -> None:
        self.left["foreign_ticks"] -= 1
        self._deliver_later(Tick(v=1, origin="x", seq=0, as_of=self.now, source="another"))

    def _send(self, origin: str, message: Any) -> None:
        self.seqs[origin] += 1
        self._deliver_later(message)

    def _deliver_later(self, message: Any) -> None:
        if self.joined:
            self.queue.append(message)

    # The instance

    def join(self) -> None:
        self.joined = True
        self._evict(self.coherence.joined_anew(self.now))
        self.coherence.trust()

    def lose(self) -> None:
        self.left["losses"] -= 1
        self.joined = False
        self.queue.clear()
        self.coherence.lost("cut")

    def deliver(self) -> None:
        eviction = self.coherence.received(self.queue.pop(0), self.now)
        if eviction is not None:
            self._evict(eviction)
        self.coherence.evicted(self.now)

    def drop(self) -> None:
        self.left["drops"] -= 1
        self.queue.pop(0)

    def _evict(self, eviction: Any) -> None:
        self.coherence.evict(eviction, self.now)
        if eviction.everything or eviction.keys:
            self.entry = None

    def read(self) -> None:
        if self.entry is not None and self.coherence.may_serve(self.entry, self.now):
            self._returned(self.entry.value, self.now, "hit")
            return
        self.load = self.coherence.begin_load(KEY, self.now)
        if not self.span.hung_loads:
            self.load_reads()
            self.load_returns()

    def _returned(self, version: int | None, began: int, how: str) -> None:
        stale_since = self.replaced_at.get(version or 0)
        if stale_since is not None and began - stale_since > self.span.staleness:
            raise BrokenError(
                f"a {how} of a read that began at {began} gave what was replaced at {stale_since}"
            )

    def join_load(self) -> None:
        self.joined_at = self.now

    def load_reads(self) -> None:
        self.loaded = self.version

    def load_returns(self) -> None:
        if self.coherence.may_store(self.load):
            self.entry = self.coherence.entry(self.load, self.loaded, 1e9)
        self.coherence.end_load(self.load)
        if self.joined_at is not None:
            self._returned(self.loaded, self.joined_at, "joined load")
        self.load = self.loaded = self.joined_at = None

    def check(self) -> None:
        """All that is asked here is asked of a hit."""

    def key(self) -> Hashable:
        c, t, e = self.coherence, self.ticks, self.entry
        return (
            self.now, self.version, tuple(self.replaced_at.items()), self.next_row, tuple(self.outbox), tuple(self.begun),
            tuple(self.to_publish), tuple(self.to_delete), tuple(sorted(self.origins.items())), tuple(self.seqs.values()),
            self.cursor, None if self.half_look is None else tuple(self.half_look), self.joined,
            tuple((type(m).__name__, m.origin, m.seq, getattr(m, "as_of", 0), tuple(getattr(m, "seqs", {}).items())) for m in self.queue),
            None if e is None else (e.value, e.load_started, c.epoch - e.epoch),
            None if self.load is None else (self.load.started, self.load.voided, c.epoch - self.load.epoch), self.loaded, self.joined_at,
            None if t._look is None else (t._look.as_of, tuple(sorted(t.waiting)), tuple(self.seen.items())),
            tuple(self.left.items()), tuple(sorted(c._doubts)), tuple(c._seqs.items()), c._gap_due, c._last_gap,
            c.proof.watermark, c.proof.until, c.proof.extends, c.proof.source,
        )  # fmt: skip


def timed(rules: Any, deciding: Any, span: Span, relaying: Relaying | None = None) -> Timed:
    """The world at its start."""
    coherence = rules.Coherence(max_staleness=span.staleness, max_clock_skew=0)
    if span.foreign_ticks:
        coherence.proof.trust_only(SOURCE)
    names = ("writes", "slow_writes", "drops", "losses", "kills", "looks", "foreign_ticks")
    left = {name: getattr(span, name) for name in names}
    world = Timed(
        rules.__name__, deciding.__name__, span, relaying or Relaying(), coherence, deciding.Ticks(0), left
    )
    world.join()
    if span.baselined:
        world.left["looks"] += 1
        world.look()
        if world.half_look is not None:
            world.finish_look()
        world.tick()
        world.deliver()
        world.now += 1
    return world
