"""The bounded map, driven without awaiting and as any aiocache backend."""

import asyncio
import time
from typing import Any

import pytest

from cacheinval.backends import memory
from cacheinval.backends.memory import BoundedMemoryCache


@pytest.fixture
def cache() -> BoundedMemoryCache:
    return BoundedMemoryCache(10)


class SetTime:
    """In the place of the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SetTime:
    clock = SetTime()
    monkeypatch.setattr(memory, "time", clock)
    return clock


def test_put_peek_and_drop(cache: BoundedMemoryCache) -> None:
    assert cache.peek("a") is None
    cache.put("a", 1)
    cache.put("a", 2)
    cache.put("n", None)
    assert cache.peek("a") == 2
    assert len(cache) == 2
    assert cache.drop(["a", "missing", "n", "a"]) == 2
    assert len(cache) == 0


def test_values_are_not_copied(cache: BoundedMemoryCache) -> None:
    value: list[int] = []
    cache.put("a", value)
    assert cache.peek("a") is value


def test_the_least_recently_used_goes_first(cache: BoundedMemoryCache) -> None:
    for n in range(10):
        cache.put(f"k{n}", n)
    cache.peek("k0")
    cache.put("one more", 1)
    assert len(cache) == 10
    assert cache.peek("k0") == 0
    assert cache.peek("k1") is None


def test_reset(cache: BoundedMemoryCache) -> None:
    cache.put("a", 1)
    cache.reset()
    assert len(cache) == 0
    assert cache.peek("a") is None
    cache.put("a", 2)
    assert cache.peek("a") == 2


class Counted:
    """Knows how many of its kind have been freed."""

    freed = 0

    def __del__(self) -> None:
        Counted.freed += 1


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> BoundedMemoryCache:
    monkeypatch.setattr(Counted, "freed", 0)
    cache = BoundedMemoryCache(20_000)
    for n in range(20_000):
        cache.put(f"k{n}", Counted())
    return cache


async def test_a_reset_frees_values_in_slices(large: BoundedMemoryCache) -> None:
    large.reset()
    assert (len(large), large.peek("k1"), Counted.freed) == (0, None, 0)
    turns = []
    while Counted.freed < 20_000:
        await asyncio.sleep(0)
        turns.append(Counted.freed)
    assert len(turns) > 2
    assert turns == sorted(set(turns))  # something in each turn


async def test_what_is_stored_meanwhile_stays(large: BoundedMemoryCache) -> None:
    for _ in range(3):  # the second and the third time with a map that was emptied before
        large.reset()
        large.put("k1", "new")
        freed = -1
        while freed < Counted.freed:
            freed = Counted.freed
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (len(large), large.peek("k1")) == (1, "new")
    assert Counted.freed == 20_000


async def test_a_reset_before_the_one_before_has_freed_all(large: BoundedMemoryCache) -> None:
    large.reset()
    for n in range(20_000):
        large.put(f"k{n}", Counted())
    large.reset()
    large.put("k1", "new")
    while Counted.freed < 40_000:
        await asyncio.sleep(0)
    assert (len(large), large.peek("k1")) == (1, "new")


def test_a_reset_outside_of_a_loop_frees_at_once(large: BoundedMemoryCache) -> None:
    large.reset()
    assert (len(large), Counted.freed) == (0, 20_000)


async def test_as_an_aiocache_backend(cache: BoundedMemoryCache) -> None:
    assert await cache.set("a", 1)
    assert await cache.get("a") == 1
    assert await cache.get("missing", default=7) == 7
    assert await cache.multi_set([("b", 2), ("c", 3)])
    assert await cache.multi_get(["a", "b", "missing"]) == [1, 2, None]
    assert await cache.exists("b")
    assert await cache.delete("b") == 1
    assert await cache.delete("b") == 0
    assert not await cache.exists("b")
    assert await cache.add("d", 4)
    with pytest.raises(ValueError, match="already exists"):
        await cache.add("d", 5)
    assert await cache.increment("count", 2) == 2
    assert await cache.increment("count") == 3
    await cache.set("text", "x")
    with pytest.raises(TypeError, match="not an integer"):
        await cache.increment("text")
    assert await cache.clear()
    assert len(cache) == 0


async def test_ttl(cache: BoundedMemoryCache, clock: SetTime) -> None:
    await cache.set("a", 1, ttl=10)
    await cache.set("kept", 1)
    clock.now += 9.9
    assert await cache.get("a") == 1
    clock.now += 0.1
    assert await cache.get("a") is None
    assert not await cache.exists("a")
    assert await cache.get("kept") == 1
    assert await cache.expire("kept", 5)
    assert not await cache.expire("missing", 5)
    clock.now += 5
    assert await cache.get("kept") is None


async def test_an_old_ttl_does_not_kill_a_newer_value(cache: BoundedMemoryCache, clock: SetTime) -> None:
    await cache.set("cleared", 1, ttl=10)
    await cache.clear()
    await cache.set("none", None, ttl=10)
    await cache.delete("none")
    await cache.set("replaced", 1, ttl=10)
    for key in ("cleared", "none", "replaced"):
        await cache.set(key, "new")
    clock.now += 100
    assert await cache.multi_get(["cleared", "none", "replaced"]) == ["new"] * 3


async def test_a_namespace(clock: SetTime) -> None:
    cache = BoundedMemoryCache(10, namespace="prod")
    await cache.set("a", 1)
    await cache.set("a", 2, namespace="other")
    assert await cache.get("a") == 1
    await cache.clear(namespace="prod")
    assert await cache.get("a") is None
    assert await cache.get("a", namespace="other") == 2


async def test_expiry_times_are_bounded_too() -> None:
    cache = BoundedMemoryCache(100)
    for n in range(1_000):
        await cache.set(f"k{n}", n, ttl=60)
        assert len(cache._expiry) <= 200
    assert len(cache) == 100
    assert all(f"k{n}" in cache._expiry for n in range(900, 1_000))


async def test_a_full_cache_is_as_fast_as_an_empty_one() -> None:
    """Forgetting the expiry of what was pushed out must not cost a walk over everything at each store."""

    async def seconds(cache: BoundedMemoryCache) -> float:
        began = time.perf_counter()
        for n in range(300):
            await cache.set(f"k{n}", n, ttl=60)
        return time.perf_counter() - began

    full = BoundedMemoryCache(20_000)
    for n in range(20_000):
        full.put(f"old{n}", n)
        full._expiry[f"old{n}"] = float("inf")
    assert await seconds(full) < 20 * await seconds(BoundedMemoryCache(20_000)) + 0.2


async def test_nothing_in_it_suspends(cache: BoundedMemoryCache) -> None:
    async def all_of_it() -> Any:
        await cache.set("a", 1, ttl=1)
        await cache.multi_get(["a"])
        return await cache.delete("a")

    work = all_of_it()
    with pytest.raises(StopIteration) as done:
        work.send(None)
    assert done.value.value == 1
    await asyncio.sleep(0)
