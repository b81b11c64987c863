"""Entries in a bounded map of this process."""

import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from cacheinval import logs
from cacheinval.cache.coherent import MOST_LOADS, CoherentCache, Remember, checked_names
from cacheinval.cache.flights import Factory, LoadAndStore
from cacheinval.cache.reads import Policies, Read
from cacheinval.cache.reloading import Reloads, Warmer
from cacheinval.cache.versions import VersionOf
from cacheinval.cache.within import PastCache, current_load, running_within
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence, Entry, Eviction, Load
from cacheinval.coherence.warming import LOOK_EVERY, Hot, Warming
from cacheinval.errors import CacheError

__all__ = ["InProcessCache", "MemoryBackend"]

MOST_RELOADS = 1_000
"""Values past their ttl that are loaded again at a time; what would be one more is left to the next read."""

SAY_EVERY = 10.0
"""Seconds between two lines in the log about loads whose failure no caller sees."""

log = logging.getLogger("cacheinval.cache")

T = TypeVar("T")


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
        self._said_at = -SAY_EVERY
        self._reloads = Reloads(
            partial(self._say_failed, "cannot load again what is past its ttl"), MOST_RELOADS
        )
        self.warming: Warmer | None = None
        if policies.warm_keys:
            self.warming = Warmer(
                Warming(policies.warm_keys, policies.warm_interval),
                self._warm,
                is_fresh=self._is_fresh,
                may_begin=lambda: not self._serving.bypassing(None, self._now()),
                failed=partial(self._say_failed, "cannot load again what was evicted"),
            )
        self._keeps = False  # whether anybody has asked for `stale_if_error` so far
        self._standing = coherence.standing
        self._elapsed = clock.elapsed

    # A hit is what most reads are, so it asks no more than whether an earlier judgement of `Serving.may_serve` stands.
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
            and running_within() is None
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
            and running_within() is None
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
        within = running_within()
        if type(within) is PastCache and within.open:
            self._count_past(within)
            return Read(await self._past(factory, model), "bypass", False)
        now = self._now()
        entry = self._backend.peek(key)
        if entry is not None and not refresh and self._serving.may_serve(entry, now):
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
            and self._serving.may_serve(entry, now, overtime)
        ):
            self.counters.hits += 1
            self.counters.stale_while_revalidate += 1
            self._reloads.start(key, partial(self._flights.load_unless_loading, key, load_and_store, named))
            return Read(entry.value, "hit", False, "stale-while-revalidate")
        outcome = self._count_load(entry, now, refresh)
        try:
            load_or_join = self._flights.load if refresh else self._flights.join_or_load
            value, stored = await load_or_join(key, load_and_store, named, now)
        except CacheError:
            raise  # the loader is made wrongly
        except Exception as error:
            instead = None if refresh else self._instead(key, if_error)
            if instead is None:
                raise
            self._say_failed("cannot load, and gives what is stale", key, error)
            return instead
        return self._given(load_and_store, value, outcome, stored)

    def _given(
        self, load_and_store: LoadAndStore, value: Any, outcome: Literal["miss", "bypass"], stored: bool
    ) -> Read:
        """How a read is answered that has waited for `load_and_store`, or for another load."""
        return Read(value, outcome, stored)

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
            value = await self._flights.ask(load, factory, version, primary)
            # No await between the question and the store: an eviction in between would be undone by the store.
            if not self._loads.may_store(load):
                self.counters.not_stored += 1
                return value, False
            self._backend.put(key, load.entry(value, self._now() + lifetime, kept))
            self._remember(key, primary or factory, model)
            return value, True

        return partial(self._flights.in_place, load_and_store)

    def _instead(self, key: str, if_error: float) -> Read | None:
        """What is given where loading has failed."""
        entry = self._backend.look(key) if if_error else None
        if entry is None or not self._serving.may_serve_instead(entry, self._now(), if_error):
            return None
        self.counters.stale_if_error += 1
        current = current_load()
        if current is not None:
            self._loads.inherit_stale(current, entry)
        return Read(entry.value, "hit", False, "stale-if-error")

    def _answered_by(self, entry: Entry) -> Read:
        """A hit of `entry`, which has just been judged."""
        self._flights.inherit(entry)
        self.counters.hits += 1
        # In time that elapses: were the clock set, which moves its start, everything would be judged again.
        entry.standing = self._standing.number
        entry.serve_until = self._serving.good_until(entry) - self._clock.start
        return Read(entry.value, "hit", False)

    async def would_serve(self, key: str, model: Any = None) -> Entry | None:
        """See `CoherentCache.would_serve`."""
        entry: Entry | None = self._backend.look(key)
        return entry if entry is not None and self._serving.may_serve(entry, self._now()) else None

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
                evicted += self._serving.expire(entry)
            else:
                dropped.append(key)
        return evicted + self._backend.drop(dropped)

    async def _warm(self, hot: Hot) -> bool | None:
        return await self._flights.load_unless_loading(hot.key, *hot.reload)

    def _is_fresh(self, key: str) -> bool:
        entry = self._backend.look(key)
        return entry is not None and self._serving.may_serve(entry, self._now())

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

    async def close(self) -> None:
        """Ends what is loaded in the background, and forgets everything."""
        await self._reloads.close()
        if self.warming is not None:
            await self.warming.close()
        self._backend.reset()

    def __len__(self) -> int:
        return len(self._backend)
