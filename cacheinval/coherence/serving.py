"""Which entries answer a read."""

from collections.abc import Iterable
from typing import Any, Literal

from cacheinval.coherence.entries import Entry, Moment
from cacheinval.coherence.epochs import Epochs
from cacheinval.coherence.marks import Marks
from cacheinval.coherence.trust import Matter, Trust

__all__ = ["Serving"]


class Serving:
    """Judges entries by what has been evicted, and by how far the instance can be believed.

    Args:
        max_clock_skew: seconds by which clocks of hosts may differ.
    """

    def __init__(self, trust: Trust, epochs: Epochs, marks: Marks, max_clock_skew: float) -> None:
        self._trust, self._epochs, self._marks = trust, epochs, marks
        self._max_clock_skew = max_clock_skew
        self._registers = trust.registration.required
        self._ages_since = 1  # the first epoch of whose entries the ages can be told

    @property
    def moment(self) -> Moment:
        """How things are now: what an entry is judged by that is looked up elsewhere from now on."""
        epochs, proof = self._epochs, self._trust.proof
        return Moment(epochs.epoch, epochs.generation, proof.until, proof.extends, self._marks.at)

    def seen(self, moment: Moment, marks: Iterable[str | None]) -> Moment:
        """`moment`, now that the cache outside was seen to bear these `marks` of this instance: it may have gone back."""
        return moment._replace(stands=self._marks.stand(marks, moment.marks))

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
        if not moment.stands or entry.load_started > now:
            return False
        proven = now <= moment.until and entry.load_started > moment.extends
        return (proven or now - entry.load_started <= self._trust.age_limit) and self.may_serve(entry, now)

    def may_hold_found(self, entry: Entry, began: float, now: float, moment: Moment) -> bool:
        """Whether such an entry answers all who wait for a look that began at `began`, and may be kept in the process.

        They began to read between then and now, so it has to be good at both.
        """
        return all(self.may_serve_found(entry, at, moment) for at in (began, now))

    def may_serve(self, entry: Entry, now: float, overtime: float = 0.0) -> bool:
        """Whether a read that begins at `now` may be answered with `entry`, whose ttl ran out no more than `overtime`
        seconds ago.

        That is all that `stale_while_revalidate` excuses: what was evicted is not served for its sake, nor what cannot be
        proven to be fresh.
        """
        epochs = self._epochs
        if entry.epoch != epochs.epoch or now >= entry.expires_at + overtime:
            return False
        if self._trust.too_old(entry.load_started, now):
            return False
        if self._registers and not self._trust.registration.covers(entry.load_started, now):
            return False
        if entry.generation == epochs.generation or not entry.tags:
            return True
        if not epochs.tags_stand(entry.tags, entry.generation):
            return False
        entry.generation = epochs.generation  # looked at once for each tag eviction, not at each hit
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
        """Until when `entry`, which may be served now, may be as long as nothing shakes `standing`; never too long."""
        return min(entry.expires_at, self._trust.good_until(entry.load_started))

    def bypassing(self, entry: Entry | None, now: float) -> "Matter | Literal['age'] | None":
        """What keeps freshness from being proven, where a load is made for that; None: because nothing is cached."""
        if self._trust.doubts:
            return next(iter(self._trust.doubts))
        if now >= self._trust.registration.until:
            return "registration"
        if entry is None or entry.epoch != self._epochs.epoch:
            return None
        if self._trust.too_old(entry.load_started, now):
            return "age"
        return None if self._trust.registration.covers(entry.load_started, now) else "registration"

    def expire(self, entry: Entry) -> bool:
        """`entry` is evicted, and no more to be had but by `may_serve_instead`; whether it was not before."""
        before, entry.epoch = entry.epoch, -abs(entry.epoch)
        entry.standing = -1
        return before == self._epochs.epoch

    def forget_ages(self) -> None:
        """The clock was set, and everything is about to be evicted: of what is kept nobody can say how old it is."""
        self._ages_since = self._epochs.epoch + 1
