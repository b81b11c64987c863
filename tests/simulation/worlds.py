"""Small worlds around the real rules: a database, a broker, and one instance with its cache and its readers.

A world does what `cache/`, `receiver.py` and the bus do around `coherence`, one step at a time, in any order that
they could. `rules` is the module under test: the real one, or one with a line changed.
"""

import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cacheinval.messages import Beat, Invalidate, Probe

from .explore import BrokenError
from .standing import rely_on

TAG = "t"
FOREVER = 1e9


@dataclass
class Reader:
    """One read under way."""

    key: str
    began: float
    least: int
    """What it may not fall short of: the newest version whose eviction was done when it began."""
    load: Any
    leads: bool
    value: int | None = None
    may_store: bool | None = None


@dataclass(frozen=True)
class Shape:
    """How large a world is, and which of its events can happen."""

    keys: tuple[str, ...] = ("a",)
    tagged: bool = False
    by_tag: bool = False
    own_tags: bool = False
    """Each key has a tag of its own, instead of all sharing one."""
    writes: int = 2
    readers: int = 2
    losses: int = 0
    duplicates: int = 0
    resumes: bool = False
    malformed: int = 0
    unknown_commits: int = 0
    drops: int = 0
    origins: int = 1
    probes: int = 0
    renewals: int = 0
    """How often a publishing channel is replaced by a new one, which is an origin of its own."""
    beats: int = 0
    own: bool = False
    batches: bool = False
    keeps_entries: bool = False
    """A new epoch drops no entries: they stay where they are, and only the rules refuse them."""
    slow_join: bool = False
    """Clearing takes a while (a cache outside the process), and the subscription can be lost meanwhile."""


@dataclass(frozen=True)
class Glue:
    """Where code outside the rules could go wrong; each name is a mutation of what the project does."""

    suspends_before_store: bool = False
    clears_before_bind: bool = False
    joins_any_flight: bool = False
    skips_echoes_without_evicting: bool = False


@dataclass
class World:
    """The database, the queue, one instance."""

    rules: str  # name of the module
    shape: Shape
    glue: Glue
    coherence: Any
    database: dict[str, int] = field(default_factory=dict)
    invisible: dict[str, int] = field(default_factory=dict)  # commits whose client gave up: not visible yet
    unpublished: list[tuple[str, int, bool]] = field(default_factory=list)  # key, version, own
    rows: list[tuple[str, int]] = field(default_factory=list)  # left to the relay
    queue: list[Any] = field(default_factory=list)
    bound: bool = False
    joined: bool = False
    clearing: bool = False
    entries: dict[str, Any] = field(default_factory=dict)
    readers: list[Reader | None] = field(default_factory=list)
    evicted: dict[str, int] = field(default_factory=dict)
    channels: list[str] = field(default_factory=list)
    seqs: dict[str, int] = field(default_factory=dict)  # by origin
    behind: int = 0  # messages left of those that waited when the queue was resumed
    decided: list[tuple[Any, Any]] = field(default_factory=list)  # what came, and what has to go for it
    kept: Any = None  # with the cache: the proof state as of the last eviction that was done
    holes: list[str] = field(default_factory=list)
    """Origins of which a message was dropped, and none has come since."""
    left: dict[str, int] = field(default_factory=dict)
    now: float = 0.0

    # What can happen

    def actions(self) -> Iterator[tuple[str, Callable[["World"], None]]]:
        shape = self.shape
        if self.left["writes"]:
            for key in shape.keys:
                yield f"write {key}", partial(World.write, key=key)
                if self.left["unknown_commits"] and key not in self.invisible:
                    yield f"write {key}, reply lost", partial(World.write_unknown, key=key)
        for key in self.invisible:
            yield f"lost commit of {key} becomes visible", partial(World.become_visible, key=key)
        for channel, origin in enumerate(self.channels):
            by = "" if len(self.channels) == 1 else f" by {origin}"
            if self.unpublished:
                yield f"publish{by}", partial(World.publish, channel=channel)
            if self.left["renewals"]:
                yield f"another channel instead of {origin}", partial(World.renew, channel=channel)
            if self.left["beats"] and self.seqs[origin]:
                yield f"{origin} beats", partial(World.beat, origin=origin)
        if self.unpublished and self.left["duplicates"]:
            yield "publish, and leave the row to the relay", World.publish_twice
        if self.rows:
            yield "relay publishes", World.relay
        if not self.bound:
            if self.glue.clears_before_bind and not self.joined:
                yield "clear, before bind", World.clear_first
            if self.joined or not self.glue.clears_before_bind:
                yield "bind", World.bind
        elif not self.joined and not self.clearing:
            yield "joined", World.join
        if self.clearing:
            yield "cleared", World.cleared
            if self.left["losses"] and self.bound:
                yield "subscription lost", World.lose
        if not self.joined:
            pass
        else:
            if self.decided:
                yield "evict what was decided", World.evict_decided
            elif self.queue and shape.batches:
                yield "decide on all that waits", World.decide
            elif self.queue:
                yield f"deliver {self._label(self.queue[0])}", World.deliver
                # Not the first of an origin: nobody here knows then which number it would have had.
                if (
                    self.left["drops"]
                    and getattr(self.queue[0], "origin", None) in self.coherence._numbers.seqs
                ):
                    yield f"{self._label(self.queue[0])} is dropped", World.drop
                if self.left["duplicates"]:
                    yield "deliver, then again", World.deliver_twice
            if self.left["losses"]:
                yield "subscription lost", World.lose
            if self.left["probes"]:
                yield "somebody probes", World.probe
            if self.left["malformed"]:
                yield "malformed message", World.malformed
        if self.coherence.gap_due_at is not None:
            yield "a second passes", World.pass_second
        idle = False
        for number, reader in enumerate(self.readers):
            if reader is None and idle:
                continue  # the same as the first idle one
            if reader is None:
                idle = True
                for key in shape.keys:
                    yield f"reader {number} reads {key}", partial(World.read, number=number, key=key)
            elif reader.leads and reader.value is None:
                yield f"reader {number} loads", partial(World.load, number=number)
            elif reader.leads and self.glue.suspends_before_store and reader.may_store is None:
                yield f"reader {number} asks to store", partial(World.ask, number=number)
            elif reader.leads:
                yield f"reader {number} stores and returns", partial(World.finish, number=number)

    def _label(self, message: Any) -> str:
        if isinstance(message, Probe):
            return "marker" if message.id == "m" else "probe"
        if isinstance(message, Beat):
            return f"beat of {message.origin}"
        return ",".join([*message.keys, *(f"tag {tag}" for tag in message.tags)])

    # Writing

    def write(self, key: str) -> None:
        self.left["writes"] -= 1
        self.database[key] += 1
        own = self.shape.own
        if own and not self.glue.skips_echoes_without_evicting:
            self._evict(self._rules().Eviction([key]))
            self.evicted[key] = self.database[key]
        self.unpublished.append((key, self.database[key], own))

    def write_unknown(self, key: str) -> None:
        """COMMIT's reply is lost: published at once; the row becomes visible together with the change."""
        self.left["writes"] -= 1
        self.left["unknown_commits"] -= 1
        self.invisible[key] = 1
        self.unpublished.append((key, 0, False))

    def become_visible(self, key: str) -> None:
        del self.invisible[key]
        self.database[key] += 1
        rules = self._rules()
        if not rules.owed_after(rules.WriteOutcome.UNKNOWN).delete_rows:
            self.rows.append((key, self.database[key]))

    def publish(self, channel: int) -> None:
        self._send(*self.unpublished.pop(0), self.channels[channel])

    def renew(self, channel: int) -> None:
        self.left["renewals"] -= 1
        if self.shape.own:
            self.coherence.forget_echoes(self.channels[channel])
        self.channels[channel] += "'"
        self.seqs[self.channels[channel]] = 0

    def beat(self, origin: str) -> None:
        self.left["beats"] -= 1
        if self.bound:
            self.queue.append(Beat(v=1, origin=origin, seq=self.seqs[origin]))

    def publish_twice(self) -> None:
        self.left["duplicates"] -= 1
        key, version, own = self.unpublished.pop(0)
        self._send(key, version, own, self.channels[0])
        self.rows.append((key, version))

    def relay(self) -> None:
        self._send(*self.rows.pop(0), False, "r")

    def _send(self, key: str, version: int, own: bool, origin: str) -> None:
        self.seqs[origin] += 1
        if own:
            self.coherence.expect_echo(origin, self.seqs[origin])
        if self.bound:
            names = {"tags": [self._tag(key)]} if self.shape.by_tag else {"keys": [key]}
            # The two times carry what the world's own checks need to know: which version this was, and of which key.
            which = float(self.shape.keys.index(key))
            self.queue.append(
                Invalidate(
                    v=1, origin=origin, seq=self.seqs[origin], at=float(version), committed_at=which, **names
                )
            )

    # Subscribing

    def bind(self) -> None:
        self.bound = True
        if self.joined:  # mutated: cleared before
            self.coherence.trust()

    def clear_first(self) -> None:
        self.joined = True
        self._evict(self.coherence.joined_anew(self.now))

    def join(self) -> None:
        self.joined = True
        if self.shape.resumes and self.left["resumed"]:
            self.coherence.resumed("m", self.now, self.kept)
            self.behind = len(self.queue)
            self.queue.append(Probe(v=1, id="m"))
            return
        self.left["resumed"] = 1
        self.kept = self.coherence.proof_state()
        self._evict(self.coherence.joined_anew(self.now))
        for key in self.shape.keys:
            self.evicted[key] = self.database[key]
        if self.shape.slow_join:
            self.joined, self.clearing = False, True
        else:
            self.coherence.trust()

    def cleared(self) -> None:
        self.clearing = False
        self.joined = self.bound
        self.coherence.trust()

    def lose(self) -> None:
        self.left["losses"] -= 1
        self.joined = False
        self.queue[:0] = [message for message, _ in self.decided]  # not acknowledged: they come again
        self.decided.clear()
        self.queue = [message for message in self.queue if getattr(message, "id", None) != "m"]
        self.behind = 0
        if not self.shape.resumes:
            self.bound = False
            self.queue.clear()
        self.coherence.lost("cut")

    def probe(self) -> None:
        self.left["probes"] -= 1
        self.queue.append(Probe(v=1, id="another's"))

    # Receiving

    def deliver(self) -> None:
        self._receive(self.queue.pop(0))

    def deliver_twice(self) -> None:
        self.left["duplicates"] -= 1
        self._receive(self.queue[0])

    def drop(self) -> None:
        """An operator purges, or the queue overflows."""
        self.left["drops"] -= 1
        self.holes.append(self.queue.pop(0).origin)
        self.behind = max(0, self.behind - 1)

    def _receive(self, message: Any) -> None:
        self.decided.append((message, self.coherence.received(message, self.now)))
        self.evict_decided()

    def decide(self) -> None:
        """A batch: what is to go is decided for all of it, and then evicted in a cache outside the process."""
        self.decided = [(message, self.coherence.received(message, self.now)) for message in self.queue]
        self.queue.clear()

    def evict_decided(self) -> None:
        decided, self.decided = self.decided, []
        for message, eviction in decided:
            if eviction is not None:
                self._evict(eviction)
            self.behind = max(0, self.behind - 1)
            if isinstance(message, Invalidate | Beat):
                self.holes = [origin for origin in self.holes if origin != message.origin]
            if isinstance(message, Invalidate):
                key = self.shape.keys[int(message.committed_at or 0)]
                self.evicted[key] = max(self.evicted[key], int(message.at or 0))
        self.coherence.evicted(self.now)
        self.kept = self.coherence.proof_state()

    def malformed(self) -> None:
        self.left["malformed"] -= 1
        eviction = self.coherence.gap("malformed", self.now)
        if eviction is not None:
            self._evict(eviction)

    def pass_second(self) -> None:
        self.now += 1.5
        eviction = self.coherence.take_due_gap(self.now)
        if eviction is not None:
            self._evict(eviction)
            self.coherence.gap_done()

    def _evict(self, eviction: Any) -> None:
        self.coherence.evict(eviction, self.now)
        if eviction.everything:
            self.holes.clear()
            if not self.shape.keeps_entries:
                self.entries.clear()
        for key in eviction.keys:
            self.entries.pop(key, None)

    # Reading

    def read(self, number: int, key: str) -> None:
        entry = self.entries.get(key)
        least = self.evicted[key]
        if entry is not None and self.coherence.serving.may_serve(entry, self.now):
            self._returned(key, least, entry.value, "hit")
            return
        tags = frozenset({self._tag(key)}) if self.shape.tagged else frozenset()
        load = self.coherence.loads.joinable(key, self.now, tags)
        if load is None and self.glue.joins_any_flight:
            load = next((r.load for r in self.readers if r is not None and r.key == key and r.leads), None)
        if load is not None:
            self.readers[number] = Reader(key, self.now, least, load, leads=False)
            return
        load = self.coherence.loads.begin(key, self.now, tags)
        self.readers[number] = Reader(key, self.now, least, load, leads=True)

    def load(self, number: int) -> None:
        reader = self.readers[number]
        assert reader is not None
        reader.value = self.database[reader.key]

    def ask(self, number: int) -> None:
        reader = self.readers[number]
        assert reader is not None
        reader.may_store = self.coherence.loads.may_store(reader.load)

    def finish(self, number: int) -> None:
        leader = self.readers[number]
        assert leader is not None
        may_store = (
            self.coherence.loads.may_store(leader.load) if leader.may_store is None else leader.may_store
        )
        if may_store:
            self.entries[leader.key] = leader.load.entry(leader.value, FOREVER)
        self.coherence.loads.end(leader.load)
        for at, reader in enumerate(self.readers):
            if reader is not None and reader.load is leader.load:
                self.readers[at] = None
                self._returned(reader.key, reader.least, leader.value, "load")

    # What must hold

    def _returned(self, key: str, least: int, value: int | None, how: str) -> None:
        if value is not None and value < least:
            raise BrokenError(
                f"a read of {key} begun after version {least} was evicted returned {value} by a {how}"
            )

    def arrive(self) -> None:
        for entry in self.entries.values():
            rely_on(self.coherence, entry, self.now)

    def check(self) -> None:
        settled = (
            self.joined
            and not (
                self.queue or self.decided or self.unpublished or self.rows or self.invisible or self.holes
            )
            and self.coherence.suspect is None
        )
        if settled:
            for key, entry in self.entries.items():
                if (
                    self.coherence.serving.may_serve(entry, self.now + 0.5)
                    and entry.value != self.database[key]
                ):
                    raise BrokenError(
                        f"all is settled, and {key} is served as {entry.value}, not {self.database[key]}"
                    )

        if self.coherence.gap_due_at is not None and self.coherence.suspect is None:
            raise BrokenError("a gap is put off, and the instance is trusted")
        if self.coherence.suspect is None and not self.bound:
            raise BrokenError("the instance is trusted, and is not subscribed")
        if self.joined and self.coherence.suspect is None and self.behind:
            raise BrokenError(
                "the instance is trusted, and has not evicted what waited in the queue that it resumed"
            )

    def _tag(self, key: str) -> str:
        return f"{TAG}{key}" if self.shape.own_tags else TAG

    # Comparing

    def _rules(self) -> Any:
        return sys.modules[self.rules]

    def key(self) -> Hashable:
        c = self.coherence
        return (
            tuple(sorted(self.database.items())),
            tuple(sorted(self.invisible.items())),
            tuple(self.unpublished),
            tuple(self.rows),
            tuple(map(_message_key, self.queue)),
            tuple((*_message_key(m), e is None) for m, e in self.decided),
            (self.bound, self.joined, self.clearing, self.now, self.behind),
            tuple(self.seqs.items()), tuple(self.channels), tuple(self.holes),
            tuple(sorted(c._echoes)),
            tuple(sorted(self.left.items())),
            tuple(sorted(self.evicted.items())),
            tuple(
                (key, e.value, c.epoch - e.epoch, c._epochs.generation - e.generation, e.load_started)
                for key, e in sorted(self.entries.items())
            ),
            self._reading(),
            tuple(sorted((tag, c._epochs.generation - at) for tag, at in c._epochs._tag_evicted.items())), c._epochs.generation - c._epochs._tag_floor,
            tuple(sorted(c._trust.doubts)),
            tuple(c._numbers.seqs.items()),
            self.kept and tuple(self.kept.seqs.items()),
            c._marker, c._marker_passed, c._tick_passed is None, c._subscribed, c._gap_due, c._last_gap,
        )  # fmt: skip

    def _reading(self) -> Hashable:
        """The reads under way; which reader is which does not matter."""
        c = self.coherence
        loads: dict[int, tuple[Any, list[tuple[Any, ...]]]] = {}
        for r in self.readers:
            if r is not None:
                of = loads.setdefault(id(r.load), (r.load, []))
                of[1].append((r.key, r.least, r.leads, r.value or 0, str(r.may_store)))
        return tuple(
            sorted(
                (load.key, load.started, load.voided, c.epoch - load.epoch, c._epochs.generation - load.generation,
                 c.loads._loads.get(load.key) is load, tuple(sorted(readers)))
                for load, readers in loads.values()
            )
        )  # fmt: skip


def _message_key(message: Any) -> tuple[Hashable, ...]:
    return (
        type(message).__name__, *getattr(message, "keys", ()), getattr(message, "at", 0),
        getattr(message, "origin", ""), getattr(message, "seq", 0), getattr(message, "id", ""),
    )  # fmt: skip


def world(rules: Any, shape: Shape, glue: Glue | None = None) -> World:
    """The world at its start: nothing cached, not subscribed yet."""
    keys, channels = shape.keys, [f"w{number}" for number in range(shape.origins)]
    return World(
        rules=rules.__name__,
        shape=shape,
        glue=glue or Glue(),
        coherence=rules.Coherence(),
        database=dict.fromkeys(keys, 1),
        evicted=dict.fromkeys(keys, 0),
        readers=[None] * shape.readers,
        channels=channels,
        seqs=dict.fromkeys([*channels, "r"], 0),
        left={
            "writes": shape.writes,
            "losses": shape.losses,
            "duplicates": shape.duplicates,
            "malformed": shape.malformed,
            "drops": shape.drops,
            "unknown_commits": shape.unknown_commits,
            "renewals": shape.renewals,
            "beats": shape.beats,
            "probes": shape.probes,
            "resumed": 0,
        },
    )
