"""Two levels over a real Redis and Memcached, as two instances see them that share the second one."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from clocks import SetClock
from waiting import Eventually

from cacheinval import Client, Settings
from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.backends.servers import connect
from cacheinval.backends.shared import SharedEntries
from cacheinval.cache import Read, SharedCache
from cacheinval.cache.levels import TwoLevels
from cacheinval.coherence import Coherence, Eviction
from cacheinval.errors import CacheError
from cacheinval.sandbox import Memcached, RabbitMQ, Redis

EVICTIONS = [Eviction(["k"]), Eviction(tags=["t"]), Eviction(everything=True)]
each_eviction = pytest.mark.parametrize("what", EVICTIONS, ids=["key", "tag", "everything"])


@dataclass
class Instance:
    """Both levels as one instance uses them."""

    coherence: Coherence
    clock: SetClock
    entries: SharedEntries
    cache: TwoLevels

    async def apply(self, eviction: Eviction) -> None:
        self.coherence.evict(eviction, self.clock.now())
        await self.cache.evict(eviction)


def instance(url: str, namespace: str, **options: Any) -> Instance:
    coherence, clock = Coherence(in_front=True, **options), SetClock()
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    entries = SharedEntries(connect(url), namespace)
    second = SharedCache(entries, coherence, clock, ttl=300)
    return Instance(
        coherence, clock, entries, TwoLevels(BoundedMemoryCache(100), second, coherence, clock, ttl=300)
    )


@pytest.fixture(params=["redis", "memcached"])
def url(request: pytest.FixtureRequest) -> str:
    server: Redis | Memcached = request.getfixturevalue(request.param)
    return server.url


@pytest.fixture
async def one(url: str, namespace: str) -> AsyncIterator[Instance]:
    one = instance(url, namespace)
    yield one
    await one.cache.close()


@pytest.fixture
async def two(url: str, namespace: str) -> AsyncIterator[Instance]:
    two = instance(url, namespace)
    yield two
    await two.cache.close()


def value_of(value: Any) -> Callable[[], Awaitable[Any]]:
    async def load() -> Any:
        return value

    return load


async def refuse() -> Any:
    pytest.fail("loaded although it was cached")


async def test_what_one_stores_the_other_finds_outside_and_then_at_home(one: Instance, two: Instance) -> None:
    value = {"a": [1, None]}
    assert await one.cache.read("k", value_of({"a": (1, None)}), tags=["t"]) == Read(value, "miss", True)
    assert await one.cache.read("k", refuse) == Read(value, "hit", False)
    assert await two.cache.read("k", refuse) == Read(value, "hit", False, "shared")
    assert await two.cache.read("k", refuse) == Read(value, "hit", False)


async def test_a_hit_in_the_process_costs_redis_nothing(own_redis: Redis, namespace: str) -> None:
    admin = connect(own_redis.url)
    one, two = (instance(own_redis.url, namespace) for _ in range(2))

    async def commands() -> int:
        """How many commands the server has been given, but for those that ask."""
        stats = await admin.raw("info", "commandstats")
        return sum(said["calls"] for name, said in stats.items() if name != "cmdstat_info")

    await one.cache.get_or_set("k", value_of(1))
    await two.cache.get_or_set("k", refuse)
    before = await commands()
    for _ in range(100):
        assert await one.cache.get_or_set("k", refuse) == await two.cache.get_or_set("k", refuse) == 1
    assert await commands() == before
    await two.cache.get_or_set("other", value_of(2))
    assert await commands() > before, "what is counted is not what a look costs"
    for each in (one.cache, two.cache, admin):
        await each.close()


@each_eviction
async def test_an_eviction_reaches_both_levels_of_both(one: Instance, two: Instance, what: Eviction) -> None:
    for each in (one, two):
        await each.cache.get_or_set("k", value_of("old"), tags=["t"])
    await two.apply(what)  # it is told first, and reads at once
    assert await two.cache.read("k", value_of("new"), tags=["t"]) == Read("new", "miss", True)
    assert await one.cache.read("k", refuse) == Read("old", "hit", False)  # nobody has told it
    await one.apply(what)
    assert (await one.cache.read("k", value_of("new"), tags=["t"])).value == "new"
    assert (await two.cache.read("k", refuse)).value == "new"


@each_eviction
async def test_what_a_deaf_one_stores_outside_is_served_to_nobody_else(
    one: Instance, two: Instance, what: Eviction
) -> None:
    async def meanwhile() -> str:
        await one.apply(what)
        return "old"

    assert (await two.cache.read("k", meanwhile, tags=["t"])).value == "old"
    assert await one.cache.read("k", value_of("new"), tags=["t"]) == Read("new", "miss", True)
    await two.apply(what)
    assert (await two.cache.read("k", value_of("new"), tags=["t"])).value == "new"


async def test_what_was_found_grows_too_old_where_it_does_outside(url: str, namespace: str) -> None:
    """It is as old as its load, whoever made that, and not as old as the look."""
    one, two = (instance(url, namespace, max_staleness=10.0) for _ in range(2))
    await one.cache.get_or_set("k", value_of("old"))
    two.clock.ahead = 9.0
    assert (await two.cache.read("k", refuse)).detail == "shared"
    assert (await two.cache.read("k", refuse)).detail is None
    two.clock.ahead = 11.0
    assert await two.cache.read("k", value_of("new")) == Read("new", "bypass", True)
    for each in (one, two):
        await each.cache.close()


async def test_a_redis_that_is_killed_costs_loads_and_comes_back(
    own_redis: Redis, namespace: str, eventually: Eventually
) -> None:
    one = instance(own_redis.url, namespace)
    await one.cache.get_or_set("k", value_of("old"))
    await own_redis.kill()
    assert await one.cache.read("k", refuse) == Read("old", "hit", False), "what is here needs nobody else"
    one.coherence.evict(EVICTIONS[0], one.clock.now())
    with pytest.raises(CacheError, match="the redis cache failed"):
        await one.cache.evict(EVICTIONS[0])
    assert await one.cache.read("k", value_of("new")) == Read("new", "miss", True)
    assert one.cache.second.counters.bypasses == 1
    await own_redis.start()
    two = instance(own_redis.url, namespace)

    async def answers() -> bool:
        with suppress(CacheError):
            await one.entries._server.get(["anything"])
            return True
        return False

    await eventually(answers)
    assert (await two.cache.read("shared", value_of(2))).stored
    assert await one.cache.read("shared", refuse) == Read(2, "hit", False, "shared")
    for each in (one, two):
        await each.cache.close()


async def test_what_has_gone_outside_is_given_from_the_process_where_loading_fails(
    one: Instance, two: Instance
) -> None:
    async def away() -> Any:
        raise OSError

    assert await one.cache.get_or_set("k", value_of("old"), tags=["t"]) == "old"
    assert (await two.cache.read("k", refuse, stale_if_error=60)).detail == "shared"
    for each in (one, two):
        await each.apply(Eviction(["k"]))
    assert await two.cache.read("k", away, stale_if_error=60) == Read("old", "hit", False, "stale-if-error")
    with pytest.raises(OSError):
        await one.cache.read("k", away, stale_if_error=60)  # it was not to keep anything
    assert await one.cache.read("k", value_of("new")) == Read("new", "miss", True)
    assert await two.cache.read("k", away, stale_if_error=60) == Read("new", "hit", False, "shared")


async def test_what_is_past_its_ttl_is_given_and_then_found_outside(
    one: Instance, two: Instance, eventually: Eventually
) -> None:
    assert await two.cache.get_or_set("k", value_of("old"), ttl=2) == "old"
    one.clock.ahead = two.clock.ahead = 2.0
    assert await one.cache.get_or_set("k", value_of("new"), ttl=60) == "new"
    given = await two.cache.read("k", refuse, stale_while_revalidate=60)
    assert given == Read("old", "hit", False, "stale-while-revalidate")
    await eventually(lambda: len(two.cache._reloads) == 0)
    assert await two.cache.read("k", refuse) == Read("new", "hit", False)


@pytest.mark.parametrize("levels", [1, 2])
async def test_a_hot_key_is_there_again_after_the_write_of_another_process(
    rabbitmq: RabbitMQ, database_url: str, redis: Redis, namespace: str, levels: int, eventually: Eventually
) -> None:
    options: dict[str, Any] = {
        "broker_url": rabbitmq.url, "database_url": database_url, "namespace": namespace, "warm_keys": 10
    }  # fmt: skip
    if levels == 2:
        options |= {"cache_url": redis.url, "cache_local_entries": 10}
    async with (
        Client(Settings(**options, instance_id="reader")) as reader,
        Client(Settings(**options, instance_id="writer")) as writer,
    ):
        await writer.apply_schema()
        await writer.pool.execute("CREATE TABLE prices AS SELECT 'a' AS id, 99 AS price")
        await reader.wait_ready(20)

        @reader.cached("price:{product_id}")
        async def price_of(product_id: str) -> int:
            return await reader.pool.fetchval("SELECT price FROM prices WHERE id = $1", product_id)  # type: ignore[no-any-return]

        assert [await price_of("a") for _ in range(3)] == [99] * 3
        await writer.execute("UPDATE prices SET price = 109", invalidate=["price:a"])
        await eventually(lambda: reader.stats()["warming"]["stored"] >= 1, 20)
        assert await reader.cache.read("price:a", refuse) == Read(109, "hit", False)
