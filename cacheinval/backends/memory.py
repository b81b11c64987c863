"""A bounded cache in the process, as an aiocache backend that can also be driven without an await."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

import cachebox
from aiocache.base import BaseCache
from aiocache.serializers import NullSerializer

__all__ = ["BoundedMemoryCache"]

SLICE = 0.0005
"""Seconds for which giving memory back holds the loop at a time."""


class BoundedMemoryCache(BaseCache):  # type: ignore[misc]  # aiocache has no types
    """At most `max_entries` values; the least recently used goes first.

    Beside aiocache's coroutines it has `peek`, `look`, `put`, `drop` and `reset`, which do not suspend: a check and the store
    that follows it are one step. Values are kept as they are, without copies.

    Args:
        max_entries: how many entries are kept at most.
    """

    NAME = "bounded-memory"

    def __init__(self, max_entries: int = 100_000, **kwargs: Any) -> None:
        # Nothing here can take long, and a time limit would cost a task for each operation.
        super().__init__(**{"serializer": NullSerializer(), "timeout": None, **kwargs})
        self.max_entries = max_entries
        self._values: cachebox.LRUCache[str, Any] = cachebox.LRUCache(max_entries)
        self._spare: cachebox.LRUCache[str, Any] | None = None
        self._expiry: dict[
            str, float
        ] = {}  # only of values stored through aiocache's own methods, with a ttl
        self.peek = self._values.get

    # Without suspension

    def look(self, key: str) -> Any | None:
        """The value of `key`, which stays as recently used as it was."""
        return self._values.peek(key)

    def put(self, key: str, value: Any) -> None:
        """Stores `value` now."""
        self._values.insert(key, value)

    def drop(self, keys: Iterable[str]) -> int:
        """Removes `keys` now; returns how many were there."""
        missing = object()
        pop = self._values.pop
        return sum(pop(key, missing) is not missing for key in keys)

    def reset(self) -> None:
        """Removes everything now. Within an event loop the values are freed little by little, between other work.

        Until they are, there can be as many again beside those that are stored meanwhile. Their map serves again after the
        next reset: to give a large one back, or to let another grow as large, would hold the loop longer than all the rest.
        """
        removed = self._values
        self._values = cachebox.LRUCache(self.max_entries) if self._spare is None else self._spare
        self._spare = None
        self._expiry = {}
        self.peek = self._values.get
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # nobody else waits for this thread
            return
        loop.call_soon(self._free, removed, loop)

    def _free(self, removed: "cachebox.LRUCache[str, Any]", loop: asyncio.AbstractEventLoop) -> None:
        until = time.monotonic() + SLICE
        while removed.drain(100):
            if time.monotonic() >= until:
                loop.call_soon(self._free, removed, loop)
                return
        self._spare = removed

    def __len__(self) -> int:
        return len(self._values)

    # As aiocache asks for it

    async def _get(self, key: str, encoding: str | None = None, _conn: Any = None) -> Any:
        if self._expired(key):
            await self._delete(key)
        return self._values.get(key)

    async def _gets(self, key: str, encoding: str | None = None, _conn: Any = None) -> Any:
        return await self._get(key)

    async def _multi_get(
        self, keys: Sequence[str], encoding: str | None = None, _conn: Any = None
    ) -> list[Any]:
        return [await self._get(key) for key in keys]

    async def _set(
        self, key: str, value: Any, ttl: float | None = None, _cas_token: Any = None, _conn: Any = None
    ) -> bool | int:
        if _cas_token is not None and _cas_token != await self._get(key):
            return 0
        self.put(key, value)
        await self._expire(key, ttl or 0)
        return True

    async def _multi_set(
        self, pairs: Iterable[tuple[str, Any]], ttl: float | None = None, _conn: Any = None
    ) -> bool:
        for key, value in pairs:
            await self._set(key, value, ttl)
        return True

    async def _add(self, key: str, value: Any, ttl: float | None = None, _conn: Any = None) -> bool:
        if await self._exists(key):
            raise ValueError(f"Key {key} already exists, use .set to update the value")
        return bool(await self._set(key, value, ttl))

    async def _exists(self, key: str, _conn: Any = None) -> bool:
        return key in self._values and not self._expired(key)

    async def _increment(self, key: str, delta: int, _conn: Any = None) -> int:
        try:
            value = int(await self._get(key) or 0) + delta
        except (TypeError, ValueError):
            raise TypeError("Value is not an integer") from None
        self.put(key, value)
        return value

    async def _expire(self, key: str, ttl: float, _conn: Any = None) -> bool:
        if key not in self._values:
            return False
        self._expiry.pop(key, None)
        if ttl:
            if len(self._expiry) >= 2 * self.max_entries:
                self._expiry = {known: at for known, at in self._expiry.items() if known in self._values}
            self._expiry[key] = time.monotonic() + ttl
        return True

    async def _delete(self, key: str, _conn: Any = None) -> int:
        self._expiry.pop(key, None)
        return self.drop([key])

    async def _clear(self, namespace: str | None = None, _conn: Any = None) -> bool:
        if namespace:
            self.drop([key for key in self._values if key.startswith(namespace)])
        else:
            self.reset()
        return True

    async def _raw(
        self, command: str, *args: Any, encoding: str | None = None, _conn: Any = None, **kwargs: Any
    ) -> Any:
        return getattr(self._values, command)(*args, **kwargs)

    async def _redlock_release(self, key: str, value: Any) -> int:
        return await self._delete(key) if await self._get(key) == value else 0

    def _expired(self, key: str) -> bool:
        expires_at = self._expiry.get(key)
        return expires_at is not None and time.monotonic() >= expires_at
