"""A small world with one stream: a log with offsets and segments, a broker that loses it in every way, and one who reads it.

It does what `receiver.py` and `bus/streaming.py` do, one step at a time, and the subscription may be lost between any two.
From every state it must be possible to come to rest with nothing old in the cache; and whoever is trusted has evicted all
that was published before he subscribed.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cacheinval.coherence
from cacheinval.messages import Invalidate, Probe, Tick

from .changing import Changes, changed
from .copying import copied
from .explore import BrokenError

KEY = "k"
SOURCE = "the database"
SEGMENT = 2  # messages


@dataclass(frozen=True)
class Course:
    """How much can happen."""

    writes: int = 2
    others: int = 0
    """Messages about another row."""
    numbered: bool = True
    cuts: int = 1
    trims: int = 0
    """Segments that retention removes."""
    renewals: int = 0
    """The stream is deleted and made again."""
    crashes: int = 0
    """The broker comes back without the end of the stream, all of which had been read."""
    unbindings: int = 0
    """Nothing is put into the stream any more, until somebody subscribes."""
    nonsense: int = 0
    loads: int = 0
    """Loads that take their time."""
    ticks: int = 0


@dataclass(frozen=True)
class Ways:
    """Where the code around the rules could go wrong."""

    keeps_position_when_deaf: bool = False


@dataclass
class Reading:
    """The state."""

    rules: str
    course: Course
    ways: Ways
    left: dict[str, int]
    coherence: Any
    now: float = 10.0
    version: int = 1
    seq: int = 0
    # The stream
    segments: list[list[tuple[int, Any]]] = field(default_factory=lambda: [[]])
    end: int = 0
    bound: bool = True
    # Whoever reads it
    at: int | None = None
    """Where the broker goes on delivering; None while there is no subscription."""
    open: list[tuple[int, Any]] = field(default_factory=list)
    """The segment that is being read, once it was removed: the broker has it open, and reads it to its end."""
    reads: int = -1
    """A message of the segment that is being read."""
    published_before: int = 1
    """The version that the row had when the subscription was made."""
    markers: int = 0
    todo: list[str] = field(default_factory=list)
    eviction: Any = None
    entry: Any = None
    load: Any = None
    loading: int = 0
    """What the load in flight has read."""

    def actions(self) -> Iterator[tuple[str, Callable[["Reading"], None]]]:
        left = self.left
        if left["writes"]:
            yield "commit and publish", Reading.write
        if left["others"]:
            yield "publish about another row", Reading.write_other
        if left["nonsense"]:
            yield "publish nonsense", Reading.write_nonsense
        if left["ticks"]:
            yield "the relay ticks", Reading.tick
        if left["trims"] and len(self.segments) > 1:
            yield "retention removes a segment", Reading.trim
        if left["renewals"]:
            yield "the stream is deleted and made again", Reading.renew
        if left["crashes"] and self.segments[-1] and self._all_is_read():
            yield "the broker loses the last message", Reading.crash
        if left["unbindings"] and self.at is not None:
            yield "the stream is unbound", Reading.unbind
        if self.at is None:
            yield "subscribe", Reading.subscribe
        else:
            if left["cuts"] and self.bound:
                yield "the connection is cut", Reading.cut
            if self.todo:
                yield self.todo[0], Reading.step
            elif self._next() is not None:
                yield "receive", Reading.receive
        yield "read", Reading.read
        if left["loads"] and self.load is None:
            yield "a load begins", Reading.begin_load
        if self.load is not None:
            yield "the load ends", Reading.end_load

    # The world outside

    def write(self) -> None:
        self.left["writes"] -= 1
        self.version += 1
        self._tell(KEY)

    def write_other(self) -> None:
        self.left["others"] -= 1
        self._tell("another")

    def write_nonsense(self) -> None:
        self.left["nonsense"] -= 1
        self.version += 1
        self._append(None)

    def _tell(self, key: str) -> None:
        if self.course.numbered:
            self.seq += 1
            self._append(Invalidate(v=1, origin="w", seq=self.seq, keys=[key]))
        else:
            self._append(Invalidate(v=1, keys=[key]))

    def tick(self) -> None:
        self.left["ticks"] -= 1
        self._tick()

    def _tick(self) -> None:
        self.now += 0.25
        seqs = {"w": self.seq} if self.seq else {}
        self._append(Tick(v=1, origin="r", seq=0, as_of=self.now, source=SOURCE, seqs=seqs))

    def _append(self, message: Any) -> None:
        if not self.bound:
            return
        if len(self.segments[-1]) == SEGMENT:
            self.segments.append([])
        self.segments[-1].append((self.end, message))
        self.end += 1

    def trim(self) -> None:
        self.left["trims"] -= 1
        removed = self.segments.pop(0)
        if self.reads in [offset for offset, _ in removed]:
            self.open = removed

    def renew(self) -> None:
        self.left["renewals"] -= 1
        self.segments, self.end = [[]], 0
        self._lose("deleted")

    def crash(self) -> None:
        self.left["crashes"] -= 1
        self.end, _ = self.segments[-1].pop()
        self._lose("crashed")

    def _all_is_read(self) -> bool:
        return self.at is not None and self._next() is None and not self.todo

    def unbind(self) -> None:
        self.left["unbindings"] -= 1
        self.bound = False

    # Whoever reads

    def cut(self) -> None:
        self.left["cuts"] -= 1
        self._lose("cut")

    def _lose(self, reason: str) -> None:
        self.at, self.open, self.todo, self.eviction = None, [], [], None
        self.coherence.lost(reason)

    def fall_silent(self) -> None:
        self._lose("silence")
        if not self.ways.keeps_position_when_deaf:
            self.coherence.position.forget()

    def subscribe(self) -> None:
        self.bound = True
        self.published_before = self.version
        position = self.coherence.position.offset
        if position is not None and position >= self.end:
            self.coherence.position.forget()
            position = None
        self.reads = self.end - 1 if position is None else position
        if position is None:
            self.at = self.end
            self.todo = ["join", "trust"]
        else:
            self.at = position
            self.todo = ["go on", "publish the marker"]

    def _next(self) -> tuple[int, Any] | None:
        """What the broker delivers: the first that it still has, and it says nothing of those that it has not."""
        at = self.at
        if at is None:
            return None
        for segment in (self.open, *self.segments):
            for offset, message in segment:
                if offset >= at:
                    return offset, message
        return None

    def step(self) -> None:
        getattr(self, "_" + self.todo.pop(0).replace(" ", "_"))()

    def _join(self) -> None:
        self.eviction = self.coherence.joined_anew(self.now)
        self.coherence.evict(self.eviction, self.now)
        self.todo.insert(0, "drop")

    def _trust(self) -> None:
        self.coherence.trust()

    def _go_on(self) -> None:
        self.markers += 1
        self.coherence.continued(f"m{self.markers}", self.now)

    def _publish_the_marker(self) -> None:
        self._append(Probe(v=1, id=f"m{self.markers}"))

    def receive(self) -> None:
        found = self._next()
        assert found is not None
        offset, message = found
        self.at = offset + 1
        self.reads = offset
        self.eviction = self.coherence.received(message, self.now, offset)
        self.todo = ["say that it is evicted"]
        if self.eviction is not None:
            self.coherence.evict(self.eviction, self.now)
            self.todo.insert(0, "drop")

    def _drop(self) -> None:
        if self.eviction.everything or KEY in self.eviction.keys:
            self.entry = None
        self.eviction = None

    def _say_that_it_is_evicted(self) -> None:
        self.coherence.evicted(self.now)

    def read(self) -> None:
        if self.entry is not None and self.coherence.serving.may_serve(self.entry, self.now):
            return
        load = self.coherence.loads.begin(KEY, self.now)
        self._store(load, self.version)

    def begin_load(self) -> None:
        self.left["loads"] -= 1
        self.load, self.loading = self.coherence.loads.begin(KEY, self.now), self.version

    def end_load(self) -> None:
        load, self.load = self.load, None
        self._store(load, self.loading)

    def _store(self, load: Any, value: int) -> None:
        if self.coherence.loads.may_store(load):
            self.entry = load.entry(value, 1e9)
        self.coherence.loads.end(load)

    # What must hold

    def arrive(self) -> None:
        """Nothing depends on the way."""

    def check(self) -> None:
        """Who is trusted has caught up; and whatever happens, it comes to rest, and then nothing old is served."""
        if self._serves_older_than(self.published_before, later=2.0):
            raise BrokenError(f"trusted, and serves {self.entry.value}, replaced before it subscribed")
        world = copied(self)
        if world.load is not None:
            world.end_load()
        for ticks in range(2 if self.course.ticks else 1):
            if ticks:
                world._tick()
            world._come_to_rest()
        if world.coherence.suspect is not None:
            raise BrokenError(f"all is settled, and it is suspect: {world.coherence.suspect}")
        if world._serves_older_than(world.version, later=2.0):
            raise BrokenError(f"all is settled, and {world.entry.value} is served, not {world.version}")

    def _serves_older_than(self, version: int, later: float) -> bool:
        """By the trust in the subscription: an entry's own age excuses nothing any more so much later."""
        return (
            self.entry is not None
            and self.entry.value < version
            and self.coherence.serving.may_serve(self.entry, self.now + later)
        )

    def _come_to_rest(self) -> None:
        if not self.bound:
            self.fall_silent()
        while self.at is None or self.todo or self._next() is not None or self.coherence.marker is not None:
            if self.at is None:
                self.subscribe()
            elif self.todo:
                self.step()
            elif self._next() is not None:
                self.receive()
            else:
                self._publish_the_marker()  # again, since it is overdue

    def key(self) -> Hashable:
        c = self.coherence
        position = c.position
        return (
            self.now, self.version, self.seq, self.end, self.bound, self.at, self.published_before,
            self.markers, tuple(self.todo), str(self.eviction), tuple(self.left.items()),
            str(self.segments), str([one for one in self.open if self.at is not None and one[0] >= self.at]), self.reads,
            self.entry and (self.entry.value, self.entry.epoch - c.epoch, self.entry.load_started),
            self.load and (self.loading, self.load.voided, self.load.epoch - c.epoch, self.load.started),
            tuple(c._numbers.seqs.items()), tuple(c._trust.doubts), c._marker, c._marker_passed, str(c._tick_passed),
            c.proof.watermark, c.proof.extends, c.proof.checked_until,
            str((position._kept, position._passed, position._expected, position._last, position._reading)),
        )  # fmt: skip


def reading(rules: Any, course: Course, ways: Ways | None = None) -> Reading:
    """The world at its start: subscribed, one message about another row has been read, and the first version is cached."""
    coherence = rules.Coherence(None, 0, gap_interval=0)
    names = (
        "writes",
        "others",
        "cuts",
        "trims",
        "renewals",
        "crashes",
        "unbindings",
        "nonsense",
        "loads",
        "ticks",
    )
    world = Reading(
        rules.__name__, course, ways or Ways(), {name: getattr(course, name) for name in names}, coherence
    )
    world.subscribe()
    world._come_to_rest()
    world.seq += 1
    world._append(Invalidate(v=1, origin="w", seq=1, keys=["another"]))
    if course.ticks:
        world._tick()
    world._come_to_rest()
    world.read()
    return world


COURSES = {
    "cut at any moment": Course(writes=2, cuts=1, loads=1),
    "cut, and nobody numbers": Course(writes=2, cuts=2, numbered=False),
    "retention cuts off where it was": Course(writes=1, others=3, cuts=1, trims=2, numbered=False),
    "the stream is made again": Course(writes=2, others=1, cuts=0, renewals=1),
    "the same, and nobody numbers": Course(writes=2, others=1, cuts=1, renewals=1, numbered=False),
    "the end of the stream is lost": Course(writes=2, others=1, cuts=0, crashes=2, numbered=False),
    "the stream is unbound": Course(writes=3, cuts=0, unbindings=2, numbered=False, loads=1),
    "nonsense": Course(writes=1, cuts=2, nonsense=1),
    "with ticks": Course(writes=1, cuts=1, renewals=1, ticks=1),
}


@dataclass(frozen=True)
class StreamMutant:
    """A fault, and where it shows."""

    name: str
    course: str
    changes: Changes = ()
    ways: Ways | None = None

    def world(self) -> Reading:
        rules = changed(cacheinval.coherence, self.changes, self.name)
        return reading(rules, COURSES[self.course], self.ways)


STREAM_MUTANTS = [
    StreamMutant(
        "the message not compared after the stream was made again",
        "the same, and nobody numbers",
        changes=(("self._expected != (offset, _identity(message))", "self._expected.offset != offset"),),
    ),
    StreamMutant(
        "the message not compared after the end of the stream was lost",
        "the end of the stream is lost",
        changes=(("self._expected != (offset, _identity(message))", "self._expected.offset != offset"),),
    ),
    StreamMutant(
        "a first message behind the expected one accepted",
        "retention cuts off where it was",
        changes=(
            (
                '        if self._expected is not None:\n            return "the stream does not go on',
                '        if False:\n            return "the stream does not go on',
            ),
        ),
    ),
    StreamMutant(
        "a jump of any length accepted",
        "retention cuts off where it was",
        changes=(("STEP = 2", "STEP = 3"),),
    ),
    StreamMutant(
        "trusted before the marker",
        "cut, and nobody numbers",
        (
            (
                '        self.doubt("subscription", "catching up with the stream")',
                '        self.settle("subscription")',
            ),
        ),
    ),
    StreamMutant(
        "read on behind what arrived, evicted or not",
        "cut at any moment",
        changes=(
            (
                "            self._passed = _Place(offset, identity)",
                "            self._kept = _Place(offset, identity)",
            ),
        ),
    ),
    StreamMutant(
        "what cannot be understood is not a gap",
        "nonsense",
        (('            return self.gap("malformed message", now)', "            return None"),),
    ),
    StreamMutant(
        "gaps of the stream told to nobody",
        "retention cuts off where it was",
        (("        gap = self.gap(missing, now)\n", "        gap = None\n"),),
    ),
    StreamMutant(
        "going on where it was left although nothing was heard",
        "the stream is unbound",
        ways=Ways(keeps_position_when_deaf=True),
    ),
]
