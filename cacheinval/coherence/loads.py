"""Loads in flight: who may join one, what it may read, and whether what it has read may be stored."""

import math
from collections.abc import Collection, Iterable
from typing import Any

from cacheinval.coherence.counters import Counters
from cacheinval.coherence.entries import NO_TAGS, Entry
from cacheinval.coherence.epochs import Epochs
from cacheinval.coherence.floors import NO_FLOOR, Floors
from cacheinval.coherence.trust import Trust

__all__ = ["JOIN_AGE", "Load", "Loads"]

JOIN_AGE = 30.0
"""Seconds after which nobody joins a load any more: it may hang for good, and the source be back."""


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

    def entry(self, value: Any, expires_at: float, kept: bool = False) -> Entry:
        """The entry that holds what this load read; `kept` is for `stale_if_error`."""
        return Entry(value, self.started, self.epoch, self.generation, expires_at, self.tags, kept=kept)


class Loads:
    """The loads in flight of one instance, the youngest of each key.

    Args:
        max_replica_lag: seconds by which a replica that loaders read may lag behind the primary.
    """

    def __init__(self, trust: Trust, epochs: Epochs, counters: Counters, max_replica_lag: float) -> None:
        self._trust, self._epochs, self._counters = trust, epochs, counters
        self._max_replica_lag = max_replica_lag
        self.floors = Floors(max_replica_lag, wanted=False)
        self._loads: dict[str, Load] = {}

    # Beginning, joining, ending

    def begin(self, key: str, now: float, tags: frozenset[str] = NO_TAGS, parent: Load | None = None) -> Load:
        """The token for a load of `key`; to be taken before the loader starts, and given back by `end`."""
        older = self._loads.get(key)
        if older is not None:
            older.voided = True  # whoever waits for it gets its value, but the younger load stores
        floor = self.floors.lowest(key, now)
        load = Load(key, now, self._epochs.epoch, self._epochs.generation, tags, parent, floor)
        if parent is not None:
            parent.parts.append(load)
        self._loads[key] = load
        return load

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
            and not self._trust.too_old(load.started, now)
            and self._stands(load, load.tags)
        )

    def may_give(self, load: Load, now: float) -> bool:
        """Whether the value of `load`, which `joinable` answered, is for a read that begins at `now`.

        Where no writer waits for this instance, only if the load began after the read did. The others wait until
        it has ended, and ask again: they all share the one that is begun then.
        """
        covers = self._trust.registration.covers
        return all(one.started > now or covers(one.started, now) for one in load.whole())

    def hold(self, load: Load) -> None:
        """`load` waits for its turn. It has not begun to read, so whoever comes may join it, however long it waits."""
        load.started = math.inf

    def let_go(self, load: Load, now: float) -> None:
        """`load` begins to read now; what was evicted since it took its token voids it nevertheless."""
        load.started = now

    def end(self, load: Load) -> None:
        """The load has ended, however it did."""
        if load.parent is not None:
            load.parent.parts.remove(load)
        if self._loads.get(load.key) is load:
            del self._loads[load.key]

    # Replicas and versions

    def compare_versions(self) -> None:
        """From now on it is noted what was evicted, for loads to be compared with. The first load that asks does this, and
        finds what was evicted before it unknown; who says so in advance spares it that."""
        self.floors.wanted = True

    def turn_to_replica(self, load: Load, now: float, *, shared: bool = False) -> bool:
        """Whether `load` may read a replica, of which its version and its floor will tell whether it lags; asked just
        before it does. If not, it has to read the primary.

        With `max_staleness` its value is as old as the watermark: what was committed since may be neither in the replica
        nor evicted here yet. A cache that is `shared` may hold it for others, whose watermarks say nothing about that.
        """
        self.compare_versions()
        if self._trust.doubts or not self.floors.comparable(load.key, load.tags, now):
            return False
        if self._trust.max_staleness is not None:
            proof = self._trust.proof
            settled = proof.extends + self._max_replica_lag
            if shared or now <= settled or now - proof.fresh_as_of > self._trust.max_staleness:
                return False
            load.started = min(load.started, proof.fresh_as_of)
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
        self._counters.below_floor += 1
        return False

    # Storing

    def may_store(self, load: Load) -> bool:
        """Whether nothing has evicted what `load` read; store at once, with no await in between."""
        return self._stands(load, load.tags)

    def refuse(self, load: Load) -> None:
        """What `load` read lags behind: it is not stored, nor is what is built from it."""
        load.voided = True

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

    def _stands(self, load: Load, tags: frozenset[str]) -> bool:
        epochs = self._epochs
        return not load.voided and load.epoch == epochs.epoch and epochs.tags_stand(tags, load.generation)

    # Evicting

    def void(self, keys: Iterable[str]) -> None:
        """These are evicted."""
        for key in keys:
            load = self._loads.pop(key, None)
            if load is not None:
                load.voided = True
                self._counters.voided_loads += 1

    def void_all(self) -> None:
        """A new epoch has begun; each carries an older one, which voids it."""
        self._counters.voided_loads += len(self._loads)
        self._loads.clear()
