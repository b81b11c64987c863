"""Caches of aiocache's own, attached: exactly what was invalidated goes, on real servers too."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiocache import SimpleMemoryCache
from aiocache.backends.memcached import MemcachedCache
from aiocache.backends.redis import RedisCache
from aiocache.base import BaseCache
from proxy import Proxy
from waiting import Eventually

from cacheinval import CacheError, Client, ConfigurationError, Settings
from cacheinval.backends import attached as attaching
from cacheinval.backends.attached import AttachedCache
from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.coherence import Eviction
from cacheinval.sandbox import Memcached, Redis

EVERYTHING = Eviction(everything=True)


def redis_cache(server: Redis, namespace: str | None, port: int | None = None) -> RedisCache:
    return RedisCache(endpoint="127.0.0.1", port=port or urlsplit(server.url).port, namespace=namespace)


@pytest.fixture
async def clean_redis(redis: Redis) -> AsyncIterator[RedisCache]:
    """A cache without a namespace, which sees every key of the server; it is empty at the start."""
    cache = redis_cache(redis, None)
    await cache.raw("flushdb")
    yield cache
    await cache.raw("flushdb")
    await cache.close()


async def names_in(cache: RedisCache) -> list[str]:
    return sorted(await cache.raw("keys", "*"))


# Redis


async def test_redis_keys(redis: Redis, clean_redis: RedisCache) -> None:
    cache = redis_cache(redis, "prod")
    for key in ("a", "b", "c"):
        await cache.set(key, 1)
    await AttachedCache(cache).evict(Eviction(["a", "c", "missing"], tags=["b"]))
    assert await names_in(clean_redis) == ["prod:b"]
    await cache.close()


async def test_redis_namespaces_do_not_touch_each_other(redis: Redis, clean_redis: RedisCache) -> None:
    caches = {name: redis_cache(redis, name) for name in ("prod", "product", "pro", "prod:sub", "Prod")}
    for cache in caches.values():
        await cache.multi_set([(f"k{n}", n) for n in range(3)])
    await clean_redis.set("prod", "not a key of the namespace")
    await AttachedCache(caches["prod"]).evict(EVERYTHING)
    left = await names_in(clean_redis)
    # "prod:sub" is, in Redis, a part of "prod": aiocache joins namespace and key by a colon.
    assert left == sorted(
        ["prod", *(f"{name}:k{n}" for name in ("product", "pro", "Prod") for n in range(3))]
    )
    for cache in caches.values():
        await cache.close()


@pytest.mark.parametrize(
    "namespace", ["p*", "p?", "p[a-z]", "p[^x]", "p\\", "p]", "*", "p-q", "p^", "sp ace", "é漢"]
)
async def test_redis_namespaces_are_no_patterns(
    redis: Redis, clean_redis: RedisCache, namespace: str
) -> None:
    cache = redis_cache(redis, namespace)
    await cache.multi_set([("a", 1), ("*", 1)])
    others = ["pa:a", "px:a", "paa:a", "p:a", "q:a", "[:a", "pz:a", "p\\\\:a"]
    for name in others:
        await clean_redis.set(name, 1)
    await AttachedCache(cache).evict(EVERYTHING)
    assert await names_in(clean_redis) == sorted(others)
    await cache.close()


async def test_a_large_redis_namespace(redis: Redis, clean_redis: RedisCache) -> None:
    cache = redis_cache(redis, "large")
    for start in range(0, 5_000, 1_000):
        await cache.multi_set([(f"k{n}", n) for n in range(start, start + 1_000)])
    await clean_redis.set("other", 1)
    await AttachedCache(cache).evict(EVERYTHING)
    assert await names_in(clean_redis) == ["other"]
    await cache.close()


@pytest.mark.parametrize("namespace", [None, ""])
def test_redis_without_a_namespace_is_refused(redis: Redis, namespace: str | None) -> None:
    with pytest.raises(ConfigurationError, match=r"no namespace.*accepted: RedisCache\(namespace=…\)"):
        AttachedCache(redis_cache(redis, namespace))


async def test_the_deadline_is_for_each_step_and_not_for_all(
    redis: Redis, clean_redis: RedisCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large eviction takes its time; only a server that does not answer is a failure."""
    async with Proxy("127.0.0.1", urlsplit(redis.url).port or 0) as proxy:
        cache = redis_cache(redis, "slow", proxy.port)
        await cache.multi_set([(f"k{n}", n) for n in range(30)])
        monkeypatch.setattr(attaching, "OPERATION_TIMEOUT", 0.4)
        monkeypatch.setattr(attaching, "_SCAN_COUNT", 2)
        proxy.delay(0.01)
        await AttachedCache(cache).evict(Eviction([f"k{n}" for n in range(25)]))
        await AttachedCache(cache).evict(EVERYTHING)
        assert await names_in(clean_redis) == []
        proxy.delay(0.5)
        with pytest.raises(CacheError, match="the attached redis cache failed: TimeoutError"):
            await AttachedCache(cache).evict(Eviction(["a"]))
        await cache.close()


async def test_a_redis_that_is_down_is_an_error_that_names_it(redis: Redis) -> None:
    async with Proxy("127.0.0.1", urlsplit(redis.url).port or 0) as proxy:
        cache = redis_cache(redis, "down", proxy.port)
        proxy.cut()
        for eviction in (Eviction(["a"]), EVERYTHING):
            with pytest.raises(CacheError, match="the attached redis cache failed"):
                await AttachedCache(cache).evict(eviction)
        await cache.close()


async def test_a_client_keeps_an_attached_redis_cache_honest(
    redis: Redis, clean_redis: RedisCache, namespace: str, eventually: Eventually
) -> None:
    settings = Settings(broker_url="memory://", database_url="", namespace=namespace)
    cache = redis_cache(redis, "attached")
    async with Client(settings) as client, Client(settings) as other:
        await client.wait_ready(30)
        await other.wait_ready(30)
        client.attach(cache)
        await cache.multi_set([("a", 1), ("b", 1)])
        await other.invalidate("a")
        await eventually(lambda: names_are(clean_redis, ["attached:b"]))
        await other.invalidate(everything=True)
        await eventually(lambda: names_are(clean_redis, []))
    await cache.close()


async def names_are(cache: RedisCache, names: list[str]) -> bool:
    return await names_in(cache) == names


# Memcached


def memcached_cache(server: Memcached, **options: Any) -> MemcachedCache:
    return MemcachedCache(endpoint="127.0.0.1", port=urlsplit(server.url).port, **options)


async def test_memcached_is_flushed_only_where_that_is_allowed(memcached: Memcached) -> None:
    cache, other = memcached_cache(memcached, namespace="mine"), memcached_cache(memcached)
    with pytest.raises(ConfigurationError, match=r"accepted: attach\(cache, may_flush_all=True\)"):
        AttachedCache(cache)
    await cache.set("a", 1)
    await cache.set("b", 1)
    await other.set("theirs", 1)
    attached = AttachedCache(cache, may_flush_all=True)
    await attached.evict(Eviction(["a"]))
    assert (await cache.get("a"), await cache.get("b"), await other.get("theirs")) == (None, 1, 1)
    await attached.evict(EVERYTHING)
    assert (await cache.get("b"), await other.get("theirs")) == (None, None)
    for each in (cache, other):
        await each.close()


# Memory


async def test_memory_keys_and_everything() -> None:
    cache = SimpleMemoryCache()
    for key in ("a", "b", "c"):
        await cache.set(key, 1)
    attached = AttachedCache(cache)
    await attached.evict(Eviction(["a", "missing"]))
    assert sorted(cache._cache) == ["b", "c"]
    await attached.evict(EVERYTHING)
    assert cache._cache == {}


async def test_memory_with_a_namespace_keeps_what_others_put_there() -> None:
    cache = SimpleMemoryCache(namespace="mine:")
    await cache.set("a", 1)
    await cache.set("a", 1, namespace="theirs:")
    await AttachedCache(cache).evict(EVERYTHING)
    assert list(cache._cache) == ["theirs:a"]


@pytest.mark.parametrize("value", [1, None, 0, ""])
@pytest.mark.parametrize("eviction", [Eviction(["a"]), EVERYTHING], ids=["key", "everything"])
async def test_no_timer_is_left_over_to_kill_a_newer_entry(value: Any, eviction: Eviction) -> None:
    cache = SimpleMemoryCache()
    await cache.set("a", value, ttl=0.05)
    timer = cache._handlers["a"]
    await AttachedCache(cache).evict(eviction)
    assert timer.cancelled()
    assert cache._handlers == {}
    await cache.set("a", "newer")
    await asyncio.sleep(0.1)  # longer than the old entry would have lived
    assert await cache.get("a") == "newer"


async def test_our_own_bounded_cache_can_be_attached() -> None:
    cache = BoundedMemoryCache(10)
    await cache.set("a", 1)
    await cache.set("b", 1)
    attached = AttachedCache(cache)
    await attached.evict(Eviction(["a"]))
    assert (await cache.get("a"), await cache.get("b")) == (None, 1)
    await attached.evict(EVERYTHING)
    assert len(cache) == 0


def test_a_cache_that_nobody_knows_how_to_clear_is_refused() -> None:
    class Strange(BaseCache):  # type: ignore[misc]
        NAME = "strange"

    with pytest.raises(ConfigurationError, match="do not know how to clear a Strange"):
        AttachedCache(Strange())
