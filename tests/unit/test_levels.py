"""Two levels: a map in the process, in front of a cache outside it which somebody else fills and evicts as well."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from waiting import Eventually

from cacheinval import Client, Settings
from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.backends.shared import Found
from cacheinval.cache import InProcessCache, PastCache, Policies, Read, SharedCache
from cacheinval.cache.levels import TwoLevels
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence, Entry, Eviction
from cacheinval.errors import CacheError

KEY, TAG, EVERYTHING = Eviction(["k"]), Eviction(tags=["t"]), Eviction(everything=True)
each_eviction = pytest.mark.parametrize("what", [KEY, TAG, EVERYTHING], ids=["key", "tag", "everything"])

IN_PROCESS = Read("there", "hit", False)
OUTSIDE = Read("there", "hit", False, "shared")


class SetClock(Clock):
    """A clock that goes only when told."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.start, self.elapsed = 0.0, lambda: self.time


class Outside:
    """A cache outside the process that holds `entry`, can be held up or down, and lists what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.entry: tuple[Any, float, float, frozenset[str]] | None = None
        """Value, start of its load, end of its ttl, and tags."""
        self.free = {name: asyncio.Event() for name in ("find", "store", "evict")}
        self.down = False
        for event in self.free.values():
            event.set()

    async def _ask(self, what: str) -> None:
        self.asked.append(what)
        await self.free[what].wait()
        if self.down:
            raise CacheError("down")

    async def find(self, key: str, tags: frozenset[str], model: Any, ttl: float) -> Found:
        entry = self.entry  # the answer is of the moment of the question
        await self._ask("find")
        value, started, expires_at, borne = entry or (None, 0.0, 0.0, tags)
        return Found(value, entry is not None, started, expires_at, borne, "e", "s", dict.fromkeys(tags, "s"))

    async def store(
        self, key: str, value: bytes, ttl: float, load_started: float, expires_at: float, found: Found
    ) -> None:
        await self._ask("store")
        self.entry = (value.decode(), load_started, expires_at, frozenset(found.stamps))

    async def evict(self, keys: Any, tags: Any, everything: bool) -> None:
        await self._ask("evict")
        self.entry = None

    evict_ahead = evict

    async def close(self) -> None:
        self.asked.append("close")

    def encode(self, value: Any) -> bytes:
        return str(value).encode()

    def decode(self, value: bytes, model: Any) -> Any:
        return value.decode()


def value_of(value: Any) -> Callable[[], Awaitable[Any]]:
    async def load() -> Any:
        return value

    return load


async def refuse() -> Any:
    pytest.fail("loaded although it was cached")


async def here(cache: TwoLevels, key: str = "k") -> Entry | None:
    """The entry in the process that a read of `key` would be answered with."""
    return await InProcessCache.would_serve(cache, key)


async def turns(number: int = 5) -> None:
    """Lets the others go on until each waits for something."""
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def outside() -> Outside:
    outside = Outside()
    outside.entry = ("there", 900.0, 1200.0, frozenset(["t"]))
    return outside


def trusted(**options: Any) -> Coherence:
    coherence = Coherence(in_front=True, **options)
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    return coherence


def levels(outside: Outside, coherence: Coherence, clock: Clock, **options: Any) -> TwoLevels:
    second = SharedCache(outside, coherence, clock, ttl=300)
    return TwoLevels(BoundedMemoryCache(100), second, coherence, clock, ttl=300, **options)


@pytest.fixture
def coherence() -> Coherence:
    return trusted()


@pytest.fixture
def cache(outside: Outside, coherence: Coherence, clock: SetClock) -> TwoLevels:
    return levels(outside, coherence, clock)


# Reading


async def test_it_looks_outside_once_and_keeps_here_what_it_found(cache: TwoLevels, outside: Outside) -> None:
    assert await cache.read("k", refuse) == OUTSIDE
    assert await cache.read("k", refuse) == IN_PROCESS
    assert await cache.get_or_set("k", refuse) == "there"
    entry = cache.hit("k")
    assert entry is not None
    assert entry.value == "there"
    assert outside.asked == ["find"]
    assert (cache.counters.misses, cache.counters.hits, cache.counters.loads) == (1, 3, 0)
    assert (cache.second.counters.hits, cache.second.counters.misses) == (1, 0)


async def test_what_neither_has_is_loaded_and_kept_in_both(cache: TwoLevels, outside: Outside) -> None:
    outside.entry = None
    assert await cache.read("k", value_of(1), tags=["t"]) == Read("1", "miss", True)
    assert outside.asked == ["find", "store"]
    assert outside.entry == ("1", 1000.0, 1300.0, {"t"})
    assert await cache.read("k", refuse) == Read("1", "hit", False)
    assert (cache.second.counters.misses, cache.counters.loads) == (1, 1)


async def test_a_refresh_reads_the_source_past_both_and_stores_in_both(
    cache: TwoLevels, outside: Outside
) -> None:
    assert await cache.read("k", refuse) == OUTSIDE
    assert await cache.read("k", value_of("anew"), refresh=True) == Read("anew", "bypass", True)
    assert outside.entry is not None
    assert outside.entry[0] == "anew"
    assert await cache.read("k", refuse) == Read("anew", "hit", False)


async def test_what_was_found_outside_is_given_where_loading_fails_and_goes_by_its_own_age(
    cache: TwoLevels, outside: Outside, coherence: Coherence, clock: SetClock
) -> None:
    async def away() -> Any:
        raise OSError

    assert await cache.read("k", refuse, stale_if_error=250) == OUTSIDE
    coherence.evict(KEY, 1000.0)
    await cache.evict(KEY)
    instead = Read("there", "hit", False, "stale-if-error")
    assert await cache.read("k", away, stale_if_error=250) == instead
    clock.time = 1149.0  # it was loaded at 900, by a clock that may have been 0.1 s ahead
    assert await cache.read("k", away, stale_if_error=250) == instead
    clock.time = 1150.0
    with pytest.raises(OSError):
        await cache.read("k", away, stale_if_error=250)
    assert outside.entry is None, "outside nothing stale is kept, and nothing is stored there for it"


async def test_what_is_past_its_ttl_is_given_and_what_another_one_has_loaded_is_taken_from_outside(
    cache: TwoLevels, outside: Outside, clock: SetClock, eventually: Eventually
) -> None:
    assert await cache.read("k", refuse) == OUTSIDE
    clock.time = 1200.0
    outside.entry = ("another's", 1150.0, 1450.0, frozenset(["t"]))
    given = await cache.read("k", refuse, stale_while_revalidate=30)
    assert given == Read("there", "hit", False, "stale-while-revalidate")
    await eventually(lambda: len(cache._reloads) == 0)
    assert await cache.read("k", refuse) == Read("another's", "hit", False)


async def test_a_hot_key_is_taken_from_outside_where_another_one_has_loaded_it(
    outside: Outside, coherence: Coherence, clock: SetClock, eventually: Eventually
) -> None:
    cache = levels(outside, coherence, clock, policies=Policies(warm_keys=10))
    assert cache.warming is not None
    assert [(await cache.read("k", refuse)).outcome for _ in range(2)] == ["hit", "hit"]
    coherence.evict(KEY, 1000.0)
    await cache.evict(KEY)
    outside.entry = ("another's", 1000.0, 1300.0, frozenset())
    clock.time = 1001.0
    await eventually(lambda: cache.warming.counters.stored == 1)  # type: ignore[union-attr]
    assert await cache.read("k", refuse) == Read("another's", "hit", False)
    await cache.close()


async def test_who_reads_a_key_at_the_same_time_shares_one_look(cache: TwoLevels, outside: Outside) -> None:
    outside.free["find"].clear()
    readers = [asyncio.create_task(cache.get_or_set("k", refuse)) for _ in range(5)]
    await turns()
    outside.free["find"].set()
    assert await asyncio.gather(*readers) == ["there"] * 5
    assert outside.asked == ["find"]


async def test_within_a_transaction_neither_is_asked(cache: TwoLevels, outside: Outside) -> None:
    await cache.read("k", refuse)
    with PastCache("a transaction"):
        assert await cache.read("k", value_of("mine")) == Read("mine", "bypass", False)
    assert cache.counters.bypass_reasons == {"transaction": 1}
    assert cache.second.counters.bypasses == 0  # nobody has looked there in vain
    assert await cache.read_source("k", value_of("source")) == "source"
    assert outside.asked == ["find"]


async def test_who_observes_sees_what_either_would_serve(cache: TwoLevels, clock: SetClock) -> None:
    entry = await cache.would_serve("k")
    assert entry is not None
    assert await cache.get_or_set("k", refuse) == "there"
    kept = await here(cache)
    assert kept is not None
    assert kept.load_started == entry.load_started
    assert cache.counters.hits == 0
    clock.time = 1201.0
    assert await cache.would_serve("k") is None


async def test_only_what_was_loaded_here_is_remembered(
    outside: Outside, coherence: Coherence, clock: SetClock
) -> None:
    remembered: list[str] = []
    cache = levels(outside, coherence, clock, remember=lambda key, *_: remembered.append(key))
    await cache.read("k", refuse)
    outside.entry = None
    await cache.read("other", value_of(1))
    assert remembered == ["other"]


async def test_looks_take_no_place_of_a_loader(
    outside: Outside, coherence: Coherence, clock: SetClock
) -> None:
    cache = levels(outside, coherence, clock, most_loads=1)
    entry, outside.entry = outside.entry, None
    over = asyncio.Event()
    loading = asyncio.create_task(cache.get_or_set("slow", lambda: over.wait()))
    await turns()
    outside.entry = entry
    async with asyncio.timeout(30):
        assert await cache.get_or_set("k", refuse) == "there"
    over.set()
    await loading


async def test_no_more_loaders_run_at_a_time_than_may(
    outside: Outside, coherence: Coherence, clock: SetClock
) -> None:
    cache = levels(outside, coherence, clock, most_loads=1)
    outside.entry, running, most = None, 0, 0

    async def load() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    await asyncio.gather(*(cache.get_or_set(f"k{number}", load) for number in range(5)))
    assert (most, cache.counters.loads, cache.counters.queued_loads) == (1, 5, 4)


async def test_a_load_that_another_waits_for_waits_for_no_place(
    outside: Outside, coherence: Coherence, clock: SetClock
) -> None:
    """The other one has the only place; when it began to wait, the first was still looking."""
    cache = levels(outside, coherence, clock, most_loads=1)
    outside.entry = None

    async def whole() -> str:
        return str(await cache.get_or_set("part", refuse)) + "!"

    outside.free["find"].clear()
    part = asyncio.create_task(cache.get_or_set("part", value_of("part")))
    await turns()
    assert outside.asked == ["find"]
    blocked, outside.free["find"] = outside.free["find"], asyncio.Event()
    outside.free["find"].set()
    reading = asyncio.create_task(cache.get_or_set("whole", whole))
    await turns()
    blocked.set()
    async with asyncio.timeout(30):
        assert await reading == "part!"
        assert await part == "part"


async def test_closed_it_holds_nothing_and_leaves_what_is_outside(cache: TwoLevels, outside: Outside) -> None:
    await cache.read("k", refuse)
    await cache.close()
    assert len(cache) == 0
    assert outside.asked == ["find", "close"]
    assert outside.entry is not None


# As old as it is outside


async def test_what_was_found_ends_when_it_ends_outside(
    cache: TwoLevels, outside: Outside, clock: SetClock
) -> None:
    await cache.read("k", refuse, ttl=10_000)
    clock.time = 1199.0
    assert await here(cache) is not None
    clock.time = 1200.0
    assert await here(cache) is None
    assert (await cache.read("k", value_of("new"))).value == "new"


async def test_what_was_found_is_as_old_as_it_is_outside(outside: Outside, clock: SetClock) -> None:
    cache = levels(outside, trusted(max_staleness=150.0, max_clock_skew=1.0), clock)
    assert await cache.read("k", refuse) == OUTSIDE
    clock.time = (
        1049.0  # 150 s after it was loaded, which may have been a second earlier than its host believed
    )
    assert await here(cache) is not None
    clock.time = 1049.5
    assert (await cache.read("k", value_of("new"))).value == "new"


async def test_what_grew_too_old_during_the_look_is_for_nobody(outside: Outside, clock: SetClock) -> None:
    """Who has joined meanwhile may have begun to read only now."""
    cache = levels(outside, trusted(max_staleness=150.0, max_clock_skew=1.0), clock)
    outside.free["find"].clear()
    readers = [asyncio.create_task(cache.get_or_set("k", value_of("new")))]
    await turns()
    clock.time = 1050.0
    readers.append(asyncio.create_task(cache.get_or_set("k", value_of("new"))))
    await turns()
    outside.free["find"].set()
    assert await asyncio.gather(*readers) == ["new", "new"]


async def test_what_is_built_from_it_goes_with_its_tags(cache: TwoLevels, coherence: Coherence) -> None:
    async def whole() -> str:
        return str(await cache.get_or_set("k", refuse)) + "!"

    cache.second._backend.entry, entry = None, cache.second._backend.entry  # type: ignore[attr-defined]

    async def part_is_there() -> str:
        cache.second._backend.entry = entry  # type: ignore[attr-defined]
        return await whole()

    assert await cache.get_or_set("whole", part_is_there) == "there!"
    assert await here(cache, "whole") is not None
    coherence.evict(TAG, 1000.0)
    assert await here(cache, "whole") is None


# Evicting


@each_eviction
async def test_an_eviction_reaches_both(
    cache: TwoLevels, outside: Outside, coherence: Coherence, what: Eviction
) -> None:
    await cache.read("k", refuse)
    coherence.evict(what, 1000.0)
    await cache.evict(what)
    assert outside.entry is None
    assert await cache.read("k", value_of("new")) == Read("new", "miss", True)


@each_eviction
async def test_what_was_looked_up_before_an_eviction_is_not_kept(
    cache: TwoLevels, outside: Outside, coherence: Coherence, what: Eviction
) -> None:
    outside.free["find"].clear()
    reading = asyncio.create_task(cache.read("k", value_of("loaded")))
    await turns()
    coherence.evict(what, 1000.0)
    evicting = asyncio.create_task(cache.evict(what))
    await turns()
    outside.free["find"].set()
    await asyncio.gather(reading, evicting)
    kept = await here(cache)
    assert kept is None or kept.value == "loaded"  # it had not named the tag


@each_eviction
async def test_nothing_is_read_outside_while_it_is_evicted_there(
    cache: TwoLevels, outside: Outside, coherence: Coherence, what: Eviction
) -> None:
    await cache.read("k", refuse)
    outside.free["evict"].clear()
    coherence.evict(what, 1000.0)
    evicting = asyncio.create_task(cache.evict(what))
    await turns()
    reading = asyncio.create_task(cache.read("k", value_of("new")))
    await turns()
    kept = await here(cache)
    assert kept is None or kept.value == "new"  # it need not evict first, as it does not name the tag
    outside.free["evict"].set()
    assert (await reading).value == "new"
    await evicting
    assert (await cache.read("k", value_of("new"))).value == "new"


@each_eviction
async def test_nothing_is_read_outside_that_has_yet_to_be_evicted_there(
    cache: TwoLevels, outside: Outside, coherence: Coherence, what: Eviction
) -> None:
    """A write has returned; what evicts outside runs a moment later."""
    await cache.read("k", refuse)
    coherence.evict(what, 1000.0)
    assert not cache.evict_now(what)
    outside.free["find"].clear()
    reading = asyncio.create_task(cache.read("k", value_of("new")))
    await turns()
    await cache.evict(what)
    outside.free["find"].set()
    assert (await reading).value == "new"
    assert (await cache.read("k", refuse)).value == "new"


# Down


async def test_a_cache_outside_that_is_down_costs_a_load_and_is_found_again(
    cache: TwoLevels, outside: Outside, coherence: Coherence
) -> None:
    outside.down = True
    assert await cache.read("k", value_of("new")) == Read("new", "miss", True)
    assert await cache.read("k", refuse) == Read("new", "hit", False)
    assert cache.second.counters.bypasses == 1
    coherence.evict(KEY, 1000.0)
    with pytest.raises(CacheError, match="down"):
        await cache.evict(KEY)
    assert await here(cache) is None
    assert await cache.read("k", value_of("newer")) == Read("newer", "miss", True)
    cache._backend.reset()
    outside.down = False
    assert (await cache.read("k", value_of("newest"))).value == "newest", (
        "evicted there before it was looked at"
    )
    assert outside.asked[-3:] == ["evict", "find", "store"]


async def test_what_is_not_stored_outside_is_kept_here(cache: TwoLevels, outside: Outside) -> None:
    outside.entry = None

    async def load() -> str:
        outside.down = True
        return "new"

    assert await cache.read("k", load) == Read("new", "miss", True)
    assert (cache.counters.not_stored, cache.second.counters.not_stored) == (0, 1)
    assert await cache.read("k", refuse) == Read("new", "hit", False)


# Put together


@pytest.mark.parametrize(
    ("local_entries", "kind", "has_session"), [(0, SharedCache, False), (10, TwoLevels, True)]
)
async def test_the_client_puts_them_together_and_registers_each_process_by_itself(
    local_entries: int, kind: type, has_session: bool
) -> None:
    """A process that has lost its queue to another of the same id still serves what it holds, and has not answered."""
    client = Client(
        Settings(
            cache_url="redis://127.0.0.1:1/0",
            instance_id="one",
            broker_url="memory://",
            cache_local_entries=local_entries,
        )
    )
    assert type(client.cache) is kind
    status = client.status()
    assert bool(status["registration"]["session"]) is has_session
    assert ("second_level" in status["counters"]) is has_session
    assert status["cache"]["entries"] == (0 if has_session else None)
