"""What a cache outside the process must not forget when the process does: what was kept with it, and what it tells."""

import asyncio
import signal
from functools import partial
from typing import Any

import asyncpg
import pytest
from scene import (
    EVENTUAL,
    SET_PRICE,
    Clients,
    Eventually,
    Programs,
    has_price,
    looking_into,
    operating,
    price,
)

from cacheinval import Client, Read, Settings
from cacheinval.sandbox import RabbitMQ, Redis

pytest_plugins = ("scene",)

DB = asyncpg.Connection
TICK = 0.2


@pytest.fixture
def settings(rabbitmq: RabbitMQ, redis: Redis, database_url: str, db: DB, namespace: str) -> dict[str, Any]:
    """Of an instance whose cache is in Redis; it relays, and ticks."""
    return {
        "broker_url": rabbitmq.url,
        "cache_url": redis.url,
        "database_url": database_url,
        "namespace": namespace,
        "instance_id": "one",
        "tick_interval": TICK,
        "cache_ttl": 3600,
    }


async def cached(client: Client, key: str, value: int) -> None:
    """`key` is read and stored, and a tick has been processed since."""
    await client.wait_ready(EVENTUAL)
    assert (await price(client, key)).value == value
    assert (await price(client, key)).outcome == "hit"


async def is_kept_outside(client: Client, key: str) -> bool:
    """What was loaded before an instance was registered, or soon after that, it does not serve."""
    outside = getattr(client.cache, "second", client.cache)
    if await outside.would_serve(key):
        return True
    await price(client, key, refresh=True)
    return False


async def connect_anew(client: Client) -> None:
    """Else each connection of before costs a read that goes past the cache."""
    outside = getattr(client.cache, "second", client.cache)
    await outside._backend._server._backend.client.connection_pool.disconnect()


async def ticks(client: Client, eventually: Eventually, count: int = 2) -> None:
    """So many ticks have been believed since."""
    before = client.stats()["coherence"]["ticks"]
    await eventually(lambda: client.stats()["coherence"]["ticks"] >= before + count, EVENTUAL)


def epochs(client: Client) -> dict[str, int]:
    return dict(client.stats()["coherence"]["gap_reasons"])


@pytest.mark.timeout(180)
async def test_an_instance_that_comes_back_goes_on_where_it_was(
    settings: dict[str, Any], clients: Clients, namespace: str, eventually: Eventually
) -> None:
    async with looking_into(settings["cache_url"], namespace) as shared:
        async with Client(Settings(**settings)) as first:
            await cached(first, "a", 1)
            await cached(first, "b", 1)
            await ticks(first, eventually)
            await first.execute(SET_PRICE, "b", 2, invalidate=["b"])
            await eventually(lambda: first.publisher.counters.deleted_rows == 1)
        before = await shared.epoch()
        second = await clients(**settings | {"relay": "auto"})
        await second.wait_ready(EVENTUAL)
        await ticks(second, eventually, 3)
        assert epochs(second) == {}
        assert await shared.epoch() == before
        assert (await price(second, "a")) == Read(1, "hit", False)
        assert await has_price(second, "b", 2)
        assert second.watermark_age is not None


# Everything has to go, since the queue is new; the process ends just before that.
KILLED_BEFORE_CLEARING = """
import asyncio, os, signal
from cacheinval import Client
from cacheinval.cache import SharedCache

async def die(self, eviction):
    os.kill(os.getpid(), signal.SIGKILL)

SharedCache.evict = die

async def main():
    async with Client() as client:
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.timeout(180)
async def test_killed_between_making_the_queue_and_clearing(
    settings: dict[str, Any],
    clients: Clients,
    programs: Programs,
    db: DB,
    namespace: str,
    eventually: Eventually,
) -> None:
    """The next process finds the queue, and must not take it for the one that the cache was kept honest by."""
    name = f"cacheinval.{namespace}.one"
    settings["relay"] = "off"
    async with operating(settings["broker_url"]) as operator:
        async with Client(Settings(**settings)) as first:
            await cached(first, "a", 1)
        await operator.queue_delete(name)  # as when it expires
        await db.execute(SET_PRICE, "a", 2)  # which it would have been told
        killed = programs("-c", KILLED_BEFORE_CLEARING, **settings)
        async with asyncio.timeout(EVENTUAL):
            assert await killed.ended() == -signal.SIGKILL
        assert await operator.declare_queue(name, passive=True)

        second = await clients(**settings)
        await second.wait_ready(EVENTUAL)
        assert epochs(second) == {"nothing kept with the cache": 1}
        assert await has_price(second, "a", 2)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("loss", ["emptied", "gone back"])
@pytest.mark.parametrize("local_entries", [0, 10])
async def test_redis_loses_what_it_held(
    loss: str,
    local_entries: int,
    settings: dict[str, Any],
    clients: Clients,
    redis: Redis,
    namespace: str,
    eventually: Eventually,
) -> None:
    """A failover to a replica that was behind: what had been deleted is there again."""
    client = await clients(**settings | {"relay": "auto", "cache_local_entries": local_entries})
    await cached(client, "a", 1)
    await ticks(client, eventually)
    async with looking_into(redis.url, namespace) as shared:
        copy = await shared.copy()
        await client.execute(SET_PRICE, "a", 2, invalidate=["a"])
        await eventually(lambda: has_price(client, "a", 2))
        await ticks(client, eventually)
        if loss == "gone back":
            await shared.go_back_to(copy)
        else:
            await shared.go_back_to({})
        await eventually(lambda: epochs(client) == {"the cache lost what it kept": 1}, EVENTUAL)
        await eventually(lambda: client.ready)
        assert await has_price(client, "a", 2)
        await ticks(client, eventually)
        assert epochs(client) == {"the cache lost what it kept": 1}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("local_entries", [0, 10])
async def test_a_redis_that_is_killed_takes_up_its_last_snapshot(
    local_entries: int,
    settings: dict[str, Any],
    clients: Clients,
    own_redis: Redis,
    namespace: str,
    eventually: Eventually,
) -> None:
    """What was evicted since is there again, and nobody tells: no message comes before it is read."""
    settings |= {"cache_url": own_redis.url, "cache_local_entries": local_entries, "max_staleness": 300}
    relaying = Settings(**settings | {"instance_id": "relay", "relay": "auto"})
    client = await clients(**settings | {"relay": "off", "tick_interval": 60})
    async with looking_into(own_redis.url, namespace) as shared, Client(relaying):
        for key in ("a", "b"):
            await eventually(partial(is_kept_outside, client, key), EVENTUAL)
        await ticks(client, eventually)
        await shared.save()
        await client.execute(SET_PRICE, "a", 2, invalidate=["a"])
        await ticks(client, eventually)
        assert not await shared.has("a")
    await own_redis.kill()
    await own_redis.start()
    async with looking_into(own_redis.url, namespace) as shared:
        assert await shared.has("a")
        assert await shared.has("b")
        await connect_anew(client)
        assert await price(client, "a") == Read(2, "miss", True)
        assert epochs(client) == {}, "nothing has been heard yet"

        await client.invalidate("another")
        await eventually(lambda: epochs(client) == {"the cache lost what it kept": 1}, EVENTUAL)
        await eventually(lambda: client.ready)
        await eventually(partial(is_kept_outside, client, "b"), EVENTUAL)
