"""What a client itself has made stale goes from all of its caches."""

import asyncio
from typing import Any

from cacheinval.client.caches import Caches
from cacheinval.coherence import Coherence, Eviction
from cacheinval.errors import CacheError


class Outside:
    """A cache outside the process; it says what is asked of it."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self._name, self._asked = name, asked
        self.fails = False

    def evict_now(self, eviction: Eviction) -> bool:
        return False

    async def evict(self, eviction: Eviction) -> None:
        self._asked.append(f"{self._name} evicts")

    async def evict_ahead(self, eviction: Eviction) -> None:
        self._asked.append(f"{self._name} evicts ahead of the message")
        if self.fails:
            raise CacheError("away")


async def test_it_evicts_ahead_of_the_message_by_which_it_is_evicted_once_more() -> None:
    """By that one alone the cache is marked: other processes of this name write, too."""
    asked: list[str] = []
    cache: Any = Outside("its own", asked)
    attached: Any = Outside("an attached one", asked)
    caches = Caches(cache, Coherence(), lambda: 0.0, asyncio.ensure_future)
    caches.attach(attached)
    for cache.fails in (False, True):
        asked.clear()
        done = caches.evict(Eviction(["k"]))
        assert done is not None
        await done
        assert asked == ["its own evicts ahead of the message", "an attached one evicts"]
