"""All caches of one client: the one that it reads through, and those that it was given to keep honest."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from cacheinval.backends.attached import AttachedCache
from cacheinval.cache import CoherentCache
from cacheinval.coherence import Coherence, Eviction
from cacheinval.errors import CacheError

__all__ = ["Caches"]

log = logging.getLogger("cacheinval.client")


class Caches:
    """Evicts from all of them what this client itself has made stale.

    Args:
        now: the clock.
        aside: runs what nobody is to wait for.
    """

    def __init__(
        self,
        cache: CoherentCache,
        coherence: Coherence,
        now: Callable[[], float],
        aside: Callable[[Coroutine[Any, Any, None]], "asyncio.Future[None]"],
    ) -> None:
        self.all: list[Any] = [cache]
        self._cache, self._coherence, self._now, self._aside = cache, coherence, now, aside

    def attach(self, cache: AttachedCache) -> None:
        """From now on it is evicted from, too."""
        self.all.append(cache)

    @property
    def attached(self) -> int:
        """How many there are beside the client's own."""
        return len(self.all) - 1

    def evict(self, eviction: Eviction) -> "asyncio.Future[None] | None":
        """Evicts in every cache; None when it is done, or what ends (never with an error) when it has been tried."""
        self._coherence.evict(eviction, self._now())
        if self._cache.evict_now(eviction) and not self.attached:
            return None
        return self._aside(self._try_to_evict(eviction))

    async def _try_to_evict(self, eviction: Eviction) -> None:
        for cache in self.all:
            try:
                await (self._cache.evict_ahead if cache is self._cache else cache.evict)(eviction)
            except CacheError:
                pass  # the message comes back here, and is not acknowledged before it is done
            except Exception:
                log.exception("a cache cannot evict")
