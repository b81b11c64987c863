"""What an instance has evicted lately: kept for whoever looks at the fleet, bounded, and cheap where nobody does."""

from collections import deque
from typing import Any

import msgspec

from cacheinval.messages import Invalidate

__all__ = ["Evicted", "Recent", "RecentEvictions"]

MOST_KEPT = 200
MOST_TOLD = 32
"""Evictions that one answer tells: many instances may answer at once."""

NAMES_TOLD = 3
NAME_LENGTH = 80  # characters of a name: enough to know it by


class Evicted(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One eviction, with enough of its names to know it by.

    `at` is when it was done, by the instance's clock; `committed_at` when the change was committed, or else published.
    `more` names are not among `keys` and `tags`. `own` says that this instance wrote it itself, and had evicted it before
    it was published; `reason` that it began a new epoch, and dropped everything.
    """

    at: float
    committed_at: float | None = None
    origin: str | None = None
    seq: int | None = None
    keys: list[str] = []
    tags: list[str] = []
    more: int = 0
    all: bool = False
    own: bool = False
    reason: str | None = None


class Recent(msgspec.Struct):
    """The evictions of an instance between `since` and `until`, by its clock, the oldest first."""

    since: float
    until: float
    told: list[Evicted] = []


class RecentEvictions:
    """Remembers the last evictions."""

    def __init__(self) -> None:
        # Tuples, made into what is told when somebody asks: every message passes here.
        self._kept: deque[tuple[Any, ...]] = deque(maxlen=MOST_KEPT)

    def note(self, message: Invalidate, now: float, *, own: bool = False) -> None:
        """What `message` names is evicted."""
        keys, tags = message.keys, message.tags
        self._kept.append(
            (
                now,
                message.committed_at or message.at,
                message.origin,
                message.seq,
                keys[:NAMES_TOLD],
                tags[:NAMES_TOLD],
                len(keys) + len(tags),
                message.all,
                own,
                None,
            )
        )

    def note_epoch(self, reason: str, now: float) -> None:
        """Everything was dropped, for a reason of this instance's own."""
        self._kept.append((now, None, None, None, (), (), 0, True, False, reason))

    def told(self, seconds: float, now: float) -> Recent:
        """The newest of the last `seconds`."""
        since = now - seconds
        newest = [kept for kept in self._kept if kept[0] >= since]
        if (
            len(newest) > MOST_TOLD
        ):  # fewer than are kept, so that what was forgotten is never claimed to be told
            newest = newest[-MOST_TOLD:]
            since = newest[0][0]
        return Recent(since, now, [_evicted(*kept) for kept in newest])


def _evicted(
    at: float,
    committed_at: float | None,
    origin: str | None,
    seq: int | None,
    keys: list[str],
    tags: list[str],
    names: int,
    everything: bool,
    own: bool,
    reason: str | None,
) -> Evicted:
    tags = tags[: NAMES_TOLD - len(keys)]
    return Evicted(
        at=at,
        committed_at=committed_at,
        origin=origin,
        seq=seq,
        keys=[_short(key) for key in keys],
        tags=[_short(tag) for tag in tags],
        more=names - len(keys) - len(tags),
        all=everything,
        own=own,
        reason=reason,
    )


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
