"""Others on the same broker: other namespaces, other versions, other programs, and a second process of the same name."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from actors import KEYS, TICK
from aio_pika import Message
from aio_pika.abc import AbstractChannel
from history import now
from proxy import Proxy
from scene import EVENTUAL, OUTBOX, Clients, Eventually, evicted, giving, operating, through
from workload import Work, Working

from cacheinval import Read
from cacheinval.sandbox import RabbitMQ, Redis

pytest_plugins = ("scene", "workload")

DB = asyncpg.Connection


@pytest.fixture
async def operator(rabbitmq: RabbitMQ) -> AsyncIterator[AbstractChannel]:
    async with operating(rabbitmq.url) as channel:
        yield channel


@pytest.fixture
async def work(working: Working, stock: DB, rabbitmq: RabbitMQ, database_url: str) -> Work:
    """With a relay that leads."""
    work = working(stock, broker_url=rabbitmq.url, database_url=database_url)
    await work.relay()
    return work


def body(*keys: str, **fields: Any) -> bytes:
    return json.dumps({"v": 1, "kind": "invalidate", "keys": keys, **fields}).encode()


# Other namespaces


@pytest.mark.timeout(120)
@pytest.mark.parametrize("cache", ["memory", "redis"])
async def test_namespaces_whose_names_look_alike(
    cache: str,
    rabbitmq: RabbitMQ,
    database_url: str,
    stock: DB,
    namespace: str,
    clients: Clients,
    eventually: Eventually,
    request: pytest.FixtureRequest,
) -> None:
    """`prod` must not clear `product`, nor relay, nor prove anything, for it."""
    names = [f"{namespace}{end}" for end in ("prod", "product", "prod-uct", "prod_")]
    url = {} if cache == "memory" else {"cache_url": request.getfixturevalue("redis").url}
    servers: dict[str, Any] = {
        "broker_url": rabbitmq.url,
        "database_url": database_url,
        "tick_interval": TICK,
    }
    all_of_them = [
        await clients(**servers, **url, namespace=name, instance_id="one", relay="auto") for name in names
    ]
    for client in all_of_them:
        await client.wait_ready(EVENTUAL)
        await eventually(
            lambda client=client: client.relay.leads and client.watermark_age is not None, EVENTUAL
        )
        for key in ("a", "prod:a", "uct:a"):
            await client.cache.read(key, giving(client.settings.namespace), tags=["t"])
    prod, *others = all_of_them
    epochs = [client.stats()["coherence"]["epochs"] for client in others]
    relayed = [client.relay.counters["published_rows"] for client in others]

    await prod.invalidate("a")
    await prod.invalidate(tags=["t"])
    await prod.invalidate(everything=True)
    async with stock.transaction():  # which only the relay can publish
        await stock.execute("SELECT cacheinval.invalidate_all($1)", prod.settings.namespace)
    await eventually(lambda: stock.fetchval(f"SELECT ({OUTBOX}) = 0"), EVENTUAL)
    assert (
        prod.relay.counters["published_rows"] >= 1
    )  # more where the client was slower than the grace of its rows
    await eventually(lambda: prod.stats()["receiver"]["evictions"] >= 2, EVENTUAL)
    for client in others:  # and a tick later they still have everything
        heard = client.stats()["coherence"]["ticks"]
        await eventually(
            lambda client=client, heard=heard: client.stats()["coherence"]["ticks"] > heard + 1, EVENTUAL
        )
    for client in others:
        for key in ("a", "prod:a", "uct:a"):
            found = await client.cache.read(key, giving("loaded again"), tags=["t"])
            assert found == Read(client.settings.namespace, "hit", False)
        assert evicted(client) == 0
    assert [client.stats()["coherence"]["epochs"] for client in others] == epochs
    assert [client.relay.counters["published_rows"] for client in others] == relayed
    assert (await prod.cache.read("a", giving("new"), tags=["t"])).outcome == "miss"


# Other versions, and other programs


@pytest.mark.timeout(120)
async def test_messages_of_a_version_to_come_during_a_rolling_deploy(
    work: Work, operator: AbstractChannel, namespace: str, eventually: Eventually
) -> None:
    """Each may have been an invalidation, so it costs an epoch, at most one a second; nothing else."""
    reader = await work.reader("reader")
    writer = await work.writer()
    async with work.writing(writer):
        await work.sees("reader", "hit", now())
        exchange = await operator.get_exchange(f"cacheinval.{namespace}")
        before, queue = work.says("reader").epoch, reader.client.status()["broker"]["queue"]
        work.history.fault("version 2 is spoken too")
        began = now()
        for number in range(30):
            newer = body(KEYS[0], v=2, origin="new", seq=number + 1, names={"of": "another form"})
            await exchange.publish(Message(newer), routing_key="")
            await asyncio.sleep(0.05)
        await eventually(lambda: reader.client.stats()["receiver"]["malformed"] == 30, EVENTUAL)
        took = now() - began
        await reader.client.wait_ready(EVENTUAL)
        assert 1 <= work.says("reader").epoch - before <= took + 2
        assert reader.client.status()["broker"]["queue"] == queue
        work.history.fault("no more")
        done = writer.done
        await eventually(lambda: writer.done > done + 5, EVENTUAL)
    await work.check()


@pytest.mark.timeout(120)
async def test_messages_of_another_program_that_numbers_nothing(
    work: Work, operator: AbstractChannel, namespace: str, eventually: Eventually
) -> None:
    reader = await work.reader("reader")
    async with work.writing(await work.writer()):
        await eventually(lambda: reader.client.watermark_age is not None, EVENTUAL)
        exchange = await operator.get_exchange(f"cacheinval.{namespace}")
        for _, key in zip(range(50), itertools.cycle(KEYS), strict=False):
            messages = reader.client.stats()["receiver"]["messages"]
            await exchange.publish(Message(body(key)), routing_key="")
            await eventually(
                lambda messages=messages: reader.client.stats()["receiver"]["messages"] > messages
            )
        # Nor is anything wrong with an origin that gives no numbers, or with a new one.
        await exchange.publish(Message(body(KEYS[0], origin="somebody")), routing_key="")
        await exchange.publish(Message(body(KEYS[0], origin="somebody else", seq=1)), routing_key="")
    await work.check()
    counted = reader.client.stats()["coherence"]
    assert (counted["gap_reasons"], counted["epochs"]) == ({}, 1)


# A second process of the same name


@pytest.mark.timeout(180)
async def test_a_half_open_consumer_still_holds_messages_while_another_process_takes_its_name(
    work: Work,
    redis: Redis,
    rabbitmq: RabbitMQ,
    namespace: str,
    clients: Clients,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shared: dict[str, Any] = {"cache_url": redis.url, "instance_id": "one"}
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        first = await work.reader("first", broker_url=through(proxy, rabbitmq.url), **shared)
        writer = await work.writer()
        async with work.writing(writer):
            await eventually(lambda: first.client.watermark_age is not None, EVENTUAL)
            work.history.fault("half-open, with messages in hand")
            first.free.clear()
            proxy.swallow()
            done = writer.done
            await eventually(lambda: writer.done > done + 10, EVENTUAL)

            second = await clients(**work.settings | shared)
            await eventually(lambda: second.status()["broker"]["consumer"] == "standby", EVENTUAL)
            assert not second.ready
            assert "standing by: another process consumes this queue" in caplog.text
            # It answers by loading; of what the first one left behind in Redis it serves nothing that it cannot prove.
            work.observe("second", second)
            await work.sees("second", "bypass", now())
            assert not second.ready

            work.history.fault("the first one is gone")
            first.free.set()
            proxy.cut()  # and the broker gets its messages back, in front of those that came after
            await second.wait_ready(EVENTUAL)
            await work.sees("second", "hit", now())
            await first.client.__aexit__(None, None, None)
        await work.check("second")
        assert second.status()["broker"]["sessions"] == 1
