"""Eviction in aiocache caches that belong to others (`Client.attach`): nothing is read or stored there.

aiocache's own `clear()` is never called: on Redis it is FLUSHDB, or KEYS over an unescaped pattern; in memory it leaves
the timers of what it cleared, which then kill newer entries.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

from aiocache.base import BaseCache

from cacheinval.coherence import Eviction
from cacheinval.errors import CacheError, ConfigurationError

__all__ = ["AttachedCache"]

OPERATION_TIMEOUT = 5.0
_SCAN_COUNT = 500


class AttachedCache:
    """An aiocache cache whose keys are invalidated. Its entries carry no tags, so tags do not concern it.

    Args:
        cache: a memory, Redis or Memcached cache of aiocache; a Redis cache needs a namespace.
        may_flush_all: allows `flush_all` on Memcached, which cannot drop the entries of one namespace.

    Raises:
        ConfigurationError: everything in this cache could not be dropped without harm to others, or aiocache is
            switched off by AIOCACHE_DISABLE, which makes deletes do nothing.
    """

    def __init__(self, cache: BaseCache, *, may_flush_all: bool = False) -> None:
        if os.environ.get("AIOCACHE_DISABLE") == "1":
            raise ConfigurationError(
                "AIOCACHE_DISABLE=1 makes aiocache's deletes do nothing; accepted: unset"
            )
        self._cache = cache
        self._drop_all = self._way_to_drop_all(cache, may_flush_all)

    def _way_to_drop_all(self, cache: BaseCache, may_flush_all: bool) -> Callable[[], Awaitable[None]]:
        if cache.NAME == "redis":
            if not cache.namespace:
                raise ConfigurationError(
                    "attach: this Redis cache has no namespace, so its keys cannot be told from others'; "
                    "accepted: RedisCache(namespace=…)"
                )
            return self._unlink_all
        if cache.NAME == "memcached":
            if not may_flush_all:
                raise ConfigurationError(
                    "attach: Memcached can only be cleared as a whole; accepted: attach(cache, may_flush_all=True)"
                )
            return self._flush_all
        if hasattr(cache, "_cache") and hasattr(cache, "_handlers"):  # aiocache's SimpleMemoryCache
            return self._delete_all
        return self._clear_bounded(cache)

    @staticmethod
    def _clear_bounded(cache: BaseCache) -> Callable[[], Awaitable[None]]:
        reset = getattr(cache, "reset", None)
        if reset is None:
            raise ConfigurationError(
                f"attach: do not know how to clear a {type(cache).__name__}; accepted: aiocache's memory, Redis and "
                "Memcached caches, and BoundedMemoryCache"
            )

        async def clear() -> None:
            reset()

        return clear

    async def evict(self, eviction: Eviction) -> None:
        """Deletes what `eviction` names.

        Raises:
            CacheError: the cache cannot be reached.
        """
        try:
            if eviction.everything:
                await self._drop_all()
                return
            for key in eviction.keys:
                await _within_deadline(self._cache.delete(key))
                self._forget_timer(self._cache.build_key(key))
        except Exception as error:  # each driver has errors of its own
            raise CacheError(
                f"the attached {self._cache.NAME} cache failed: {type(error).__name__} {error}".strip()
            ) from error

    async def _unlink_all(self) -> None:
        pattern = re.sub(r"([*?\[\]\\^-])", r"\\\1", self._cache.build_key("")) + "*"
        cursor: Any = 0
        while True:
            scan = self._cache.raw("scan", cursor, match=pattern, count=_SCAN_COUNT)
            cursor, keys = await _within_deadline(scan)
            if keys:
                await _within_deadline(self._cache.raw("unlink", *keys))
            if int(cursor) == 0:
                return

    async def _flush_all(self) -> None:
        await _within_deadline(self._cache.raw("flush_all"))

    async def _delete_all(self) -> None:
        # aiocache has no public list of keys. Deleting each cancels its timer, which `clear()` forgets to do.
        prefix = self._cache.build_key("")
        for key in [key for key in self._cache._cache if key.startswith(prefix)]:
            await self._cache._delete(key)
            self._forget_timer(key)

    def _forget_timer(self, key: str) -> None:
        # Deleting a value that is None leaves its timer in aiocache's memory cache, to kill a newer entry.
        timers = getattr(self._cache, "_handlers", None)
        if timers and key in timers and key not in self._cache._cache:
            timers.pop(key).cancel()


async def _within_deadline(operation: Awaitable[Any]) -> Any:
    # For each by itself: many keys, or a large server, take their time.
    async with asyncio.timeout(OPERATION_TIMEOUT):
        return await operation
