"""When a tick may be sent: decisions only, no I/O."""

from collections.abc import Iterable
from uuid import UUID

from cacheinval.outbox.session import MOST_WAITING, Confirmed, Look

__all__ = ["Ticks"]


class Ticks:
    """One look at the outbox at a time, and the rows that have to be confirmed before it may be told as a tick.

    The rows are a set, as they were seen: rows become visible in any order, so no number or time can stand for them. The
    numbers that the tick tells are read when none of these rows is left: a client notes the number of what it had
    confirmed together with the deletion of its row, which may come after the look.

    Args:
        interval: seconds between ticks.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._next = 0.0
        self._look: Look | None = None
        self.waiting: set[UUID] = set()
        """Rows seen by the look, and not yet known to be confirmed."""
        self._confirmed: Confirmed | None = None

    def due(self, now: float) -> bool:
        """Whether it is time for another look; `now` in seconds of any steady clock."""
        return self._look is None and now >= self._next

    def put_off(self, now: float) -> None:
        """This look is not to be used; the next comes in its time."""
        self._next = now + self._interval

    def begin(self, look: Look, now: float) -> None:
        """From this look a tick will be made, unless it saw only a part of what waits."""
        self._next = now + self._interval
        if len(look.waiting) < MOST_WAITING:
            self._look, self.waiting, self._confirmed = look, set(look.waiting), None

    def confirmed(self, ids: Iterable[UUID]) -> None:
        """These rows were published by this relay, and confirmed."""
        self.waiting.difference_update(ids)

    @property
    def wanted(self) -> set[UUID] | None:
        """The rows to ask the outbox for; None where there is no look to make a tick of."""
        return None if self._look is None else self.waiting

    def left(self, ids: set[UUID], confirmed: Confirmed) -> None:
        """Of the rows wanted these are still in the outbox, and this is noted beside it, seen at once."""
        self.waiting &= ids
        self._confirmed = None if self.waiting else confirmed

    def take(self) -> tuple[Look, Confirmed] | None:
        """The look that may be told now, with what was noted, once: nothing that it saw is waited for any more."""
        if self._look is None or self._confirmed is None:
            return None
        told = self._look, self._confirmed
        self._look = self._confirmed = None
        return told
