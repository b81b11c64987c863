"""A small world with one cache outside the process, two instances that fill and evict it, and the time; and, where it is
asked for, an entry in each of the processes in front of it.

The rules are the real ones, one `Coherence` for each instance; what lies around them does what `cache/` and
`backends/shared.py` do, one step at a time: an instance can be frozen before any of them, since time may pass and everybody
else may act before its next one.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import cacheinval.coherence
from cacheinval.messages import Invalidate, Probe, Tick

from .changing import Changes, changed
from .copying import copied
from .explore import BrokenError
from .mutants import TOO_OLD

MOST_MARKS = 3  # that the cache tells: all that may be unanswered here, and more
KEY = "k"
TAG = "t"
SOURCE = "the database"
FOREVER = 1e9
NAMES = ("one", "two")
BUDGETS = (
    "writes",
    "loads",
    "deaf",
    "drops",
    "losses",
    "late_stores",
    "forgotten_stamps",
    "takeovers",
    "load_failures",
    "rollbacks",
)

Act = Callable[["Sharing"], None]


@dataclass(frozen=True)
class Extent:
    """How large the world is, and how much of what can happen in it."""

    staleness: int | None = 0
    """With 0 a value may be served in the second in which it was replaced, and no longer."""
    skew: int = 0
    ahead: tuple[int, int] = (0, 0)
    """Seconds by which the clock of each instance's host is ahead of real time, which is the database's."""
    until: int = 3
    by_tag: bool = False
    """The writer names the tag of the entry instead of its key."""
    writes: int = 1
    deaf: int = 0
    """Queues that get nothing any more, which the instance is not told."""
    drops: int = 0
    losses: int = 0
    late_stores: int = 0
    """Stores that are on their way for a while; whether anybody waits for them makes no difference."""
    slow_looks: bool = False
    """Between a look of the first one into the cache and what follows from it anything may happen; otherwise they are one
    step."""
    slow_evictions: bool = False
    """The same between telling the rules of an eviction and evicting in the cache."""
    loads: int = 1
    forgotten_stamps: int = 0
    """Stamps that a full cache drops."""
    in_front: bool = False
    """Each keeps an entry in its process, too, as `TwoLevels` does."""
    takeovers: int = 0
    """Processes of the same name that have the queue while the instance has lost it."""
    baselined: bool = True
    """Each has processed a tick before anything else happens."""
    ttl: int = 0
    """Seconds that entries are kept; 0: for ever."""
    overtime: int = 0
    """Seconds for which an entry in the process is given past its ttl, while it is loaded again."""
    if_error: float = 0
    """Seconds for which it is given where a load fails, though its ttl or an eviction has ended it."""
    load_failures: int = 0
    both_read: bool = True
    """Otherwise the first one only evicts."""
    rollbacks: int = 0
    """How often the cache is replaced by a copy that somebody made of it before."""


@dataclass(frozen=True)
class Handling:
    """Where the code around the rules could go wrong; each name is a mutation of it."""

    ignores_key_stamp: bool = False
    ignores_tag_stamp: bool = False
    ignores_epoch_stamp: bool = False
    looks_up_key_stamp_after_loading: bool = False
    keeps_key_stamp: bool = False
    takes_missing_for_match: bool = False
    acknowledges_before_evicting: bool = False
    looks_at_what_is_being_evicted: bool = False
    keeps_what_was_evicted_during_the_look: bool = False
    dates_what_it_finds_from_the_look: bool = False
    keeps_its_own_entry: bool = False
    overlooks_the_mark: bool = False


@dataclass
class Stored:
    """An entry in the cache: its value, and the stamps of its epoch, key and tag as they were before its load."""

    value: int
    load_started: float
    expires_at: float
    stamps: dict[str, int]


@dataclass
class Reading:
    """One read under way."""

    began: float
    least: int
    moment: Any
    seen: Stored | None
    stamps: dict[str, int]
    mark: str | None
    """What the cache bore of this instance when it was looked into."""
    at: str = "looked"
    load: Any = None
    value: int = 0


@dataclass
class Sharer:
    """One instance, and the queue of it at the broker."""

    coherence: Any
    ahead: int
    queue: list[Any] = field(default_factory=list)
    bound: bool = True
    joined: bool = True
    marker: int = 0
    evicting: Any = None
    marks: tuple[str, ...] = ()
    """What the cache bears of it, and bore before, the newest first."""
    kept: Any = None
    """What is kept there, and the mark that was the newest."""
    held: Any = None
    """The entry in its process."""
    floor: int = 0
    """What was in the database when the rules of this instance were last told of an eviction; as `Sharing.floor`, for what
    it holds in its process."""
    reading: Reading | None = None


@dataclass
class Sharing:
    """The state."""

    rules: str  # the name of a module
    extent: Extent
    handling: Handling
    left: dict[str, int]
    sharers: list[Sharer]
    real: int = 1
    version: int = 1
    replaced_at: dict[int, int] = field(default_factory=dict)
    floor: int = 0
    """What was in the database when anybody evicted last: no read that begins later may fall short of it."""
    seq: int = 0
    # The cache
    entry: Stored | None = None
    stamps: dict[str, int] = field(default_factory=dict)
    stamps_made: int = 0
    landing: list[Stored] = field(default_factory=list)
    """Stores on their way."""
    marks_made: int = 0
    copy: (
        tuple[Stored | None, tuple[tuple[str, int], ...], tuple[tuple[tuple[str, ...], Any], ...]] | None
    ) = None

    # What can happen

    def actions(self) -> Iterator[tuple[str, Act]]:
        left = self.left
        if self.real < self.extent.until:
            yield "a second passes", Sharing.wait
        if left["writes"]:
            yield "commit and publish", Sharing.write
        if self.landing:
            yield "a late store lands", Sharing.land
        if left["rollbacks"]:
            if self.copy is None:
                yield "the cache is copied", Sharing.make_copy
            else:
                yield "the cache goes back to its copy", Sharing.go_back
        if left["forgotten_stamps"]:
            for name in self.stamps:
                yield f"the cache drops the stamp of the {name}", partial(Sharing.forget_stamp, name=name)
        for number in range(2):
            for label, act in self._actions_of(self.sharers[number]):
                yield f"{NAMES[number]} {label}", partial(act, number=number)

    def _actions_of(self, sharer: Sharer) -> Iterator[tuple[str, Callable[..., None]]]:
        reading, left = sharer.reading, self.left
        if reading is None:
            if self.extent.both_read or sharer is not self.sharers[0]:
                yield "reads", Sharing.look
        elif reading.at == "looked":
            yield "is served, or begins to load", Sharing.serve_or_begin
        elif reading.at == "loading":
            yield "asks the database", Sharing.ask_database
        else:
            yield "stores", Sharing.store
            if left["late_stores"]:
                yield "stores, which takes a while", Sharing.store_late
        if sharer.evicting is not None:
            yield "evicts", Sharing.finish_evicting
        elif sharer.joined and sharer.queue:
            yield f"receives {_label(sharer.queue[0])}", Sharing.receive
        if not sharer.joined:
            yield "is subscribed again", Sharing.resume
            if left["takeovers"] and sharer.queue:
                yield "has lost its queue to another process of its name", Sharing.take_over
        if left["drops"] and sharer.queue and isinstance(sharer.queue[0], Invalidate):
            yield "misses an invalidation", Sharing.drop
        if sharer is self.sharers[0]:
            return  # both can do the same, so it does not matter which of them suffers
        if sharer.joined and left["losses"] and sharer.evicting is None:
            yield "loses its subscription", Sharing.lose
        if sharer.bound and left["deaf"]:
            yield "goes deaf", Sharing.deafen
        if left["load_failures"] and reading is not None and reading.at == "loading":
            yield "asks the database in vain", Sharing.load_fails

    # The world outside

    def wait(self) -> None:
        self.real += 1
        self.tick()

    def write(self) -> None:
        self.left["writes"] -= 1
        self.replaced_at[self.version] = self.real
        self.version += 1
        self.seq += 1
        names: dict[str, Any] = {"tags": [TAG]} if self.extent.by_tag else {"keys": [KEY]}
        self._publish(Invalidate(v=1, origin="w", seq=self.seq, **names))

    def tick(self) -> None:
        """All that was committed has been confirmed by the broker, since writers publish at once here."""
        seqs = {"w": self.seq} if self.seq else {}
        self._publish(Tick(v=1, origin="r", seq=0, as_of=self.real, source=SOURCE, seqs=seqs))

    def _publish(self, message: Any) -> None:
        for sharer in self.sharers:
            if sharer.bound:
                sharer.queue.append(message)

    def drop(self, number: int) -> None:
        self.left["drops"] -= 1
        self.sharers[number].queue.pop(0)

    def deafen(self, number: int) -> None:
        self.left["deaf"] -= 1
        self.sharers[number].bound = False

    # The cache outside the process

    def _stamp(self, name: str) -> int:
        """What is made for an absent one is random: it is like none before it."""
        if name not in self.stamps:
            self._new_stamp(name)
        return self.stamps[name]

    def _new_stamp(self, name: str) -> None:
        self.stamps_made += 1
        self.stamps[name] = self.stamps_made

    def forget_stamp(self, name: str) -> None:
        self.left["forgotten_stamps"] -= 1
        del self.stamps[name]

    def _present(self) -> Stored | None:
        """The entry, if all that it bears is as it was."""
        entry = self.entry
        if entry is None:
            return None
        how = self.handling
        ignored = {
            "key": how.ignores_key_stamp, "tag": how.ignores_tag_stamp, "epoch": how.ignores_epoch_stamp
        }  # fmt: skip
        for name, stamp in entry.stamps.items():
            present = self.stamps.get(name)
            if present is None and how.takes_missing_for_match:
                continue
            if present != stamp and not ignored[name]:
                return None
        return entry

    def _evict_key(self) -> None:
        self.entry = None
        if not self.handling.keeps_key_stamp:
            self.stamps.pop("key", None)

    def land(self) -> None:
        self.entry = self.landing.pop(0)

    def make_copy(self) -> None:
        kept = tuple((sharer.marks, sharer.kept) for sharer in self.sharers)
        self.copy = (self.entry, tuple(self.stamps.items()), kept)

    def go_back(self) -> None:
        """What was stored or evicted since is not there, nor what replaced a mark."""
        self.left["rollbacks"] -= 1
        assert self.copy is not None
        (self.entry, stamps, kept), self.copy = self.copy, None
        self.stamps = dict(stamps)
        for sharer, of_it in zip(self.sharers, kept, strict=True):
            sharer.marks, sharer.kept = of_it

    # Reading

    def _now(self, sharer: Sharer) -> int:
        return self.real + sharer.ahead

    def look(self, number: int) -> None:
        sharer, load = self.sharers[number], None
        now = self._now(sharer)
        if self.extent.in_front:
            held = sharer.held
            if held is not None and sharer.coherence.serving.may_serve(held, now):
                self._returned(NAMES[number], held.value, now, self._floor_of(sharer), sharer)
                return
            if held is not None and sharer.coherence.serving.may_serve(held, now, self.extent.overtime):
                # Given, and what follows goes on in the background.
                self._returned(NAMES[number], held.value, now, self._floor_of(sharer), sharer)
            load = sharer.coherence.loads.begin(KEY, now, frozenset([TAG]))
            if sharer.evicting is not None and not self.handling.looks_at_what_is_being_evicted:
                self._evict_outside(sharer.evicting)
        moment, seen = sharer.coherence.serving.moment, self._present()
        stamps = {name: self._stamp(name) for name in ("epoch", "key", "tag")}
        least = self._floor_of(sharer)
        sharer.reading = Reading(now, least, moment, seen, stamps, _mark(sharer), load=load)
        if not self.extent.slow_looks or number:
            self.serve_or_begin(number)

    def serve_or_begin(self, number: int) -> None:
        sharer = self.sharers[number]
        reading = sharer.reading
        assert reading is not None
        if reading.seen is not None and self._answers(sharer, reading, reading.seen):
            sharer.reading = None
            if reading.load is not None:
                self._hold(sharer, reading.load, reading.seen)
            self._returned(NAMES[number], reading.seen.value, reading.began, reading.least, sharer)
            return
        if not self.left["loads"]:
            sharer.reading = None
            if reading.load is not None:
                sharer.coherence.loads.end(reading.load)
            return
        self.left["loads"] -= 1
        if reading.load is None:
            reading.load = sharer.coherence.loads.begin(KEY, reading.began, frozenset([TAG]))
        else:
            sharer.coherence.loads.let_go(reading.load, self._now(sharer))
        reading.at, reading.seen, reading.moment = "loading", None, None

    def _answers(self, sharer: Sharer, reading: Reading, seen: Stored) -> bool:
        serving, moment = sharer.coherence.serving, reading.moment
        if not self.handling.overlooks_the_mark:
            moment = serving.seen(moment, [reading.mark])
        if reading.load is None:
            return _serves(sharer, seen, reading.began, moment)
        return bool(
            serving.may_hold_found(_found(sharer, seen, moment), reading.began, self._now(sharer), moment)
        )

    def _hold(self, sharer: Sharer, load: Any, seen: Stored) -> None:
        """What was found outside is kept in the process, too."""
        c, how = sharer.coherence, self.handling
        if not how.dates_what_it_finds_from_the_look:
            c.loads.inherit(
                load,
                c.serving.found(
                    seen.value, seen.load_started, seen.expires_at, frozenset([TAG]), c.serving.moment
                ),
            )
        if c.loads.may_store(load) or how.keeps_what_was_evicted_during_the_look:
            sharer.held = load.entry(seen.value, seen.expires_at)
        c.loads.end(load)

    def ask_database(self, number: int) -> None:
        reading = self.sharers[number].reading
        assert reading is not None
        reading.value, reading.at = self.version, "loaded"

    def store(self, number: int) -> None:
        stored = self._to_store(self.sharers[number])
        if stored is not None:
            self.entry = stored

    def store_late(self, number: int) -> None:
        """A store that is not answered in time is not refused."""
        stored = self._to_store(self.sharers[number])
        if stored is not None:
            self.left["late_stores"] -= 1
            self.landing.append(stored)

    def _to_store(self, sharer: Sharer) -> Stored | None:
        """What is stored at the end of a load, if anything; there is no await between that question and the store."""
        reading, sharer.reading = sharer.reading, None
        assert reading is not None
        if self.handling.looks_up_key_stamp_after_loading:
            reading.stamps["key"] = self._stamp("key")
        stands = sharer.coherence.loads.may_store(reading.load)
        expires_at = self._now(sharer) + self.extent.ttl if self.extent.ttl else FOREVER
        if stands and self.extent.in_front:
            sharer.held = reading.load.entry(reading.value, expires_at)
        sharer.coherence.loads.end(reading.load)
        return Stored(reading.value, reading.load.started, expires_at, reading.stamps) if stands else None

    def load_fails(self, number: int) -> None:
        """What is kept in the process may be given instead; outside nothing is kept for that."""
        self.left["load_failures"] -= 1
        sharer = self.sharers[number]
        reading, sharer.reading = sharer.reading, None
        assert reading is not None
        sharer.coherence.loads.end(reading.load)
        held, now = sharer.held, self._now(sharer)
        if held is None or not sharer.coherence.serving.may_serve_instead(held, now, self.extent.if_error):
            return
        since = self.replaced_at.get(held.value)
        known = held.value < reading.least  # of what is not known to be evicted nothing is promised
        if known and since is not None and self.real - since > self.extent.if_error:
            raise BrokenError(f"at {self.real} an error gave {NAMES[number]} what was replaced at {since}")

    def _floor_of(self, sharer: Sharer) -> int:
        # What it holds itself nobody else evicts; and what another has evicted may be there again.
        return sharer.floor if self.extent.in_front or self.extent.rollbacks else self.floor

    def _returned(self, name: str, value: int, began: float, least: int, sharer: Sharer) -> None:
        began -= sharer.ahead
        if value < least:
            raise BrokenError(f"a read of {name} gave {value}, after {least} was known to be evicted")
        since, most = self.replaced_at.get(value), self.extent.staleness
        if most is not None and since is not None and began - since > most:
            raise BrokenError(f"a hit of {name} at {began} gave what was replaced at {since}")

    # Receiving

    def receive(self, number: int) -> None:
        """Decides on the first message and tells the rules; evicting in the cache takes a while."""
        sharer = self.sharers[number]
        now = self._now(sharer)
        eviction = sharer.coherence.received(sharer.queue.pop(0), now)
        if eviction is None:
            self._acknowledge(sharer)
            return
        sharer.coherence.evict(eviction, now)
        sharer.floor = self.version
        if not self.handling.keeps_its_own_entry and not eviction.tags:  # of tags the rules keep a note
            if sharer.held is not None and self.extent.if_error:
                sharer.coherence.serving.expire(sharer.held)
            else:
                sharer.held = None
        sharer.evicting = eviction
        if self.handling.acknowledges_before_evicting:
            self._acknowledge(sharer)
            self.floor = self.version
        if not self.extent.slow_evictions:
            self.finish_evicting(number)

    def finish_evicting(self, number: int) -> None:
        sharer = self.sharers[number]
        eviction, sharer.evicting = sharer.evicting, None
        self._evict_and_mark(sharer, sharer.coherence, eviction)
        if not self.handling.acknowledges_before_evicting:
            self._acknowledge(sharer)
            self.floor = self.version

    def _evict_and_mark(self, sharer: Sharer, coherence: Any, eviction: Any = None) -> None:
        """In one step with what the cache bears of it."""
        self.marks_made += 1
        mark, before = f"mark {self.marks_made}", sharer.marks
        coherence.marks.replacing(mark)
        if eviction is not None:
            self._evict_outside(eviction)
        sharer.marks = (mark, *before)[:MOST_MARKS]
        coherence.marks.replaced(mark, before[: coherence.marks.history])

    def _keep(self, sharer: Sharer, coherence: Any) -> None:
        """Again, with everything evicted, if the cache turns out to have gone back."""
        after = coherence.marks.last
        sharer.kept = (after, coherence.proof_state())
        self._evict_and_mark(sharer, coherence)
        if coherence.marks.lost:
            self._forget(sharer, coherence)
            eviction, now = coherence.gap("lost", self._now(sharer)), self._now(sharer)
            coherence.evict(eviction, now)
            sharer.held = None
            self._evict_and_mark(sharer, coherence, eviction)
            self._keep(sharer, coherence)

    def _forget(self, sharer: Sharer, coherence: Any) -> None:
        sharer.kept, sharer.marks = None, ()
        coherence.marks.start_over(None)

    def _restored(self, sharer: Sharer, coherence: Any) -> Any:
        if sharer.kept is not None and coherence.marks.resumes(sharer.kept[0], sharer.marks):
            return sharer.kept[1]
        self._forget(sharer, coherence)
        return None

    def _evict_outside(self, eviction: Any) -> None:
        if eviction.everything:
            self._new_stamp("epoch")
        if eviction.tags:
            self._new_stamp("tag")
        if eviction.keys:
            self._evict_key()

    def take_over(self, number: int) -> None:
        """Another process of its name resumes its queue, evicts what waits there, acknowledges it, and is gone again."""
        self.left["takeovers"] -= 1
        sharer = self.sharers[number]
        now = self._now(sharer)
        other = type(sharer.coherence)(self.extent.staleness, self.extent.skew, gap_interval=0)
        other.proof.trust_only(SOURCE)
        other.resumed("another's", now, self._restored(sharer, other))
        while sharer.queue:
            eviction = other.received(sharer.queue.pop(0), now)
            if eviction is not None:
                other.evict(eviction, now)
                self._evict_and_mark(sharer, other, eviction)
            other.evicted(now)
            self._keep(sharer, other)

    def _acknowledge(self, sharer: Sharer) -> None:
        sharer.coherence.evicted(self._now(sharer))
        self._keep(sharer, sharer.coherence)

    def lose(self, number: int) -> None:
        self.left["losses"] -= 1
        sharer = self.sharers[number]
        sharer.joined = False
        sharer.coherence.lost("connection lost")

    def resume(self, number: int) -> None:
        """Its queue was there; if it was bound to nothing, it is bound now."""
        sharer = self.sharers[number]
        sharer.joined = sharer.bound = True
        sharer.marker += 1
        marker = f"m{number}{sharer.marker}"
        state = self._restored(sharer, sharer.coherence)
        eviction = sharer.coherence.resumed(marker, self._now(sharer), state)
        if eviction is not None:
            sharer.coherence.evict(eviction, self._now(sharer))
            sharer.held = None
            self._evict_and_mark(sharer, sharer.coherence, eviction)
            self._keep(sharer, sharer.coherence)
        self._publish(Probe(v=1, id=marker))

    # What must hold

    def arrive(self) -> None:
        """Nothing depends on the way."""

    def check(self) -> None:
        """When all is evicted and a value has had the time to grow too old, nobody would be served anything else than what
        the database has: neither now, nor when those have stored who were about to."""
        world = copied(self)
        for sharer in world.sharers:
            if sharer.reading is not None and sharer.reading.at == "loaded":
                world.store_late(world.sharers.index(sharer))  # it has asked whether it may, and been frozen
        world._come_to_rest()
        world._expect_truth("all is settled")
        while world.landing:
            world.land()
            world._expect_truth("all is settled, and a late store has landed")

    def _come_to_rest(self) -> None:
        for number in range(2):
            if not self.sharers[number].joined:
                self.resume(number)
        self._receive_all()
        for _ in range(2):
            self.real += (self.extent.staleness or 1) + 2 * self.extent.skew
            self.wait()
            self._receive_all()

    def _receive_all(self) -> None:
        for number, sharer in enumerate(self.sharers):
            while sharer.queue or sharer.evicting is not None:
                if sharer.evicting is not None:
                    self.finish_evicting(number)
                else:
                    self.receive(number)

    def _expect_truth(self, when: str) -> None:
        for name, sharer in zip(NAMES, self.sharers, strict=True):
            now = self._now(sharer)
            held, seen = sharer.held, self._present()
            promised = self.extent.staleness is not None or sharer.bound
            is_held = held is not None and sharer.coherence.serving.may_serve(held, now, self.extent.overtime)
            if is_held and held.value != self.version and promised:
                raise BrokenError(f"{when}, and {name} would serve its own {held.value}, not {self.version}")
            if seen is None or seen.value == self.version:
                continue
            serving = sharer.coherence.serving
            is_served = _serves(sharer, seen, now, serving.seen(serving.moment, [_mark(sharer)]))
            if is_served and promised:
                raise BrokenError(f"{when}, and {name} would serve {seen.value}, not {self.version}")

    def key(self) -> Hashable:
        names: dict[
            int | str, int
        ] = {}  # which number a stamp has does not matter, only which ones are the same

        def named(stamps: dict[str, int]) -> tuple[tuple[str, int], ...]:
            return tuple(
                (name, names.setdefault(stamp, len(names))) for name, stamp in sorted(stamps.items())
            )

        def marked(marks: Iterable[str | None]) -> Hashable:
            return tuple(mark and names.setdefault(mark, len(names)) for mark in marks)

        def kept(state: Any) -> Hashable:
            return state and (
                marked(state[:1]),
                tuple(state[1].seqs.items()),
                state[1].checked_until,
                state[1].extends,
            )

        def stored(entry: Stored | None) -> Hashable:
            return entry and (entry.value, entry.load_started, entry.expires_at, named(entry.stamps))

        return (
            self.real, self.version, tuple(self.replaced_at.items()), self.floor, self.seq,
            tuple(self.left.values()), named(self.stamps), stored(self.entry), tuple(map(stored, self.landing)),
            self.copy and (stored(self.copy[0]), named(dict(self.copy[1])), tuple((marked(marks), kept(state)) for marks, state in self.copy[2])),
            tuple((marked(sharer.marks), marked([sharer.coherence.marks.last]), sharer.coherence.marks.lost, kept(sharer.kept)) for sharer in self.sharers),
            tuple((_key_of(sharer), sharer.reading and (
                marked([sharer.reading.mark]),
 sharer.reading.moment and sharer.coherence.marks.stand([sharer.reading.mark], sharer.reading.moment.marks),
                sharer.reading.began, sharer.reading.least, sharer.reading.at, sharer.reading.value,
                stored(sharer.reading.seen), named(sharer.reading.stamps), _key_of_load(sharer)))
                for sharer in self.sharers),
        )  # fmt: skip


def _serves(sharer: Sharer, seen: Stored, now: float, moment: Any) -> bool:
    """As `SharedCache` asks the rules about what it has seen."""
    return bool(sharer.coherence.serving.may_serve_found(_found(sharer, seen, moment), now, moment))


def _found(sharer: Sharer, seen: Stored, moment: Any) -> Any:
    return sharer.coherence.serving.found(
        seen.value, seen.load_started, seen.expires_at, frozenset([TAG]), moment
    )


def _mark(sharer: Sharer) -> str | None:
    return sharer.marks[0] if sharer.marks else None


def _label(message: Any) -> str:
    if isinstance(message, Tick):
        return f"a tick as of {message.as_of:g}"
    return "a marker" if isinstance(message, Probe) else "an invalidation"


def _key_of(sharer: Sharer) -> Hashable:
    c, evicting = sharer.coherence, sharer.evicting
    return (
        sharer.bound, sharer.joined, sharer.marker,
        tuple((type(m).__name__, getattr(m, "seq", 0), getattr(m, "as_of", 0), getattr(m, "id", "")) for m in sharer.queue),
        sharer.floor, sharer.held and (sharer.held.value, sharer.held.load_started, sharer.held.expires_at, c.epoch - sharer.held.epoch,
            c._epochs.generation - sharer.held.generation),
        evicting and (evicting.everything, bool(evicting.keys), bool(evicting.tags)),
        tuple(c._trust.doubts), tuple(c._numbers.seqs.items()), c._marker, c._marker_passed, c._tick_passed and c._tick_passed.as_of,
        tuple((tag, c._epochs.generation - at) for tag, at in c._epochs._tag_evicted.items()),
        c.proof.watermark, c.proof.until, c.proof.extends, c.proof.checked_until,
    )  # fmt: skip


def _key_of_load(sharer: Sharer) -> Hashable:
    c, reading = sharer.coherence, sharer.reading
    assert reading is not None
    load, moment = reading.load, reading.moment
    since = None
    if moment is not None:
        since = (
            c.epoch - moment.epoch,
            c._epochs.generation - moment.generation,
            moment.until,
            moment.extends,
        )
    return since, load and (
        load.started,
        load.voided,
        c.epoch - load.epoch,
        c._epochs.generation - load.generation,
    )


def sharing(rules: Any, extent: Extent, handling: Handling | None = None) -> Sharing:
    """The world at its start: both are subscribed, the cache is empty."""
    sharers = []
    for ahead in extent.ahead:
        coherence = rules.Coherence(extent.staleness, extent.skew, gap_interval=0, in_front=extent.in_front)
        coherence.proof.trust_only(SOURCE)
        sharers.append(Sharer(coherence, ahead))
    left = {name: getattr(extent, name) for name in BUDGETS}
    world = Sharing(rules.__name__, extent, handling or Handling(), left, sharers)
    for sharer in sharers:
        eviction = sharer.coherence.joined_anew(world._now(sharer))
        sharer.coherence.evict(eviction, world._now(sharer))
        world._evict_and_mark(sharer, sharer.coherence, eviction)
        sharer.coherence.trust()
        world._keep(sharer, sharer.coherence)
    if extent.baselined:
        world.tick()
        world._receive_all()
        world.wait()
    return world


PAST_TTL = Extent(in_front=True, ttl=1, overtime=2)
PAST_TTL_BY_TAG = Extent(in_front=True, staleness=None, ttl=1, overtime=2, by_tag=True)
IN_VAIN = Extent(in_front=True, staleness=None, if_error=0.5, load_failures=1, loads=2, both_read=False)
EXTENTS = {
    "looking takes a while": Extent(slow_looks=True),
    "evicting takes a while": Extent(slow_evictions=True),
    "two loads, two writes": Extent(loads=2, writes=2, until=2),
    "one goes deaf": Extent(deaf=1),
    "both miss a message": Extent(drops=2),
    "both miss a message before their first tick": Extent(drops=2, baselined=False, until=2),
    "stores land late": Extent(loads=2, late_stores=1, until=2),
    "a subscription is lost": Extent(losses=1),
    "by tag": Extent(by_tag=True, deaf=1),
    "the cache drops a stamp": Extent(forgotten_stamps=1, until=2),
    "one clock is ahead": Extent(staleness=1, skew=1, ahead=(0, 1), until=4),
    "in front, looking takes a while": Extent(in_front=True, slow_looks=True, until=2),
    "in front, looking by tag takes a while": Extent(in_front=True, slow_looks=True, by_tag=True, until=2),
    "in front, values may be a second old": Extent(in_front=True, staleness=1, deaf=1, until=4),
    "in front, evicting takes a while": Extent(in_front=True, slow_evictions=True, until=2),
    "in front, both miss a message": Extent(in_front=True, drops=2, until=2),
    "in front, one goes deaf": Extent(in_front=True, deaf=1, loads=2, until=2),
    "in front, stores land late": Extent(in_front=True, loads=2, late_stores=1, until=2),
    "in front, another process has the queue for a while": Extent(in_front=True, losses=1, takeovers=1),
    "in front, the same without max_staleness": Extent(
        in_front=True, staleness=None, losses=1, takeovers=1, until=2
    ),
    "in front, past their ttl": PAST_TTL,
    "in front, past their ttl, by tag": PAST_TTL_BY_TAG,
    "in front, where loading fails": IN_VAIN,
    "without max_staleness": Extent(staleness=None, loads=2, deaf=1, until=2),
    "the cache goes back while one looks": Extent(rollbacks=1, slow_looks=True, until=2),
    "the cache goes back, by tag": Extent(rollbacks=1, by_tag=True, until=2),
    "the cache goes back, without max_staleness": Extent(rollbacks=1, staleness=None, until=2),
    "in front, the cache goes back": Extent(in_front=True, rollbacks=1, until=2),
}


@dataclass(frozen=True)
class SharingMutant:
    """A fault, and where it shows."""

    name: str
    extent: Extent
    changes: Changes = ()
    handling: Handling | None = None

    def world(self) -> Sharing:
        return sharing(changed(cacheinval.coherence, self.changes, self.name), self.extent, self.handling)


SHARING_MUTANTS = [
    SharingMutant(
        "the key's stamp is not compared",
        EXTENTS["one goes deaf"],
        handling=Handling(ignores_key_stamp=True),
    ),
    SharingMutant(
        "the tag's stamp is not compared",
        EXTENTS["by tag"],
        handling=Handling(ignores_tag_stamp=True),
    ),
    SharingMutant(
        "the epoch's stamp is not compared",
        EXTENTS["both miss a message"],
        handling=Handling(ignores_epoch_stamp=True),
    ),
    SharingMutant(
        "the key's stamp is looked up after the load",
        EXTENTS["one goes deaf"],
        handling=Handling(looks_up_key_stamp_after_loading=True),
    ),
    SharingMutant(
        "evicting a key keeps its stamp",
        EXTENTS["one goes deaf"],
        handling=Handling(keeps_key_stamp=True),
    ),
    SharingMutant(
        "a missing stamp is taken for a match",
        EXTENTS["one goes deaf"],
        handling=Handling(takes_missing_for_match=True),
    ),
    SharingMutant(
        "acknowledged before the cache has evicted",
        EXTENTS["evicting takes a while"],
        handling=Handling(acknowledges_before_evicting=True),
    ),
    SharingMutant(
        "extended, though loaded before the first tick",
        EXTENTS["both miss a message before their first tick"],
        changes=(
            (" and load_started > self.extends", ""),
            (" and entry.load_started > moment.extends", ""),
        ),
    ),
    SharingMutant(
        "what the look saw is judged by what was proven after it",
        EXTENTS["looking takes a while"],
        changes=(("proven = now <= moment.until and", "proven = True or"),),
    ),
    SharingMutant(
        "in front: a resumed queue is taken for one that nobody else had",
        EXTENTS["in front, the same without max_staleness"],
        changes=(("        if self._in_front:\n            self._begin_epoch()\n", ""),),
    ),
    SharingMutant(
        "in front: what is being evicted outside is looked up",
        EXTENTS["in front, evicting takes a while"],
        handling=Handling(looks_at_what_is_being_evicted=True),
    ),
    SharingMutant(
        "in front: kept, though evicted during the look",
        EXTENTS["in front, looking takes a while"],
        handling=Handling(keeps_what_was_evicted_during_the_look=True),
    ),
    SharingMutant(
        "in front: as young as the look that found it",
        EXTENTS["in front, values may be a second old"],
        handling=Handling(dates_what_it_finds_from_the_look=True),
    ),
    SharingMutant(
        "in front: the entry in the process is not dropped",
        EXTENTS["in front, evicting takes a while"],
        handling=Handling(keeps_its_own_entry=True),
    ),
    SharingMutant(
        "in front: an evicted value given while it is loaded again",
        replace(PAST_TTL, if_error=1),
        changes=(
            (
                "if entry.epoch != epochs.epoch or now >=",
                "if (entry.epoch != epochs.epoch and not overtime) or now >=",
            ),
        ),
    ),
    SharingMutant(
        "in front: a value of an evicted tag given while it is loaded again",
        PAST_TTL_BY_TAG,
        changes=(
            (
                "if not epochs.tags_stand(entry.tags, entry.generation):",
                "if not overtime and not epochs.tags_stand(entry.tags, entry.generation):",
            ),
        ),
    ),
    SharingMutant(
        "in front: what cannot be proven given while it is loaded again",
        PAST_TTL,
        changes=((TOO_OLD, TOO_OLD.replace("if self", "if not overtime and self")),),
    ),
    SharingMutant(
        "in front: an evicted value of any age given instead of an error",
        IN_VAIN,
        changes=((" and now - entry.load_started <= seconds", ""),),
    ),
    SharingMutant(
        "in front: an evicted value that is kept is served",
        IN_VAIN,
        changes=(("before, entry.epoch = entry.epoch, -abs(entry.epoch)", "before = entry.epoch"),),
    ),
    SharingMutant(
        "the mark is not looked at",
        EXTENTS["the cache goes back while one looks"],
        handling=Handling(overlooks_the_mark=True),
    ),
    SharingMutant(
        "what a cache holds that has gone back is served",
        EXTENTS["the cache goes back, without max_staleness"],
        changes=(("if not moment.stands or ", "if "),),
    ),
    SharingMutant(
        "any mark will do",
        EXTENTS["in front, the cache goes back"],
        changes=(("mark is not None and self._known.get(mark, -1) >= since", "mark is not None"),),
    ),
    SharingMutant(
        "marks that replaced the same one are taken for one history",
        EXTENTS["the cache goes back, without max_staleness"],
        changes=(("                self.lose()\n                return\n", "                break\n"),),
    ),
    SharingMutant(
        "the clocks of others are believed",
        EXTENTS["one clock is ahead"],
        changes=(("started = load_started - self._max_clock_skew", "started = load_started"),),
    ),
]
