"""For how long names gather before they are published."""

import math

__all__ = ["Pace"]

WINDOW = 0.02
"""Seconds back in time at which a write counts for a third (1/e) of one that comes now."""

BUSY, PLENTY = 500.0, 2000.0
"""Writes a second: below the first each is published at once."""

GATHER_MOST = 0.008
"""Seconds, where so many come as are plenty; less in proportion."""


class Pace:
    """How many writes come lately, by which the next ones wait for more.

    A message costs its publisher, the broker and every reader much, and one more name in it next to nothing; but a write
    that is alone has nothing to wait for, also if chance brought it together with another one.
    """

    def __init__(self) -> None:
        self._rate, self._at = 0.0, -math.inf

    def published(self, writes: int, now: float) -> None:
        """So many writes went out together; `now` in seconds of any clock that only goes forward."""
        self._rate, self._at = self._lately(now) + writes / WINDOW, now

    def gather(self, now: float) -> float:
        """Seconds for which a write that is there now may wait for others."""
        rate = self._lately(now)
        return 0.0 if rate < BUSY else GATHER_MOST * min(1.0, rate / PLENTY)

    def _lately(self, now: float) -> float:
        return self._rate * math.exp((self._at - now) / WINDOW)
