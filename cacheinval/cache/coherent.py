"""Read-through caching that obeys the rules, whatever keeps the entries."""

import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any, Literal, TypeVar

from cacheinval.cache.flights import Factory, Flights
from cacheinval.cache.reads import BypassReason, CacheCounters, Policies, Read
from cacheinval.cache.versions import VersionOf
from cacheinval.cache.within import PastCache, current_load
from cacheinval.clock import Clock
from cacheinval.coherence import NO_TAGS, Coherence, Entry, Eviction
from cacheinval.errors import CacheError
from cacheinval.messages import check_names

__all__ = ["MOST_LOADS", "CoherentCache", "Remember", "checked_names"]

MOST_LOADS = 64
"""Loaders that run at a time, unless the setting `MAX_CONCURRENT_LOADS` says otherwise."""

T = TypeVar("T")
Remember = Callable[[str, Factory, Any], None]


class CoherentCache(ABC):
    """A read-through cache whose entries never outlive an invalidation; `client.cache` is one.

    Values in the process are handed out as they are, not copied: treat them as frozen.

    >>> async def load():
    ...     return await client.pool.fetchval("SELECT price FROM prices WHERE id = 'abc-123'")
    >>> await client.cache.get_or_set("price:abc-123", load)
    99

    Args:
        ttl: seconds that an entry is kept where its reader does not say.
        most_loads: loaders that run at a time; further ones wait.
        policies: for reads that do not say otherwise.
    """

    _shared = False
    """Whether others are served what is stored here."""

    def __init__(
        self,
        coherence: Coherence,
        clock: Clock,
        ttl: float,
        remember: Remember = lambda *loaded: None,
        most_loads: int = MOST_LOADS,
        policies: Policies = Policies(),  # noqa: B008 (cannot be changed)
    ) -> None:
        self.counters = CacheCounters()
        self._remember = remember
        self._serving, self._loads = coherence.serving, coherence.loads
        self._clock = clock
        self._now = clock.now
        self._ttl = ttl
        self._flights = Flights(self._loads, clock.now, self.counters, most_loads, shared=self._shared)
        self._policies = policies

    async def get_or_set(
        self,
        key: str,
        factory: Callable[[], Awaitable[T]],
        *,
        ttl: float | None = None,
        tags: Collection[str] = (),
        model: Any = None,
        version: VersionOf | None = None,
        primary: Callable[[], Awaitable[T]] | None = None,
        stale_if_error: float | None = None,
        stale_while_revalidate: float | None = None,
        ttl_jitter: float | None = None,
    ) -> T:
        """The cached value of `key`, else the one that `factory` loads (at most one load of a key at a time).

        >>> async def load():
        ...     return 99

        >>> await client.cache.get_or_set("price:abc-123", load, ttl=60, tags=["prices"], stale_if_error=600)
        99

        Args:
            key: 1 to 512 bytes of UTF-8 without NUL.
            factory: coroutine function without arguments that reads the source of truth.
            ttl: seconds that the entry is kept; the setting `CACHE_TTL` if None.
            tags: names that invalidate this entry together with others.
            model: type of the value, for a cache outside the process, which keeps JSON; JSON's own types if None.
            version: where the row's version stands in the loaded value: the name of an attribute or of a mapping's key,
                or a callable. What is known to be older than an invalidation said is not stored.
            primary: the same as `factory`, from the primary. It says that `factory` reads a replica, which may lag: where
                that cannot be told from the version, the primary is read instead.
            stale_if_error: seconds. Where loading fails, an older value is given instead of the error: one that only ran
                out of its ttl for so long after that, any other one, an evicted one too, until it is so old. The
                setting `STALE_IF_ERROR` if None; 0: never.
            stale_while_revalidate: seconds. A value whose ttl ran out no longer ago is given at once, and loaded again in
                the background; one that was evicted is not. The setting `STALE_WHILE_REVALIDATE` if None; 0: never.
            ttl_jitter: up to which part of its ttl an entry expires early, at random, so that what was stored together
                is not loaded together: 0 to 1. The setting `CACHE_TTL_JITTER` if None.

        Raises:
            InvalidKeyError: a key or tag that could never be invalidated.
            CacheError: the loaded value has no such version.
            ValueError: one of the numbers is not as said above.
            Exception: whatever `factory` raises, to everyone who waited for it.
        """
        read = await self.read(
            key,
            factory,
            ttl=ttl,
            tags=tags,
            model=model,
            version=version,
            primary=primary,
            stale_if_error=stale_if_error,
            stale_while_revalidate=stale_while_revalidate,
            ttl_jitter=ttl_jitter,
        )
        return read.value  # type: ignore[no-any-return]

    def hit(self, key: str) -> Entry | None:
        """The entry that answers a read of `key` now, counted as a hit; None where `get_or_set` has to see to it."""
        return None

    @abstractmethod
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
        """The same as `get_or_set`, with how the value was come by.

        >>> async def load():
        ...     return 99

        >>> await client.cache.read("price:abc-123", load)
        Read(value=99, outcome='miss', stored=True, detail=None)
        >>> await client.cache.read("price:abc-123", load)
        Read(value=99, outcome='hit', stored=False, detail=None)

        Args:
            refresh: loads in any case, by a load that begins now, and stores over what is there. Others are served what
                is there until then; nobody else hears of it.
        """

    async def withhold(self, *, drop: bool = False) -> None:
        """Called by a factory: what it returns goes to everyone who waits for it, and is not stored, nor is what is built
        from it.

        >>> async def load():
        ...     price = None  # not there yet
        ...     if price is None:
        ...         await client.cache.withhold()
        ...     return price
        >>> await client.cache.read("price:abc-123", load)
        Read(value=None, outcome='miss', stored=False, detail=None)

        Args:
            drop: what was stored before goes. Otherwise it stays, and is served if it still may be.
        """
        load = current_load()
        if load is None:
            return
        self._loads.refuse(load)
        if drop:
            with suppress(CacheError):  # what cannot be dropped is not served from here until it is
                await self.evict_ahead(Eviction([load.key]))

    # For who observes

    @abstractmethod
    async def would_serve(self, key: str, model: Any = None) -> Entry | None:
        """The entry that a read of `key` would be answered with now, if any; it counts as no read.

        >>> async def load():
        ...     return 99

        >>> await client.cache.get_or_set("price:abc-123", load)
        99
        >>> entry = await client.cache.would_serve("price:abc-123")
        >>> entry.value
        99
        """

    async def read_source(self, key: str, factory: Factory, model: Any = None) -> Any:
        """What a read of `key` would give if nothing were cached, nor what `factory` reads; nothing is stored.

        >>> async def load():
        ...     return 99

        >>> await client.cache.read_source("price:abc-123", load)
        99
        >>> print(await client.cache.would_serve("price:abc-123"))
        None
        """
        with PastCache():
            return (await self.read(key, factory, model=model)).value

    @abstractmethod
    def evict_now(self, eviction: Eviction) -> bool:
        """Does of `evict` what needs no waiting, after which no read is served what `eviction` names; whether it was all."""

    @abstractmethod
    async def evict(self, eviction: Eviction) -> None:
        """Drops what `eviction` names; to be called right after `coherence.evict`.

        Raises:
            CacheError: the cache cannot be reached; nothing that `eviction` names is served until it has succeeded.
        """

    async def evict_ahead(self, eviction: Eviction) -> None:
        """The same, where a cache outside may go back to before it: a message is going to ask for it once more."""
        await self.evict(eviction)

    @abstractmethod
    async def close(self) -> None:
        """Gives back what the cache holds in this process."""

    # What the kinds of caches share

    def _count_past(self, block: PastCache) -> None:
        if block.of is not None:  # an audit is no reader
            self.counters.bypassed("transaction")

    def _count_load(self, entry: Entry | None, now: float, refresh: bool) -> Literal["miss", "bypass"]:
        """Counts a read at `now` that is answered by a load, and says why it is, where there is `entry`."""
        reason: BypassReason | None = "refresh" if refresh else self._serving.bypassing(entry, now)
        if reason is None:
            self.counters.misses += 1
            return "miss"
        self.counters.bypassed(reason)
        return "bypass"

    def _lifetime(self, ttl: float | None, jitter: float | None) -> float:
        if ttl is None:
            ttl = self._ttl
        elif not ttl > 0:
            raise ValueError(f"ttl={ttl!r}: accepted: seconds, more than 0")
        if jitter is None:
            jitter = self._policies.ttl_jitter
        elif not 0 <= jitter <= 1:
            raise ValueError(
                f"ttl_jitter={jitter!r}: accepted: the part of the ttl that it may take off, 0 to 1"
            )
        return ttl * (1 - jitter * random.random()) if jitter else ttl


def checked_names(key: str, tags: Collection[str]) -> frozenset[str]:
    """`tags` as a set.

    Raises:
        InvalidKeyError: a key or tag that could never be invalidated.
    """
    check_names((key,))
    return frozenset(check_names(tags, "tag")) if tags else NO_TAGS
