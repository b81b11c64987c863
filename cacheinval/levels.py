"""Two levels: entries in the process, in front of a cache outside it which other instances fill and evict as well."""

from collections.abc import Collection
from typing import Any

from cacheinval.cache import (
    MOST_LOADS,
    Factory,
    InProcessCache,
    LoadAndStore,
    MemoryBackend,
    Policies,
    Read,
    Remember,
    SharedCache,
    checked_names,
    in_transaction,
    refuse_stale,
)
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence, Entry, Eviction, Load
from cacheinval.versions import VersionOf

__all__ = ["SECOND_LEVEL", "TwoLevels"]

SECOND_LEVEL = ("hits", "misses", "bypasses", "not_stored", "evicted_entries")
"""The counters of `TwoLevels.second` that say something: it is not read through, but looked into."""


class TwoLevels(InProcessCache):
    """A hit in the process costs what it costs without a second level; everything else looks there before it loads.

    The look is a part of the load, under its token: an eviction that arrives meanwhile voids it, and what it found is kept
    here as old as it is there, with its tags. Values in the process are those that came back from outside, and are handed
    out as they are.

    Args:
        backend: keeps the entries in the process.
        second: the cache outside it, under the same rules.
        coherence, clock, ttl, remember, most_loads, policies: as for any `CoherentCache`.
    """

    _shared = True

    def __init__(
        self,
        backend: MemoryBackend,
        second: SharedCache,
        coherence: Coherence,
        clock: Clock,
        ttl: float,
        remember: Remember = lambda *loaded: None,
        most_loads: int = MOST_LOADS,
        policies: Policies = Policies(),  # noqa: B008 (cannot be changed)
    ) -> None:
        super().__init__(backend, coherence, clock, ttl, remember, most_loads, policies)
        self.second = second

    async def read(
        self,
        key: str,
        factory: Factory,
        *,
        ttl: float | None = None,
        tags: Collection[str] = (),
        model: Any = None,
        version: VersionOf | None = None,
        primary: Factory | None = None,
        stale_if_error: float | None = None,
        stale_while_revalidate: float | None = None,
        ttl_jitter: float | None = None,
        refresh: bool = False,
    ) -> Read:
        """See `CoherentCache.read`. All who read a key name the same `model`."""
        if in_transaction():
            self.counters.bypassed("transaction")
            _, value = self.second.as_stored(await factory(), model)
            return Read(value, "bypass", False)
        refuse_stale(stale_if_error, stale_while_revalidate)
        now = self._now()
        entry: Entry | None = self._backend.peek(key)
        if entry is not None and not refresh and self._coherence.may_serve(entry, now):
            return self._answered_by(entry)
        lifetime, named, was_there = self._lifetime(ttl, ttl_jitter), checked_names(key, tags), False

        async def look_or_load(load: Load) -> tuple[Any, bool]:
            nonlocal was_there
            found, there = await self.second.look(load, model, lifetime)
            if there is not None and not refresh:
                was_there = True
                self._coherence.inherit(load, there)
                return there.value, self._put(load, there.value, there.expires_at)
            self._coherence.let_go(load, self._now())  # nothing has been read yet
            return await super(TwoLevels, self)._in_place(load, load_and_store(found))

        def load_and_store(found: Any) -> LoadAndStore:
            async def load_and_store(load: Load) -> tuple[Any, bool]:
                kept, value = self.second.as_stored(await self._ask(load, factory, version, primary), model)
                stored = self._put(load, value, self._now() + lifetime)
                self.counters.not_stored += not stored
                stored |= await self.second.store(load, kept, lifetime, found)
                if stored:
                    self._remember(key, primary or factory, model)
                return value, stored

            return load_and_store

        read = await self._join_or_load(key, look_or_load, named, now, entry, refresh)
        return Read(read.value, "hit", False, "shared") if was_there else read

    async def _in_place(self, load: Load, load_and_store: LoadAndStore) -> tuple[Any, bool]:
        return await load_and_store(load)  # a look takes no place: places are for loaders

    def _put(self, load: Load, value: Any, expires_at: float) -> bool:
        if not self._coherence.may_store(load):
            return False
        self._backend.put(load.key, self._coherence.entry(load, value, expires_at))
        return True

    async def would_serve(self, key: str, model: Any = None) -> Entry | None:
        """See `CoherentCache.would_serve`."""
        return await super().would_serve(key, model) or await self.second.would_serve(key, model)

    def evict_now(self, eviction: Eviction) -> bool:
        """See `CoherentCache.evict_now`."""
        done = self.second.evict_now(eviction)  # whoever misses it here must not find it there
        super().evict_now(eviction)
        return done

    async def evict(self, eviction: Eviction) -> None:
        """See `CoherentCache.evict`."""
        self.evict_now(eviction)
        await self.second.evict(eviction)

    async def close(self) -> None:
        """Forgets what is in the process, and closes the connections; the entries outside stay."""
        await super().close()
        await self.second.close()
