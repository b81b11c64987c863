"""The one clock by which ages are judged."""

import time
from functools import partial

__all__ = ["Clock"]

# CLOCK_BOOTTIME goes on while the machine is suspended: an entry does not stay young in its sleep.
_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock:
    """Wall clock time at start, advanced by a clock that nobody sets and that counts suspended time."""

    def __init__(self) -> None:
        # `start` and `elapsed` are for where a call matters that adds them up: `now` is their sum.
        self.elapsed = partial(time.clock_gettime, _ELAPSED)
        self.start = time.time() - self.elapsed()

    def drift(self) -> float:
        """Seconds by which the wall clock has been set, or has run differently, since the start or `restart`."""
        return time.time() - self.now()

    def restart(self) -> None:
        """Takes the wall clock as it is now; `now` may jump, in either direction."""
        self.start = time.time() - self.elapsed()

    def now(self) -> float:
        """Seconds since 1970; never goes back but by `restart`."""
        return self.start + self.elapsed()
