"""Clocks that tests set."""

from cacheinval.clock import Clock

__all__ = ["SetClock"]


class SetClock(Clock):
    """The clock of this host, `ahead` seconds later."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = 0.0

    def now(self) -> float:
        """Seconds since 1970, by this clock."""
        return super().now() + self.ahead
