"""Reading through the cache in the process: one load at a time, and never a store that an eviction has forbidden."""

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from waiting import Eventually

from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.backends.shared import Found
from cacheinval.cache import InProcessCache, PastCache, Read, SharedCache
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence, Eviction
from cacheinval.coherence.registration import Registration
from cacheinval.errors import CacheError, InvalidKeyError
from cacheinval.messages import Tick

KEY, TAG = Eviction(["k"]), Eviction(tags=["t"])
EVERYTHING = Eviction(everything=True)


class SetClock(Clock):
    """A clock that goes only when told."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.start, self.elapsed = 0.0, lambda: self.time


class Loader:
    """A factory that waits to be released; `calls` counts its starts."""

    def __init__(self, value: Any = "value") -> None:
        self.value = value
        self.calls = 0
        self.release = asyncio.Event()

    async def __call__(self) -> Any:
        self.calls += 1
        value = self.value  # as a database does: the answer is of the moment of the question
        await self.release.wait()
        return value


def value_of(value: Any) -> Callable[[], Awaitable[Any]]:
    async def load() -> Any:
        return value

    return load


async def refuse() -> Any:
    pytest.fail("loaded although it was cached")


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def coherence() -> Coherence:
    coherence = Coherence()
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    return coherence


@pytest.fixture
def cache(coherence: Coherence, clock: SetClock) -> InProcessCache:
    return InProcessCache(BoundedMemoryCache(1000), coherence, clock, ttl=300)


@pytest.fixture
def evict(cache: InProcessCache, coherence: Coherence) -> Callable[[Eviction], None]:
    def evict(eviction: Eviction) -> None:
        coherence.evict(eviction, cache._now())
        cache.evict_now(eviction)

    return evict


Evict = Callable[[Eviction], None]


def in_flight(cache: InProcessCache) -> int:
    return len(cache._loads._loads) + len(cache._flights)


# Hits and misses


async def test_a_miss_loads_and_a_hit_does_not(cache: InProcessCache) -> None:
    assert await cache.read("k", value_of(1)) == Read(1, "miss", True)
    assert await cache.read("k", refuse) == Read(1, "hit", False)
    assert await cache.get_or_set("k", refuse) == 1
    assert (cache.counters.misses, cache.counters.hits, cache.counters.loads) == (1, 2, 1)


@pytest.mark.parametrize("value", [None, 0, "", False, []])
async def test_values_that_are_false_are_cached(cache: InProcessCache, value: Any) -> None:
    assert await cache.get_or_set("k", value_of(value)) == value
    assert await cache.read("k", refuse) == Read(value, "hit", False)


async def test_an_entry_expires(cache: InProcessCache, clock: SetClock) -> None:
    await cache.get_or_set("k", value_of(1), ttl=10)
    await cache.get_or_set("default", value_of(1))
    clock.time += 9.9
    assert await cache.get_or_set("k", refuse) == 1
    clock.time += 0.1
    assert await cache.get_or_set("k", value_of(2), ttl=10) == 2
    clock.time += 289.9
    assert await cache.get_or_set("default", refuse) == 1
    clock.time += 0.1
    assert await cache.get_or_set("default", value_of(2)) == 2


async def test_the_ttl_counts_from_the_store_and_the_age_from_the_start_of_the_load(
    cache: InProcessCache, clock: SetClock
) -> None:
    async def slow() -> str:
        clock.time += 100
        return "slow"

    await cache.get_or_set("k", slow, ttl=10)
    clock.time += 9.9
    assert await cache.get_or_set("k", refuse) == "slow"
    assert cache._backend.peek("k").load_started == 1000.0


@pytest.mark.parametrize("ttl", [0, -1, float("nan")])
async def test_a_ttl_that_means_nothing_is_refused(cache: InProcessCache, ttl: float) -> None:
    with pytest.raises(ValueError, match="accepted: seconds, more than 0"):
        await cache.get_or_set("k", refuse, ttl=ttl)


async def test_names_that_could_not_be_invalidated_are_refused(cache: InProcessCache) -> None:
    with pytest.raises(InvalidKeyError, match=r"^key '' is empty"):
        await cache.get_or_set("", refuse)
    with pytest.raises(InvalidKeyError, match=r"^tag 'a"):
        await cache.get_or_set("k", refuse, tags=["a\0"])
    with pytest.raises(InvalidKeyError, match="must be a list of strings"):
        await cache.get_or_set("k", refuse, tags="products")
    assert in_flight(cache) == 0


async def test_the_size_is_bounded_and_the_least_recently_used_goes_first(
    coherence: Coherence, clock: SetClock
) -> None:
    cache = InProcessCache(BoundedMemoryCache(10), coherence, clock, ttl=300)
    for n in range(100):
        await cache.get_or_set("kept", value_of("kept"))
        await cache.get_or_set(f"k{n}", value_of(n))
    assert len(cache) == 10
    assert await cache.get_or_set("kept", refuse) == "kept"
    assert in_flight(cache) == 0


async def test_closing_forgets_everything(cache: InProcessCache) -> None:
    await cache.get_or_set("k", value_of(1))
    await cache.close()
    assert len(cache) == 0


# One load at a time


async def test_a_hundred_readers_make_one_load(cache: InProcessCache, eventually: Eventually) -> None:
    loader = Loader()
    readers = [asyncio.create_task(cache.read("k", loader)) for _ in range(100)]
    await eventually(lambda: cache.counters.misses == 100)
    loader.release.set()
    reads = await asyncio.gather(*readers)
    assert loader.calls == 1
    assert {read.value for read in reads} == {"value"}
    assert sum(read.stored for read in reads) == 1
    assert in_flight(cache) == 0


async def test_loads_of_different_keys_do_not_wait_for_each_other(cache: InProcessCache) -> None:
    loader = Loader()
    slow = asyncio.create_task(cache.get_or_set("slow", loader))
    await asyncio.sleep(0)
    assert await cache.get_or_set("k", value_of(1)) == 1
    loader.release.set()
    assert await slow == "value"


@pytest.mark.parametrize("who", ["the leader", "a waiter", "all waiters"])
async def test_who_is_cancelled_cancels_nobody_else(
    cache: InProcessCache, eventually: Eventually, who: str
) -> None:
    loader = Loader()
    readers = [asyncio.create_task(cache.get_or_set("k", loader)) for _ in range(10)]
    await eventually(lambda: cache.counters.misses == 10)
    victims = {"the leader": readers[:1], "a waiter": readers[5:6], "all waiters": readers[1:]}[who]
    for task in victims:
        task.cancel()
    await asyncio.wait(victims)
    assert all(task.cancelled() for task in victims)
    loader.release.set()
    others = [task for task in readers if task not in victims]
    assert await asyncio.gather(*others) == ["value"] * len(others)
    assert loader.calls == (2 if who == "the leader" else 1)
    assert await cache.get_or_set("k", refuse) == "value"
    assert in_flight(cache) == 0


async def test_all_are_cancelled(cache: InProcessCache, eventually: Eventually) -> None:
    loader = Loader()
    readers = [asyncio.create_task(cache.get_or_set("k", loader)) for _ in range(10)]
    await eventually(lambda: cache.counters.misses == 10)
    for task in readers:
        task.cancel()
    await asyncio.wait(readers)
    assert in_flight(cache) == 0
    assert await cache.get_or_set("k", value_of(2)) == 2


async def test_a_loader_that_fails_fails_for_all_who_waited_and_frees_its_token(
    cache: InProcessCache, eventually: Eventually
) -> None:
    gate = asyncio.Event()

    async def fail() -> Any:
        await gate.wait()
        raise LookupError("no such product")

    readers = [asyncio.create_task(cache.get_or_set("k", fail)) for _ in range(10)]
    await eventually(lambda: cache.counters.misses == 10)
    gate.set()
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert [str(result) for result in results] == ["no such product"] * 10
    assert all(isinstance(result, LookupError) for result in results)
    assert cache.counters.load_errors == 1
    assert in_flight(cache) == 0
    assert await cache.read("k", value_of(2)) == Read(2, "miss", True)


async def test_a_failure_that_nobody_waits_for_any_more_is_no_unhandled_one(
    cache: InProcessCache, eventually: Eventually
) -> None:
    gate, unhandled = asyncio.Event(), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))

    async def fail() -> Any:
        await gate.wait()
        raise LookupError

    leader, waiter = (asyncio.create_task(cache.get_or_set("k", fail)) for _ in range(2))
    await eventually(lambda: cache.counters.misses == 2)
    waiter.cancel()
    await asyncio.wait([waiter])
    gate.set()
    with pytest.raises(LookupError):
        await leader
    del leader, waiter
    gc.collect()
    await asyncio.sleep(0)
    assert unhandled == []


# Evictions meanwhile


@pytest.mark.parametrize("eviction", [KEY, TAG, EVERYTHING], ids=["key", "tag", "everything"])
async def test_what_was_read_before_an_eviction_is_returned_and_not_stored(
    cache: InProcessCache, evict: Evict, eviction: Eviction
) -> None:
    loader = Loader()
    reader = asyncio.create_task(cache.read("k", loader, tags=["t"]))
    await asyncio.sleep(0)
    evict(eviction)
    loader.release.set()
    assert await reader == Read("value", "miss", False)
    assert len(cache) == 0
    assert cache.counters.not_stored == 1
    assert in_flight(cache) == 0


@pytest.mark.parametrize("eviction", [KEY, TAG, EVERYTHING], ids=["key", "tag", "everything"])
async def test_a_reader_that_comes_after_an_eviction_does_not_join_the_old_load(
    cache: InProcessCache, evict: Evict, eviction: Eviction
) -> None:
    old, new = Loader("old"), Loader("new")
    first = asyncio.create_task(cache.read("k", old, tags=["t"]))
    await asyncio.sleep(0)
    evict(eviction)
    second = asyncio.create_task(cache.read("k", new, tags=["t"]))
    await asyncio.sleep(0)
    new.release.set()
    assert await second == Read("new", "miss", True)
    old.release.set()
    assert await first == Read("old", "miss", False)
    assert await cache.get_or_set("k", refuse) == "new"


async def test_a_reader_does_not_join_a_load_that_has_hung_while_suspect(
    cache: InProcessCache, coherence: Coherence, clock: SetClock
) -> None:
    old = Loader("old")
    first = asyncio.create_task(cache.get_or_set("k", old))
    await asyncio.sleep(0)
    coherence.lost("cut")
    clock.time += 1.1
    assert await cache.read("k", value_of("new")) == Read("new", "bypass", True)
    old.release.set()
    assert await first == "old"
    assert await cache.get_or_set("k", refuse) == "new"


async def test_who_waited_for_a_leader_that_was_cancelled_after_an_eviction_loads_anew(
    cache: InProcessCache, evict: Evict
) -> None:
    old, new = Loader("old"), Loader("new")
    leader = asyncio.create_task(cache.get_or_set("k", old))
    await asyncio.sleep(0)
    waiter = asyncio.create_task(cache.get_or_set("k", new))
    await asyncio.sleep(0)
    evict(KEY)
    leader.cancel()
    new.release.set()
    assert await waiter == "new"
    assert await cache.get_or_set("k", refuse) == "new"


async def test_a_load_after_a_leader_that_was_cancelled_is_as_young_as_it_is(
    cache: InProcessCache, clock: SetClock, eventually: Eventually
) -> None:
    leader = asyncio.create_task(cache.get_or_set("k", Loader()))
    waiter = asyncio.create_task(cache.get_or_set("k", value_of("value")))
    await eventually(lambda: cache.counters.misses == 2)
    clock.time += 30
    leader.cancel()
    assert await waiter == "value"
    assert cache._backend.peek("k").load_started == 1030.0


async def test_suspect_it_serves_for_a_second_and_says_bypass_afterwards(
    cache: InProcessCache, coherence: Coherence, clock: SetClock
) -> None:
    await cache.get_or_set("k", value_of(1))
    coherence.lost("cut")
    clock.time += 1
    assert await cache.read("k", refuse) == Read(1, "hit", False)
    clock.time += 0.01
    assert await cache.read("k", value_of(2)) == Read(2, "bypass", True)
    assert await cache.read("k", refuse) == Read(2, "hit", False)
    assert cache.counters.bypasses == 1


async def test_evicted_entries_are_counted(cache: InProcessCache, evict: Evict) -> None:
    for n in range(5):
        await cache.get_or_set(f"k{n}", value_of(n))
    evict(Eviction(["k0", "missing"]))
    assert cache.counters.evicted_entries == 1
    evict(EVERYTHING)
    assert cache.counters.evicted_entries == 5
    assert len(cache) == 0


async def test_a_load_that_races_an_invalidation_never_stores_the_old_value(
    cache: InProcessCache, evict: Evict
) -> None:
    """200 loads, each with a write that commits and evicts at some point during it."""
    database = {"k": 0}
    chance = random.Random(42)
    stale = 0
    for run in range(200):

        async def load() -> int:
            await asyncio.sleep(0)
            value = database["k"]
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            return value

        async def write(run: int = run) -> None:
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            database["k"] = run + 1
            evict(KEY if run % 3 else EVERYTHING)

        readers = [asyncio.create_task(cache.get_or_set("k", load)) for _ in range(3)]
        await write()
        await asyncio.gather(*readers)
        entry = cache._backend.peek("k")
        stale += entry is not None and entry.value != database["k"]
    assert stale == 0
    assert cache.counters.not_stored > 50, "too few of the runs were races"


# Values built from other entries


async def test_a_value_inherits_the_age_and_the_tags_of_its_parts(
    cache: InProcessCache, clock: SetClock, evict: Evict
) -> None:
    await cache.get_or_set("old", value_of(1), tags=["o"])
    clock.time += 50

    async def whole() -> int:
        clock.time += 1
        return await cache.get_or_set("old", refuse) + await cache.get_or_set("new", value_of(2), tags=["n"])

    assert await cache.get_or_set("k", whole, tags=["w"]) == 3
    entry = cache._backend.peek("k")
    assert entry.load_started == 1000.0
    assert entry.tags == {"o", "n", "w"}
    evict(Eviction(tags=["o"]))
    assert await cache.get_or_set("k", value_of(4)) == 4


@pytest.mark.parametrize("eviction", [Eviction(["part"]), Eviction(tags=["p"])], ids=["key", "tag"])
async def test_a_part_that_is_evicted_while_it_is_loaded_voids_the_whole(
    cache: InProcessCache, evict: Evict, eviction: Eviction
) -> None:
    loader = Loader()

    async def whole() -> Any:
        return await cache.get_or_set("part", loader, tags=["p"])

    reader = asyncio.create_task(cache.read("k", whole))
    await asyncio.sleep(0)
    evict(eviction)
    loader.release.set()
    assert await reader == Read("value", "miss", False)
    assert len(cache) == 0


@pytest.mark.parametrize("eviction", [Eviction(["part"]), Eviction(tags=["p"])], ids=["key", "tag"])
async def test_who_comes_after_a_part_was_evicted_does_not_wait_for_the_whole(
    cache: InProcessCache, evict: Evict, eviction: Eviction
) -> None:
    source, began, go = ["old"], asyncio.Event(), asyncio.Event()

    async def part() -> str:
        value = source[0]
        began.set()
        await go.wait()
        return value

    async def whole() -> str:
        return await cache.get_or_set("part", part, tags=["p"])

    before = asyncio.create_task(cache.get_or_set("k", whole))
    await began.wait()
    source[0] = "new"
    evict(eviction)
    after = asyncio.create_task(cache.get_or_set("k", whole))
    await asyncio.sleep(0)
    go.set()
    assert [await before, await after] == ["old", "new"]
    assert await cache.get_or_set("k", refuse) == "new"


async def test_who_comes_later_does_not_wait_for_a_whole_of_which_a_part_is_too_old(clock: SetClock) -> None:
    coherence = Coherence(5.0, 0.0)
    coherence.evict(coherence.joined_anew(clock.time), clock.time)
    coherence.trust()
    part = coherence.loads.begin("part", clock.time)
    whole = coherence.loads.begin("whole", clock.time + 4)
    whole.parts.append(part)
    assert coherence.loads.joinable("whole", clock.time + 5) is whole
    assert coherence.loads.joinable("whole", clock.time + 5.1) is None


async def test_a_whole_is_not_given_to_late_readers_if_a_part_began_before_the_registration(
    clock: SetClock,
) -> None:
    registration = Registration(5.0, 0.0, required=True)
    coherence = Coherence(5.0, 0.0, registration=registration)
    part = coherence.loads.begin("part", clock.time)
    registration.sending(clock.time + 1)
    registration.answered(clock.time + 1, clock.time + 1, clock.time + 1)
    whole = coherence.loads.begin("whole", clock.time + 2)
    assert coherence.loads.may_give(whole, clock.time + 3)
    whole.parts.append(part)
    assert not coherence.loads.may_give(whole, clock.time + 3)


async def test_a_part_that_another_loads_is_inherited_as_well(cache: InProcessCache, evict: Evict) -> None:
    loader = Loader()
    other = asyncio.create_task(cache.get_or_set("part", loader, tags=["p"]))
    await asyncio.sleep(0)

    async def whole() -> Any:
        return await cache.get_or_set("part", refuse, tags=["p"])

    reader = asyncio.create_task(cache.read("k", whole))
    await asyncio.sleep(0)
    loader.release.set()
    assert await reader == Read("value", "miss", True)
    await other
    assert cache._backend.peek("k").tags == {"p"}


async def test_a_factory_that_reads_its_own_key_is_told_so(cache: InProcessCache) -> None:
    async def outer() -> Any:
        return await cache.get_or_set("inner", inner)

    async def inner() -> Any:
        return await cache.get_or_set("k", refuse)

    with pytest.raises(CacheError, match=r"'inner' reads 'k'.* for ever"):
        await cache.get_or_set("k", outer)
    assert in_flight(cache) == 0


async def test_two_factories_that_read_each_other_do_not_hang(cache: InProcessCache) -> None:
    started = asyncio.Event()

    async def one() -> Any:
        await started.wait()
        return await cache.get_or_set("two", refuse)

    async def two() -> Any:
        started.set()
        return await cache.get_or_set("one", refuse)

    async with asyncio.timeout(30):
        results = await asyncio.gather(
            cache.get_or_set("one", one), cache.get_or_set("two", two), return_exceptions=True
        )
    assert any(isinstance(result, CacheError) for result in results)
    assert in_flight(cache) == 0


async def test_two_factories_may_share_a_part(cache: InProcessCache) -> None:
    loader = Loader(1)

    async def whole() -> Any:
        parts = [cache.get_or_set("part", loader), cache.get_or_set("part", loader)]
        return sum(await asyncio.gather(*parts))

    readers = asyncio.gather(cache.get_or_set("one", whole), cache.get_or_set("two", whole))
    await asyncio.sleep(0.01)
    loader.release.set()
    assert await readers == [2, 2]
    assert loader.calls == 1


# Transactions


async def test_within_a_transaction_the_cache_is_left_alone(cache: InProcessCache) -> None:
    await cache.get_or_set("k", value_of("committed"))
    with PastCache("a transaction"):
        assert await cache.read("k", value_of("own change")) == Read("own change", "bypass", False)
        assert await cache.read("other", value_of("own change")) == Read("own change", "bypass", False)
    assert cache.counters.bypass_reasons == {"transaction": 2}
    assert await cache.get_or_set("k", refuse) == "committed"
    assert len(cache) == 1


async def test_a_transaction_does_not_concern_other_tasks(cache: InProcessCache) -> None:
    await cache.get_or_set("k", value_of(1))
    inside, leave = asyncio.Event(), asyncio.Event()

    async def transaction() -> None:
        with PastCache():
            inside.set()
            await leave.wait()

    task = asyncio.create_task(transaction())
    await inside.wait()
    assert await cache.read("k", refuse) == Read(1, "hit", False)
    leave.set()
    await task


async def test_a_task_that_outlives_its_transaction_gets_the_cache_back() -> None:
    coherence = Coherence()
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    cache = InProcessCache(BoundedMemoryCache(10), coherence, Clock(), ttl=300)
    over = asyncio.Event()

    async def load() -> int:
        return 1

    async def later() -> list[str]:
        within = (await cache.read("k", load)).outcome
        await over.wait()
        return [within, (await cache.read("k", load)).outcome, (await cache.read("k", load)).outcome]

    with PastCache():
        task = asyncio.create_task(later())
        await asyncio.sleep(0)
    over.set()
    assert await task == ["bypass", "miss", "hit"]


class SharedStub:
    """An empty cache outside the process; while it is asked, the clock is set."""

    def __init__(self, clock: SetClock, to: float) -> None:
        self.clock = clock
        self.to = to
        self.starts: list[float] = []

    async def find(self, key: str, tags: frozenset[str], model: Any, ttl: float) -> Found:
        self.clock.time = self.to
        return Found(None, False, 0.0, 0.0, frozenset(), "", "", {})

    async def store(
        self, key: str, value: bytes, ttl: float, load_started: float, expires_at: float, found: Found
    ) -> None:
        self.starts.append(load_started)

    async def evict(self, keys: Any, tags: Any, everything: bool) -> None: ...
    async def evict_ahead(self, keys: Any, tags: Any, everything: bool) -> None: ...
    async def close(self) -> None: ...

    def encode(self, value: Any) -> bytes:
        return b""

    def decode(self, value: bytes, model: Any) -> Any:
        return None


@pytest.mark.parametrize(("to", "started"), [(500.0, 500.0), (2000.0, 1000.0)], ids=["back", "forwards"])
async def test_a_clock_set_during_a_look_makes_no_entry_younger_than_it_is(
    coherence: Coherence, clock: SetClock, to: float, started: float
) -> None:
    stub = SharedStub(clock, to)
    await SharedCache(stub, coherence, clock, ttl=300).read("k", value_of(1))
    assert stub.starts == [started]


# Loading anew, and not storing


async def test_a_refresh_loads_past_what_is_there_and_stores(cache: InProcessCache) -> None:
    await cache.read("k", value_of("old"))
    assert await cache.read("k", value_of("new"), refresh=True) == Read("new", "bypass", True)
    assert await cache.read("k", refuse) == Read("new", "hit", False)


async def test_a_refresh_joins_no_load_that_began_before_it(cache: InProcessCache) -> None:
    older, younger = Loader("old"), Loader("new")
    first = asyncio.create_task(cache.read("k", older))
    await asyncio.sleep(0)
    second = asyncio.create_task(cache.read("k", younger, refresh=True))
    await asyncio.sleep(0)
    joined = asyncio.create_task(cache.read("k", refuse))
    younger.release.set()
    assert await second == Read("new", "bypass", True)
    assert await joined == Read("new", "miss", False)
    older.release.set()
    assert await first == Read("old", "miss", False)
    assert await cache.read("k", refuse) == Read("new", "hit", False)
    assert in_flight(cache) == 0


async def test_while_it_is_refreshed_the_entry_is_served(cache: InProcessCache) -> None:
    await cache.read("k", value_of("old"))
    loader = Loader("new")
    refreshing = asyncio.create_task(cache.read("k", loader, refresh=True))
    await asyncio.sleep(0)
    assert await cache.read("k", refuse) == Read("old", "hit", False)
    loader.release.set()
    await refreshing
    assert (await cache.read("k", refuse)).value == "new"


@pytest.mark.parametrize("eviction", [KEY, TAG, EVERYTHING], ids=["key", "tag", "everything"])
async def test_an_eviction_voids_a_refresh(cache: InProcessCache, evict: Evict, eviction: Eviction) -> None:
    await cache.read("k", value_of("older"), tags=["t"])
    loader = Loader("old")
    refreshing = asyncio.create_task(cache.read("k", loader, tags=["t"], refresh=True))
    await asyncio.sleep(0)
    evict(eviction)
    loader.release.set()
    assert await refreshing == Read("old", "bypass", False)
    assert (await cache.read("k", value_of("new"), tags=["t"])).value == "new"


@pytest.mark.parametrize("drop", [False, True])
async def test_what_is_withheld_is_given_and_not_stored(cache: InProcessCache, drop: bool) -> None:
    async def load() -> str:
        await asyncio.sleep(0)
        await cache.withhold(drop=drop)
        return "withheld"

    async def built_of_it() -> Any:
        return [await cache.get_or_set("k", load)]

    one, two = await asyncio.gather(cache.read("k", load), cache.read("k", refuse))
    assert one == two == Read("withheld", "miss", False)
    assert await cache.read("whole", built_of_it) == Read(["withheld"], "miss", False)
    await cache.read("k", value_of("before"))
    assert await cache.read("k", load, refresh=True) == Read("withheld", "bypass", False)
    assert (await cache.read("k", value_of("after"))).value == ("after" if drop else "before")
    await cache.withhold(drop=True)
    assert (await cache.read("k", refuse)).outcome == "hit", "nothing was being loaded"


class TestAHitRestsOnAnEarlierJudgement:
    """Each of these takes something away on which it rests, and nothing else."""

    @pytest.fixture
    def proven(self, clock: SetClock) -> tuple[InProcessCache, Coherence]:
        registration = Registration(5.0, 0.0, required=True)
        coherence = Coherence(5.0, 0.0, registration=registration)
        coherence.evict(coherence.joined_anew(clock.time), clock.time)
        coherence.trust()
        for told in (clock.time, clock.time + 1):
            registration.sending(told)
            registration.answered(told, told, told)
        coherence.settle("registration")
        coherence.proof.trust_only("ours")
        return InProcessCache(BoundedMemoryCache(1000), coherence, clock, ttl=300), coherence

    async def judged(self, cache: InProcessCache, coherence: Coherence, clock: SetClock) -> None:
        """Leaves an entry that is older than Δ, and has been judged to be good for a while."""
        for seq in range(3):
            tick = Tick(v=1, origin="relay", seq=0, as_of=clock.time, source="ours")
            coherence.received(tick, clock.time)
            coherence.evicted(clock.time)
            clock.time += 1
            if seq == 0:
                await cache.get_or_set("k", value_of(1))
        clock.time += 3
        assert await cache.get_or_set("k", refuse) == 1
        clock.time += 0.5
        hit = cache.hit("k")
        assert hit is not None
        assert hit.value == 1

    async def test_time(self, proven: tuple[InProcessCache, Coherence], clock: SetClock) -> None:
        cache, coherence = proven
        await self.judged(cache, coherence, clock)
        clock.time += 1
        assert cache.hit("k") is None
        assert await cache.get_or_set("k", value_of(2)) == 2

    async def test_the_database(self, proven: tuple[InProcessCache, Coherence], clock: SetClock) -> None:
        cache, coherence = proven
        await self.judged(cache, coherence, clock)
        coherence.proof.trust_only("another")
        assert cache.hit("k") is None
        assert await cache.get_or_set("k", value_of(2)) == 2

    async def test_the_registration(self, proven: tuple[InProcessCache, Coherence], clock: SetClock) -> None:
        cache, coherence = proven
        await self.judged(cache, coherence, clock)
        coherence.registration.forget()
        assert cache.hit("k") is None
        assert await cache.get_or_set("k", value_of(2)) == 2

    async def test_a_transaction(self, proven: tuple[InProcessCache, Coherence], clock: SetClock) -> None:
        cache, coherence = proven
        await self.judged(cache, coherence, clock)
        with PastCache():
            assert cache.hit("k") is None
            assert await cache.get_or_set("k", value_of(2)) == 2

    async def test_a_load_that_inherits(
        self, proven: tuple[InProcessCache, Coherence], clock: SetClock
    ) -> None:
        cache, coherence = proven
        await self.judged(cache, coherence, clock)

        async def built() -> Any:
            assert cache.hit("k") is None
            return await cache.get_or_set("k", refuse)

        assert await cache.get_or_set("whole", built) == 1
        whole = await cache.would_serve("whole")
        part = await cache.would_serve("k")
        assert whole is not None
        assert part is not None
        assert whole.load_started == part.load_started
