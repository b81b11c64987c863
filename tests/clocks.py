"""Clocks that tests set."""

import time
from types import SimpleNamespace
from typing import Any

from cacheinval.clock import Clock

__all__ = ["SetClock", "WrongClock", "shifted"]


class SetClock(Clock):
    """The clock of this host, `ahead` seconds later."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = 0.0

    def now(self) -> float:
        """Seconds since 1970, by this clock."""
        return super().now() + self.ahead


def shifted(seconds: float) -> Any:
    """The module `time` as one sees it whose wall clock is wrong by so much."""
    return SimpleNamespace(
        time=lambda: time.time() + seconds,
        clock_gettime=time.clock_gettime,
        CLOCK_MONOTONIC=time.CLOCK_MONOTONIC,
        CLOCK_BOOTTIME=time.CLOCK_BOOTTIME,
        monotonic=time.monotonic,
    )


class WrongClock(Clock):
    """That of a host whose wall clock has always been wrong by so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self.start += seconds

    def drift(self) -> float:
        return super().drift() + self._seconds
