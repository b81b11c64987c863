"""A small world in which loaders read a replica that lags, and the primary only where they are told to.

The replica answers with any state that the lag allows, now an older one and now a newer: as several do among which a
service chooses. `rules` is what is tested: the real ones, or with a line changed.
"""

import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import cacheinval.coherence as real_rules
from cacheinval.messages import Invalidate, Probe, Tick

from .changing import Changes, changed
from .explore import BrokenError

KEY, OTHER, TAG = "k", "another", "t"
SOURCE = "the database"
FOREVER = 1e9


@dataclass(frozen=True)
class Write:
    """What the row becomes: its version, or None where it is deleted; and the version that the invalidation tells."""

    version: int | None
    told: int | None
    by_tag: bool = False


UPDATES = (Write(8, 8), Write(9, 9))
DELETED_AND_INSERTED = (Write(None, 8), Write(1, 1))
STARTED_OVER = (Write(None, 8), Write(1, 1), Write(2, 2))
UNTOLD = (Write(8, 8), Write(9, None))
BY_TAG = (Write(8, 8), Write(9, None, by_tag=True))


@dataclass(frozen=True)
class Span:
    """How much can happen, in which order so ever. The row has version 7 at first."""

    writes: tuple[Write, ...] = UPDATES
    lag: int = 1
    until: int = 3
    primary: bool = True
    """Whether loads name a primary; else they give a version and no more."""
    staleness: int | None = None
    ticks: int = 0
    baselined: bool = True
    """A tick has come long ago."""
    drops: int = 0
    losses: int = 0
    restarts: int = 0
    """The cache is outside the process, which ends and is started again; its queue and the entries stay."""
    crowds: int = 0
    """More floors than are remembered."""
    batches: bool = False
    own: bool = False
    joins: bool = False
    """Reads join the load under way."""
    unasked: bool = False
    """Nobody has said that there are loads to be compared with what was evicted, before the first of them."""


@dataclass
class Loading:
    """The load under way."""

    token: Any
    least: int
    """The newest write that had been evicted here when it, or the last read that joined it, began."""
    at_replica: bool
    value: int | None = None


@dataclass
class Replicated:
    """The state. What the row was is told by how many writes had been made."""

    rules: str
    span: Span
    coherence: Any
    left: dict[str, int]
    now: int = 0
    committed_at: list[int] = field(default_factory=list)
    queue: list[Any] = field(default_factory=list)
    seq: int = 0
    joined: bool = True
    evicted: int = 0
    unheard: int = 0
    """Messages that were dropped without a later one of their origin: nobody can know yet."""
    entry: Any = None
    load: Loading | None = None

    # What can happen

    def actions(self) -> Iterator[tuple[str, Callable[["Replicated"], None]]]:
        span, left = self.span, self.left
        if self.now < span.until:
            yield "a second passes", Replicated.wait
        if len(self.committed_at) < len(span.writes):
            yield "commit", Replicated.commit
        if left["ticks"]:
            yield "the relay ticks", Replicated.tick
        if left["crowds"] and self.joined:
            yield "many others are evicted", Replicated.crowd
        if not self.joined:
            yield "joined", Replicated.join
        elif self.queue:
            yield "deliver", Replicated.deliver
            if span.batches and len(self.queue) > 1:
                yield "deliver all that waits", Replicated.deliver_all
            if left["drops"]:
                yield "a message is dropped", Replicated.drop
        if self.joined and left["losses"]:
            yield "subscription lost", Replicated.lose
        if self.joined and left["restarts"]:
            yield "started again", Replicated.restart
        yield from self._reading()

    def _reading(self) -> Iterator[tuple[str, Callable[["Replicated"], None]]]:
        if self.load is None:
            yield "read", Replicated.read
            return
        if self.span.joins and self.coherence.loads.joinable(KEY, self.now, self._tags) is self.load.token:
            yield "another read joins", Replicated.join_load
        if self.load.value is not None:
            yield "the load returns", Replicated.load_returns
        elif self.load.at_replica:
            for state in range(self._applied(), len(self.committed_at) + 1):
                yield f"the replica answers with state {state}", partial(Replicated.answer, state=state)
        else:
            yield "the primary answers", partial(Replicated.answer, state=len(self.committed_at))

    def _applied(self) -> int:
        """How many writes even the slowest replica has applied."""
        return sum(at < self.now - self.span.lag for at in self.committed_at)

    @property
    def _tags(self) -> frozenset[str]:
        return frozenset([TAG]) if any(write.by_tag for write in self.span.writes) else frozenset()

    # Time, and writing

    def wait(self) -> None:
        self.now += 1
        eviction = self.coherence.take_due_gap(self.now)
        if eviction is not None:
            self._evict(eviction)
            self.coherence.gap_done()

    def commit(self) -> None:
        self.committed_at.append(self.now)
        number = len(self.committed_at)
        write = self.span.writes[number - 1]
        names: dict[str, Any] = {"tags": [TAG]} if write.by_tag else {"keys": [KEY], "versions": [write.told]}
        self.seq += 1
        if self.span.own:
            self._evict(sys.modules[self.rules].Eviction([KEY], versions=[write.told]))
            self.evicted = number
            self.coherence.expect_echo("w", self.seq)
        if self.joined:
            # The time carries what the world's own checks need to know: which write this was.
            self.queue.append(Invalidate(v=1, origin="w", seq=self.seq, at=float(number), **names))

    def tick(self) -> None:
        self.left["ticks"] -= 1
        if self.joined:
            told = {"w": self.seq} if self.seq else {}
            self.queue.append(Tick(v=1, origin="r", seq=0, as_of=self.now, source=SOURCE, seqs=told))

    def crowd(self) -> None:
        self.left["crowds"] -= 1
        self._evict(sys.modules[self.rules].Eviction([OTHER], versions=[1]))

    # The instance

    def join(self) -> None:
        self.joined, self.unheard = True, 0
        self._evict(self.coherence.joined_anew(self.now))
        self.evicted = len(self.committed_at)
        self.coherence.trust()

    def lose(self) -> None:
        self.left["losses"] -= 1
        self.joined = False
        self.queue.clear()
        self.coherence.lost("cut")

    def restart(self) -> None:
        self.left["restarts"] -= 1
        self.load = None
        kept = self.coherence.proof_state()
        self.coherence = _coherence(sys.modules[self.rules], self.span)
        self.coherence.resumed("m", self.now, kept)
        self.queue.append(Probe(v=1, id="m"))

    def deliver(self) -> None:
        self._receive([self.queue.pop(0)])

    def deliver_all(self) -> None:
        messages, self.queue = self.queue, []
        self._receive(messages)

    def _receive(self, messages: list[Any]) -> None:
        evictions = [self.coherence.received(message, self.now) for message in messages]
        asked = [eviction for eviction in evictions if eviction is not None]
        if asked:
            self._evict(sys.modules[self.rules].Eviction.merged(asked))
        self.coherence.evicted(self.now)
        for message in messages:
            if isinstance(message, Invalidate):
                self.evicted, self.unheard = max(self.evicted, int(message.at or 0)), 0

    def drop(self) -> None:
        self.left["drops"] -= 1
        self.unheard += isinstance(self.queue.pop(0), Invalidate)

    def _evict(self, eviction: Any) -> None:
        self.coherence.evict(eviction, self.now)
        if eviction.everything or KEY in eviction.keys or (TAG in eviction.tags and self.span.restarts):
            self.entry = None

    # Reading

    def read(self) -> None:
        entry = self._found()
        if entry is not None and self.coherence.serving.may_serve(entry, self.now):
            self._returned(entry.value, self.evicted, "hit")
            return
        load = self.coherence.loads.begin(KEY, self.now, self._tags)
        at_replica = not self.span.primary or self._turns_to_replica(load)
        if not at_replica:
            self.coherence.loads.turn_to_primary(load, self.now)
        self.load = Loading(load, self.evicted, at_replica)

    def _found(self) -> Any:
        entry = self.entry
        if entry is None or not self.span.restarts:
            return entry
        # As a cache outside the process has it: with the epoch of this moment.
        return sys.modules[self.rules].Entry(
            entry.value, entry.load_started, *self.coherence.serving.moment[:2], entry.expires_at, entry.tags
        )

    def _turns_to_replica(self, load: Any) -> bool:
        asked: bool = self.coherence.loads.turn_to_replica(load, self.now, shared=bool(self.span.restarts))
        return asked

    def join_load(self) -> None:
        assert self.load is not None
        self.load.least = max(self.load.least, self.evicted)

    def answer(self, state: int) -> None:
        assert self.load is not None
        self.load.value = state

    def load_returns(self) -> None:
        load = self.load
        assert load is not None
        assert load.value is not None
        if load.at_replica and not self.coherence.loads.accepts(load.token, self._version(load.value)):
            if self.span.primary:
                self.coherence.loads.turn_to_primary(load.token, self.now)
                load.at_replica, load.value = False, None
                return
            self.coherence.loads.refuse(load.token)
        may_store = self.coherence.loads.may_store
        if may_store(load.token):
            self.entry = load.token.entry(load.value, FOREVER)
        self.coherence.loads.end(load.token)
        self.load = None
        if self.span.primary:
            self._returned(load.value, load.least, "load")

    def _version(self, state: int) -> int | None:
        return 7 if state == 0 else self.span.writes[state - 1].version

    # What must hold

    def _returned(self, state: int, least: int, how: str) -> None:
        if state < least:
            raise BrokenError(
                f"a read begun after write {least} was evicted returned state {state} by a {how}"
            )
        if how == "hit" and self.span.staleness is not None and state < len(self.committed_at):
            replaced_at = self.committed_at[state]
            if self.now - replaced_at > self.span.staleness:
                raise BrokenError(
                    f"at {self.now} a hit gave state {state}, which was replaced at {replaced_at}"
                )

    def arrive(self) -> None:
        """Nothing depends on the way."""

    def check(self) -> None:
        waits = self.queue or self.unheard or not self.joined
        entry = self._found()
        if waits or self.coherence.suspect is not None or entry is None:
            return
        if self.coherence.serving.may_serve(entry, self.now) and entry.value != len(self.committed_at):
            raise BrokenError(f"all is settled, and state {entry.value} is served")

    def key(self) -> Hashable:
        c, e, load = self.coherence, self.entry, self.load
        floors = c.loads.floors
        return (
            self.now, tuple(self.committed_at), self.seq, self.joined, self.evicted, self.unheard,
            tuple((type(m).__name__, getattr(m, "at", 0), getattr(m, "as_of", 0), getattr(m, "seq", 0)) for m in self.queue),
            tuple(self.left.items()),
            None if e is None else (e.value, e.load_started),
            None if e is None or self.span.restarts else (c.epoch - e.epoch, c._epochs.generation - e.generation),
            None if load is None else (
                load.least, load.at_replica, load.value, load.token.started, load.token.voided, load.token.floor,
                c.epoch - load.token.epoch, c._epochs.generation - load.token.generation, load.token.of_replica,
            ),
            tuple(
                tuple((name, noted) for name, noted in recent._noted.items() if noted[-1][1] >= self.now)
                for recent in (floors._versions, floors._unversioned, floors._tags)
            ),
            floors.wanted, max(self.now - 1, floors._everything_until), max(self.now - 1, floors._forgotten_until),
            tuple((tag, c._epochs.generation - at) for tag, at in c._epochs._tag_evicted.items()),
            tuple(sorted(c._trust.doubts)), tuple(c._numbers.seqs.items()), tuple(sorted(c._echoes)), c._marker, c._gap_due, c._last_gap,
            c.proof.watermark, c.proof.until, c.proof.extends,
        )  # fmt: skip


def _coherence(rules: Any, span: Span) -> Any:
    coherence = rules.Coherence(span.staleness, 0, gap_interval=0, max_replica_lag=span.lag)
    if span.crowds:
        coherence.loads.floors._most = 1
    if not span.unasked:
        coherence.loads.compare_versions()
    coherence.proof.trust_only(SOURCE)
    return coherence


def replicated(rules: Any, span: Span) -> Replicated:
    """The world at its start: subscribed, and for so long that the replica has caught up with that."""
    names = ("ticks", "drops", "losses", "restarts", "crowds")
    world = Replicated(
        rules.__name__, span, _coherence(rules, span), {name: getattr(span, name) for name in names}
    )
    world.now = -(span.lag + 1)
    world.join()
    if span.staleness is not None and span.baselined:
        world.left["ticks"] += 2
        world.tick()
        world.deliver()
        world.now = 0
        world.tick()
        world.deliver()
    world.now = 0
    return world


@dataclass(frozen=True)
class Mutant:
    """A changed line of the rules, and where it shows."""

    name: str
    span: Span
    changes: Changes = ()

    def rules(self) -> ModuleType:
        """The changed rules, importable by name."""
        return changed(real_rules, self.changes, self.name)


EVERYTHING = """        \"""Everything was evicted at `now`.\"""
        self._everything_until = now + self._lag
"""
FIRST_TICKS = Span((Write(8, 8),), staleness=1, ticks=2, drops=1, baselined=False)

SPANS = {
    "two updates": Span(),
    "reads that join": Span(DELETED_AND_INSERTED, joins=True),
    "two updates, a lag of two": Span(lag=2, until=4),
    "deleted and inserted again": Span(DELETED_AND_INSERTED),
    "deleted, inserted again, updated": Span(STARTED_OVER),
    "an update without a version": Span(UNTOLD),
    "an update told by its tag": Span(BY_TAG),
    "the same, in batches": Span(UNTOLD, batches=True),
    "a dropped message": Span((Write(8, 8), Write(9, 9), Write(10, 10)), drops=1, until=2),
    "a lost subscription": Span(losses=1),
    "a process that is started again": Span(restarts=1),
    "own writes": Span(own=True),
    "more floors than are remembered": Span(crowds=1),
    "nobody has asked before": Span(unasked=True),
    "the same, an update without a version": Span(UNTOLD, unasked=True),
    "versions alone": Span(STARTED_OVER, primary=False),
    "versions alone, more than are remembered": Span(primary=False, crowds=1),
    "freshness that is proven": Span((Write(8, 8),), staleness=1, ticks=1, until=5),
    "the same, deleted and inserted again": Span(DELETED_AND_INSERTED, staleness=1, ticks=1),
    "the same, without a version": Span((Write(8, None),), staleness=1, ticks=1, until=4),
    "the first ticks": FIRST_TICKS,
}

MUTANTS = [
    Mutant(
        "versions that skip evictions",
        Span(DELETED_AND_INSERTED),
        (
            (
                "        return _asked_by(message)\n",
                "        old = message.versions and message.versions[0] < self.loads.floors.lowest(message.keys[0], now)\n"
                "        return None if old else _asked_by(message)\n",
            ),
        ),
    ),
    Mutant("floors are not looked at", Span(), (("if load.floor == NO_FLOOR or (", "if True or ("),)),
    Mutant(
        "an absent row stored under a floor",
        Span(DELETED_AND_INSERTED),
        (("(version is not None and version >= load.floor)", "(version is None or version >= load.floor)"),),
    ),
    Mutant(
        "what was refused is stored",
        Span(primary=False),
        (("        load.voided = True\n\n    def inherit(", "        pass\n\n    def inherit("),),
    ),
    Mutant(
        "floors that pass before the replica has caught up",
        Span(),
        changes=(("        until = now + self._lag\n", "        until = now + self._lag - 1\n"),),
    ),
    Mutant(
        "a lower version takes the place of a higher one",
        Span(DELETED_AND_INSERTED),
        changes=(("if one[1] >= now and one[0] > version]", "if False]"),),
    ),
    Mutant(
        "what was evicted before the first question not noted",
        Span(primary=False, unasked=True),
        changes=(("            if versions:\n", "            if False:\n"),),
    ),
    Mutant(
        "the same, without a version",
        Span(UNTOLD, unasked=True),
        changes=(("            elif keys or tags:\n", "            elif False:\n"),),
    ),
    Mutant(
        "too many floors forgotten as if they had passed",
        Span(crowds=1),
        changes=(
            (
                "        self._start()\n        self._forgotten_until = now + self._lag\n",
                "        self._start()\n",
            ),
        ),
    ),
    Mutant(
        "the same, for versions alone",
        Span(primary=False, crowds=1),
        changes=(("return math.inf if now <= self._forgotten_until else", "return"),),
    ),
    Mutant(
        "a replica asked right after an eviction without a version",
        Span(UNTOLD),
        changes=(("self._unversioned.highest(key, now) == NO_FLOOR", "True"),),
    ),
    Mutant(
        "a replica asked right after an eviction of a tag",
        Span(BY_TAG),
        changes=(("all(self._tags.highest(tag, now) == NO_FLOOR for tag in tags)", "True"),),
    ),
    Mutant(
        "a replica asked right after everything was evicted",
        Span(losses=1),
        changes=((EVERYTHING, "        pass\n"),),
    ),
    Mutant(
        "the same, after a gap",
        Span((Write(8, 8), Write(9, 9), Write(10, 10)), drops=1, until=2),
        changes=((EVERYTHING, "        pass\n"),),
    ),
    Mutant(
        "a replica asked right after a queue was resumed",
        Span(restarts=1),
        (("        self.loads.floors.note_everything(now)  # what was", "        # what was"),),
    ),
    Mutant(
        "an unknown version is lower than a known one",
        Span(UNTOLD, batches=True),
        (
            (
                "return None if one is None or other is None else max(one, other)",
                "return one if other is None else other if one is None else max(one, other)",
            ),
        ),
    ),
    Mutant(
        "a replica's answer as old as its load",
        Span((Write(8, 8),), staleness=1),
        (("            load.started = min(load.started, proof.fresh_as_of)\n", ""),),
    ),
    Mutant(
        "a replica asked right after the first tick",
        replace(FIRST_TICKS, until=2),
        (("settled = proof.extends + self._max_replica_lag", "settled = proof.extends"),),
    ),
]
