"""Stale values by the user's own word, and entries that expire apart from each other."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from shelf import Shelf
from waiting import Eventually

from cacheinval import Client, ConfigurationError, Settings
from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.cache import InProcessCache, Policies, Read, SharedCache
from cacheinval.cache.levels import TwoLevels
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence, Eviction
from cacheinval.errors import CacheError
from cacheinval.products.http import cache_status

KEY, TAG, EVERYTHING = Eviction(["k"]), Eviction(tags=["t"]), Eviction(everything=True)


class SetClock(Clock):
    """A clock that goes only when told."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.start, self.elapsed = 0.0, lambda: self.time


class Source:
    """What loaders read. It can be away, and can be made to wait."""

    def __init__(self) -> None:
        self.value: Any = 1
        self.away: BaseException | None = None
        self.loads = 0
        self.open = asyncio.Event()
        self.open.set()

    async def load(self) -> Any:
        self.loads += 1
        value = self.value
        await self.open.wait()
        if self.away is not None:
            raise self.away
        return value


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def source() -> Source:
    return Source()


def trusted(coherence: Coherence) -> Coherence:
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    return coherence


@pytest.fixture
def coherence() -> Coherence:
    return trusted(Coherence())


@pytest.fixture(params=["in the process", "two levels"])
def cache(request: pytest.FixtureRequest, coherence: Coherence, clock: SetClock) -> InProcessCache:
    if request.param == "two levels":
        second = SharedCache(Shelf(), coherence, clock, ttl=300)
        return TwoLevels(BoundedMemoryCache(1000), second, coherence, clock, ttl=300)
    return InProcessCache(BoundedMemoryCache(1000), coherence, clock, ttl=300)


@pytest.fixture
def evict(cache: InProcessCache, coherence: Coherence) -> Callable[[Eviction], None]:
    def evict(eviction: Eviction) -> None:
        coherence.evict(eviction, cache._now())
        cache.evict_now(eviction)

    return evict


# stale_if_error


async def give_if_error(cache: InProcessCache, source: Source, seconds: float = 60, **options: Any) -> Read:
    return await cache.read("k", source.load, stale_if_error=seconds, tags=["t"], **options)


async def test_an_expired_value_is_given_where_loading_fails_for_so_long_after_its_ttl(
    cache: InProcessCache, source: Source, clock: SetClock
) -> None:
    await give_if_error(cache, source)
    source.away = OSError("no database")
    clock.time += 300 + 59.9
    read = await give_if_error(cache, source)
    assert read == Read(1, "hit", False, "stale-if-error")
    assert cache_status(read) == "cacheinval; hit; detail=stale-if-error"
    assert (cache.counters.stale_if_error, cache.counters.load_errors, source.loads) == (1, 1, 2)
    clock.time += 0.1
    with pytest.raises(OSError, match="no database"):
        await give_if_error(cache, source)
    assert cache.counters.stale_if_error == 1


@pytest.mark.parametrize("eviction", [KEY, TAG, EVERYTHING], ids=["key", "tag", "everything"])
async def test_an_evicted_value_is_given_until_it_is_so_old(
    cache: InProcessCache,
    source: Source,
    clock: SetClock,
    evict: Callable[[Eviction], None],
    eviction: Eviction,
) -> None:
    await give_if_error(cache, source)
    clock.time += 59
    evict(eviction)
    evict(eviction)
    source.away = OSError()
    assert await give_if_error(cache, source) == Read(1, "hit", False, "stale-if-error")
    clock.time += 1.5
    with pytest.raises(OSError):
        await give_if_error(cache, source)


@pytest.mark.parametrize("eviction", [KEY, TAG, EVERYTHING], ids=["key", "tag", "everything"])
async def test_an_evicted_value_is_given_for_nothing_but_an_error(
    cache: InProcessCache, source: Source, evict: Callable[[Eviction], None], eviction: Eviction
) -> None:
    await give_if_error(cache, source)
    assert (await give_if_error(cache, source)).outcome == "hit"  # so that a judgement of it stands
    evict(eviction)
    source.value = 2
    assert cache.hit("k") is None
    assert await cache.would_serve("k") is None
    assert await give_if_error(cache, source) == Read(2, "miss", True)
    assert await give_if_error(cache, source) == Read(2, "hit", False)


async def test_what_is_given_instead_of_an_error_is_not_fresh_again(
    cache: InProcessCache, source: Source, evict: Callable[[Eviction], None]
) -> None:
    await give_if_error(cache, source)
    evict(KEY)
    source.away = OSError()
    await give_if_error(cache, source)
    source.away, source.value = None, 2
    assert await give_if_error(cache, source) == Read(2, "miss", True)


async def test_what_cannot_be_proven_is_given_until_it_is_so_old(source: Source, clock: SetClock) -> None:
    coherence = trusted(Coherence(max_staleness=5))
    cache = InProcessCache(BoundedMemoryCache(1000), coherence, clock, ttl=300)
    await give_if_error(cache, source)
    source.away = OSError()
    clock.time += 60
    assert (await give_if_error(cache, source)).detail == "stale-if-error"
    clock.time += 0.1
    with pytest.raises(OSError):
        await give_if_error(cache, source)


async def test_of_a_clock_that_was_set_nothing_is_believed_that_was_loaded_before(
    cache: InProcessCache,
    coherence: Coherence,
    source: Source,
    clock: SetClock,
    evict: Callable[[Eviction], None],
) -> None:
    await give_if_error(cache, source)
    clock.time += 3600
    evict(KEY)
    clock.time -= 3600
    evict(coherence.clock_stepped(clock.time))
    source.away = OSError()
    with pytest.raises(OSError):
        await give_if_error(cache, source)
    source.away = None
    await give_if_error(cache, source)
    evict(KEY)
    source.away = OSError()
    assert (await give_if_error(cache, source)).detail == "stale-if-error"


async def test_without_it_an_eviction_leaves_nothing_behind(
    cache: InProcessCache, source: Source, evict: Callable[[Eviction], None]
) -> None:
    await cache.read("k", source.load)
    evict(KEY)
    assert len(cache) == 0
    await cache.get_or_set("k", source.load)
    evict(EVERYTHING)
    assert len(cache) == 0
    source.away = OSError()
    with pytest.raises(OSError):
        await cache.read("k", source.load)


async def test_entries_that_did_not_ask_for_it_go_although_others_did(
    cache: InProcessCache, source: Source, evict: Callable[[Eviction], None]
) -> None:
    await cache.get_or_set("kept", source.load, stale_if_error=60)
    await cache.get_or_set("k", source.load)
    evict(Eviction(["k", "kept"]))
    assert (len(cache), cache.counters.evicted_entries) == (1, 2)
    evict(Eviction(["k", "kept"]))
    assert cache.counters.evicted_entries == 2


async def test_each_of_those_who_wait_gets_what_it_has_asked_for(
    cache: InProcessCache, source: Source, evict: Callable[[Eviction], None]
) -> None:
    await give_if_error(cache, source)
    evict(KEY)
    source.away = OSError()
    source.open.clear()
    lenient = asyncio.create_task(give_if_error(cache, source))
    strict = asyncio.create_task(cache.read("k", source.load, stale_if_error=0))
    await asyncio.sleep(0)
    source.open.set()
    assert (await lenient).detail == "stale-if-error"
    with pytest.raises(OSError):
        await strict
    assert source.loads == 2


async def test_a_cancelled_load_is_no_error(
    cache: InProcessCache, source: Source, evict: Callable[[Eviction], None]
) -> None:
    await give_if_error(cache, source)
    evict(KEY)
    source.away = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await give_if_error(cache, source)


async def test_a_loader_that_waits_for_itself_is_told_so_all_the_same(
    cache: InProcessCache, source: Source, evict: Callable[[Eviction], None]
) -> None:
    await give_if_error(cache, source)
    evict(KEY)
    with pytest.raises(CacheError, match="wait for each other"):
        await cache.get_or_set("k", lambda: give_if_error(cache, source), stale_if_error=60)


async def test_what_is_built_from_a_stale_value_is_not_stored(
    cache: InProcessCache, source: Source, evict: Callable[[Eviction], None]
) -> None:
    await give_if_error(cache, source)
    evict(KEY)
    source.away = OSError()

    async def page() -> str:
        return f"page of {(await give_if_error(cache, source)).value}"

    assert await cache.read("page", page) == Read("page of 1", "miss", False)
    source.away, source.value = None, 2
    assert (await cache.read("page", page)).value == "page of 2"


async def test_the_log_says_why_now_and_then(
    cache: InProcessCache,
    source: Source,
    clock: SetClock,
    evict: Callable[[Eviction], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    await give_if_error(cache, source)
    evict(KEY)
    source.away = OSError("no database")
    with caplog.at_level(logging.WARNING, "cacheinval.cache"):
        for _ in range(3):
            await give_if_error(cache, source)
        assert [record.getMessage() for record in caplog.records] == [
            "cannot load, and gives what is stale key=k reason=\"OSError('no database')\""
        ]
        clock.time += 10
        await give_if_error(cache, source)
    assert len(caplog.records) == 2


# stale_while_revalidate


async def give_and_reload(cache: InProcessCache, source: Source, **options: Any) -> Read:
    return await cache.read("k", source.load, stale_while_revalidate=30, tags=["t"], **options)


async def test_a_value_past_its_ttl_is_given_at_once_and_loaded_once(
    cache: InProcessCache, source: Source, clock: SetClock, eventually: Eventually
) -> None:
    await give_and_reload(cache, source)
    clock.time += 300
    source.value = 2
    source.open.clear()
    for _ in range(3):
        read = await give_and_reload(cache, source)
        assert read == Read(1, "hit", False, "stale-while-revalidate")
        assert cache_status(read) == "cacheinval; hit; detail=stale-while-revalidate"
        await asyncio.sleep(0)
    source.open.set()
    await eventually(lambda: len(cache._reloads) == 0)
    assert await give_and_reload(cache, source) == Read(2, "hit", False)
    assert source.loads == 2
    assert (cache.counters.stale_while_revalidate, cache.counters.misses) == (3, 1)


async def test_it_is_loaded_first_where_its_ttl_ran_out_longer_ago(
    cache: InProcessCache, source: Source, clock: SetClock
) -> None:
    await give_and_reload(cache, source)
    source.value = 2
    clock.time += 330
    assert await give_and_reload(cache, source) == Read(2, "miss", True)


@pytest.mark.parametrize("eviction", [KEY, TAG, EVERYTHING], ids=["key", "tag", "everything"])
async def test_an_evicted_value_is_not_given_for_its_sake(
    cache: InProcessCache,
    source: Source,
    clock: SetClock,
    evict: Callable[[Eviction], None],
    eviction: Eviction,
) -> None:
    await give_and_reload(cache, source, stale_if_error=600)  # so that it is still there
    clock.time += 300
    evict(eviction)
    source.value = 2
    assert await give_and_reload(cache, source) == Read(2, "miss", True)


async def test_what_cannot_be_proven_is_not_given_for_its_sake(source: Source, clock: SetClock) -> None:
    coherence = trusted(Coherence(max_staleness=5))
    cache = InProcessCache(BoundedMemoryCache(1000), coherence, clock, ttl=300)
    await give_and_reload(cache, source, ttl=3)
    source.value = 2
    clock.time += 4
    assert (await give_and_reload(cache, source)).detail == "stale-while-revalidate"
    await cache._reloads.close()
    clock.time += 2
    assert await give_and_reload(cache, source) == Read(2, "bypass", True)


async def test_a_reload_that_an_eviction_overtakes_is_not_stored(
    cache: InProcessCache,
    source: Source,
    clock: SetClock,
    evict: Callable[[Eviction], None],
    eventually: Eventually,
) -> None:
    await give_and_reload(cache, source)
    clock.time += 300
    source.open.clear()
    await give_and_reload(cache, source)
    await eventually(lambda: source.loads == 2)
    evict(KEY)
    source.value = 2
    source.open.set()
    await eventually(lambda: len(cache._reloads) == 0)
    assert await give_and_reload(cache, source) == Read(2, "miss", True)


async def test_a_reload_that_fails_is_counted_said_and_tried_again(
    cache: InProcessCache,
    source: Source,
    clock: SetClock,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await give_and_reload(cache, source)
    clock.time += 300
    source.away = OSError("no database")
    for _ in range(2):
        assert (await give_and_reload(cache, source)).value == 1
        await eventually(lambda: len(cache._reloads) == 0)
    assert (source.loads, cache.counters.load_errors) == (3, 2)
    assert "no database" in caplog.text


async def test_a_reader_whose_time_is_over_joins_the_reload(
    cache: InProcessCache, source: Source, clock: SetClock, eventually: Eventually
) -> None:
    await give_and_reload(cache, source)
    clock.time += 300
    source.open.clear()
    source.value = 2
    await give_and_reload(cache, source)
    await eventually(lambda: source.loads == 2)
    strict = asyncio.create_task(cache.read("k", source.load))
    await asyncio.sleep(0)
    source.open.set()
    assert (await strict).value == 2
    assert source.loads == 2


async def test_within_another_load_it_is_loaded_first(
    cache: InProcessCache, source: Source, clock: SetClock
) -> None:
    await give_and_reload(cache, source)
    clock.time += 300
    source.value = 2

    async def page() -> str:
        return f"page of {(await give_and_reload(cache, source)).value}"

    assert await cache.get_or_set("page", page) == "page of 2"


async def test_what_a_reader_loads_already_is_not_loaded_again(
    cache: InProcessCache, source: Source, clock: SetClock, eventually: Eventually
) -> None:
    await give_and_reload(cache, source)
    clock.time += 300
    source.open.clear()
    strict = asyncio.create_task(cache.read("k", source.load))
    await eventually(lambda: source.loads == 2)
    assert (await give_and_reload(cache, source)).detail == "stale-while-revalidate"
    await eventually(lambda: len(cache._reloads) == 0)
    source.open.set()
    assert (await strict).stored
    assert source.loads == 2


async def test_reloads_end_with_the_cache(
    cache: InProcessCache, source: Source, clock: SetClock, eventually: Eventually
) -> None:
    await give_and_reload(cache, source)
    clock.time += 300
    source.open.clear()
    await give_and_reload(cache, source)
    await eventually(lambda: source.loads == 2)
    await cache.close()
    assert len(cache._reloads) == 0
    assert not cache._reloads.start("k", source.load)


async def test_no_more_than_so_many_reloads_at_once(
    cache: InProcessCache,
    source: Source,
    clock: SetClock,
    eventually: Eventually,
) -> None:
    cache._reloads._most = 2
    keys = ["a", "b", "c"]
    for key in keys:
        await cache.get_or_set(key, source.load)
    clock.time += 300
    source.open.clear()
    for key in keys:
        assert await cache.get_or_set(key, source.load, stale_while_revalidate=30) == 1
    await eventually(lambda: source.loads == 5)
    source.open.set()
    await eventually(lambda: len(cache._reloads) == 0)
    assert source.loads == 5


# ttl jitter


async def test_what_is_stored_together_expires_apart_and_never_late(
    cache: InProcessCache, source: Source
) -> None:
    now = cache._now()
    for number in range(200):
        await cache.get_or_set(f"{number}", source.load, ttl=100, ttl_jitter=0.2)
    left = [cache._backend.look(f"{number}").expires_at - now for number in range(200)]
    assert 80 < min(left) < 85
    assert 95 < max(left) <= 100
    await cache.get_or_set("k", source.load, ttl=100)
    assert cache._backend.look("k").expires_at == now + 100


# Set once for all, and wrong values


async def test_policies_hold_for_reads_that_do_not_say_otherwise(
    coherence: Coherence, source: Source, clock: SetClock
) -> None:
    policies = Policies(ttl_jitter=1, stale_if_error=60, stale_while_revalidate=30)
    cache = InProcessCache(BoundedMemoryCache(1000), coherence, clock, ttl=300, policies=policies)
    await cache.read("k", source.load)
    clock.time += cache._backend.look("k").expires_at - clock.time
    assert (await cache.read("k", source.load)).detail == "stale-while-revalidate"
    await cache._reloads.close()
    source.away = OSError()
    assert (await cache.read("k", source.load, stale_while_revalidate=0)).detail == "stale-if-error"
    with pytest.raises(OSError):
        await cache.read("k", source.load, stale_if_error=0, stale_while_revalidate=0)


@pytest.mark.parametrize(
    ("policy", "value", "accepted"),
    [
        ("stale_if_error", -1, "seconds, 0 for never"),
        ("stale_if_error", float("inf"), "seconds, 0 for never"),
        ("stale_while_revalidate", float("nan"), "seconds, 0 for never"),
        ("ttl_jitter", 1.5, "0 to 1"),
        ("ttl_jitter", -0.1, "0 to 1"),
    ],
)
async def test_numbers_that_cannot_be_used(
    cache: InProcessCache, source: Source, policy: str, value: float, accepted: str
) -> None:
    with pytest.raises(ValueError, match=f"{policy}={value!r}: accepted: .*{accepted}"):
        await cache.read("k", source.load, **{policy: value})  # type: ignore[arg-type]
    assert source.loads == 0


async def test_the_settings_reach_the_cache_and_the_decorator_says_otherwise() -> None:
    settings = Settings(broker_url="memory://", database_url="", stale_if_error=60)
    away = False
    async with Client(settings) as client:

        async def load() -> int:
            if away:
                raise OSError
            return 1

        lenient = client.cached("lenient")(load)
        strict = client.cached("strict", stale_if_error=0)(load)
        assert [await lenient(), await strict()] == [1, 1]
        away = True
        await client.invalidate("lenient", "strict")
        assert await lenient() == 1
        with pytest.raises(OSError):
            await strict()
        assert client.stats()["cache"]["stale_if_error"] == 1


@pytest.mark.parametrize("policy", ["stale_if_error", "stale_while_revalidate"])
async def test_a_cache_outside_the_process_alone_keeps_nothing_stale(
    policy: str, coherence: Coherence, clock: SetClock, source: Source
) -> None:
    settings = Settings(cache_url="redis://localhost", instance_id="i", **{policy: 5})
    with pytest.raises(ConfigurationError, match=f"CACHEINVAL_{policy.upper()}=5: accepted: 0"):
        Client(settings)
    cache = SharedCache(object(), coherence, clock, 300)  # type: ignore[arg-type]  # not asked
    with pytest.raises(ValueError, match=f"{policy}.*accepted: 0"):
        await cache.read("k", source.load, **{policy: 5})  # type: ignore[arg-type]
    in_front = Settings(**settings.model_dump(exclude_unset=True), cache_local_entries=10)
    assert isinstance(Client(in_front).cache, TwoLevels)
