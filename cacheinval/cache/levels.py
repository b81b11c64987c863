"""Two levels: entries in the process, in front of a cache outside it which other instances fill and evict as well."""

from typing import Any, Literal

from cacheinval.cache.coherent import MOST_LOADS, Remember
from cacheinval.cache.flights import Factory, LoadAndStore
from cacheinval.cache.in_process import InProcessCache, MemoryBackend
from cacheinval.cache.reads import Policies, Read
from cacheinval.cache.shared import SharedCache
from cacheinval.cache.versions import VersionOf
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence, Entry, Eviction, Load

__all__ = ["SECOND_LEVEL", "TwoLevels"]

SECOND_LEVEL = ("hits", "misses", "bypasses", "not_stored", "evicted_entries")
"""The counters of `TwoLevels.second` that say something: it is not read through, but looked into."""


class _Looking:
    """A look outside, with the load that follows where that finds nothing; remembers whether it did."""

    def __init__(self, look: LoadAndStore) -> None:
        self._look = look
        self.was_there = False

    async def __call__(self, load: Load) -> tuple[Any, bool]:
        return await self._look(load)


class TwoLevels(InProcessCache):
    """A hit in the process costs what it costs without a second level; everything else looks there before it loads.

    The look is a part of the load, under its token: an eviction that arrives meanwhile voids it, and what it found is kept
    here as old as it is there, with its tags. Values in the process are those that came back from outside, and are handed
    out as they are. All who read a key name the same `model`. What is stale on purpose is what is kept here: outside all
    ends with its ttl or its eviction.

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

    async def _past(self, factory: Factory, model: Any) -> Any:
        return self.second.as_stored(await factory(), model)[1]

    def _loading(
        self,
        key: str,
        factory: Factory,
        model: Any,
        version: VersionOf | None,
        primary: Factory | None,
        lifetime: float,
        kept: bool,
        refresh: bool,
    ) -> LoadAndStore:
        async def look(load: Load) -> tuple[Any, bool]:
            found, there = await self.second.look(load, model, lifetime)
            if there is not None and not refresh:
                looking.was_there = True
                self._loads.inherit(load, there)
                return there.value, self._put(load, there.value, there.expires_at, kept)
            self._loads.let_go(load, self._now())  # nothing has been read yet
            return await self._flights.in_place(load_and_store(found), load)

        def load_and_store(found: Any) -> LoadAndStore:
            async def load_and_store(load: Load) -> tuple[Any, bool]:
                written, value = self.second.as_stored(
                    await self._flights.ask(load, factory, version, primary), model
                )
                stored = self._put(load, value, self._now() + lifetime, kept)
                self.counters.not_stored += not stored
                stored |= await self.second.store(load, written, lifetime, found)
                if stored:
                    self._remember(key, primary or factory, model)
                return value, stored

            return load_and_store

        looking = _Looking(look)
        return looking

    def _given(
        self, load_and_store: LoadAndStore, value: Any, outcome: Literal["miss", "bypass"], stored: bool
    ) -> Read:
        if isinstance(load_and_store, _Looking) and load_and_store.was_there:
            return Read(value, "hit", False, "shared")
        return super()._given(load_and_store, value, outcome, stored)

    def _put(self, load: Load, value: Any, expires_at: float, kept: bool) -> bool:
        if not self._loads.may_store(load):
            return False
        self._backend.put(load.key, load.entry(value, expires_at, kept))
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

    async def evict_ahead(self, eviction: Eviction) -> None:
        """See `CoherentCache.evict_ahead`."""
        self.evict_now(eviction)
        await self.second.evict_ahead(eviction)

    async def close(self) -> None:
        """Forgets what is in the process, and closes the connections; the entries outside stay."""
        await super().close()
        await self.second.close()
