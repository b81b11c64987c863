"""What a replica's answer is compared with: the lowest versions that may still be stored, and evictions that told none."""

import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from itertools import repeat

__all__ = ["MAX_AT_ONCE", "MAX_FLOORS", "NO_FLOOR", "Floors"]

MAX_FLOORS = 100_000
"""Names of each sort that are remembered."""

MAX_AT_ONCE = 10_000
"""Names of one eviction that are noted one by one; of a larger one it is only noted that it was."""

NO_FLOOR = -math.inf


class Floors:
    """What was evicted lately, with the versions that replaced it.

    It is kept for `max_replica_lag` seconds: a replica that is asked after that has applied whatever made the eviction.
    What is asked about a moment concerns a load that begins then, since a later eviction voids that load anyway.

    Args:
        max_replica_lag: seconds by which a replica may lag behind the primary.
        most: names of each sort that are remembered.
        wanted: whether anything is to be compared. Until then it is only noted that something was evicted, since most
            loads read the primary, and noting each name takes longer than evicting it.
    """

    def __init__(self, max_replica_lag: float, most: int = MAX_FLOORS, *, wanted: bool = True) -> None:
        self.wanted = wanted
        self._lag = max_replica_lag
        self._most = most
        self._forgotten_until = self._everything_until = -math.inf
        self._start()

    def _start(self) -> None:
        self._versions, self._unversioned, self._tags = _Recent(), _Recent(), _Recent()

    def note(
        self, keys: Collection[str], versions: Sequence[int | None], tags: Collection[str], now: float
    ) -> None:
        """These were evicted at `now`; `versions` is empty, or one for each key, None where unknown."""
        if not self.wanted:
            if versions:
                self._forgotten_until = now + self._lag
            elif keys or tags:
                self._everything_until = now + self._lag
            return
        if len(keys) + len(tags) > MAX_AT_ONCE:
            self.forget(now)
            return
        until = now + self._lag
        for key, version in zip(keys, versions or repeat(None), strict=False):
            if version is None:
                self._unversioned.note(key, math.inf, until, now)
            else:
                self._versions.note(key, version, until, now)
        for tag in tags:
            self._tags.note(tag, math.inf, until, now)
        if max(len(self._versions), len(self._unversioned), len(self._tags)) > self._most:
            self.forget(now)

    def note_everything(self, now: float) -> None:
        """Everything was evicted at `now`."""
        self._everything_until = now + self._lag

    def forget(self, now: float) -> None:
        """What was evicted before `now` is not known, or too much to remember."""
        self._start()
        self._forgotten_until = now + self._lag

    def lowest(self, key: str, now: float) -> float:
        """The floor of `key`: a replica that is asked at `now` and answers with a lower version, or with none, lags.

        NO_FLOOR where any answer may be right, infinity where none can be told to be.
        """
        return math.inf if now <= self._forgotten_until else self._versions.highest(key, now)

    def comparable(self, key: str, tags: Iterable[str], now: float) -> bool:
        """Whether the floor tells all there is to know: no eviction that a version cannot be compared with was noted."""
        return (
            now > max(self._everything_until, self._forgotten_until)
            and self._unversioned.highest(key, now) == NO_FLOOR
            and all(self._tags.highest(tag, now) == NO_FLOOR for tag in tags)
        )


class _Recent:
    """Of each name the highest version that still counts; the name that was noted longest ago goes first.

    Of a name two versions are kept: the highest, and the highest of those noted since. A row that was deleted and
    inserted again starts over with low versions, and is not held to the old ones for longer than these count.
    """

    def __init__(self) -> None:
        self._noted: OrderedDict[str, tuple[tuple[float, float], ...]] = OrderedDict()

    def note(self, name: str, version: float, until: float, now: float) -> None:
        higher = [one for one in self._noted.get(name, ()) if one[1] >= now and one[0] > version]
        self._noted[name] = (*higher[:1], (higher[1][0] if higher[1:] else version, until))
        self._noted.move_to_end(name)
        while next(iter(self._noted.values()))[-1][1] < now:
            self._noted.popitem(last=False)

    def highest(self, name: str, now: float) -> float:
        return next((version for version, until in self._noted.get(name, ()) if now <= until), NO_FLOOR)

    def __len__(self) -> int:
        return len(self._noted)
