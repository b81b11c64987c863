"""Which keys are loaded again after an eviction, and when. No I/O, no clock, no tasks."""

import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

__all__ = ["LOOK_EVERY", "Hot", "Warming"]

LOOK_EVERY = 1.0
"""Seconds after which an entry that is read is noted as hot anew; hits in between cost nothing."""

APART = 0.01
"""Seconds between two of many keys that are evicted at once, on average: a new epoch is not a stampede."""


class Hot(NamedTuple):
    """A key that was read from the cache, and how to load it again."""

    key: str
    reload: Any
    tags: frozenset[str]


class Warming:
    """The keys that were read most recently, and those of them that are to be loaded again.

    A key is noted when it is read from the cache, not when it is loaded, and forgotten when it is evicted: nobody loads for
    ever what nobody reads. Times are of any clock that only goes forward.

    Args:
        most: how many keys are noted; the one that was not read for longest goes first.
        interval: seconds between two loads of one key.
        drawn: a random number from 0 to 1.
    """

    def __init__(self, most: int, interval: float, drawn: Callable[[], float] = random.random) -> None:
        self._most, self._interval, self._drawn = most, interval, drawn
        self._hot: OrderedDict[str, Hot] = OrderedDict()
        self._due: dict[str, Hot] = {}
        self._order: list[tuple[float, str]] = []
        self._begun: OrderedDict[str, float] = OrderedDict()

    @property
    def hot(self) -> int:
        """How many keys would be loaded again if they were evicted."""
        return len(self._hot)

    @property
    def waiting(self) -> int:
        """How many keys are to be loaded again."""
        return len(self._due)

    @property
    def next_at(self) -> float | None:
        """When the next key is due."""
        return self._order[0][0] if self._order else None

    def read(self, hot: Hot) -> None:
        """It was read from the cache."""
        self._hot[hot.key] = hot
        self._hot.move_to_end(hot.key)
        if len(self._hot) > self._most:
            self._hot.popitem(last=False)

    def evicted(self, keys: Iterable[str], tags: Collection[str], everything: bool, now: float) -> None:
        """These were evicted at `now`: what was hot of them is due soon."""
        gone: list[Hot]
        if everything:
            gone = list(self._hot.values())
        else:
            gone = [self._hot[key] for key in keys if key in self._hot]
            if tags:
                names = frozenset(tags)
                gone += [hot for hot in self._hot.values() if not names.isdisjoint(hot.tags)]
        for hot in gone:
            if self._hot.pop(hot.key, None) is not None:
                self.put_off(hot, now + self._drawn() * len(gone) * APART)

    def put_off(self, hot: Hot, until: float) -> None:
        """It is due at `until`, or `interval` after it was loaded last; unless it is due already, or as many are as are hot."""
        if hot.key in self._due or len(self._due) >= self._most:
            return
        at = max(until, self._begun.get(hot.key, until - self._interval) + self._interval)
        self._due[hot.key] = hot
        heapq.heappush(self._order, (at, hot.key))

    def take(self, now: float) -> Hot | None:
        """One that is due at `now`."""
        if not self._order or self._order[0][0] > now:
            return None
        return self._due.pop(heapq.heappop(self._order)[1])

    def begun(self, key: str, now: float) -> None:
        """It is being loaded again since `now`."""
        self._begun[key] = now
        self._begun.move_to_end(key)
        while now - next(iter(self._begun.values())) >= self._interval:
            self._begun.popitem(last=False)
