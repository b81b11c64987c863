"""The broker dies, freezes, or refuses messages: writes go on, and nobody keeps an old value."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from actors import DELTA, UNLUCKY, make_stock
from history import now
from proxy import Proxy
from scene import (
    EVENTUAL,
    OUTBOX,
    SET_PRICE,
    Clients,
    Eventually,
    Program,
    Programs,
    has_price,
    price,
    through,
)
from workload import Working

from cacheinval import Client
from cacheinval.sandbox import RabbitMQ

pytest_plugins = ("scene", "workload")

DB = asyncpg.Connection

PRODUCTS = [f"p{number}" for number in range(20)]
PUBLISH_TIMEOUT = 3.0


@pytest.mark.timeout(240)
async def test_the_broker_is_killed_and_restarted_during_a_thousand_updates(
    own_rabbitmq: RabbitMQ,
    database_url: str,
    db: DB,
    clients: Clients,
    programs: Programs,
    eventually: Eventually,
) -> None:
    async with Proxy("127.0.0.1", own_rabbitmq.port) as proxy:
        settings: dict[str, Any] = {
            "broker_url": own_rabbitmq.url,
            "database_url": database_url,
            "publish_timeout": EVENTUAL,
        }
        services = [programs("-m", "cacheinval", "serve", **settings) for _ in range(2)]
        here = await clients(**settings)
        late = await clients(**settings | {"broker_url": through(proxy, own_rabbitmq.url)})
        for service in services:
            await eventually(service.ready, EVENTUAL)
        for client in (here, late):
            await client.wait_ready(EVENTUAL)
        instances = [*map(_over_http, services), _embedded(here), _embedded(late)]
        writer = Writer(here)
        for product in [*PRODUCTS, "marker"]:
            await writer.write(product)

        readers = asyncio.gather(*map(_keep_reading, instances[:-1]))
        await writer.write_many(300)
        for product in PRODUCTS:
            await instances[-1](product)
        await own_rabbitmq.kill()
        proxy.cut()
        await writer.write_many(400)
        assert await db.fetchval(OUTBOX) > 300  # nobody else knows what was written meanwhile
        starting = asyncio.create_task(own_rabbitmq.start())
        await writer.write_many(300)
        await starting
        await eventually(lambda: db.fetchval(f"SELECT ({OUTBOX}) = 0"), EVENTUAL)
        for service in services:
            await eventually(service.ready, EVENTUAL)
        await here.wait_ready(EVENTUAL)
        assert late.state == "suspect"
        proxy.pass_()  # this one was not there when the others were told
        await late.wait_ready(EVENTUAL)
        readers.cancel()
        with suppress(asyncio.CancelledError):
            await readers

        # Everything is confirmed. Who evicts what is published from now on has evicted all of it.
        for instance in instances:
            await instance("marker")
            assert await instance("marker") == (writer.last["marker"], True)
        await writer.write("marker")
        for instance in instances:
            await eventually(lambda instance=instance: _gives(instance, "marker", writer.last["marker"]))
        assert {row["id"]: row["price"] for row in await db.fetch("SELECT * FROM products")} == writer.last
        for instance in instances:
            assert {product: (await instance(product))[0] for product in PRODUCTS} == writer.last_of(PRODUCTS)
            assert [(await instance(product))[1] for product in PRODUCTS] == [True] * len(PRODUCTS)
        assert writer.count == 1000 + len(PRODUCTS) + 2
        assert writer.slowest < here.settings.publish_timeout


Instance = Callable[[str], Awaitable[tuple[Decimal, bool]]]
"""Reads a product: its price, and whether it came from the cache."""


def _over_http(service: Program) -> Instance:
    async def read(product: str) -> tuple[Decimal, bool]:
        answer = await service.request("GET", f"/products/{product}")
        assert answer is not None, "no answer"
        return Decimal(answer.json()["price"]), answer.headers["cache-status"] == "cacheinval; hit"

    return read


def _embedded(client: Client) -> Instance:
    async def read(product: str) -> tuple[Decimal, bool]:
        query = "SELECT price FROM products WHERE id = $1"
        found = await client.cache.read(f"product:{product}", lambda: client.pool.fetchval(query, product))
        return found.value, found.outcome == "hit"

    return read


async def _keep_reading(instance: Instance) -> None:
    while True:
        await instance(random.choice(PRODUCTS))
        await asyncio.sleep(0.005)


async def _gives(instance: Instance, product: str, price: Decimal) -> bool:
    return (await instance(product))[0] == price


class Writer:
    """Changes prices, one after the other, and knows what they should be."""

    def __init__(self, client: Client) -> None:
        self.last: dict[str, Decimal] = {}
        self.count = 0
        self.slowest = 0.0
        self._client = client

    async def write(self, product: str) -> None:
        self.count += 1
        self.last[product] = Decimal(self.count)
        began = time.monotonic()
        await self._client.execute(
            "INSERT INTO products VALUES ($1, 'Tea', $2, 0) ON CONFLICT (id) DO UPDATE SET price = excluded.price",
            product,
            self.last[product],
            invalidate=[f"product:{product}"],
        )
        self.slowest = max(self.slowest, time.monotonic() - began)

    def last_of(self, products: list[str]) -> dict[str, Decimal]:
        return {product: self.last[product] for product in products}

    async def write_many(self, count: int) -> None:
        for number in range(count):
            await self.write(PRODUCTS[number % len(PRODUCTS)])


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", ["frozen", "alarm", "unreachable"])
async def test_writes_do_not_wait_for_the_broker(
    fault: str,
    own_rabbitmq: RabbitMQ,
    database_url: str,
    db: DB,
    clients: Clients,
    eventually: Eventually,
) -> None:
    async with Proxy("127.0.0.1", own_rabbitmq.port) as proxy:
        settings: dict[str, Any] = {
            "broker_url": own_rabbitmq.url,
            "database_url": database_url,
            "publish_timeout": PUBLISH_TIMEOUT,
        }
        reader = await clients(**settings)
        writer = await clients(**settings | {"broker_url": through(proxy, own_rabbitmq.url), "relay": "auto"})
        for client in (reader, writer):
            await client.wait_ready(EVENTUAL)
            assert (await price(client, "a")).value == 1
        await eventually(lambda: writer.relay is not None and writer.relay.leads)

        async def write(value: int) -> float:
            began = time.monotonic()
            await writer.execute(SET_PRICE, "a", value, invalidate=["a"])
            return time.monotonic() - began

        await write(2)
        await eventually(lambda: has_price(reader, "a", 2))
        await eventually(lambda: db.fetchval(f"SELECT ({OUTBOX}) = 0"))

        if fault == "frozen":
            own_rabbitmq.pause()
        elif fault == "alarm":
            await own_rabbitmq.ctl("set_vm_memory_high_watermark", "0.0000001")
        else:
            proxy.cut()
        took = [await write(value) for value in range(3, 103)]
        assert max(took) < PUBLISH_TIMEOUT
        assert await db.fetchval(OUTBOX) > 50
        assert (await price(writer, "a")).value == 102
        await eventually(lambda: writer.publisher.failing, EVENTUAL)
        took = [await write(value) for value in range(103, 203)]
        assert max(took) < PUBLISH_TIMEOUT
        assert await db.fetchval(OUTBOX) > 150
        await eventually(
            lambda: writer.relay is not None and writer.relay.state["state"] == "blocked", EVENTUAL
        )

        if fault == "frozen":
            own_rabbitmq.resume()
        elif fault == "alarm":
            await own_rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")
        else:
            proxy.pass_()
        await eventually(lambda: has_price(reader, "a", 202), EVENTUAL)
        await eventually(lambda: db.fetchval(f"SELECT ({OUTBOX}) = 0"), EVENTUAL)
        for client in (reader, writer):
            await client.wait_ready(EVENTUAL)

        async def publishes_again() -> (
            bool
        ):  # which it tries, some seconds after a failure, when it has something
            await write(203)
            return not writer.publisher.failing

        await eventually(publishes_again, EVENTUAL)
        await eventually(lambda: has_price(reader, "a", 203))


CROWD, HOT = 1_000, tuple(f"hot{number}" for number in range(100))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", ["killed", "memory alarm", "disk alarm"])
async def test_without_a_broker_hits_live_by_their_own_age_and_the_database_by_few_loads(
    fault: str,
    own_rabbitmq: RabbitMQ,
    database_url: str,
    stock: DB,
    working: Working,
    eventually: Eventually,
) -> None:
    await make_stock(stock, HOT)
    work = working(stock, keys=HOT, broker_url=own_rabbitmq.url, database_url=database_url)
    await work.relay()
    reader, writer = await work.reader("reader"), await work.writer()

    async def be_one_of_many() -> None:
        while True:
            with suppress(*UNLUCKY):
                await reader.read(random.choice(HOT))
            await asyncio.sleep(random.uniform(0.2, 0.6))

    async with work.writing(writer):
        await eventually(lambda: all(reader.loads.values()), EVENTUAL)
        crowd = [work.start(be_one_of_many()) for _ in range(CROWD)]
        work.history.fault(fault)
        await begin(fault, own_rabbitmq)
        said = "alarm" if fault.endswith("alarm") else ""
        await eventually(lambda: not reader.client.ready and said in reader.client.reason, EVENTUAL)
        await work.sees("reader", "bypass", now())
        away, written = now(), writer.done
        await asyncio.sleep(3 * DELTA)
        await eventually(lambda: writer.done > written + 20, EVENTUAL)
        back = work.history.fault("over")
        await end(fault, own_rabbitmq)
        await eventually(lambda: work.says("reader").ready, EVENTUAL)
        for one in crowd:
            one.cancel()
    # Who is loaded once by DELTA, whatever the number of readers, is loaded a hundred times by a hundred keys.
    # Counted, since a loader begins a little later than its load: by the clock two may be nearer than DELTA.
    for key, loads in reader.loads.items():
        outage = [at for at in loads if away < at < back]
        assert len(outage) <= (back - away) / DELTA + 1, (key, outage)
    await work.check()


async def begin(fault: str, broker: RabbitMQ) -> None:
    if fault == "killed":
        await broker.kill()
    elif fault == "memory alarm":
        await broker.ctl("set_vm_memory_high_watermark", "0.0000001")
    else:
        await broker.ctl("set_disk_free_limit", "1000000GB")


async def end(fault: str, broker: RabbitMQ) -> None:
    if fault == "killed":
        await broker.start()
    elif fault == "memory alarm":
        await broker.ctl("set_vm_memory_high_watermark", "0.4")
    else:
        await broker.ctl("set_disk_free_limit", "50MB")
