"""Read-through caching that obeys `coherence`: over a map in the process, or over a cache that others share."""

import asyncio
import logging
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from cacheinval import logs
from cacheinval.clock import Clock
from cacheinval.coherence import NO_TAGS, Coherence, Entry, Eviction, Load, Matter, Moment
from cacheinval.coherence.warming import LOOK_EVERY, Hot, Warming
from cacheinval.errors import CacheError
from cacheinval.messages import check_names
from cacheinval.places import Places
from cacheinval.reloading import Reloads, Warmer
from cacheinval.versions import VersionOf, version_of

__all__ = [
    "BypassReason",
    "CacheCounters",
    "CoherentCache",
    "InProcessCache",
    "Policies",
    "Read",
    "SharedCache",
    "running_transaction",
    "without_cache",
]

log = logging.getLogger("cacheinval.cache")

MOST_LOADS = 64
"""Loaders that run at a time, unless the setting `MAX_CONCURRENT_LOADS` says otherwise."""

MOST_OWED = 10_000
"""Names whose eviction failed that are remembered one by one."""

MOST_RELOADS = 1_000
"""Values past their ttl that are loaded again at a time; what would be one more is left to the next read."""

SAY_EVERY = 10.0
"""Seconds between two lines in the log about loads whose failure no caller sees."""

T = TypeVar("T")
Factory = Callable[[], Awaitable[Any]]
LoadAndStore = Callable[[Load], Awaitable[tuple[Any, bool]]]
Remember = Callable[[str, Factory, Any], None]


class Read(NamedTuple):
    """What a read gave, and how.

    >>> async def load():
    ...     return 99

    >>> read = await client.cache.read("price:abc-123", load)
    >>> read.value, read.outcome, read.stored
    (99, 'miss', True)
    """

    value: Any
    outcome: Literal["hit", "miss", "bypass"]
    """`bypass`: loaded because the freshness of what is cached could not be proven, or past the cache on purpose."""
    stored: bool
    """Whether the value is now in the cache because of this read."""
    detail: Literal["shared", "stale-if-error", "stale-while-revalidate"] | None = None
    """Of a hit: that it was not in the process but in the cache outside it that stands behind, or by which exception a stale
    value was given."""


class Policies(NamedTuple):
    """What holds for reads that do not say otherwise; see `CoherentCache.get_or_set`."""

    ttl_jitter: float = 0.0
    stale_if_error: float = 0.0
    stale_while_revalidate: float = 0.0
    warm_keys: int = 0
    """How many of the hottest keys are loaded again after an eviction."""
    warm_interval: float = 1.0
    """Seconds between two such loads of one key."""


BypassReason = Literal[Matter, "age", "refresh", "transaction"]
"""Why a read goes past the cache: what the instance is in doubt about, that what is cached is older than is proven, or
that the reader wants it so."""


class CacheCounters:
    """What the cache did, counted since the start."""

    __slots__ = (
        "bypass_reasons",
        "bypasses",
        "evicted_entries",
        "hits",
        "load_errors",
        "loads",
        "misses",
        "not_stored",
        "primary_loads",
        "queued_loads",
        "stale_if_error",
        "stale_while_revalidate",
    )

    def __init__(self) -> None:
        self.hits = self.misses = self.bypasses = 0
        self.bypass_reasons: dict[BypassReason, int] = {}
        self.loads = self.primary_loads = self.queued_loads = self.load_errors = 0
        self.not_stored = self.evicted_entries = 0
        self.stale_if_error = self.stale_while_revalidate = 0

    def bypassed(self, reason: BypassReason) -> None:
        """Counts a read past the cache."""
        self.bypasses += 1
        self.bypass_reasons[reason] = self.bypass_reasons.get(reason, 0) + 1


# What the code that runs now is part of: a load (whose value inherits what it reads), or a transaction (which must see
# its own changes, and so reads past the cache).
_within: ContextVar["Load | _Transaction | None"] = ContextVar("cacheinval_within", default=None)
_running_within = _within.get
_ABANDONED = object()


class _Transaction:
    """Marks what runs within a transaction, for as long as that is open: a task started there may outlive it."""

    __slots__ = ("open", "this")

    def __init__(self, this: Any) -> None:
        self.open = True
        self.this = this


@contextmanager
def without_cache(transaction: Any = None) -> Iterator[None]:
    """Within this block, of `transaction`, `get_or_set` calls its factory and leaves the cache alone."""
    within = _Transaction(transaction)
    token = _within.set(within)
    try:
        yield
    finally:
        within.open = False
        with suppress(ValueError):  # left in another context than it was entered in, as some test fixtures do
            _within.reset(token)


def running_transaction() -> Any:
    """What the block of `without_cache` was entered for in which this runs, if it is still open."""
    within = _running_within()
    return within.this if type(within) is _Transaction and within.open else None


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
        self._coherence = coherence
        self._loads = coherence.loads
        self._clock = clock
        self._now = clock.now
        self._ttl = ttl
        self._flights: dict[Load, asyncio.Future[Any]] = {}
        self._places = Places(most_loads)
        self._policies = policies
        self._said_at = -SAY_EVERY

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
        load = _current_load()
        if load is None:
            return
        self._loads.refuse(load)
        if drop:
            with suppress(CacheError):  # what cannot be dropped is not served from here until it is
                await self.evict(Eviction([load.key]))

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
        with without_cache():
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

    @abstractmethod
    async def close(self) -> None:
        """Gives back what the cache holds in this process."""

    # One load at a time

    async def _join_or_load(
        self,
        key: str,
        load_and_store: LoadAndStore,
        tags: frozenset[str],
        now: float,
        entry: Entry | None,
        refresh: bool,
    ) -> Read:
        reason: BypassReason | None = "refresh" if refresh else self._coherence.bypassing(entry, now)
        if reason is not None:
            self.counters.bypassed(reason)
        else:
            self.counters.misses += 1
        outcome: Literal["miss", "bypass"] = "miss" if reason is None else "bypass"
        began = now
        while not refresh and (load := self._loads.joinable(key, now, tags)) is not None:
            shared = self._loads.may_give(load, began)
            landed = await self._wait_for(load)
            if shared and landed is not _ABANDONED:
                self._inherit(load)
                return Read(landed, outcome, False)
            now = self._now()  # whoever loaded was cancelled; that is no reason to fail for those who waited
        value, stored = await self._load(key, load_and_store, tags, now)
        return Read(value, outcome, stored)

    async def _wait_for(self, load: Load) -> Any:
        flight = self._flights.get(load)
        if flight is None:
            flight = self._flights[load] = asyncio.get_running_loop().create_future()
        current = _current_load()
        if current is None:
            return await asyncio.shield(flight)
        if load.depends_on(current):
            raise CacheError(
                f"the factory of {current.key!r} reads {load.key!r}, and that of {load.key!r} depends on "
                f"{current.key!r}: they would wait for each other for ever"
            )
        current.parts.append(load)
        load.awaited = True
        self._places.admit(load)  # or `current`, which has a place, would wait for one that waits for a place
        try:
            return await asyncio.shield(flight)
        finally:
            current.parts.remove(load)

    async def _load(
        self, key: str, load_and_store: LoadAndStore, tags: frozenset[str], now: float
    ) -> tuple[Any, bool]:
        load = self._loads.begin(key, now, tags, _current_load())
        landed: Any = _ABANDONED
        failure: Exception | None = None
        try:
            landed, stored = await self._in_place(load, load_and_store)
        except Exception as error:
            self.counters.load_errors += 1
            failure = error
            raise
        finally:
            self._inherit(load)  # before its token goes: a voided part voids the whole
            self._loads.end(load)
            self._land(load, landed, failure)
        return landed, stored

    async def _in_place(self, load: Load, load_and_store: LoadAndStore) -> tuple[Any, bool]:
        # A part of another load runs in the place of that one, which waits for it.
        has_place = load.parent is None and not load.awaited and await self._take_place(load)
        try:
            return await load_and_store(load)
        finally:
            if has_place:
                self._places.give_back()

    async def _take_place(self, load: Load) -> bool:
        if self._places.take():
            return True
        self.counters.queued_loads += 1
        self._loads.hold(load)
        took = await self._places.wait(load)
        self._loads.let_go(load, self._now())
        return took

    async def _ask(
        self, load: Load, factory: Factory, version: VersionOf | None, primary: Factory | None
    ) -> Any:
        """What `factory` reads or, where that may lag behind what was evicted, what `primary` does."""
        if version is None and primary is None:
            return await self._run(load, factory)
        if primary is None or self._loads.turn_to_replica(load, self._now(), shared=self._shared):
            value = await self._run(load, factory)
            if self._loads.accepts(load, version_of(value, version)):
                return value
            if primary is None:
                self._loads.refuse(load)
                return value
        self.counters.primary_loads += 1
        self._loads.turn_to_primary(load, self._now())
        return await self._run(load, primary)

    async def _run(self, load: Load, factory: Factory) -> Any:
        self.counters.loads += 1
        token = _within.set(load)
        try:
            return await factory()
        finally:
            _within.reset(token)

    def _land(self, load: Load, value: Any, failure: Exception | None) -> None:
        flight = self._flights.pop(load, None)
        if flight is None:
            return
        if failure is None:
            flight.set_result(value)
        else:
            flight.set_exception(failure)
            flight.exception()  # seen, even where all who waited have been cancelled

    def _count_past(self, within: _Transaction) -> None:
        if within.this is not None:  # an audit is no reader
            self.counters.bypassed("transaction")

    def _inherit(self, part: Entry | Load) -> None:
        current = _current_load()
        if current is not None:
            self._loads.inherit(current, part)

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

    def _allowed(self, policy: str, seconds: float | None) -> float:
        if seconds is None:
            return getattr(self._policies, policy)  # type: ignore[no-any-return]
        if not 0 <= seconds < math.inf:
            raise ValueError(f"{policy}={seconds!r}: accepted: seconds, 0 for never")
        return seconds

    def _say_failed(self, what: str, key: str, error: Exception) -> None:
        now = self._now()
        if not 0 <= now - self._said_at < SAY_EVERY:
            self._said_at = now
            logs.event(log, logging.WARNING, what, key=key, reason=repr(error))


class MemoryBackend(Protocol):
    """A map that never suspends."""

    def peek(self, key: str, /) -> Any | None: ...
    def look(self, key: str) -> Any | None: ...
    def put(self, key: str, value: Any) -> None: ...
    def drop(self, keys: Iterable[str]) -> int: ...
    def reset(self) -> None: ...
    def __len__(self) -> int: ...


class InProcessCache(CoherentCache):
    """Entries in a bounded map of this process. Nothing here suspends but the loader."""

    def __init__(
        self,
        backend: MemoryBackend,
        coherence: Coherence,
        clock: Clock,
        ttl: float,
        remember: Remember = lambda *loaded: None,
        most_loads: int = MOST_LOADS,
        policies: Policies = Policies(),  # noqa: B008 (cannot be changed)
    ) -> None:
        super().__init__(coherence, clock, ttl, remember, most_loads, policies)
        self._backend = backend
        self._reloads = Reloads(
            partial(self._say_failed, "cannot load again what is past its ttl"), MOST_RELOADS
        )
        self.warming: Warmer | None = None
        if policies.warm_keys:
            self.warming = Warmer(
                Warming(policies.warm_keys, policies.warm_interval),
                self._warm,
                is_fresh=self._is_fresh,
                may_begin=lambda: not coherence.bypassing(None, self._now()),
                failed=partial(self._say_failed, "cannot load again what was evicted"),
            )
        self._keeps = False  # whether anybody has asked for `stale_if_error` so far
        self._standing = coherence.standing
        self._elapsed = clock.elapsed

    # A hit is what most reads are, so it asks no more than whether an earlier judgement of `Coherence.may_serve` stands.
    # It is written twice, since a call more would cost a tenth of it, and without the `*` of its base class, for that too.

    async def get_or_set(
        self,
        key: str,
        factory: Callable[[], Awaitable[T]],
        ttl: float | None = None,
        tags: Collection[str] = (),
        model: Any = None,
        version: VersionOf | None = None,
        primary: Callable[[], Awaitable[T]] | None = None,
        stale_if_error: float | None = None,
        stale_while_revalidate: float | None = None,
        ttl_jitter: float | None = None,
    ) -> T:
        """See `CoherentCache.get_or_set`."""
        entry = self._backend.peek(key)
        if (
            entry is not None
            and entry.standing == self._standing.number
            and self._elapsed() < entry.serve_until
            and _running_within() is None
        ):
            self.counters.hits += 1
            return entry.value  # type: ignore[no-any-return]
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
        """See `CoherentCache.hit`."""
        entry: Entry | None = self._backend.peek(key)
        if (
            entry is not None
            and entry.standing == self._standing.number
            and self._elapsed() < entry.serve_until
            and _running_within() is None
        ):
            self.counters.hits += 1
            return entry
        return None

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
        """See `CoherentCache.read`. `model` is not needed here: values keep their type."""
        within = _running_within()
        if type(within) is _Transaction and within.open:
            self._count_past(within)
            return Read(await self._past(factory, model), "bypass", False)
        now = self._now()
        entry = self._backend.peek(key)
        if entry is not None and not refresh and self._coherence.may_serve(entry, now):
            answer = self._answered_by(entry)
            if self.warming is not None:
                entry.serve_until = min(entry.serve_until, self._elapsed() + LOOK_EVERY)
                kept = self._allowed("stale_if_error", stale_if_error) > 0
                lifetime = self._lifetime(ttl, ttl_jitter)
                reload = self._loading(key, factory, model, version, primary, lifetime, kept, False)
                self.warming.plan.read(Hot(key, (reload, checked_names(key, tags)), entry.tags))
            return answer
        named = checked_names(key, tags)
        if_error = self._allowed("stale_if_error", stale_if_error)
        overtime = self._allowed("stale_while_revalidate", stale_while_revalidate)
        lifetime = self._lifetime(ttl, ttl_jitter)
        load_and_store = self._loading(key, factory, model, version, primary, lifetime, if_error > 0, refresh)
        self._keeps = self._keeps or if_error > 0
        # Within another load it is not given: what is built from it would be kept for a ttl of its own.
        if (
            overtime
            and not refresh
            and entry is not None
            and not isinstance(within, Load)
            and self._coherence.may_serve(entry, now, overtime)
        ):
            self.counters.hits += 1
            self.counters.stale_while_revalidate += 1
            self._reloads.start(key, partial(self._reload, key, load_and_store, named))
            return Read(entry.value, "hit", False, "stale-while-revalidate")
        try:
            return await self._join_or_load(key, load_and_store, named, now, entry, refresh)
        except CacheError:
            raise  # the loader is made wrongly
        except Exception as error:
            instead = None if refresh else self._instead(key, if_error)
            if instead is None:
                raise
            self._say_failed("cannot load, and gives what is stale", key, error)
            return instead

    async def _past(self, factory: Factory, model: Any) -> Any:
        """What a read gives that goes past the cache."""
        return await factory()

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
        async def load_and_store(load: Load) -> tuple[Any, bool]:
            value = await self._ask(load, factory, version, primary)
            # No await between the question and the store: an eviction in between would be undone by the store.
            if not self._loads.may_store(load):
                self.counters.not_stored += 1
                return value, False
            self._backend.put(key, load.entry(value, self._now() + lifetime, kept))
            self._remember(key, primary or factory, model)
            return value, True

        return load_and_store

    async def _reload(self, key: str, load_and_store: LoadAndStore, tags: frozenset[str]) -> None:
        now = self._now()
        if self._loads.joinable(key, now, tags) is None:
            await self._load(key, load_and_store, tags, now)

    def _instead(self, key: str, if_error: float) -> Read | None:
        """What is given where loading has failed."""
        entry = self._backend.look(key) if if_error else None
        if entry is None or not self._coherence.may_serve_instead(entry, self._now(), if_error):
            return None
        self.counters.stale_if_error += 1
        current = _current_load()
        if current is not None:
            self._loads.inherit_stale(current, entry)
        return Read(entry.value, "hit", False, "stale-if-error")

    def _answered_by(self, entry: Entry) -> Read:
        """A hit of `entry`, which has just been judged."""
        self._inherit(entry)
        self.counters.hits += 1
        # In time that elapses: were the clock set, which moves its start, everything would be judged again.
        entry.standing = self._standing.number
        entry.serve_until = self._coherence.good_until(entry) - self._clock.start
        return Read(entry.value, "hit", False)

    async def would_serve(self, key: str, model: Any = None) -> Entry | None:
        """See `CoherentCache.would_serve`."""
        entry: Entry | None = self._backend.look(key)
        return entry if entry is not None and self._coherence.may_serve(entry, self._now()) else None

    async def evict(self, eviction: Eviction) -> None:
        """See `CoherentCache.evict`; done without suspending."""
        self.evict_now(eviction)

    def evict_now(self, eviction: Eviction) -> bool:
        """See `CoherentCache.evict_now`. Entries of evicted tags are refused by the rules, and stay until they are replaced."""
        if self.warming is not None:
            self.warming.evicted(eviction.keys, eviction.tags, eviction.everything)
        if self._keeps:
            self.counters.evicted_entries += self._expire(eviction)
        elif eviction.everything:
            self.counters.evicted_entries += len(self._backend)
            self._backend.reset()
        else:
            self.counters.evicted_entries += self._backend.drop(eviction.keys)
        return True

    def _expire(self, eviction: Eviction) -> int:
        """Evicts, and leaves for `stale_if_error` what is to be kept for it; returns how many entries that concerns."""
        if eviction.everything:
            return len(
                self._backend
            )  # the rules refuse those of an older epoch, and they are replaced in time
        evicted, dropped = 0, []
        for key in eviction.keys:
            entry = self._backend.look(key)
            if entry is not None and entry.kept:
                evicted += self._coherence.expire(entry)
            else:
                dropped.append(key)
        return evicted + self._backend.drop(dropped)

    async def _warm(self, hot: Hot) -> bool | None:
        load_and_store, tags = hot.reload
        now = self._now()
        if self._loads.joinable(hot.key, now, tags) is not None:
            return None
        return (await self._load(hot.key, load_and_store, tags, now))[1]

    def _is_fresh(self, key: str) -> bool:
        entry = self._backend.look(key)
        return entry is not None and self._coherence.may_serve(entry, self._now())

    async def close(self) -> None:
        """Ends what is loaded in the background, and forgets everything."""
        await self._reloads.close()
        if self.warming is not None:
            await self.warming.close()
        self._backend.reset()

    def __len__(self) -> int:
        return len(self._backend)


class SharedBackend(Protocol):
    """Entries in a cache outside the process; its methods raise CacheError where that cache cannot be used."""

    async def find(self, key: str, tags: frozenset[str], model: Any, ttl: float) -> Any: ...
    async def store(
        self, key: str, value: bytes, ttl: float, load_started: float, expires_at: float, found: Any
    ) -> None: ...
    async def evict(self, keys: Sequence[str], tags: Sequence[str], everything: bool) -> None: ...
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
        within = _running_within()
        if type(within) is _Transaction and within.open:
            self._count_past(within)
            _, value = self.as_stored(await factory(), model)
            return Read(value, "bypass", False)
        _refuse_stale(stale_if_error, stale_while_revalidate)
        lifetime, named, now = self._lifetime(ttl, ttl_jitter), checked_names(key, tags), self._now()
        found, entry, moment = await self._find_entry(key, named, model, lifetime)
        # The clock may have been set back meanwhile, and what began in its future would stay young too long.
        now = min(now, self._now())
        if entry is not None and not refresh and self._coherence.may_serve_found(entry, now, moment):
            self._inherit(entry)
            self.counters.hits += 1
            return Read(entry.value, "hit", False)

        async def load_and_store(load: Load) -> tuple[Any, bool]:
            kept, value = self.as_stored(await self._ask(load, factory, version, primary), model)
            stored = await self.store(load, kept, lifetime, found)
            if stored:
                self._remember(key, primary or factory, model)
            return value, stored

        return await self._join_or_load(key, load_and_store, named, now, entry, refresh)

    async def would_serve(self, key: str, model: Any = None) -> Entry | None:
        """See `CoherentCache.would_serve`."""
        now = self._now()
        _, entry, moment = await self._find_entry(key, NO_TAGS, model)
        if entry is None or not self._coherence.may_serve_found(entry, now, moment):
            return None
        return entry

    async def look(self, load: Load, model: Any, ttl: float) -> tuple[Any, Entry | None]:
        """What an entry has to bear that `load` stores, and the entry that answers all who wait for `load`, if any.

        They began to read between the token of `load` and now, so the entry has to be good at both.
        """
        began = load.started
        found, entry, moment = await self._find_entry(load.key, load.tags, model, ttl)
        if entry is not None and all(
            self._coherence.may_serve_found(entry, at, moment) for at in (began, self._now())
        ):
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
        moment, withheld = self._coherence.moment, frozenset(self._owed.tags)
        found = await self._find(key, tags, model, ttl)
        if found is None or not found.present or not withheld.isdisjoint(found.tags):
            return found, None, moment
        entry = self._coherence.found(found.value, found.load_started, found.expires_at, found.tags, moment)
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
            await self.evict(eviction)

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
        this = object()
        self._owed.note(eviction, this)
        try:
            await self._backend.evict(eviction.keys, eviction.tags, eviction.everything)
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


def checked_names(key: str, tags: Collection[str]) -> frozenset[str]:
    """`tags` as a set.

    Raises:
        InvalidKeyError: a key or tag that could never be invalidated.
    """
    check_names((key,))
    return frozenset(check_names(tags, "tag")) if tags else NO_TAGS


def _current_load() -> Load | None:
    within = _running_within()
    return within if isinstance(within, Load) else None
