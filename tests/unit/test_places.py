"""Places for loads: so many run at a time, and none waits for another in a circle."""

import asyncio
from typing import Any

import pytest
from waiting import Eventually

from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.cache import InProcessCache
from cacheinval.cache.places import Places
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence, Eviction

START = 1000.0


class SetClock(Clock):
    """A clock that goes only when told."""

    def __init__(self) -> None:
        self.time = START
        self.start, self.elapsed = 0.0, lambda: self.time


def subscribed(max_staleness: float | None = None) -> Coherence:
    coherence = Coherence(max_staleness)
    coherence.evict(coherence.joined_anew(START), START)
    coherence.trust()
    return coherence


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def coherence() -> Coherence:
    return subscribed()


class Source:
    """A loader that counts how many of it run, and lets them end when told."""

    def __init__(self) -> None:
        self.running = self.most = self.calls = 0
        self.release = asyncio.Event()

    async def __call__(self) -> int:
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.release.wait()
        finally:
            self.running -= 1
        return self.calls


def bounded(coherence: Coherence, clock: SetClock, most: int) -> InProcessCache:
    return InProcessCache(BoundedMemoryCache(1000), coherence, clock, 300, most_loads=most)


def free(cache: InProcessCache) -> int:
    assert cache._flights.places.waiting == 0
    return cache._flights.places._free


async def test_a_thousand_readers_of_a_hundred_keys_make_a_hundred_loads_each_time_and_few_at_once(
    clock: SetClock, eventually: Eventually
) -> None:
    coherence = subscribed(5.0)
    cache = bounded(coherence, clock, 8)
    coherence.lost("cut")
    most = running = 0
    calls: dict[int, int] = {}

    async def load(n: int) -> int:
        nonlocal most, running
        calls[n] = calls.get(n, 0) + 1
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return n

    for age in range(1, 4):
        for _ in range(5):  # seconds within one maximum staleness
            readers = [cache.get_or_set(f"k{n % 100}", lambda n=n: load(n % 100)) for n in range(1000)]
            assert await asyncio.gather(*readers) == [n % 100 for n in range(1000)]
            clock.time += 1
        clock.time += 0.001
        assert calls == dict.fromkeys(range(100), age)
    assert most == 8
    assert free(cache) == 8


async def test_loads_wait_for_their_turn_in_order(
    coherence: Coherence, clock: SetClock, eventually: Eventually
) -> None:
    cache, source, order = bounded(coherence, clock, 1), Source(), list[str]()

    async def load(key: str) -> None:
        async def factory() -> None:
            order.append(key)
            await source()

        await cache.get_or_set(key, factory)

    tasks = [asyncio.create_task(load(key)) for key in "abc"]
    await eventually(lambda: cache._flights.places.waiting == 2)
    assert order == ["a"]
    source.release.set()
    await asyncio.gather(*tasks)
    assert (order, source.most, cache.counters.queued_loads, free(cache)) == (["a", "b", "c"], 1, 2, 1)


async def test_a_load_that_waited_is_as_old_as_its_beginning_and_may_be_joined_until_then(
    clock: SetClock, eventually: Eventually
) -> None:
    coherence = subscribed(5.0)
    cache, first, second = bounded(coherence, clock, 1), Source(), Source()
    second.release.set()
    tasks = [asyncio.create_task(cache.get_or_set("a", first))]
    tasks.append(asyncio.create_task(cache.get_or_set("b", second)))
    await eventually(lambda: cache._flights.places.waiting == 1)
    clock.time += 60
    tasks.append(asyncio.create_task(cache.get_or_set("b", second)))
    await eventually(lambda: cache.counters.misses == 3)
    first.release.set()
    await asyncio.gather(*tasks)
    assert second.calls == 1
    assert cache._backend.peek("b").load_started == START + 60
    assert cache._backend.peek("a").load_started == START


async def test_an_eviction_voids_a_load_that_waits(
    coherence: Coherence, clock: SetClock, eventually: Eventually
) -> None:
    cache, first = bounded(coherence, clock, 1), Source()
    tasks = [asyncio.create_task(cache.read("a", first)), asyncio.create_task(cache.read("b", first))]
    await eventually(lambda: cache._flights.places.waiting == 1)
    coherence.evict(Eviction(["b"]), clock.now())
    first.release.set()
    assert [read.stored for read in await asyncio.gather(*tasks)] == [True, False]


@pytest.mark.parametrize("when", ["waiting", "loading"])
async def test_a_cancelled_load_keeps_no_place(
    coherence: Coherence, clock: SetClock, eventually: Eventually, when: str
) -> None:
    cache, first, second = bounded(coherence, clock, 1), Source(), Source()
    leader = asyncio.create_task(cache.get_or_set("a", first))
    await eventually(lambda: first.running == 1)
    task = asyncio.create_task(cache.get_or_set("b", second))
    await eventually(lambda: cache._flights.places.waiting == 1)
    if when == "loading":
        first.release.set()
        await eventually(lambda: second.running == 1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert cache._flights.places.waiting == 0
    assert second.calls == (1 if when == "loading" else 0)
    first.release.set()
    await leader
    assert free(cache) == 1
    assert len(cache._loads._loads) == len(cache._flights) == 0


async def test_who_joined_a_load_that_was_cancelled_while_it_waited_loads(
    coherence: Coherence, clock: SetClock, eventually: Eventually
) -> None:
    cache, first, second = bounded(coherence, clock, 1), Source(), Source()
    second.release.set()
    leader = asyncio.create_task(cache.get_or_set("a", first))
    await eventually(lambda: first.running == 1)
    waiting, joined = (asyncio.create_task(cache.get_or_set("b", second)) for _ in range(2))
    await eventually(lambda: cache.counters.misses == 3)
    waiting.cancel()
    await asyncio.wait([waiting])
    first.release.set()
    await leader
    assert await joined == 1
    assert free(cache) == 1


async def test_a_loader_that_fails_gives_its_place_back(coherence: Coherence, clock: SetClock) -> None:
    cache = bounded(coherence, clock, 1)

    async def fail() -> None:
        raise LookupError

    for _ in range(3):
        with pytest.raises(LookupError):
            await cache.get_or_set("k", fail)
    assert free(cache) == 1


async def test_a_part_of_a_load_runs_in_its_place(coherence: Coherence, clock: SetClock) -> None:
    cache, source = bounded(coherence, clock, 1), Source()
    source.release.set()

    async def whole() -> Any:
        return await asyncio.gather(*(cache.get_or_set(f"part {n}", source) for n in range(3)))

    async with asyncio.timeout(30):
        await cache.get_or_set("whole", whole)
    assert free(cache) == 1


async def test_a_part_that_waits_for_a_place_goes_on_when_a_load_with_a_place_waits_for_it(
    coherence: Coherence, clock: SetClock, eventually: Eventually
) -> None:
    cache, source, go = bounded(coherence, clock, 1), Source(), asyncio.Event()
    source.release.set()

    async def whole() -> Any:
        await go.wait()
        return await cache.get_or_set("part", source)

    reader = asyncio.create_task(cache.get_or_set("whole", whole))
    await asyncio.sleep(0)
    part = asyncio.create_task(cache.get_or_set("part", source))
    await eventually(lambda: cache._flights.places.waiting == 1)
    go.set()
    async with asyncio.timeout(30):
        assert await asyncio.gather(reader, part) == [1, 1]
    assert free(cache) == 1


@pytest.mark.parametrize("cancelled_first", [False, True])
async def test_who_is_cancelled_between_its_turn_and_its_waking_passes_its_place_on(
    cancelled_first: bool,
) -> None:
    places = Places(1)
    assert places.take()
    first, second = (asyncio.create_task(places.wait(who)) for who in "ab")
    await asyncio.sleep(0)
    if cancelled_first:
        first.cancel()
    places.give_back()
    first.cancel()
    assert await second
    assert first.cancelled()
    assert not places.take()
    places.give_back()
    assert places.take()


@pytest.mark.parametrize("cancelled_first", [False, True])
async def test_who_is_admitted_and_cancelled_gives_no_place_back(cancelled_first: bool) -> None:
    places = Places(1)
    assert places.take()
    task = asyncio.create_task(places.wait("a"))
    await asyncio.sleep(0)
    if cancelled_first:
        task.cancel()
    places.admit("a")
    places.admit("nobody")
    task.cancel()
    await asyncio.wait([task])
    assert not places.take()
