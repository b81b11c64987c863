"""How far this instance can be believed: what it is in doubt about, and what is proven in spite of that."""

import math
from typing import Literal

from cacheinval.coherence.proof import Proof
from cacheinval.coherence.registration import NOT_YET, Registration

__all__ = ["SUSPECT_AGE", "Matter", "Trust"]

SUSPECT_AGE = 1.0
"""Seconds for which a suspect instance without `max_staleness` still serves what it loaded itself."""

Matter = Literal["subscription", "silence", "gap", "eviction", "registration"]
"""What an instance may be in doubt about."""


class Trust:
    """Says of a moment at which a load began whether its value is still fresh enough; what was evicted is not asked here.

    Args:
        max_staleness: seconds; how old a served value may be. None: eventual consistency.
        max_clock_skew: seconds by which clocks of hosts and database may differ.
        registration: under which alone anything is served, if it is required.
    """

    def __init__(
        self, max_staleness: float | None, max_clock_skew: float, registration: Registration
    ) -> None:
        self.max_staleness = max_staleness
        self.registration = registration
        self.standing = registration.standing
        self.proof = Proof(max_staleness, max_clock_skew, self.standing)
        self.doubts: dict[Matter, str] = {"subscription": "not subscribed yet"}
        if registration.required:
            self.doubts["registration"] = NOT_YET
        self.age_limit = 0.0
        """Seconds for which a value is fresh by its age alone."""
        self._set_age_limit()

    @property
    def suspect(self) -> str | None:
        """Why this instance may have missed something, or None: what it cannot evict explains all else."""
        return self.doubts.get("eviction") or next(iter(self.doubts.values()), None)

    def doubt(self, about: Matter, reason: str) -> None:
        """From now on this instance is suspect, until `settle` is called for the same matter."""
        self.doubts[about] = reason
        self._set_age_limit()

    def settle(self, about: Matter) -> None:
        """The doubt about this matter is over."""
        if self.doubts.pop(about, None) is not None:
            self._set_age_limit()

    def _set_age_limit(self) -> None:
        before = self.age_limit
        # With max_staleness an entry's own age is its proof; without, age counts only while something may be missing.
        if self.max_staleness is not None:
            self.age_limit = self.max_staleness
        else:
            self.age_limit = SUSPECT_AGE if self.doubts else math.inf
        if self.age_limit < before:
            self.standing.shake()

    def too_old(self, load_started: float, now: float) -> bool:
        """Whether what a load read that began then can be proven no more to be fresh."""
        return now - load_started > self.age_limit and not self.proof.covers(load_started, now)

    def good_until(self, load_started: float) -> float:
        """Until when it surely is not too old, nor unregistered, as long as nothing shakes `standing`.

        Ticks may prove more meanwhile.
        """
        fresh = load_started + self.age_limit
        if load_started > self.proof.extends:
            fresh = max(fresh, self.proof.until)
        return min(self.registration.until, fresh)
