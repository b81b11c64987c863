"""Entries in a cache outside the process, which other instances fill and evict as well."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol

from cacheinval.cache.coherent import MOST_LOADS, CoherentCache, Remember, checked_names
from cacheinval.cache.flights import Factory
from cacheinval.cache.reads import Policies, Read
from cacheinval.cache.versions import VersionOf
from cacheinval.cache.within import PastCache, running_within
from cacheinval.clock import Clock
from cacheinval.coherence import NO_TAGS, Coherence, Entry, Eviction, Load, Moment
from cacheinval.errors import CacheError

__all__ = ["SharedCache"]

MOST_OWED = 10_000
"""Names whose eviction failed that are remembered one by one."""


class SharedBackend(Protocol):
    """Entries in a cache outside the process; its methods raise CacheError where that cache cannot be used."""

    async def find(self, key: str, tags: frozenset[str], model: Any, ttl: float) -> Any: ...
    async def store(
        self, key: str, value: bytes, ttl: float, load_started: float, expires_at: float, found: Any
    ) -> None: ...
    async def evict(self, keys: Sequence[str], tags: Sequence[str], everything: bool) -> None: ...
    async def evict_ahead(self, keys: Sequence[str], tags: Sequence[str], everything: bool) -> None: ...
    async def close(self) -> None: ...
    def encode(self, value: Any) -> bytes: ...
    def decode(self, value: bytes, model: Any) -> Any: ...


class _Owed:
    """What is being evicted, or could not be: not served from here until an eviction of it, the last one, is done. (An
    earlier one may have passed before somebody stored again.)"""

    def __init__(self) -> None:
        self.keys: dict[str, object] = {}
        self.tags: dict[str, object] = {}
        self.everything: object | None = None

    def note(self, eviction: Eviction, this: object) -> None:
        """`this` is about to evict."""
        self.keys.update(dict.fromkeys(eviction.keys, this))
        self.tags.update(dict.fromkeys(eviction.tags, this))
        if eviction.everything:
            self.everything = this

    def settle(self, eviction: Eviction, this: object) -> None:
        """`this` has evicted."""
        for owed, names in ((self.keys, eviction.keys), (self.tags, eviction.tags)):
            for name in names:
                if owed.get(name) is this:
                    del owed[name]
        if self.everything is this:
            self.everything = None

    def shorten(self) -> None:
        """Many names are as good as everything, and cost less to remember while the cache is away."""
        if len(self.keys) + len(self.tags) > MOST_OWED:
            self.keys.clear()
            self.tags.clear()
            self.everything = object()

    def __bool__(self) -> bool:
        return bool(self.keys or self.tags or self.everything is not None)


class SharedCache(CoherentCache):
    """Entries in a cache outside the process, which other instances fill and evict as well.

    An entry bears stamps that were looked up before its load began, and an eviction by anybody takes one of them away: so
    it does not matter when an entry is stored, nor by whom. A cache that is down costs a read of the source, never an error.
    """

    _shared = True

    def __init__(
        self,
        backend: SharedBackend,
        coherence: Coherence,
        clock: Clock,
        ttl: float,
        remember: Remember = lambda *loaded: None,
        most_loads: int = MOST_LOADS,
        policies: Policies = Policies(),  # noqa: B008 (cannot be changed)
    ) -> None:
        super().__init__(coherence, clock, ttl, remember, most_loads, policies)
        self._backend = backend
        self._owed = _Owed()

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
        """See `CoherentCache.read`; what is returned has been through JSON on a miss as on a hit."""
        within = running_within()
        if type(within) is PastCache and within.open:
            self._count_past(within)
            _, value = self.as_stored(await factory(), model)
            return Read(value, "bypass", False)
        _refuse_stale(stale_if_error, stale_while_revalidate)
        lifetime, named, now = self._lifetime(ttl, ttl_jitter), checked_names(key, tags), self._now()
        found, entry, moment = await self._find_entry(key, named, model, lifetime)
        # The clock may have been set back meanwhile, and what began in its future would stay young too long.
        now = min(now, self._now())
        if entry is not None and not refresh and self._serving.may_serve_found(entry, now, moment):
            self._flights.inherit(entry)
            self.counters.hits += 1
            return Read(entry.value, "hit", False)

        async def load_and_store(load: Load) -> tuple[Any, bool]:
            kept, value = self.as_stored(await self._flights.ask(load, factory, version, primary), model)
            stored = await self.store(load, kept, lifetime, found)
            if stored:
                self._remember(key, primary or factory, model)
            return value, stored

        outcome = self._count_load(entry, now, refresh)
        load_or_join = self._flights.load if refresh else self._flights.join_or_load
        value, stored = await load_or_join(key, partial(self._flights.in_place, load_and_store), named, now)
        return Read(value, outcome, stored)

    async def would_serve(self, key: str, model: Any = None) -> Entry | None:
        """See `CoherentCache.would_serve`."""
        now = self._now()
        _, entry, moment = await self._find_entry(key, NO_TAGS, model)
        if entry is None or not self._serving.may_serve_found(entry, now, moment):
            return None
        return entry

    async def look(self, load: Load, model: Any, ttl: float) -> tuple[Any, Entry | None]:
        """What an entry has to bear that `load` stores, and the entry that answers all who wait for `load`, if any."""
        began = load.started
        found, entry, moment = await self._find_entry(load.key, load.tags, model, ttl)
        if entry is not None and self._serving.may_hold_found(entry, began, self._now(), moment):
            self.counters.hits += 1
            return found, entry
        if found is None:
            self.counters.bypasses += 1
        else:
            self.counters.misses += 1
        return found, None

    async def _find_entry(
        self, key: str, tags: frozenset[str], model: Any, ttl: float = 0.0
    ) -> tuple[Any, Entry | None, Moment]:
        # As it was before the look: whatever is evicted or proven during the look does not concern what the look saw.
        moment, withheld = self._serving.moment, frozenset(self._owed.tags)
        found = await self._find(key, tags, model, ttl)
        if found is None or not found.present or not withheld.isdisjoint(found.tags):
            return found, None, moment
        moment = self._serving.seen(moment, found.marks)
        entry = self._serving.found(found.value, found.load_started, found.expires_at, found.tags, moment)
        return found, entry, moment

    async def _find(self, key: str, tags: frozenset[str], model: Any, ttl: float) -> Any:
        try:
            if self._owed:
                await self._evict_owed(key, tags)
            return await self._backend.find(key, tags, model, ttl)
        except CacheError:
            return None

    async def _evict_owed(self, key: str, tags: frozenset[str]) -> None:
        owed = self._owed
        keys = [key] if key in owed.keys else []
        eviction = Eviction(keys, [tag for tag in tags if tag in owed.tags], owed.everything is not None)
        if eviction:
            await self.evict_ahead(eviction)

    def as_stored(self, value: Any, model: Any) -> tuple[bytes, Any]:
        """What is kept of `value`, and what comes back of it.

        Raises:
            CacheError: it cannot be kept, or does not come back as `model`.
        """
        kept = self._backend.encode(value)
        return kept, self._backend.decode(kept, model)

    async def store(self, load: Load, value: bytes, ttl: float, found: Any) -> bool:
        """Keeps what `load` read, if nothing stands against it and the look before it `found` something; whether it did."""
        stored = found is not None and await self._store(load, value, ttl, found)
        self.counters.not_stored += not stored
        return stored

    async def _store(self, load: Load, value: bytes, ttl: float, found: Any) -> bool:
        if not self._loads.may_store(load) or load.tags - found.stamps.keys():
            return False  # the second: tags learned while loading, whose stamps were not looked up before
        try:
            await self._backend.store(load.key, value, ttl, load.started, self._now() + ttl, found)
        except CacheError:
            return False  # or it lands later, and is served unless it has been evicted by then
        return self._loads.may_store(load)

    def evict_now(self, eviction: Eviction) -> bool:
        """See `CoherentCache.evict_now`: the next read that it concerns evicts first."""
        self._owed.note(eviction, object())
        return False

    async def evict(self, eviction: Eviction) -> None:
        """See `CoherentCache.evict`."""
        await self._evict(eviction, self._backend.evict)

    async def evict_ahead(self, eviction: Eviction) -> None:
        """See `CoherentCache.evict_ahead`."""
        await self._evict(eviction, self._backend.evict_ahead)

    async def _evict(
        self, eviction: Eviction, evict: Callable[[Sequence[str], Sequence[str], bool], Awaitable[None]]
    ) -> None:
        this = object()
        self._owed.note(eviction, this)
        try:
            await evict(eviction.keys, eviction.tags, eviction.everything)
        except CacheError:
            self._owed.shorten()
            raise
        self.counters.evicted_entries += len(eviction.keys)
        self._owed.settle(eviction, this)

    async def close(self) -> None:
        """Closes the connections; the entries stay."""
        await self._backend.close()


def _refuse_stale(stale_if_error: float | None, stale_while_revalidate: float | None) -> None:
    """Raises ValueError where a stale value is asked for, which a cache outside the process does not keep."""
    if stale_if_error or stale_while_revalidate:
        raise ValueError(
            "stale_if_error, stale_while_revalidate: accepted: 0, as a cache outside the process keeps nothing stale, "
            "unless CACHEINVAL_CACHE_LOCAL_ENTRIES keeps some in front of it"
        )
