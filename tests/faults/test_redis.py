"""A cache outside the process, and the durable queue that keeps it honest while nobody is there."""

import asyncio
import re
import signal
from collections.abc import Sequence
from typing import Any

import pytest
from aio_pika import Message
from proxy import Proxy
from scene import (
    EVENTUAL,
    Clients,
    Eventually,
    Programs,
    giving,
    is_refused,
    looking_into,
    operating,
    ready_messages,
    through,
)

from cacheinval import Client, Read, Settings, receiver
from cacheinval.bus import Delivery, Receiver
from cacheinval.bus.rabbitmq import RabbitBus
from cacheinval.sandbox import RabbitMQ, Redis

pytest_plugins = ("scene",)

NO_BEATS = 3600.0  # for a writer, where a test counts what is left in a queue


async def fill(client: Client, *keys: str) -> None:
    for key in keys:
        assert (await client.cache.read(key, giving("old"))).stored


async def fill_by_another(settings: dict[str, Any], *keys: str) -> None:
    """By an instance that is gone again when the story begins."""
    async with Client(Settings(**settings, instance_id="another", database_url="")) as other:
        await other.wait_ready(EVENTUAL)
        await fill(other, *keys)


@pytest.mark.timeout(120)
async def test_a_worker_is_killed_between_eviction_and_acknowledgement(
    rabbitmq: RabbitMQ,
    redis: Redis,
    namespace: str,
    clients: Clients,
    programs: Programs,
    eventually: Eventually,
) -> None:
    queue = f"cacheinval.{namespace}.one"
    settings: dict[str, Any] = {"cache_url": redis.url, "instance_id": "one", "database_url": ""}
    async with (
        Proxy("127.0.0.1", rabbitmq.port) as proxy,
        operating(rabbitmq.url) as operator,
        looking_into(redis.url, namespace) as shared,
    ):
        worker = programs("-m", "cacheinval", "worker", broker_url=through(proxy, rabbitmq.url), **settings)
        others = {"broker_url": rabbitmq.url, "cache_url": redis.url, "namespace": namespace}
        writer = await clients(broker_url=rabbitmq.url, subscribe=False, tick_interval=NO_BEATS)
        await eventually(worker.ready, EVENTUAL)
        await fill_by_another(others, "a", "b")
        before = await shared.epoch()

        proxy.swallow("request")  # whatever the worker tells the broker
        await writer.invalidate("a")
        await eventually(lambda: is_gone(shared, "a"))
        await eventually(lambda: bool(worker.said("evicted")))
        assert await ready_messages(operator, queue) == 0
        await worker.kill()
        await eventually(lambda: are_ready(operator, queue, 1))  # it is the broker's again: not acknowledged

        await fill_by_another(others, "a")  # a load that began before the invalidation, and ended after it
        proxy.pass_()
        again = programs("-m", "cacheinval", "worker", broker_url=rabbitmq.url, **settings)
        await eventually(again.ready, EVENTUAL)
        assert not await shared.has("a")
        assert await shared.has("b")
        assert await shared.epoch() == before
        assert [(line["key"], line["origin"]) for line in again.said("evicted")] == [
            (line["key"], line["origin"]) for line in worker.said("evicted")
        ]
        again.signal(signal.SIGTERM)
        assert await again.ended() == 0
        await eventually(lambda: are_ready(operator, queue, 0))  # it was acknowledged


class HeldBus:
    """RabbitMQ, with a receiver that gets nothing while `open` is not set."""

    def __init__(self, bus: RabbitBus) -> None:
        self.open = asyncio.Event()
        self.held = 0
        self._bus = bus

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def run(self, receiver: Receiver) -> None:
        held = self

        class Held:
            renewing, joined, lost = receiver.renewing, receiver.joined, receiver.lost
            overhear = receiver.overhear

            async def receive(self, deliveries: Sequence[Delivery]) -> list[str | None]:
                held.held += len(deliveries)
                await held.open.wait()
                return await receiver.receive(deliveries)

            def receive_now(self, deliveries: Sequence[Delivery]) -> None: ...

        await self._bus.run(Held())


@pytest.mark.timeout(120)
async def test_a_worker_that_was_away_catches_up_before_it_serves(
    rabbitmq: RabbitMQ, redis: Redis, namespace: str, clients: Clients, eventually: Eventually
) -> None:
    settings: dict[str, Any] = {
        "broker_url": rabbitmq.url,
        "cache_url": redis.url,
        "instance_id": "one",
        "namespace": namespace,
    }
    async with looking_into(redis.url, namespace) as shared:
        async with Client(Settings(**settings, database_url="", cache_ttl=3600)) as first:
            await first.wait_ready(EVENTUAL)
            await fill(first, "a", "b", "c")
        before = await shared.epoch()
        writer = await clients(broker_url=rabbitmq.url, subscribe=False, tick_interval=NO_BEATS)
        await writer.invalidate("a")
        await writer.invalidate(*(f"another:{number}" for number in range(5000)))
        await writer.invalidate("c")

        bus = HeldBus(RabbitBus(Settings(**settings)))
        second = await clients(over=bus, **settings)
        await eventually(lambda: bus.held > 0, EVENTUAL)
        assert not second.ready
        assert second.reason == "catching up with the queue"
        # What is younger than a second may be served; it is there, and is refused from then on.
        await eventually(lambda: is_refused(second, "a"))
        await eventually(lambda: is_refused(second, "b"))
        assert await shared.has("a")
        assert await shared.has("b")
        assert not second.ready

        bus.open.set()
        await second.wait_ready(EVENTUAL)
        assert not await shared.has("a")
        assert not await shared.has("c")
        assert await second.cache.read("b", giving("new")) == Read("old", "hit", False)
        assert await shared.epoch() == before
        assert second.stats()["coherence"]["epochs"] == 0
        assert bus.held >= 7 + 1  # 5000 keys are 5 messages; the last one is the marker


@pytest.mark.timeout(120)
async def test_a_second_process_with_the_same_name_stands_by(
    rabbitmq: RabbitMQ,
    redis: Redis,
    namespace: str,
    clients: Clients,
    programs: Programs,
    eventually: Eventually,
) -> None:
    settings = {"broker_url": rabbitmq.url, "cache_url": redis.url, "database_url": "", "instance_id": "one"}
    queue = f"cacheinval.{namespace}.one"
    first = programs("-m", "cacheinval", "worker", **settings)
    await eventually(first.ready, EVENTUAL)
    second = programs("-m", "cacheinval", "worker", **settings)

    def refusals() -> int:
        return len(re.findall(rf"queue '{queue}' in vhost '/' in exclusive use", rabbitmq.log.read_text()))

    await eventually(lambda: refusals() >= 3, EVENTUAL)
    status = await second.status()
    assert status["broker"]["consumer"] == "standby"
    assert status["state"] != "ready"
    assert not await second.ready()
    assert len(second.said("standing by: another process consumes this queue")) == 1
    assert await first.ready()

    others = {"broker_url": rabbitmq.url, "cache_url": redis.url, "namespace": namespace}
    writer = await clients(broker_url=rabbitmq.url, subscribe=False, tick_interval=NO_BEATS)
    async with looking_into(redis.url, namespace) as shared:
        await fill_by_another(others, "a", "b")
        await writer.invalidate("a")
        await eventually(lambda: is_gone(shared, "a"))
        await first.kill()
        await writer.invalidate("b")
        await eventually(lambda: is_gone(shared, "b"), EVENTUAL)
    await eventually(second.ready, EVENTUAL)
    assert [line["resumed"] for line in second.said("joined")] == ["yes"]
    assert len(second.said("standing by: another process consumes this queue")) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("patience", ["in place", "by a new subscription"])
async def test_redis_is_away_while_it_has_to_evict(
    patience: str,
    rabbitmq: RabbitMQ,
    redis: Redis,
    namespace: str,
    clients: Clients,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if patience != "in place":
        monkeypatch.setattr(receiver, "RETRY_LIMIT", 0.1)
    queue = f"cacheinval.{namespace}.one"
    async with (
        Proxy("127.0.0.1", redis.port) as proxy,
        operating(rabbitmq.url) as operator,
        looking_into(redis.url, namespace) as shared,
    ):
        settings = Settings(
            broker_url=rabbitmq.url,
            cache_url=through(proxy, redis.url),
            instance_id="one",
            namespace=namespace,
            database_url="",
        )
        async with Client(settings) as client:
            await client.wait_ready(EVENTUAL)
            await fill(client, "a", "b")
            before = await shared.epoch()
            writer = await clients(broker_url=rabbitmq.url, subscribe=False, tick_interval=NO_BEATS)

            proxy.swallow(
                "request"
            )  # and not Redis stopped: it would do in the end what it was told meanwhile
            await writer.invalidate("a")
            await eventually(lambda: client.state == "suspect", EVENTUAL)
            if patience == "in place":
                assert (client.reason or "").startswith("eviction failed: the redis cache failed")
                assert await unacknowledged(rabbitmq, queue) >= 1
            else:
                await eventually(lambda: "receiving failed: not evicted within" in caplog.text, EVENTUAL)
            assert await shared.has("a")
            assert await client.cache.read("a", giving("new")) == Read("new", "bypass", False)

            proxy.pass_()
            await client.wait_ready(EVENTUAL)
            assert not await shared.has("a")
            assert await shared.epoch() == before
            assert await client.cache.read("b", giving("new")) == Read("old", "hit", False)
        await eventually(lambda: are_ready(operator, queue, 0))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("gap", ["a missing message", "a deleted queue"])
async def test_redis_is_away_when_everything_has_to_go(
    gap: str,
    rabbitmq: RabbitMQ,
    redis: Redis,
    namespace: str,
    clients: Clients,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The next attempt to subscribe finds its queue there, and no message missing; the gap was before."""
    monkeypatch.setattr(receiver, "RETRY_LIMIT", 0.1)
    async with (
        Proxy("127.0.0.1", redis.port) as proxy,
        operating(rabbitmq.url) as operator,
        looking_into(redis.url, namespace) as shared,
    ):
        client = await clients(
            broker_url=rabbitmq.url, cache_url=through(proxy, redis.url), instance_id="one"
        )
        await client.wait_ready(EVENTUAL)
        exchange = await operator.get_exchange(f"cacheinval.{namespace}")
        body = '{"v": 1, "kind": "invalidate", "keys": ["c"], "origin": "o", "seq": %d}'
        await exchange.publish(Message((body % 1).encode()), "")
        await eventually(lambda: client.stats()["receiver"]["messages"] >= 1)
        await fill(client, "a")
        before = await shared.epoch()

        proxy.swallow("request")
        if gap == "a missing message":
            await exchange.publish(Message((body % 3).encode()), "")
        else:
            await operator.queue_delete(f"cacheinval.{namespace}.one")
        said = (
            "not evicted within" if gap == "a missing message" else "not subscribing before the cache can be"
        )
        await eventually(lambda: said in caplog.text, EVENTUAL)
        assert await shared.epoch() == before

        proxy.pass_()
        await client.wait_ready(EVENTUAL)
        assert await shared.epoch() != before  # whoever reads there, be it in another process
        assert await client.cache.read("a", giving("new")) == Read("new", "miss", True)


async def unacknowledged(rabbitmq: RabbitMQ, queue: str) -> int:
    listed = await rabbitmq.ctl("list_queues", "--no-table-headers", "name", "messages_unacknowledged")
    return {name: int(count) for name, count in (line.split("\t") for line in listed.splitlines())}[queue]


async def is_gone(shared: Any, key: str) -> bool:
    return not await shared.has(key)


async def are_ready(operator: Any, queue: str, messages: int) -> bool:
    """At least so many, for its publisher says the number again for a while; or none."""
    ready = await ready_messages(operator, queue)
    return ready >= messages if messages else ready == 0
