"""How far a stream has been read, and by what it is known again.

A stream keeps what was published, for a while, and each message has an offset in it. Whoever was away goes on reading where
he left, provided that it is still the same stream and still holds that place: the message there, looked at once more, has
to be the one that was there. An offset alone would not do, since those of a stream that was made again start over.
"""

from collections.abc import Hashable
from typing import Literal, NamedTuple

from cacheinval.messages import Invalidate, Message, Tick, Unknown

__all__ = ["Interruption", "Position"]

Interruption = Literal["the stream does not go on where it was left", "messages missing in the stream"]

STEP = 2
"""Offsets from one message to the next: 1, or 2 where the broker has put a record of its own between them, as it does at the
head of each segment. What retention removes are whole segments, of many messages each."""


class _Place(NamedTuple):
    offset: int
    message: Hashable
    """What no other message is, in whatever stream."""


class Position:
    """Follows the offsets of one subscription after the other."""

    def __init__(self) -> None:
        self._kept: _Place | None = None  # all up to it is evicted
        self._passed: _Place | None = None  # all up to it has arrived
        self._expected: _Place | None = None
        self._last: int | None = None
        self._reading = False

    @property
    def offset(self) -> int | None:
        """Where to go on reading: at a message that is known; None where there is none."""
        return None if self._kept is None else self._kept.offset

    def forget(self) -> None:
        """What was read before is of no use: reading goes on with whatever comes, once it has begun anew."""
        self._kept = None
        self.leave()

    def leave(self) -> None:
        """The subscription is lost. What of it is still in hand moves nothing: it may not be all that there was."""
        self._reading = False
        self._passed = self._expected = self._last = None

    def begin(self) -> None:
        """A subscription begins at `offset`, or anywhere if there is none."""
        self.leave()
        self._reading = True
        self._expected = self._kept

    def recognises(self, offset: int, message: Message | Unknown | None) -> bool:
        """Whether this is the message at which reading goes on: it is evicted, and what follows it follows what was read."""
        if self._expected is None or self._expected != (offset, _identity(message)):
            return False
        self._last, self._expected = offset, None
        return True

    def passes(self, offset: int, message: Message | Unknown | None) -> Interruption | None:
        """Another message has arrived, None if it cannot be understood: why some may be missing before it, or None."""
        if not self._reading:
            return None
        missing = self._missing_before(offset)
        self._last, self._expected = offset, None
        if missing is not None:
            self._kept = self._passed = None
        identity = _identity(message)
        if identity is not None:
            self._passed = _Place(offset, identity)
        return missing

    def _missing_before(self, offset: int) -> Interruption | None:
        if self._expected is not None:
            return "the stream does not go on where it was left"
        if self._last is not None and not 1 <= offset - self._last <= STEP:
            return "messages missing in the stream"
        return None

    def evicted(self) -> None:
        """All that has arrived is evicted."""
        if self._passed is not None:
            self._kept, self._passed = self._passed, None


def _identity(message: Message | Unknown | None) -> Hashable:
    """None for what may be published twice with the same words; numbers and times of ticks are used once."""
    if isinstance(message, Invalidate) and message.origin is not None and message.seq is not None:
        return ("invalidate", message.origin, message.seq)
    if isinstance(message, Tick):
        return ("tick", message.origin, message.as_of)
    return None
