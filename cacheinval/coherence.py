"""The rules by which a cache stays honest (PROTOCOL.md, "The rules"), as plain objects.

No I/O, no clock, no tasks: this module is told what happened and at what time, and answers what may be served, joined
and stored, what is to be evicted, and what a write still owes. Nothing here suspends, so a question and the act that
follows its answer are one step as long as the caller awaits nothing in between.
"""

import enum
import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec

from cacheinval.floors import MAX_AT_ONCE, NO_FLOOR, Floors
from cacheinval.messages import Beat, Invalidate, Message, Probe, Tick, Unknown
from cacheinval.position import Interruption, Position
from cacheinval.registration import NOT_YET, Registration
from cacheinval.standing import Standing

__all__ = [
    "Coherence",
    "Entry",
    "Eviction",
    "GapReason",
    "Load",
    "Matter",
    "Owed",
    "ProofState",
    "WriteOutcome",
    "higher",
    "outcome_of_error",
    "owed_after",
]

SUSPECT_AGE = 1.0
"""Seconds for which a suspect instance without `max_staleness` still serves what it loaded itself."""

JOIN_AGE = 30.0
"""Seconds after which nobody joins a load any more: it may hang for good, and the source be back."""

GAP_INTERVAL = 1.0
"""Seconds between two epochs begun for gaps: a flood of them costs one reset a second."""

NUMBERS_TOLD_FOR = 1800.0
"""Seconds between two ticks after which the later one may leave out what was confirmed in between: the relay forgets
channels that were silent for an hour."""

MAX_ORIGINS = 10_000
MAX_ORIGINS_KEPT = 1_000
MAX_EVICTED_TAGS = 100_000

NO_TAGS: frozenset[str] = frozenset()

Matter = Literal["subscription", "silence", "gap", "eviction", "registration"]
"""What an instance may be in doubt about."""

GapReason = Literal[
    "missing messages",
    "messages missing before a tick",
    "messages missing before a beat",
    "malformed message",
    "no tick for too long",
    "ticks of another database than before",
    "nothing kept with the cache",
    "the cache lost what it kept",
    "clock stepped",
    Interruption,
]


class Entry(msgspec.Struct, eq=False, gc=False):
    """A cached value and what must hold for it to be served.

    A million of them are no concern of the garbage collector: what an entry holds never leads back to it but through the
    cache, which drops it by itself.
    """

    value: Any
    load_started: float
    epoch: int
    generation: int
    expires_at: float
    tags: frozenset[str] = NO_TAGS
    serve_until: float = -math.inf
    standing: int = -1
    """Judged at this number of `Coherence.standing` to be good until `serve_until`, which is of a clock of the cache."""
    kept: bool = False
    """Whether an eviction only expires it, since it is to be had while loading fails; its epoch is negative then."""


class Moment(NamedTuple):
    """What is looked up elsewhere is judged as of before the look; see `Coherence.moment`."""

    epoch: int
    generation: int
    until: float
    extends: float


class Load:
    """The token that a load takes before it reads; compared by identity, voided by an eviction, never revived."""

    __slots__ = (
        "awaited",
        "epoch",
        "floor",
        "generation",
        "key",
        "of_replica",
        "parent",
        "parts",
        "started",
        "tags",
        "voided",
    )

    def __init__(
        self,
        key: str,
        started: float,
        epoch: int,
        generation: int,
        tags: frozenset[str],
        parent: "Load | None" = None,
        floor: float = NO_FLOOR,
    ) -> None:
        self.key = key
        self.started = started
        self.epoch = epoch
        self.generation = generation
        self.tags = tags
        self.floor = floor
        self.of_replica = False
        """Whether it has turned to a replica, which may lag behind."""
        self.awaited = False
        """Whether another load has waited for it: then it must not wait for a place, which that one may hold."""
        self.parent = parent
        self.parts: list[Load] = []
        """The loads in flight that its loader has begun, or waits for."""
        self.voided = False

    def whole(self) -> Collection["Load"]:
        """This load, and those in flight without which it cannot end."""
        whole: dict[Load, None] = {}
        left = [self]
        while left:
            load = left.pop()
            if load not in whole:
                whole[load] = None
                left += load.parts
        return whole

    def depends_on(self, other: "Load") -> bool:
        """Whether this load cannot end before `other` has: then `other` must not wait for it."""
        return other in self.whole()


INVALIDATED = "invalidated"
"""The reason of an eviction that somebody has asked for."""


@dataclass(slots=True)
class Eviction:
    """What has to go: some keys, all entries with some tags, or everything (a new epoch, with its reason).

    `versions` is empty, or what each key has become, None where that is unknown.
    """

    keys: Sequence[str] = ()
    tags: Sequence[str] = ()
    everything: bool = False
    reason: str = INVALIDATED
    versions: Sequence[int | None] = ()

    def __bool__(self) -> bool:
        return bool(self.keys or self.tags or self.everything)

    @classmethod
    def merged(cls, evictions: Iterable["Eviction"]) -> "Eviction":
        """One eviction that does what all of these do, in whatever order."""
        evictions = list(evictions)
        names = sum(len(eviction.keys) for eviction in evictions)
        tell_versions = names <= MAX_AT_ONCE  # else nobody would note them
        keys: dict[str, int | None] = {}
        tags: dict[str, None] = {}
        everything: Eviction | None = None
        for eviction in evictions:
            if eviction.versions and tell_versions:
                for key, version in zip(eviction.keys, eviction.versions, strict=True):
                    keys[key] = higher(keys.get(key, version), version)
            else:
                keys.update(dict.fromkeys(eviction.keys))
            tags.update(dict.fromkeys(eviction.tags))
            if eviction.everything:
                everything = eviction
        if everything:
            return cls(everything=True, reason=everything.reason)
        versions = tuple(keys.values()) if any(version is not None for version in keys.values()) else ()
        return cls(list(keys), list(tags), versions=versions)


class WriteOutcome(enum.Enum):
    """How a COMMIT (or a write that is one statement) ended, as far as its client can know."""

    COMMITTED = "committed"
    ABORTED = "aborted"  # a definite server error, or it was never sent
    UNKNOWN = "unknown"  # reply lost, cancelled, connection cut: it may yet become visible


@dataclass(frozen=True, slots=True)
class Owed:
    """What a write still owes after it ended."""

    publish: bool
    delete_rows: bool
    """The outbox rows may be deleted once a publish that begins from now on is confirmed."""
    may_skip_echo: bool
    """Its own message need not be processed here, provided that every cache of this client has evicted."""


def outcome_of_error(sqlstate: str | None) -> WriteOutcome:
    """How a COMMIT (or a write that is one statement) ended that raised: `sqlstate` is the server's, None if it said nothing.

    Only an error that the server reports while it lives is definite. A connection failure (class 08), an intervention
    or shutdown (57), a failure of the system (58) or an internal one (XX) may come after the commit; 40003 says so itself.
    """
    if sqlstate is None or sqlstate[:2] in ("08", "57", "58", "XX") or sqlstate == "40003":
        return WriteOutcome.UNKNOWN
    return WriteOutcome.ABORTED


def owed_after(outcome: WriteOutcome) -> Owed:
    """What follows from `outcome`.

    The rows of a write whose outcome is unknown are never deleted by its client: the commit may become visible after
    everybody has evicted and loaded the old value again; the relay publishes them when they are visible. Nor may its
    echo be skipped, for the same reason.
    """
    committed = outcome is WriteOutcome.COMMITTED
    return Owed(publish=outcome is not WriteOutcome.ABORTED, delete_rows=committed, may_skip_echo=committed)


@dataclass(frozen=True, slots=True)
class ProofState:
    """What must be known of a cache outside the process when its queue is resumed; kept in that cache itself.

    `seqs` are the last numbers of the origins heard of most recently, `checked_until` is the tick by which they were
    last checked (-inf: none yet), `extends` since when loads may be extended, and `source` whose ticks these were.
    """

    seqs: dict[str, int]
    checked_until: float
    extends: float
    source: str | None


class Proof:
    """What ticks prove: all that was committed before the watermark has been evicted here (PROTOCOL.md, "Ticks and watermark").

    Args:
        max_staleness: seconds; None: nothing needs proof.
        max_clock_skew: seconds by which clocks of hosts and database may differ.
        standing: shaken when less is proven than before.
    """

    def __init__(self, max_staleness: float | None, max_clock_skew: float, standing: Standing) -> None:
        self._standing = standing
        self.watermark = -math.inf
        self.source: str | None = None
        self.refused: str | None = None
        """Why the last tick was not believed."""
        self.until = -math.inf
        """Reads that begin until then may be served what was loaded since `extends`, however long ago that was."""
        self.extends = math.inf
        self.checked_until = -math.inf
        """The newest tick by whose numbers it was seen that nothing is missing."""
        self._source_before: str | None = None
        self._awaits_source = False
        self._max_staleness = -math.inf if max_staleness is None else max_staleness
        self._max_clock_skew = max_clock_skew

    @property
    def fresh_as_of(self) -> float:
        """All that was committed before this has been evicted here, by whatever clock it was committed."""
        return self.watermark - self._max_clock_skew

    @property
    def baselined(self) -> bool:
        """Whether a tick of this subscription has told the numbers from which gaps are counted."""
        return self.extends < math.inf

    def start_over(self) -> None:
        """A new subscription: its first tick tells numbers, and proves nothing of what was loaded before it."""
        self.watermark = self.until = self.checked_until = -math.inf
        self.extends = math.inf
        self._source_before = None
        self._standing.shake()

    def restore(self, state: ProofState) -> None:
        """Another process, or this one before, had come so far with the same queue and cache.

        The next tick goes on from there. Until then nothing is extended: the clock may have been set meanwhile.
        """
        self.start_over()
        self.checked_until, self.extends = state.checked_until, state.extends
        self._source_before = state.source

    def breaks_off(self, tick: Tick) -> GapReason | None:
        """Why nothing can be told from `tick` about what was missed since the tick before it; None where it can."""
        if self._source_before not in (None, tick.source):
            return "ticks of another database than before"
        if self.baselined and tick.as_of - self.checked_until > NUMBERS_TOLD_FOR:
            return "no tick for too long"
        return None

    def await_source(self) -> None:
        """The instance has a database of its own, and does not know yet which one: until `trust_only` nothing proves."""
        self._awaits_source = True

    def trust_only(self, source: str) -> None:
        """The source of truth of this instance is known: ticks of any other database prove nothing."""
        self._awaits_source = False
        if self.source not in (None, source):
            self.start_over()
        self.source = source

    def believes(self, tick: Tick, now: float) -> bool:
        """Whether `tick` comes from the one source and from no future."""
        if self._awaits_source:
            return False
        self.source = self.source or tick.source
        if tick.source != self.source:
            self.refused = f"a tick of another database: {tick.source}, not {self.source}"
            self.watermark = self.until = -math.inf  # who speaks for which is for a person to find out
            self._standing.shake()
            return False
        if tick.as_of > now + self._max_clock_skew:
            self.refused = f"a tick from the future, by {tick.as_of - now:.3f} s: the clocks differ"
            return False
        self.refused = None
        return True

    def checked(self, tick: Tick) -> None:
        """All that came before `tick` has been evicted here, as far as is known."""
        self.checked_until = max(self.checked_until, tick.as_of)
        self._source_before = tick.source

    def advance(self, tick: Tick, now: float) -> None:
        """All that came before `tick` has been evicted, and no number was missing."""
        if not self.baselined:
            self.extends = now
        self.watermark = max(self.watermark, tick.as_of)
        self.until = self.fresh_as_of + self._max_staleness

    def covers(self, load_started: float, now: float) -> bool:
        """Whether a read that begins at `now` may be given what was read by a load that began then."""
        return now <= self.until and load_started > self.extends


@dataclass(slots=True)
class Counters:
    """What the rules decided, counted since the start."""

    epochs: int = 0
    gaps: int = 0
    voided_loads: int = 0
    skipped_echoes: int = 0
    unknown_messages: int = 0
    duplicates: int = 0
    below_floor: int = 0
    ticks: int = 0
    refused_ticks: int = 0
    gap_reasons: dict[GapReason, int] = field(default_factory=dict)


class Gap(NamedTuple):
    """When messages may have been missed, by the clock of the instance, and why."""

    at: float
    reason: str


class Coherence:
    """Decides for the caches of one instance. Times are seconds of one clock (see `cacheinval.clock`).

    Args:
        max_staleness: seconds; how old a served value may be. None: eventual consistency.
        max_clock_skew: seconds by which clocks of hosts and database may differ.
        gap_interval: seconds between two epochs begun for gaps, one second if None. 0 for a cache outside the process:
            a gap that was put off is forgotten when the process ends, and such a cache outlives it.
        max_replica_lag: seconds by which a replica that loaders read may lag behind the primary.
        registration: under which alone anything is served, if it is required; None: nothing depends on any.
        in_front: entries are kept in this process, too, in front of a cache outside it.
    """

    def __init__(
        self,
        max_staleness: float | None = None,
        max_clock_skew: float = 0.1,
        gap_interval: float | None = None,
        max_replica_lag: float = 30.0,
        registration: Registration | None = None,
        in_front: bool = False,
    ) -> None:
        self._in_front = in_front
        self._gap_interval = gap_interval
        self._max_replica_lag = max_replica_lag
        self._floors = Floors(max_replica_lag, wanted=False)
        self.registration = registration or Registration()
        self.standing = self.registration.standing
        self.proof = Proof(max_staleness, max_clock_skew, self.standing)
        self._registers = self.registration.required
        self.epoch = 1
        self.counters = Counters()
        self.last_gap: Gap | None = None
        """For status: the last one, be it that the subscription was lost and a new one made."""
        self._max_staleness, self._max_clock_skew = max_staleness, max_clock_skew
        self._doubts: dict[Matter, str] = {"subscription": "not subscribed yet"}
        if self.registration.required:
            self._doubts["registration"] = NOT_YET
        self._age_limit = 0.0
        self._set_age_limit()

        self._loads: dict[str, Load] = {}
        # Evicting a tag is a note of when it happened, not a walk over its entries: `_generation` counts tag
        # evictions, and an entry or a load is out if one of its tags was evicted in a later generation than its own.
        self._generation = 0
        self._tag_evicted: dict[str, int] = {}
        self._tag_floor = 0
        self._ages_since = 1  # the first epoch of whose entries the ages can be told

        self._seqs: OrderedDict[str, int] = OrderedDict()
        self._origins_told = 0
        self._echoes: set[tuple[str, int]] = set()
        self._subscribed = False
        self.position = Position()
        self._lost: str | None = None
        self._marker: str | None = None
        self._marker_passed = False
        self._tick_passed: Tick | None = None
        self._heard_at = -math.inf
        self._last_gap = -math.inf
        self._gap_due: str | None = None

    # Serving and joining

    @property
    def moment(self) -> Moment:
        """How things are now: what an entry is judged by that is looked up elsewhere from now on."""
        return Moment(self.epoch, self._generation, self.proof.until, self.proof.extends)

    def found(
        self, value: Any, load_started: float, expires_at: float, tags: frozenset[str], moment: Moment
    ) -> Entry:
        """An entry that was looked up elsewhere after `moment`, and was loaded by a host whose clock may differ."""
        started = load_started - self._max_clock_skew
        return Entry(value, started, moment.epoch, moment.generation, expires_at, tags)

    def may_serve_found(self, entry: Entry, now: float, moment: Moment) -> bool:
        """The same as `may_serve` for such an entry.

        What has been proven since the look began does not count: it rests on evictions that the look may not have seen. One
        that is dated later than clocks may differ is not young, but of an age that cannot be told.
        """
        if entry.load_started > now:
            return False
        proven = now <= moment.until and entry.load_started > moment.extends
        return (proven or now - entry.load_started <= self._age_limit) and self.may_serve(entry, now)

    def may_serve(self, entry: Entry, now: float, overtime: float = 0.0) -> bool:
        """Whether a read that begins at `now` may be answered with `entry`, whose ttl ran out no more than `overtime`
        seconds ago.

        That is all that `stale_while_revalidate` excuses: what was evicted is not served for its sake, nor what cannot be
        proven to be fresh.
        """
        if entry.epoch != self.epoch or now >= entry.expires_at + overtime:
            return False
        if self._too_old(entry.load_started, now):
            return False
        if self._registers and not self.registration.covers(entry.load_started, now):
            return False
        if entry.generation == self._generation or not entry.tags:
            return True
        if not self._tags_stand(entry.tags, entry.generation):
            return False
        entry.generation = self._generation  # looked at once for each tag eviction, not at each hit
        return True

    def may_serve_instead(self, entry: Entry, now: float, seconds: float) -> bool:
        """Whether a read whose load has failed may be answered with `entry` at `now` (`stale_if_error`).

        Where nothing but its ttl has ended it, for `seconds` from then. What was evicted, or cannot be proven to be fresh, may
        have been replaced as soon as it was loaded, so it is given until it is `seconds` old.
        """
        if self.may_serve(entry, now, seconds):
            return True
        return abs(entry.epoch) >= self._ages_since and now - entry.load_started <= seconds

    def good_until(self, entry: Entry) -> float:
        """Until when `entry`, which may be served now, may be as long as nothing shakes `standing`; never too long.

        Ticks may prove more meanwhile.
        """
        fresh = entry.load_started + self._age_limit
        if entry.load_started > self.proof.extends:
            fresh = max(fresh, self.proof.until)
        return min(entry.expires_at, self.registration.until, fresh)

    def _too_old(self, load_started: float, now: float) -> bool:
        return now - load_started > self._age_limit and not self.proof.covers(load_started, now)

    def joinable(self, key: str, now: float, tags: frozenset[str] = NO_TAGS) -> Load | None:
        """The load in flight whose value a read of `key` that begins at `now` may share.

        Never one that began before an eviction of the key or of a tag, nor one that has hung for longer than a value
        may be old; nor one of which that is true of a part, which it is still waiting for.
        """
        load = self._loads.get(key)
        if load is None or not self._stands(load, tags):
            return None
        if not all(self._may_share(part, now) for part in load.whole()):
            return None
        if load.of_replica and not tags <= load.tags:
            return None  # a replica was asked without regard to when these were evicted
        load.tags |= tags
        return load

    def _may_share(self, load: Load, now: float) -> bool:
        return (
            now - load.started <= JOIN_AGE
            and not self._too_old(load.started, now)
            and self._stands(load, load.tags)
        )

    def may_give(self, load: Load, now: float) -> bool:
        """Whether the value of `load`, which `joinable` answered, is for a read that begins at `now`.

        Where no writer waits for this instance, only if the load began after the read did. The others wait until
        it has ended, and ask again: they all share the one that is begun then.
        """
        covers = self.registration.covers
        return all(one.started > now or covers(one.started, now) for one in load.whole())

    # Loading and storing

    def begin_load(
        self, key: str, now: float, tags: frozenset[str] = NO_TAGS, parent: Load | None = None
    ) -> Load:
        """The token for a load of `key`; to be taken before the loader starts, and given back by `end_load`."""
        older = self._loads.get(key)
        if older is not None:
            older.voided = True  # whoever waits for it gets its value, but the younger load stores
        floor = self._floors.lowest(key, now)
        load = Load(key, now, self.epoch, self._generation, tags, parent, floor)
        if parent is not None:
            parent.parts.append(load)
        self._loads[key] = load
        return load

    def compare_versions(self) -> None:
        """From now on it is noted what was evicted, for loads to be compared with. The first load that asks does this, and
        finds what was evicted before it unknown; who says so in advance spares it that."""
        self._floors.wanted = True

    def hold(self, load: Load) -> None:
        """`load` waits for its turn. It has not begun to read, so whoever comes may join it, however long it waits."""
        load.started = math.inf

    def let_go(self, load: Load, now: float) -> None:
        """`load` begins to read now; what was evicted since it took its token voids it nevertheless."""
        load.started = now

    def turn_to_replica(self, load: Load, now: float, *, shared: bool = False) -> bool:
        """Whether `load` may read a replica, of which its version and its floor will tell whether it lags; asked just
        before it does. If not, it has to read the primary.

        With `max_staleness` its value is as old as the watermark: what was committed since may be neither in the replica
        nor evicted here yet. A cache that is `shared` may hold it for others, whose watermarks say nothing about that.
        """
        self.compare_versions()
        if self._doubts or not self._floors.comparable(load.key, load.tags, now):
            return False
        if self._max_staleness is not None:
            settled = self.proof.extends + self._max_replica_lag
            if shared or now <= settled or now - self.proof.fresh_as_of > self._max_staleness:
                return False
            load.started = min(load.started, self.proof.fresh_as_of)
        load.of_replica = True
        return True

    def turn_to_primary(self, load: Load, now: float) -> None:
        """`load` reads the primary from now on, and what it may have read before does not count."""
        load.started = now
        load.of_replica = False

    def accepts(self, load: Load, version: int | None) -> bool:
        """Whether what `load` read is known to hold all that was evicted before it began. None: absent, or unknown."""
        self.compare_versions()
        if load.floor == NO_FLOOR or (version is not None and version >= load.floor):
            return True
        self.counters.below_floor += 1
        return False

    def refuse(self, load: Load) -> None:
        """What `load` read lags behind: it is not stored, nor is what is built from it."""
        load.voided = True

    def may_store(self, load: Load) -> bool:
        """Whether nothing has evicted what `load` read; store at once, with no await in between."""
        return self._stands(load, load.tags)

    def bypassing(self, entry: Entry | None, now: float) -> "Matter | Literal['age'] | None":
        """What keeps freshness from being proven, where a load is made for that; None: because nothing is cached."""
        if self._doubts:
            return next(iter(self._doubts))
        if now >= self.registration.until:
            return "registration"
        if entry is None or entry.epoch != self.epoch:
            return None
        if self._too_old(entry.load_started, now):
            return "age"
        return None if self.registration.covers(entry.load_started, now) else "registration"

    def end_load(self, load: Load) -> None:
        """The load has ended, however it did."""
        if load.parent is not None:
            load.parent.parts.remove(load)
        if self._loads.get(load.key) is load:
            del self._loads[load.key]

    def entry(self, load: Load, value: Any, expires_at: float, kept: bool = False) -> Entry:
        """The entry that holds what `load` read; `kept` is for `stale_if_error`."""
        return Entry(value, load.started, load.epoch, load.generation, expires_at, load.tags, kept=kept)

    def expire(self, entry: Entry) -> bool:
        """`entry` is evicted, and no more to be had but by `may_serve_instead`; whether it was not before."""
        before, entry.epoch = entry.epoch, -abs(entry.epoch)
        entry.standing = -1
        return before == self.epoch

    def inherit(self, load: Load, part: Entry | Load) -> None:
        """The value of `load` is built from `part`: it is as old as its oldest part and goes with the tags of each."""
        load.tags |= part.tags
        if isinstance(part, Entry):
            load.started = min(load.started, part.load_started)
        else:
            load.started = min(load.started, part.started)
            load.voided = load.voided or not self.may_store(part)

    def inherit_stale(self, load: Load, part: Entry) -> None:
        """The same for a part that was given because loading it failed: what is built from it is not stored."""
        self.inherit(load, part)
        self.refuse(load)

    # Evicting

    def evict(self, eviction: Eviction, now: float) -> None:
        """Voids the loads that `eviction` concerns, and forgets what it may not serve; the cache then drops entries."""
        self._floors.note(eviction.keys, eviction.versions, eviction.tags, now)
        if eviction.everything:
            self._floors.note_everything(now)
            self._begin_epoch()
            return
        for key in eviction.keys:
            load = self._loads.pop(key, None)
            if load is not None:
                load.voided = True
                self.counters.voided_loads += 1
        if eviction.tags:
            self._evict_tags(eviction.tags)

    def _evict_tags(self, tags: Sequence[str]) -> None:
        self._generation += 1
        self.standing.shake()
        if len(self._tag_evicted) + len(tags) > MAX_EVICTED_TAGS:
            # Bounded memory: from here on every older entry with any tag counts as evicted.
            self._tag_evicted.clear()
            self._tag_floor = self._generation
        for tag in tags:
            self._tag_evicted[tag] = self._generation

    def _begin_epoch(self) -> None:
        self.epoch += 1
        self.standing.shake()
        self.counters.epochs += 1
        self.counters.voided_loads += len(self._loads)
        self._loads.clear()  # each carries the old epoch, which voids it
        self._tag_evicted.clear()

    def _stands(self, load: Load, tags: frozenset[str]) -> bool:
        return not load.voided and load.epoch == self.epoch and self._tags_stand(tags, load.generation)

    def _tags_stand(self, tags: frozenset[str], generation: int) -> bool:
        if generation == self._generation or not tags:
            return True
        evicted = self._tag_evicted
        return generation >= self._tag_floor and all(evicted.get(tag, 0) <= generation for tag in tags)

    # Trust in the subscription

    @property
    def suspect(self) -> str | None:
        """Why this instance may have missed something, or None."""
        return next(iter(self._doubts.values()), None)

    def doubt(self, about: Matter, reason: str) -> None:
        """From now on this instance is suspect, until `settle` is called for the same matter."""
        self._doubts[about] = reason
        self._set_age_limit()

    def settle(self, about: Matter) -> None:
        """The doubt about this matter is over."""
        if self._doubts.pop(about, None) is not None:
            self._set_age_limit()

    def _set_age_limit(self) -> None:
        before = self._age_limit
        # With max_staleness an entry's own age is its proof; without, age counts only while something may be missing.
        if self._max_staleness is not None:
            self._age_limit = self._max_staleness
        else:
            self._age_limit = SUSPECT_AGE if self._doubts else math.inf
        if self._age_limit < before:
            self.standing.shake()

    def lost(self, reason: str) -> None:
        """The subscription is lost: connection, channel, consumer or queue."""
        self._subscribed = False
        self._lost = self._lost or reason  # what follows from the first one explains nothing
        self._marker, self._marker_passed = None, False
        self._tick_passed = None
        self.position.leave()
        self.doubt("subscription", self._lost)

    def joined_anew(self, now: float) -> Eviction:
        """A new queue receives from now on; what was published before may have been missed. Evict, then `trust`."""
        if self._lost is not None:
            self.last_gap, self._lost = Gap(now, f"new subscription: {self._lost}"), None
        self._subscribed = True
        self._heard_at = now
        self._begin_to_count()
        self.position.forget()
        self.position.begin()
        self.doubt("subscription", "new subscription: not cleared yet")
        return Eviction(everything=True, reason="new subscription")

    def _begin_to_count(self) -> None:
        self._seqs.clear()
        self._echoes.clear()
        self.proof.start_over()

    def resumed(self, marker: str, now: float, state: ProofState | None) -> Eviction | None:
        """The queue was still there; the instance is behind until it has processed `marker`, a probe of its own.

        Without the `state` that was kept with the cache, messages may have been missed before: everything has to go. What
        this process holds in front of that cache is refused in any case, as are its loads: another process of the same
        name may have had the queue meanwhile, and has evicted outside, but not here.
        """
        self._subscribed, self._lost = True, None
        if self._in_front:
            self._begin_epoch()
        self._heard_at = now
        self._marker, self._marker_passed = marker, False
        self._floors.note_everything(now)  # what was evicted before this process began is not known
        self.doubt("subscription", "catching up with the queue")
        self._seqs.clear()
        if state is None:
            self.proof.start_over()
            return self.gap("nothing kept with the cache", now)
        self._seqs.update(state.seqs)
        self.proof.restore(state)
        return None

    def continued(self, marker: str, now: float) -> None:
        """The stream is read again from `position`; the instance is behind until it has processed `marker`, a probe of its own.

        Nothing has to go: the first message has to be the one that was read there, or it is a gap, and those that came
        since follow it. What this process knows of numbers and ticks holds, as if it had not been away.
        """
        self._subscribed, self._lost = True, None
        self._heard_at = now
        self._marker, self._marker_passed = marker, False
        self.position.begin()
        self.doubt("subscription", "catching up with the stream")

    def proof_state(self) -> ProofState:
        """What to keep with a cache outside the process, before that is acknowledged which led to it."""
        latest = list(self._seqs.items())[-max(MAX_ORIGINS_KEPT, self._origins_told) :]
        return ProofState(dict(latest), self.proof.checked_until, self.proof.extends, self.proof.source)

    @property
    def subscribed(self) -> bool:
        """Whether a queue of this instance receives what is published."""
        return self._subscribed

    @property
    def marker(self) -> str | None:
        """The probe that is waited for, if any."""
        return self._marker

    def trust(self) -> None:
        """What `joined_anew` asked for is evicted: the subscription can be relied on, unless it was lost meanwhile."""
        if self._subscribed:
            self.settle("subscription")

    def evicted(self, now: float) -> None:
        """All that `received` has answered so far is evicted, in every cache. Acknowledge after this, never before."""
        self.position.evicted()
        if self._marker_passed:
            self._marker, self._marker_passed = None, False
            self.trust()
        tick, self._tick_passed = self._tick_passed, None
        if tick is None:
            return
        self.proof.checked(tick)
        if not self._doubts:
            self.proof.advance(tick, now)

    # What arrives

    def received(
        self, message: Message | Unknown | None, now: float, offset: int | None = None
    ) -> Eviction | None:
        """What has to go because `message` arrived at `now`; None where nothing has to.

        Args:
            message: None if it cannot be understood: it may have been an invalidation of anything.
            offset: its place in a stream; None where it came by a queue.
        """
        self._heard_at = now
        if offset is None:
            return self._received(message, now)
        if self.position.recognises(offset, message):
            return None
        missing = self.position.passes(offset, message)
        if missing is None:
            return self._received(message, now)
        self._begin_to_count()  # or each origin of which something is missing would be a gap of its own
        self._tick_passed = None  # it told the numbers from which nothing is counted any more
        gap = self.gap(missing, now)
        asked = self._received(message, now)  # in any case, since it may be the marker, or tell a number
        return gap or asked

    def _received(self, message: Message | Unknown | None, now: float) -> Eviction | None:
        if message is None:
            return self.gap("malformed message", now)
        if isinstance(message, Invalidate):
            return self._received_invalidate(message, now)
        if isinstance(message, Probe):
            # The marker counts only once what came before it is evicted: see `evicted`.
            self._marker_passed = self._marker_passed or message.id == self._marker
        elif isinstance(message, Tick):
            return self._received_tick(message, now)
        elif isinstance(message, Beat):
            if self._is_behind(message.origin, message.seq, unknown_counts=False):
                return self.gap("messages missing before a beat", now)
        elif isinstance(message, Unknown):
            self.counters.unknown_messages += 1
        return None

    def _received_invalidate(self, message: Invalidate, now: float) -> Eviction | None:
        if message.origin is not None and message.seq is not None:
            own = (message.origin, message.seq) in self._echoes
            self._echoes.discard((message.origin, message.seq))  # expected once, whatever comes of it
            if not self._in_sequence(message.origin, message.seq):
                gap = self.gap("missing messages", now)
                return gap or _asked_by(message)
            if own:
                self.counters.skipped_echoes += 1
                return None
        return _asked_by(message)

    def _received_tick(self, tick: Tick, now: float) -> Eviction | None:
        self.counters.ticks += 1
        if not self.proof.believes(tick, now):
            self.counters.refused_ticks += 1
            return None
        # All of them, so that what is missing is counted once; and before the watermark may move.
        numbers = {**tick.seqs, tick.origin: tick.seq}
        self._origins_told = len(numbers)
        behind = [self._is_behind(*number, unknown_counts=self.proof.baselined) for number in numbers.items()]
        break_ = self.proof.breaks_off(tick)
        if break_ is not None:
            self.proof.start_over()
            self._tick_passed = tick  # the first one of what begins with this gap
            return self.gap(break_, now)
        if any(behind):
            return self.gap("messages missing before a tick", now)
        self._tick_passed = tick
        return None

    def _is_behind(self, origin: str, seq: int, unknown_counts: bool) -> bool:
        """Whether a confirmed message of `origin` has not arrived; from here on it counts as known to be missing."""
        last = self._seqs.get(origin)
        self._note_seq(origin, max(seq, last or 0))
        return seq > (last or 0) and (last is not None or unknown_counts)

    def _in_sequence(self, origin: str, seq: int) -> bool:
        last = self._seqs.get(origin)
        if last is not None and seq <= last:
            self.counters.duplicates += 1
            return True
        self._note_seq(origin, seq)
        if last is None:
            # A tick has told the numbers of every channel there was: this one is new, and begins with 1.
            return seq == 1 or not self.proof.baselined
        return seq == last + 1

    def _note_seq(self, origin: str, seq: int) -> None:
        self._seqs[origin] = seq
        self._seqs.move_to_end(origin)
        # Those of the present tick are not forgotten: the next one would tell them as if they had been missed.
        if len(self._seqs) > max(MAX_ORIGINS, 2 * self._origins_told):
            self._seqs.popitem(last=False)

    def expect_echo(self, origin: str, seq: int) -> None:
        """This message is about to be published, and all it names has been evicted here, after its commit."""
        if self._subscribed:  # else it may never come, and what is expected would only grow
            self._echoes.add((origin, seq))

    def forget_echoes(self, origin: str) -> None:
        """The channel of `origin` is closed: whatever of it still arrives is treated as anybody's."""
        self._echoes = {echo for echo in self._echoes if echo[0] != origin}

    # Gaps

    def silent(self, now: float, limit: float) -> bool:
        """Whether nothing has arrived for `limit` seconds, although the subscription stands: anything may be missing."""
        return self._subscribed and now - self._heard_at > limit

    def gap(self, reason: GapReason, now: float) -> Eviction | None:
        """Messages may have been missed: everything has to go; None where it is put off (see `gap_due_at`)."""
        self._note_gap(reason, now)
        if now - self._last_gap < self._between_gaps:
            self.put_off_gap(reason)
            return None
        self._last_gap = now
        return Eviction(everything=True, reason=reason)

    def clock_stepped(self, now: float) -> Eviction:
        """The clock by which everything here was judged was set to `now`: nothing that was judged by it counts any more."""
        self._note_gap("clock stepped", now)
        self._last_gap = self._heard_at = -math.inf
        self._ages_since = self.epoch + 1
        self._tick_passed = None
        self.proof.start_over()
        self._floors.forget(now)
        self.registration.forget()
        return Eviction(everything=True, reason="clock stepped")

    def _note_gap(self, reason: GapReason, now: float) -> None:
        self.counters.gaps += 1
        self.counters.gap_reasons[reason] = self.counters.gap_reasons.get(reason, 0) + 1
        self.last_gap = Gap(now, reason)

    def put_off_gap(self, reason: str) -> None:
        """An epoch has yet to begin for this gap; suspect until then."""
        self._gap_due = reason
        self.doubt("gap", reason)

    @property
    def _between_gaps(self) -> float:
        return GAP_INTERVAL if self._gap_interval is None else self._gap_interval

    @property
    def gap_due_at(self) -> float | None:
        """When an epoch that was put off is to begin, by `take_due_gap`."""
        return None if self._gap_due is None else self._last_gap + self._between_gaps

    def take_due_gap(self, now: float) -> Eviction | None:
        """The eviction that was put off, if its time has come; `gap_done` when it is done."""
        if self._gap_due is None or now < self._last_gap + self._between_gaps:
            return None
        reason, self._gap_due, self._last_gap = self._gap_due, None, now
        return Eviction(everything=True, reason=reason)

    def gap_done(self) -> None:
        """What `take_due_gap` answered is evicted."""
        if self._gap_due is None:
            self.settle("gap")


def higher(one: int | None, other: int | None) -> int | None:
    """The higher of two versions of a key; unknown where one of them is."""
    return None if one is None or other is None else max(one, other)


def _asked_by(message: Invalidate) -> Eviction:
    return Eviction(message.keys, message.tags, message.all, versions=tuple(message.versions))
