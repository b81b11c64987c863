"""Hot keys are loaded again after an eviction: which, when, and never too often or too many at once."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import pytest
from shelf import Shelf
from waiting import Eventually

from cacheinval import Client, ConfigurationError, Settings
from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.cache import InProcessCache, Policies, Read, SharedCache
from cacheinval.cache.levels import TwoLevels
from cacheinval.cache.reloading import MOST_WARMING, Warmer
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence, Eviction
from cacheinval.coherence.serving import Serving
from cacheinval.coherence.warming import Hot, Warming

NONE: frozenset[str] = frozenset()
KEY, EVERYTHING = Eviction(["k"]), Eviction(everything=True)

# The plan


def planned(*keys: str, most: int = 10, interval: float = 5.0, drawn: float = 0.0) -> Warming:
    plan = Warming(most, interval, drawn=lambda: drawn)
    for key in keys:
        plan.read(Hot(key, None, frozenset({f"tag of {key}"})))
    return plan


def taken(plan: Warming, now: float) -> list[str]:
    keys = []
    while (hot := plan.take(now)) is not None:
        plan.begun(hot.key, now)
        keys.append(hot.key)
    return keys


def test_what_was_read_is_due_when_it_is_evicted_and_nothing_else() -> None:
    plan = planned("a", "b")
    assert plan.next_at is None
    plan.evicted(["a", "c"], [], False, 100.0)
    assert (plan.hot, plan.waiting, plan.next_at) == (1, 1, 100.0)
    assert taken(plan, 100.0) == ["a"]
    assert (plan.waiting, plan.next_at) == (0, None)


def test_a_key_that_nobody_has_read_since_is_left_alone() -> None:
    plan = planned("a")
    plan.evicted(["a"], [], False, 100.0)
    assert taken(plan, 100.0) == ["a"]
    plan.evicted(["a"], [], False, 200.0)
    assert taken(plan, 300.0) == []


def test_a_storm_of_evictions_has_a_key_loaded_once_in_an_interval() -> None:
    plan = planned(interval=5.0)
    loaded = []
    for tenth in range(101):
        plan.read(Hot("a", None, NONE))
        plan.evicted(["a"], [], False, tenth / 10)
        loaded += [tenth / 10 for _ in taken(plan, tenth / 10)]
    assert loaded == [0.0, 5.0, 10.0]


def test_by_tag_and_all_at_once() -> None:
    plan = planned("a", "b", "c")
    plan.evicted([], ["tag of b", "other"], False, 0.0)
    assert taken(plan, 0.0) == ["b"]
    plan.evicted([], [], True, 0.0)
    assert sorted(taken(plan, 0.0)) == ["a", "c"]


def test_only_the_keys_read_last_are_hot() -> None:
    plan = planned("a", "b", "c", most=2)
    plan.read(Hot("b", None, NONE))
    plan.read(Hot("d", None, NONE))
    plan.evicted([], [], True, 0.0)
    assert sorted(taken(plan, 0.0)) == ["b", "d"]


def test_many_at_once_are_spread_and_one_is_not() -> None:
    plan = Warming(1000, 1.0)
    for number in range(1000):
        plan.read(Hot(f"{number}", None, NONE))
    plan.evicted([], [], True, 0.0)
    by_second = [len(taken(plan, float(second))) for second in range(1, 11)]
    assert sum(by_second) == 1000
    assert max(by_second) < 200
    plan.read(Hot("new", None, NONE))
    plan.evicted(["new"], [], False, 100.0)
    assert taken(plan, 100.01) == ["new"]


def test_no_more_wait_than_are_hot() -> None:
    plan = planned("a", "b", most=2)
    plan.evicted([], [], True, 0.0)
    plan.read(Hot("c", None, NONE))
    plan.evicted(["c"], [], False, 0.0)
    assert sorted(taken(plan, 0.0)) == ["a", "b"]


def test_what_was_begun_long_ago_is_forgotten() -> None:
    plan = planned(interval=5.0)
    for second in range(100):
        plan.begun(f"{second}", float(second))
    assert len(plan._begun) == 5
    plan.begun("98", 102.0)
    plan.begun("new", 104.0)
    assert list(plan._begun) == ["98", "new"]


# The cache


class Source:
    """What loaders read."""

    def __init__(self) -> None:
        self.value: Any = 1
        self.away: Exception | None = None
        self.loads = self.running = self.most_running = 0
        self.open = asyncio.Event()
        self.open.set()

    async def load(self) -> Any:
        self.loads += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        value = self.value
        try:
            await self.open.wait()
        finally:
            self.running -= 1
        if self.away is not None:
            raise self.away
        return value


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def coherence() -> Coherence:
    coherence = Coherence()
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    return coherence


@pytest.fixture(params=["in the process", "two levels"])
async def cache(request: pytest.FixtureRequest, coherence: Coherence) -> AsyncIterator[InProcessCache]:
    clock, policies = Clock(), Policies(warm_keys=100, warm_interval=0.02)
    cache = InProcessCache(BoundedMemoryCache(1000), coherence, clock, 300, policies=policies)
    if request.param == "two levels":
        second = SharedCache(Shelf(), coherence, clock, 300)
        cache = TwoLevels(BoundedMemoryCache(1000), second, coherence, clock, 300, policies=policies)
    yield cache
    await cache.close()


@pytest.fixture
def warmer(cache: InProcessCache) -> Warmer:
    assert cache.warming is not None
    return cache.warming


@pytest.fixture
def evict(cache: InProcessCache, coherence: Coherence) -> Callable[[Eviction], None]:
    def evict(eviction: Eviction) -> None:
        coherence.evict(eviction, cache._now())
        cache.evict_now(eviction)

    return evict


async def heat(cache: InProcessCache, source: Source, *keys: str) -> None:
    for key in keys:
        await cache.get_or_set(key, source.load, tags=["t"])
        assert (await cache.read(key, source.load, tags=["t"])).outcome == "hit"


@pytest.mark.parametrize(
    "eviction", [KEY, Eviction(tags=["t"]), EVERYTHING], ids=["key", "tag", "everything"]
)
async def test_a_hot_key_is_there_again_before_anybody_reads_it(
    cache: InProcessCache,
    warmer: Warmer,
    source: Source,
    evict: Callable[[Eviction], None],
    eventually: Eventually,
    eviction: Eviction,
) -> None:
    await heat(cache, source, "k")
    assert warmer.state == {"hot": 1, "waiting": 0, "running": 0}
    source.value = 2
    evict(eviction)
    assert cache.hit("k") is None
    await eventually(lambda: warmer.counters.stored == 1)
    assert await cache.read("k", source.load) == Read(2, "hit", False)
    assert (source.loads, cache.counters.misses, warmer.counters.loads) == (2, 1, 1)
    evict(Eviction(tags=["t"]))
    assert (await cache.read("k", source.load)).outcome == "miss"  # its tags are those that it had


async def test_the_next_time_is_an_interval_later(
    coherence: Coherence, source: Source, eventually: Eventually
) -> None:
    policies = Policies(warm_keys=10, warm_interval=60)
    cache = InProcessCache(BoundedMemoryCache(10), coherence, Clock(), ttl=300, policies=policies)
    assert cache.warming is not None
    for _ in range(2):
        await heat(cache, source, "k")
        coherence.evict(KEY, cache._now())
        cache.evict_now(KEY)
        await eventually(lambda: cache.warming.counters.stored == 1)  # type: ignore[union-attr]
    assert cache.warming.plan.next_at is not None
    assert cache.warming.plan.next_at > asyncio.get_running_loop().time() + 50
    await cache.close()


async def test_what_evicts_lends_nothing_to_the_loader(
    cache: InProcessCache,
    warmer: Warmer,
    evict: Callable[[Eviction], None],
    eventually: Eventually,
) -> None:
    caller = ContextVar("caller", default="nobody")
    seen = []

    async def load() -> None:
        seen.append(caller.get())

    for _ in range(2):
        await cache.get_or_set("k", load)
    caller.set("a request")
    evict(KEY)
    await eventually(lambda: warmer.counters.stored == 1)
    assert seen == ["nobody", "nobody"]


async def test_a_key_that_was_only_loaded_is_not_hot(
    cache: InProcessCache, warmer: Warmer, source: Source, evict: Callable[[Eviction], None]
) -> None:
    await cache.get_or_set("k", source.load)
    evict(KEY)
    assert warmer.state == {"hot": 0, "waiting": 0, "running": 0}


async def test_a_key_that_is_read_often_stays_among_the_hot(
    coherence: Coherence, source: Source, eventually: Eventually
) -> None:
    clock = Clock()
    now = 1000.0
    clock.start, clock.elapsed = 0.0, lambda: now  # type: ignore[assignment]
    cache = InProcessCache(
        BoundedMemoryCache(1000), coherence, clock, ttl=300, policies=Policies(warm_keys=2)
    )
    await heat(cache, source, "often", "once")
    now += 1
    assert await cache.get_or_set("often", source.load) == 1
    await heat(cache, source, "other")
    assert cache.warming is not None
    assert list(cache.warming.plan._hot) == ["often", "other"]
    await cache.close()


async def test_a_load_that_an_eviction_overtakes_is_not_stored_but_made_again(
    cache: InProcessCache,
    warmer: Warmer,
    source: Source,
    evict: Callable[[Eviction], None],
    eventually: Eventually,
) -> None:
    await heat(cache, source, "k")
    source.open.clear()
    evict(KEY)
    await eventually(lambda: source.loads == 2)
    evict(KEY)
    source.value = 2
    source.open.set()
    await eventually(lambda: warmer.counters.stored == 1)
    assert (warmer.counters.loads, source.loads) == (2, 3)
    assert await cache.read("k", source.load) == Read(2, "hit", False)


async def test_what_a_reader_has_loaded_or_is_loading_is_not_loaded_again(
    cache: InProcessCache,
    warmer: Warmer,
    source: Source,
    evict: Callable[[Eviction], None],
    eventually: Eventually,
) -> None:
    await heat(cache, source, "k", "l")
    may_begin, warmer._may_begin = warmer._may_begin, lambda: False  # not before the reader
    evict(Eviction(["k", "l"]))
    await cache.get_or_set("k", source.load)
    source.open.clear()
    reading = asyncio.create_task(cache.get_or_set("l", source.load))
    await eventually(lambda: source.loads == 4)
    warmer._may_begin = may_begin
    await eventually(lambda: warmer.counters.needless == 2)
    source.open.set()
    await reading
    assert (source.loads, warmer.counters.loads) == (4, 0)


async def test_few_run_at_a_time(
    cache: InProcessCache,
    warmer: Warmer,
    source: Source,
    evict: Callable[[Eviction], None],
    eventually: Eventually,
) -> None:
    await heat(cache, source, *(f"{number}" for number in range(10)))
    source.most_running = asked = 0
    may_begin = warmer._may_begin

    def asking() -> bool:
        nonlocal asked
        asked += 1
        return may_begin()

    warmer._may_begin = asking
    source.open.clear()
    evict(EVERYTHING)
    await eventually(lambda: warmer.state["running"] == MOST_WARMING and warmer.plan.waiting == 6)
    await eventually(lambda: (warmer.plan.next_at or 0) < asyncio.get_running_loop().time() - 0.1)
    assert asked < 30  # and the loop is not kept busy meanwhile
    source.open.set()
    await eventually(lambda: warmer.counters.stored == 10)
    assert source.most_running == MOST_WARMING


async def test_a_load_that_fails_is_counted_said_and_left_to_the_readers(
    cache: InProcessCache,
    warmer: Warmer,
    source: Source,
    evict: Callable[[Eviction], None],
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await heat(cache, source, "k")
    source.away = OSError("no database")
    with caplog.at_level(logging.WARNING, "cacheinval.cache"):
        evict(KEY)
        await eventually(lambda: warmer.counters.failures == 1)
    assert "cannot load again what was evicted key=k" in caplog.text
    assert (warmer.state, source.loads) == ({"hot": 0, "waiting": 0, "running": 0}, 2)


async def test_nothing_is_warmed_that_would_not_be_served(
    cache: InProcessCache,
    warmer: Warmer,
    coherence: Coherence,
    source: Source,
    evict: Callable[[Eviction], None],
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cacheinval.cache.reloading.MAY_NOT_YET", 0.01)
    await heat(cache, source, "k")
    coherence.lost("cut")
    evict(EVERYTHING)
    asked = 0

    def bypassing(*asking: Any) -> bool:
        nonlocal asked
        asked += 1
        return Serving.bypassing(coherence.serving, *asking)

    monkeypatch.setattr(coherence.serving, "bypassing", bypassing)
    await eventually(lambda: asked >= 3)
    assert (source.loads, warmer.plan.waiting) == (1, 1)
    evict(coherence.joined_anew(cache._now()))
    coherence.trust()
    await eventually(lambda: warmer.counters.stored == 1)


async def test_it_ends_with_the_cache(
    cache: InProcessCache,
    warmer: Warmer,
    source: Source,
    evict: Callable[[Eviction], None],
    eventually: Eventually,
) -> None:
    await heat(cache, source, "k", "l")
    source.open.clear()
    evict(KEY)
    await eventually(lambda: source.loads == 3)
    evict(Eviction(["l"]))
    await cache.close()
    assert source.running == 0
    evict(EVERYTHING)
    assert warmer.plan.waiting == 1
    assert warmer._timer is None


def test_without_a_loop_nothing_is_loaded(coherence: Coherence) -> None:
    cache = InProcessCache(
        BoundedMemoryCache(10), coherence, Clock(), ttl=300, policies=Policies(warm_keys=10)
    )
    cache.evict_now(EVERYTHING)


# The client


async def test_one_setting_turns_it_on_and_the_status_shows_what_it_did(
    source: Source, eventually: Eventually
) -> None:
    settings = Settings(broker_url="memory://", database_url="", warm_keys=10)
    async with Client(settings) as client, Client(settings) as other:
        await client.wait_ready(30)
        await other.wait_ready(30)
        load = client.cached("k", tags=["t"])(source.load)
        assert [await load(), await load(), await load()] == [1, 1, 1]
        source.value = 2
        await other.invalidate("k")
        await eventually(lambda: client.stats()["warming"]["stored"] == 1)
        assert client.cache.counters.misses == 1
        assert (await load(), client.cache.counters.misses) == (2, 1)
        state = {"hot": 1, "waiting": 0, "running": 0}
        await eventually(lambda: client.status()["cache"]["warming"] == state)
    async with Client(Settings(broker_url="memory://", database_url="")) as client:
        assert client.status()["cache"]["warming"] is None
        assert "warming" not in client.stats()


def test_not_for_a_cache_outside_the_process_alone() -> None:
    settings = Settings(cache_url="redis://localhost", instance_id="i", warm_keys=5)
    with pytest.raises(ConfigurationError, match=r"CACHEINVAL_WARM_KEYS=5: accepted: 0.*CACHE_LOCAL_ENTRIES"):
        Client(settings)
    client = Client(Settings(**settings.model_dump(exclude_unset=True), cache_local_entries=10))
    assert client.status()["cache"]["warming"] == {"hot": 0, "waiting": 0, "running": 0}
