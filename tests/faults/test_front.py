"""A cache in the process, in front of one outside it: what must not survive in the first when the queue was elsewhere."""

from typing import Any

import pytest
from proxy import Proxy
from scene import EVENTUAL, Clients, Eventually, giving, through

from cacheinval import Client, Read
from cacheinval.sandbox import RabbitMQ, Redis

pytest_plugins = ("scene",)


@pytest.fixture
def settings(rabbitmq: RabbitMQ, redis: Redis) -> dict[str, Any]:
    return {
        "broker_url": rabbitmq.url,
        "cache_url": redis.url,
        "cache_local_entries": 10,
        "instance_id": "one",
    }


def consumer(client: Client) -> str:
    state: str = client.status()["broker"]["consumer"]
    return state


@pytest.mark.timeout(120)
async def test_a_message_reaches_both_levels_of_every_instance(
    settings: dict[str, Any], clients: Clients, eventually: Eventually
) -> None:
    one, two = await clients(**settings), await clients(**settings | {"instance_id": "two"})
    for client in (one, two):
        await client.wait_ready(EVENTUAL)
    assert await one.cache.read("k", giving("old"), tags=["t"]) == Read("old", "miss", True)
    assert await two.cache.read("k", giving("new")) == Read("old", "hit", False, "shared")
    assert await two.cache.read("k", giving("new")) == Read("old", "hit", False)
    await one.invalidate(tags=["t"])
    assert await one.cache.read("k", giving("new"), tags=["t"]) == Read("new", "miss", True)
    await eventually(lambda: two.stats()["receiver"]["evictions"] > 1)
    assert (await two.cache.read("k", giving("newer"))).value in ("new", "newer")  # it evicts outside as well


@pytest.mark.timeout(120)
async def test_what_was_evicted_while_another_process_had_the_queue_is_served_no_more(
    settings: dict[str, Any], rabbitmq: RabbitMQ, clients: Clients, eventually: Eventually
) -> None:
    """It has evicted outside, and acknowledged; nobody tells the first one, which held the entry in its process."""
    writer = await clients(broker_url=rabbitmq.url, subscribe=False)
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        first = await clients(**settings | {"broker_url": through(proxy, rabbitmq.url)})
        await first.wait_ready(EVENTUAL)
        assert (await first.cache.read("k", giving("old"))).stored
        assert (await first.cache.read("k", giving("new"))) == Read("old", "hit", False)
        proxy.cut()
        await eventually(lambda: not first.ready)
        async with Client(first.settings.model_copy(update={"broker_url": rabbitmq.url})) as second:
            await second.wait_ready(EVENTUAL)
            await writer.invalidate("k")
            await eventually(lambda: second.stats()["receiver"]["evictions"] > 0)
        proxy.pass_()
        await first.wait_ready(EVENTUAL)
        assert first.stats()["coherence"]["gaps"] == 0, "the queue was resumed"
        assert (await first.cache.read("k", giving("new"))).value == "new"


@pytest.mark.timeout(120)
async def test_a_redis_that_is_killed_costs_no_read_an_error(
    settings: dict[str, Any], own_redis: Redis, clients: Clients, eventually: Eventually
) -> None:
    client = await clients(**settings | {"cache_url": own_redis.url})
    await client.wait_ready(EVENTUAL)
    assert (await client.cache.read("k", giving("old"))).stored
    await own_redis.kill()
    assert await client.cache.read("k", giving("new")) == Read("old", "hit", False)
    invalidating = await clients(broker_url=settings["broker_url"], subscribe=False)
    await invalidating.invalidate("k")
    await eventually(lambda: client.reason and client.reason.startswith("eviction failed"))
    assert (await client.cache.read("k", giving("new"))).value == "new"
    await own_redis.start()
    await client.wait_ready(EVENTUAL)
    assert (await client.cache.read("another", giving("new"))).stored
    before = client.stats()["second_level"]["not_stored"]
    assert (await client.cache.read("a third", giving("new"))).stored
    assert client.stats()["second_level"]["not_stored"] == before, "it is not used again"
