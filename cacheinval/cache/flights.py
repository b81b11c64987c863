"""Loads under way: one of a key at a time, whose value all get who ask for it meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from cacheinval.cache.places import Places
from cacheinval.cache.reads import CacheCounters
from cacheinval.cache.versions import VersionOf, version_of
from cacheinval.cache.within import current_load, within
from cacheinval.coherence import Entry, Load
from cacheinval.coherence.loads import Loads
from cacheinval.errors import CacheError

__all__ = ["Factory", "Flights", "LoadAndStore"]

Factory = Callable[[], Awaitable[Any]]
LoadAndStore = Callable[[Load], Awaitable[tuple[Any, bool]]]
"""Loads under a token, and stores; gives the value, and whether it was stored."""

_ABANDONED = object()


class Flights:
    """Begins loads, or joins those that the rules allow to be joined, and runs their loaders.

    Args:
        loads: the rules.
        now: the clock.
        most: loaders that run at a time; further ones wait.
        shared: others are served what is stored.
    """

    def __init__(
        self, loads: Loads, now: Callable[[], float], counters: CacheCounters, most: int, *, shared: bool
    ) -> None:
        self._loads, self._now, self._counters, self._shared = loads, now, counters, shared
        self._landing: dict[Load, asyncio.Future[Any]] = {}
        self.places = Places(most)

    def __len__(self) -> int:
        """How many loads somebody waits for who has not begun them."""
        return len(self._landing)

    async def join_or_load(
        self, key: str, load_and_store: LoadAndStore, tags: frozenset[str], now: float
    ) -> tuple[Any, bool]:
        """The value of `key` for a read that began at `now`, and whether it was stored because of this read."""
        began = now
        while (load := self._loads.joinable(key, now, tags)) is not None:
            shared = self._loads.may_give(load, began)
            landed = await self._wait_for(load)
            if shared and landed is not _ABANDONED:
                self.inherit(load)
                return landed, False
            now = self._now()  # whoever loaded was cancelled; that is no reason to fail for those who waited
        return await self.load(key, load_and_store, tags, now)

    async def load(
        self, key: str, load_and_store: LoadAndStore, tags: frozenset[str], now: float
    ) -> tuple[Any, bool]:
        """The same by a load that begins at `now`."""
        load = self._loads.begin(key, now, tags, current_load())
        landed: Any = _ABANDONED
        failure: Exception | None = None
        try:
            landed, stored = await load_and_store(load)
        except Exception as error:
            self._counters.load_errors += 1
            failure = error
            raise
        finally:
            self.inherit(load)  # before its token goes: a voided part voids the whole
            self._loads.end(load)
            self._land(load, landed, failure)
        return landed, stored

    async def load_unless_loading(
        self, key: str, load_and_store: LoadAndStore, tags: frozenset[str]
    ) -> bool | None:
        """Whether the value of `key` was loaded and stored; None where a load is under way that a read would join."""
        now = self._now()
        if self._loads.joinable(key, now, tags) is not None:
            return None
        return (await self.load(key, load_and_store, tags, now))[1]

    def inherit(self, part: Entry | Load) -> None:
        """Whatever load runs here is built from `part`."""
        current = current_load()
        if current is not None:
            self._loads.inherit(current, part)

    async def _wait_for(self, load: Load) -> Any:
        flight = self._landing.get(load)
        if flight is None:
            flight = self._landing[load] = asyncio.get_running_loop().create_future()
        current = current_load()
        if current is None:
            return await asyncio.shield(flight)
        if load.depends_on(current):
            raise CacheError(
                f"the factory of {current.key!r} reads {load.key!r}, and that of {load.key!r} depends on "
                f"{current.key!r}: they would wait for each other for ever"
            )
        current.parts.append(load)
        load.awaited = True
        self.places.admit(load)  # or `current`, which has a place, would wait for one that waits for a place
        try:
            return await asyncio.shield(flight)
        finally:
            current.parts.remove(load)

    def _land(self, load: Load, value: Any, failure: Exception | None) -> None:
        flight = self._landing.pop(load, None)
        if flight is None:
            return
        if failure is None:
            flight.set_result(value)
        else:
            flight.set_exception(failure)
            flight.exception()  # seen, even where all who waited have been cancelled

    # Within a load

    async def in_place(self, load_and_store: LoadAndStore, load: Load) -> tuple[Any, bool]:
        """Does it when `load` has a place among the loaders."""
        # A part of another load runs in the place of that one, which waits for it.
        needs_place = load.parent is None and not load.awaited
        has_place = needs_place and (self.places.take() or await self._wait_for_place(load))
        try:
            return await load_and_store(load)
        finally:
            if has_place:
                self.places.give_back()

    async def _wait_for_place(self, load: Load) -> bool:
        self._counters.queued_loads += 1
        self._loads.hold(load)
        took = await self.places.wait(load)
        self._loads.let_go(load, self._now())
        return took

    async def ask(
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
        self._counters.primary_loads += 1
        self._loads.turn_to_primary(load, self._now())
        return await self._run(load, primary)

    async def _run(self, load: Load, factory: Factory) -> Any:
        self._counters.loads += 1
        token = within.set(load)
        try:
            return await factory()
        finally:
            within.reset(token)
