"""What an instance does when its queue, its connection or its messages are not as they should be."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aio_pika import Message
from aio_pika.abc import AbstractChannel
from proxy import Proxy
from scene import (
    EVENTUAL,
    Clients,
    Eventually,
    evicted,
    giving,
    is_refused,
    looking_into,
    operating,
    ready_messages,
    through,
)

from cacheinval import Client, Read
from cacheinval.sandbox import RabbitMQ, Redis

pytest_plugins = ("scene",)


@pytest.fixture
async def operator(rabbitmq: RabbitMQ) -> AsyncIterator[AbstractChannel]:
    async with operating(rabbitmq.url) as channel:
        yield channel


@pytest.fixture
async def instance(rabbitmq: RabbitMQ, clients: Clients) -> Client:
    """A client that is ready, with `a` and `b` in its cache."""
    client = await clients(broker_url=rabbitmq.url)
    await client.wait_ready(EVENTUAL)
    await fill(client)
    return client


async def fill(client: Client) -> None:
    for key in ("a", "b"):
        assert await client.cache.read(key, giving("old"), tags=["t"]) == Read("old", "miss", True)


async def read(client: Client, key: str) -> tuple[Any, str, bool]:
    """A read for which the source of truth has a new value."""
    return await client.cache.read(key, giving("new"), tags=["t"])


def epoch(client: Client) -> int:
    return int(client.status()["cache"]["epoch"])


# The queue and the connection


@pytest.mark.timeout(120)
async def test_an_operator_deletes_the_queue(
    rabbitmq: RabbitMQ,
    instance: Client,
    clients: Clients,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, queue = epoch(instance), instance.status()["broker"]["queue"]
    await rabbitmq.ctl("delete_queue", queue)
    await eventually(lambda: epoch(instance) == before + 1, EVENTUAL)
    await instance.wait_ready(EVENTUAL)
    assert "the broker cancelled the consumer: queue deleted" in caplog.text
    assert instance.status()["broker"]["queue"] != queue
    assert await read(instance, "a") == Read("new", "miss", True)

    writer = await clients(broker_url=rabbitmq.url, subscribe=False)
    await writer.invalidate("a")
    await eventually(lambda: evicted(instance) == 3)  # two by the new epoch


@pytest.mark.timeout(120)
async def test_an_operator_deletes_the_queue_of_a_cache_outside_the_process(
    rabbitmq: RabbitMQ,
    redis: Redis,
    namespace: str,
    operator: AbstractChannel,
    clients: Clients,
    eventually: Eventually,
) -> None:
    client = await clients(broker_url=rabbitmq.url, cache_url=redis.url, instance_id="one")
    await client.wait_ready(EVENTUAL)
    await fill(client)
    async with looking_into(redis.url, namespace) as shared:
        before = await shared.epoch()
        await operator.queue_delete(f"cacheinval.{namespace}.one")
        await eventually(lambda: changed(shared.epoch, before), EVENTUAL)
    await client.wait_ready(EVENTUAL)
    assert await read(client, "a") == Read("new", "miss", True)
    assert await ready_messages(operator, f"cacheinval.{namespace}.one") == 0  # there is one again


async def changed(value: Any, before: object) -> bool:
    return bool(await value() != before)


@pytest.mark.timeout(120)
async def test_the_connection_is_cut(rabbitmq: RabbitMQ, clients: Clients, eventually: Eventually) -> None:
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        client = await clients(broker_url=through(proxy, rabbitmq.url))
        writer = await clients(broker_url=rabbitmq.url, subscribe=False)
        await client.wait_ready(EVENTUAL)
        await fill(client)
        before = epoch(client)

        proxy.cut()
        await eventually(lambda: client.state == "suspect")
        await writer.invalidate("a")  # which this instance misses
        # What it loaded less than a second ago it still serves, and then nothing.
        await eventually(lambda: is_refused(client, "a"))
        assert client.state == "suspect"

        proxy.pass_()
        await client.wait_ready(EVENTUAL)
        assert epoch(client) == before + 1
        assert await read(client, "a") == await read(client, "b") == Read("new", "miss", True)
        await writer.invalidate("b")
        await eventually(lambda: evicted(client) == 3)  # two by the new epoch


@pytest.mark.timeout(120)
async def test_a_load_in_flight_is_overtaken_by_an_invalidation(
    rabbitmq: RabbitMQ, instance: Client, clients: Clients, eventually: Eventually
) -> None:
    writer = await clients(broker_url=rabbitmq.url, subscribe=False)
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> str:
        reading.set()
        await go_on.wait()
        return "old"

    loads = [
        asyncio.create_task(instance.cache.read(key, slow, tags=tags))
        for key, tags in (("by key", []), ("by tag", ["slow"]), ("neither", []))
    ]
    await reading.wait()
    await writer.invalidate("by key", tags=["slow"])
    await eventually(lambda: instance.stats()["receiver"]["messages"] >= 1)
    await eventually(lambda: instance.stats()["coherence"]["voided_loads"] == 1)
    go_on.set()
    async with asyncio.timeout(EVENTUAL):
        assert await asyncio.gather(*loads) == [
            Read("old", "miss", False),
            Read("old", "miss", False),
            Read("old", "miss", True),
        ]
    assert await instance.cache.read("by key", giving("new")) == Read("new", "miss", True)
    assert await instance.cache.read("by tag", giving("new"), tags=["slow"]) == Read("new", "miss", True)
    assert await instance.cache.read("neither", giving("new")) == Read("old", "hit", False)


# The messages


class Exchange:
    """Publishes any bytes to a namespace, as no client would."""

    def __init__(self, operator: AbstractChannel, namespace: str, client: Client) -> None:
        self._operator = operator
        self._name = f"cacheinval.{namespace}"
        self._client = client
        self._published = 0

    async def publish(self, *bodies: bytes) -> None:
        """Returns when the client has processed all of them."""
        exchange = await self._operator.get_exchange(self._name)
        for body in [*bodies, b'{"v": 1, "kind": "of no importance"}']:
            await exchange.publish(Message(body), routing_key="")
        self._published += 1
        async with asyncio.timeout(EVENTUAL):
            while self._client.stats()["coherence"]["unknown_messages"] < self._published:
                await asyncio.sleep(0.005)


def invalidate(*keys: str, **fields: Any) -> bytes:
    """A message; fields that are None are left out."""
    fields = {"v": 1, "kind": "invalidate", "keys": list(keys), **fields}
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


MALFORMED = {
    "empty": b"",
    "not JSON": b"DELETE a",
    "cut off": invalidate("a")[:-1],
    "something after it": invalidate("a") + b"}",
    "a byte order mark": b"\xef\xbb\xbf" + invalidate("a"),
    "wrong UTF-8": invalidate("a").replace(b'"a"', b'"\xff"'),
    "wrong UTF-8 in an unknown field": invalidate("a", more="x").replace(b'"x"', b'"\xff"'),
    "UTF-16": invalidate("a").decode().encode("utf-16"),
    "half of a surrogate pair": invalidate("a").replace(b'"a"', b'"\\ud800"'),
    "a number": b"1",
    "a list": b"[" + invalidate("a") + b"]",
    "nested without end": b"[" * 100_000,
    "no version": invalidate("a", v=None),
    "another version": invalidate("a", v=2),
    "a version that is text": invalidate("a", v="1"),
    "no kind": invalidate("a", kind=None),
    "a kind that is a number": invalidate("a", kind=1),
    "nothing to invalidate": invalidate(),
    "all is false": invalidate(all=False),
    "all is text": invalidate(all="true"),
    "keys are text": invalidate(keys="a"),
    "a key that is a number": invalidate(keys=["a", 1]),
    "a key that is null": invalidate(keys=["a", None]),
    "an empty key": invalidate("a", ""),
    "NUL in a key": invalidate("a\0b"),
    "a key of 513 bytes": invalidate("é" * 256 + "x"),
    "an empty tag": invalidate("a", tags=[""]),
    "tags are an object": invalidate("a", tags={}),
    "fewer versions than keys": invalidate("a", "b", versions=[1]),
    "a version that is a fraction": invalidate("a", versions=[1.5]),
    "seq is 0": invalidate("a", origin="o", seq=0),
    "seq is text": invalidate("a", origin="o", seq="1"),
    "origin is empty": invalidate("a", origin="", seq=1),
    "at is text": invalidate("a", at="now"),
    "a tick without a time": b'{"v": 1, "kind": "tick", "origin": "o", "seq": 1}',
    "a probe without an id": b'{"v": 1, "kind": "probe"}',
    "10,001 keys": invalidate(*map(str, range(10_001))),
    "100,000 keys": invalidate(*map(str, range(100_000))),
    "more than 2 MiB": invalidate("a", more="x" * (2 << 20)),
}


@pytest.mark.timeout(120)
async def test_malformed_messages(
    rabbitmq: RabbitMQ,
    namespace: str,
    instance: Client,
    operator: AbstractChannel,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    exchange, dead = Exchange(operator, namespace, instance), f"cacheinval.{namespace}.dead"
    before, queue = epoch(instance), instance.status()["broker"]["queue"]
    await exchange.publish(*MALFORMED.values())
    await eventually(lambda: has_ready(operator, dead, len(MALFORMED)))
    letters = await operator.declare_queue(dead, passive=True)
    bodies = [(await letters.get(no_ack=True)).body for _ in MALFORMED]
    assert sorted(bodies) == sorted(MALFORMED.values())
    assert instance.stats()["receiver"]["malformed"] == len(MALFORMED)
    assert instance.status()["broker"]["rejected"] == len(MALFORMED)
    assert caplog.text.count("malformed message dead-lettered") == len(MALFORMED)

    # Each may have been an invalidation of anything: what was there is gone, but not once for each of them.
    await instance.wait_ready(EVENTUAL)
    assert before < epoch(instance) < before + 5
    assert instance.status()["broker"]["queue"] == queue
    assert await read(instance, "a") == Read("new", "miss", True)
    after = evicted(instance)
    await exchange.publish(invalidate("a"))
    assert evicted(instance) == after + 1
    assert instance.ready


async def has_ready(operator: AbstractChannel, queue: str, messages: int) -> bool:
    return await ready_messages(operator, queue) == messages


@pytest.mark.timeout(120)
async def test_a_message_of_an_unknown_kind_is_ignored(
    namespace: str, instance: Client, operator: AbstractChannel, eventually: Eventually
) -> None:
    before = epoch(instance)
    await Exchange(operator, namespace, instance).publish(invalidate("a", kind="celebrate"))
    await eventually(lambda: instance.stats()["coherence"]["unknown_messages"] == 2)  # with publish's own
    assert await read(instance, "a") == Read("old", "hit", False)
    assert epoch(instance) == before
    assert await ready_messages(operator, f"cacheinval.{namespace}.dead") == 0


@pytest.mark.timeout(120)
async def test_duplicates_reordering_and_a_missing_message(
    namespace: str, instance: Client, operator: AbstractChannel
) -> None:
    publish, before = Exchange(operator, namespace, instance).publish, epoch(instance)

    # A duplicate evicts again, and is no gap.
    await publish(invalidate("a", origin="o", seq=7))
    assert await read(instance, "a") == Read("new", "miss", True)
    await publish(invalidate("a", origin="o", seq=7), invalidate("c", origin="o", seq=8))
    assert await read(instance, "a") == Read("new", "miss", True)
    assert await read(instance, "b") == Read("old", "hit", False)
    assert epoch(instance) == before
    assert instance.stats()["coherence"]["duplicates"] == 1

    # Numbers of each origin are its own, and who gives none takes part.
    await publish(invalidate("c", origin="p", seq=1), invalidate("b"), invalidate("c", origin="o", seq=9))
    assert await read(instance, "b") == Read("new", "miss", True)
    assert await read(instance, "a") == Read("new", "hit", False)
    assert epoch(instance) == before

    # 11 before 10: when 11 comes, 10 may be lost; when 10 comes after all, it evicts, and is no second gap.
    await publish(invalidate("c", origin="o", seq=11))
    await instance.wait_ready(EVENTUAL)
    assert epoch(instance) == before + 1
    assert await read(instance, "a") == await read(instance, "b") == Read("new", "miss", True)
    await publish(invalidate("a", origin="o", seq=10), invalidate("c", origin="o", seq=12))
    assert await read(instance, "a") == Read("new", "miss", True)
    assert await read(instance, "b") == Read("new", "hit", False)
    assert epoch(instance) == before + 1
    assert instance.stats()["coherence"]["gap_reasons"] == {"missing messages": 1}
    assert instance.ready
