"""A small world in which processes end: a cache outside the process, its durable queue, and what is kept with the cache.

It does what `receiver.py`, `bus/consuming.py` and `backends/proof.py` do, one step at a time, and the process may be killed
between any two. From every state it must be possible to come to rest with nothing old in the cache.
"""

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cacheinval.coherence
from cacheinval.messages import Invalidate, Probe, Tick

from .changing import Changes, changed
from .copying import copied
from .explore import BrokenError

MOST_MARKS = 4  # that the cache tells
KEY = "k"
SOURCE = "the database"
A_WHILE = (
    1000  # seconds; after two of them a tick may leave out numbers, for the relay forgets some after an hour
)
STALENESS = A_WHILE
FORGOTTEN_AFTER = 3600


@dataclass
class Life:
    """How much can happen."""

    writes: int = 2
    others: int = 0
    """Writes of another row, which the cache does not hold."""
    kills: int = 1
    drops: int = 0
    expiries: int = 0
    rollbacks: int = 0
    replacements: int = 0
    """Of the writer's channel by one with another name."""
    ticks: int = 1
    until: int = 0
    """How often a while passes."""
    forgets: bool = False
    """The relay leaves out the numbers of channels that were silent for long."""
    eventual: bool = False
    """Without `max_staleness`: what is not noticed to be old is served for ever."""
    database: bool = True
    """Without one nobody ticks."""


@dataclass
class Steps:
    """Where the code around the rules could go wrong."""

    makes_queue_before_forgetting: bool = False
    overlooks_a_strange_mark: bool = False
    restores_whatever_is_there: bool = False


@dataclass
class Restarting:
    """The state."""

    rules: str
    life: Life
    steps: Steps
    left: dict[str, int]
    now: int = 10
    version: int = 1
    replaced_at: dict[int, int] = field(default_factory=dict)
    origin: int = 1
    seqs: dict[str, int] = field(default_factory=dict)
    told: dict[str, tuple[int, int]] = field(default_factory=dict)  # number and time, by origin
    queue: list[Any] | None = None
    # The cache, and what it held when somebody made a copy of it.
    entry: Any = None  # value, load_started
    kept: Any = None  # the mark that was the newest, state
    marks: tuple[str, ...] = ()  # that it bears, and bore before, the newest first
    copy: tuple[Any, Any, tuple[str, ...]] | None = None
    marks_made: int = 0
    # The process
    coherence: Any = None
    todo: list[str] = field(default_factory=list)  # its next steps, in order
    marker: int = 0

    def actions(self) -> Iterator[tuple[str, Callable[["Restarting"], None]]]:
        left = self.left
        if left["until"]:
            yield "a while passes", Restarting.wait
        if left["writes"]:
            yield "commit and publish", Restarting.write
        if left["others"]:
            yield "commit and publish another row", Restarting.write_other
        if left["replacements"]:
            yield "the writer opens another channel", Restarting.replace
        if left["ticks"]:
            yield "the relay ticks", Restarting.tick
        if self.queue and left["drops"] and not self.in_hand:
            yield "the first message is dropped", Restarting.drop
        if self.copy is None and left["rollbacks"]:
            yield "the cache is copied", Restarting.make_copy
        elif left["rollbacks"]:
            yield "the cache goes back to its copy", Restarting.go_back
        if self.coherence is None:
            if self.queue is not None and left["expiries"]:
                yield "the queue expires", Restarting.expire
            yield "the process starts", Restarting.start
            return
        if left["kills"]:
            yield "the process is killed", Restarting.kill
        if self.todo:
            yield self.todo[0], Restarting.step
        elif self.queue:
            yield f"receive {type(self.queue[0]).__name__.lower()}", Restarting.receive
        yield "read", Restarting.read

    @property
    def in_hand(self) -> bool:
        return bool(self.todo) and self.todo[-1] in ("acknowledge", "keep")

    # The world outside

    def wait(self) -> None:
        self.left["until"] -= 1
        self.now += A_WHILE

    def write(self) -> None:
        self.left["writes"] -= 1
        self.replaced_at[self.version] = self.now
        self.version += 1
        self._tell(KEY)

    def write_other(self) -> None:
        self.left["others"] -= 1
        self._tell("another")

    def _tell(self, key: str) -> None:
        name = f"w{self.origin}"
        seq = self.seqs[name] = self.seqs.get(name, 0) + 1
        self.told[name] = (seq, self.now)
        self._publish(Invalidate(v=1, origin=name, seq=seq, keys=[key]))

    def replace(self) -> None:
        self.left["replacements"] -= 1
        self.origin += 1

    def tick(self) -> None:
        self.left["ticks"] -= 1
        self._tick()

    def _tick(self) -> None:
        if self.life.forgets:
            self.told = {
                name: (seq, at) for name, (seq, at) in self.told.items() if self.now - at < FORGOTTEN_AFTER
            }
        numbers = {name: seq for name, (seq, _) in self.told.items()}
        self._publish(Tick(v=1, origin="r", seq=0, as_of=self.now, source=SOURCE, seqs=numbers))

    def _publish(self, message: Any) -> None:
        if self.queue is not None:
            self.queue.append(message)

    def drop(self) -> None:
        assert self.queue is not None
        self.left["drops"] -= 1
        self.queue.pop(0)

    def expire(self) -> None:
        self.left["expiries"] -= 1
        self.queue = None

    def make_copy(self) -> None:
        self.copy = (self.entry, self.kept, self.marks)

    def go_back(self) -> None:
        self.left["rollbacks"] -= 1
        assert self.copy is not None
        (self.entry, self.kept, self.marks), self.copy = self.copy, None

    # The process

    def kill(self) -> None:
        self.left["kills"] -= 1
        self.coherence = None
        self.todo = []

    def start(self) -> None:
        rules = sys.modules[self.rules]
        self.coherence = rules.Coherence(None if self.life.eventual else STALENESS, 0, gap_interval=0)
        self.coherence.proof.trust_only(SOURCE)
        if self.queue is not None:
            self.todo = ["resume"]
        elif self.steps.makes_queue_before_forgetting:
            self.todo = ["make the queue", "forget", "clear", "keep", "trust"]
        else:
            self.todo = ["forget", "make the queue", "clear", "keep", "trust"]

    def step(self) -> None:
        getattr(self, "_" + self.todo.pop(0).replace(" ", "_"))()

    def _resume(self) -> None:
        assert self.queue is not None
        after, state = self.kept if self.kept is not None else ("", None)
        if self.steps.restores_whatever_is_there and self.marks:
            after = self.marks[0]
        if not self.coherence.marks.resumes(after, self.marks):
            state = None
            self._forget()
        self.marker += 1
        eviction = self.coherence.resumed(f"m{self.marker}", self.now, state)
        if eviction is not None:
            self.coherence.evict(eviction, self.now)
            self.todo = ["drop everything", "keep"]
        self.queue.append(Probe(v=1, id=f"m{self.marker}"))

    def _drop_everything(self) -> None:
        self.entry = None
        self._replace_mark()

    def _replace_mark(self) -> None:
        """In one step with what is done to the cache."""
        self.marks_made += 1
        mark, before = f"mark {self.marks_made}", self.marks
        self.coherence.marks.replacing(mark)
        self.marks = (mark, *before)[:MOST_MARKS]
        self.coherence.marks.replaced(mark, before)

    def _forget(self) -> None:
        self.kept, self.marks = None, ()
        self.coherence.marks.start_over(None)

    def _make_the_queue(self) -> None:
        self.queue = []

    def _clear(self) -> None:
        self.coherence.evict(self.coherence.joined_anew(self.now), self.now)
        self._drop_everything()

    def _trust(self) -> None:
        self.coherence.trust()

    def receive(self) -> None:
        """Decides on the first message, and evicts; the message stays in the queue until it is acknowledged."""
        assert self.queue is not None
        eviction = self.coherence.received(self.queue[0], self.now)
        if eviction is not None:
            self.coherence.evict(eviction, self.now)
            if eviction.everything or KEY in eviction.keys:
                self.entry = None
            self._replace_mark()
        self.coherence.evicted(self.now)
        self.todo = ["keep", "acknowledge"]

    def _keep(self) -> None:
        self.kept = (self.coherence.marks.last, self.coherence.proof_state())
        self._replace_mark()
        self.todo.insert(0, "hear whether the cache went back")

    def _hear_whether_the_cache_went_back(self) -> None:
        marks = self.coherence.marks
        if marks.lost and self.steps.overlooks_a_strange_mark:
            marks.start_over(self.marks[0])
        elif marks.lost:
            self._forget()
            self.coherence.evict(self.coherence.gap("lost", self.now), self.now)
            self.todo = ["drop everything", "keep", *self.todo]

    def _acknowledge(self) -> None:
        assert self.queue is not None
        self.queue.pop(0)

    def read(self) -> None:
        if self.entry is not None and _is_served(self):
            self._returned(self.entry[0])
            return
        load = self.coherence.loads.begin(KEY, self.now)
        if self.coherence.loads.may_store(load):
            self.entry = (self.version, load.started)
        self.coherence.loads.end(load)

    def _returned(self, value: int) -> None:
        since = self.replaced_at.get(value)
        if since is not None and self.now - since > STALENESS and not self.life.eventual:
            raise BrokenError(f"a hit at {self.now} gave what was replaced at {since}")

    # What must hold

    def arrive(self) -> None:
        """Nothing depends on the way."""

    def check(self) -> None:
        """Whatever has happened: when the process runs, and two ticks have been processed, nothing old is served."""
        world = copied(self)
        if world.coherence is None:
            world.start()
        world._come_to_rest()
        for _ in range(2):
            world.now += 1 if self.life.eventual else STALENESS + 1
            if self.life.database:
                world._tick()
            world._come_to_rest()
        if world.entry is not None and world.entry[0] != world.version and _is_served(world):
            raise BrokenError(f"all is settled, and {world.entry[0]} is served, not {world.version}")

    def _come_to_rest(self) -> None:
        while self.todo or self.queue:
            if self.todo:
                self.step()
            else:
                self.receive()

    def key(self) -> Hashable:
        c = self.coherence
        names: dict[str, int] = {}

        def named(marks: Iterable[str | None]) -> Hashable:
            return tuple(mark and names.setdefault(mark, len(names)) for mark in marks)

        def kept(state: Any) -> Hashable:
            return state and (named(state[:1]), *_told(state[1]))

        return (
            self.now, self.version, tuple(self.replaced_at.items()), self.origin, tuple(self.seqs.items()),
            tuple(self.told.items()),
            None if self.queue is None else tuple((type(m).__name__, getattr(m, "origin", 0), getattr(m, "seq", 0), getattr(m, "as_of", 0), getattr(m, "id", 0)) for m in self.queue),
            self.entry, kept(self.kept), self.copy and (self.copy[0], kept(self.copy[1])),
            named(self.marks), self.copy and named(self.copy[2]), c and (named([c.marks.last]), c.marks.lost, c.marks._evicting),
            tuple(self.todo), tuple(self.left.items()), self.marker,
            c and (tuple(c._numbers.seqs.items()), tuple(c._trust.doubts), c._marker, c._marker_passed, _shown(c.proof)),
        )  # fmt: skip


def _shown(proof: Any) -> str:
    return str(
        {name: value for name, value in vars(proof).items() if name != "_standing"}
    )  # that shows where it lies


def _is_served(world: Restarting) -> bool:
    value, load_started = world.entry
    moment = world.coherence.serving.moment
    moment = world.coherence.serving.seen(moment, [world.marks[0] if world.marks else None])
    found = world.coherence.serving.found(value, load_started, 1e9, frozenset(), moment)
    return bool(world.coherence.serving.may_serve_found(found, world.now, moment))


def _told(state: Any) -> tuple[Hashable, ...]:
    return tuple(state.seqs.items()), state.checked_until, state.extends, state.source


def restarting(rules: Any, life: Life, steps: Steps | None = None) -> Restarting:
    """The world at its start: the process runs, has processed a tick, and has cached the first version."""
    names = ("writes", "others", "kills", "drops", "expiries", "rollbacks", "replacements", "ticks", "until")
    world = Restarting(rules.__name__, life, steps or Steps(), {name: getattr(life, name) for name in names})
    world.start()
    world._come_to_rest()
    if life.database:
        world._tick()
        world._come_to_rest()
    world.now += 1
    world.read()
    return world


LIVES = {
    "killed at any moment": Life(writes=2, kills=2, ticks=1),
    "a message is dropped": Life(kills=1, drops=1),
    "another channel, a message dropped": Life(writes=1, others=2, kills=0, drops=1, replacements=1),
    "the queue expires": Life(writes=1, kills=2, expiries=1),
    "the queue expires, without a database": Life(
        writes=1, kills=2, expiries=1, eventual=True, database=False, ticks=0
    ),
    "dropped while away, without max_staleness": Life(writes=1, kills=1, drops=1, eventual=True),
    "the cache goes back": Life(writes=1, rollbacks=1),
    "the cache goes back, without max_staleness": Life(writes=1, kills=0, rollbacks=1, eventual=True),
    "away for long": Life(writes=1, drops=1, until=4, forgets=True),
}


@dataclass(frozen=True)
class RestartMutant:
    """A fault, and where it shows."""

    name: str
    life: Life
    changes: Changes = ()
    steps: Steps | None = None

    def world(self) -> Restarting:
        return restarting(changed(cacheinval.coherence, self.changes, self.name), self.life, self.steps)


RESTART_MUTANTS = [
    RestartMutant(
        "resumed although nothing was kept",
        LIVES["the queue expires, without a database"],
        (('            return self.gap("nothing kept with the cache", now)', "            return None"),),
    ),
    RestartMutant(
        "the queue made before what was kept is forgotten",
        LIVES["the queue expires, without a database"],
        steps=Steps(makes_queue_before_forgetting=True),
    ),
    RestartMutant(
        "what was kept is not restored",
        LIVES["dropped while away, without max_staleness"],
        (("        self.proof.restore(state)\n", "        self.proof.start_over()\n"),),
    ),
    RestartMutant(
        "a new channel may begin with any number",
        LIVES["another channel, a message dropped"],
        (("return seq == 1 or not baselined", "return True"),),
    ),
    RestartMutant(
        "numbers believed that were told long after the last ones",
        LIVES["away for long"],
        (('            return "no tick for too long"', "            return None"),),
    ),
    RestartMutant(
        "a cache that went back is trusted",
        LIVES["the cache goes back"],
        steps=Steps(overlooks_a_strange_mark=True),
    ),
    RestartMutant(
        "what was kept is restored in whatever cache it is",
        LIVES["the cache goes back"],
        steps=Steps(restores_whatever_is_there=True),
    ),
]
