"""Who relays the outbox is killed, or frozen: somebody else goes on."""

import signal
import time
from typing import Any

import asyncpg
import pytest
from history import from_wall
from scene import (
    EVENTUAL,
    OUTBOX,
    Clients,
    Eventually,
    Program,
    Programs,
    has_price,
    price,
)
from workload import Working

from cacheinval.sandbox import RabbitMQ

pytest_plugins = ("scene", "workload")

DB = asyncpg.Connection


@pytest.mark.timeout(120)
async def test_the_leading_relay_is_killed_and_the_next_one_frozen(
    rabbitmq: RabbitMQ,
    database_url: str,
    namespace: str,
    db: DB,
    clients: Clients,
    programs: Programs,
    eventually: Eventually,
) -> None:
    settings: dict[str, Any] = {
        "broker_url": rabbitmq.url,
        "database_url": database_url,
        "tick_interval": 0.2,
    }
    reader = await clients(**settings)
    await reader.wait_ready(EVENTUAL)
    relays = [programs("-m", "cacheinval", "relay", **settings) for _ in range(2)]
    for relay in relays:
        await eventually(relay.ready, EVENTUAL)

    async def change_is_relayed(value: int) -> None:
        assert (await price(reader, "a")).value == value - 1
        assert (await price(reader, "a")).outcome == "hit"
        async with db.transaction():
            await db.execute("UPDATE prices SET price = $1", value)
            await db.execute("SELECT cacheinval.invalidate('{a}', namespace => $1)", namespace)
        await eventually(lambda: has_price(reader, "a", value), EVENTUAL)
        await eventually(lambda: db.fetchval(f"SELECT ({OUTBOX}) = 0"))

    leader, standby = relays if await leads(relays[0]) else reversed(relays)
    assert not await leads(standby)
    await change_is_relayed(2)

    await leader.kill()
    await change_is_relayed(3)
    assert await leads(standby)

    third = await clients(**settings, relay="auto", subscribe=False)
    assert third.relay is not None
    await eventually(lambda: third.relay.state["state"] == "standby")
    standby.signal(signal.SIGSTOP)  # its connection, and with it the lock, is still there
    await change_is_relayed(4)
    assert third.relay.leads

    standby.signal(signal.SIGCONT)
    await eventually(lambda: relay_is(standby, "standby"), EVENTUAL)
    await change_is_relayed(5)
    assert third.relay.leads


INTERVAL = 1.0


@pytest.mark.timeout(180)
async def test_ticks_go_on_and_stay_true_when_the_leader_is_killed_or_frozen_and_wakes(
    rabbitmq: RabbitMQ,
    database_url: str,
    stock: DB,
    programs: Programs,
    working: Working,
    eventually: Eventually,
) -> None:
    servers: dict[str, Any] = {"broker_url": rabbitmq.url, "database_url": database_url}
    work = working(stock, **servers, tick_interval=INTERVAL, max_staleness=3 * INTERVAL)
    relays = {
        name: programs("-m", "cacheinval", "relay", **servers, tick_interval=INTERVAL) for name in "abc"
    }
    for relay in relays.values():
        await eventually(relay.ready, EVENTUAL)

    async def leader() -> str:
        async def leading() -> list[str]:
            return [name for name, relay in relays.items() if await leads(relay)]

        (name,) = await eventually(leading, EVENTUAL)
        return name

    async def somebody_takes_over(since: float) -> None:
        name = await leader()
        took = (await relays[name].status())["relay"]["since"] - since
        assert took < 20 * INTERVAL  # 2.5, where nothing is in the way, and else not before TCP gives up
        seen = from_wall(since) + took
        await eventually(lambda: work.history.ticks[-1].as_of > seen, EVENTUAL)

    reader = await work.reader("reader")
    async with work.writing(
        await work.writer(), ways=("sql", "transaction")
    ):  # a relay always has something in hand
        await eventually(lambda: reader.client.watermark_age is not None, EVENTUAL)
        gaps = reader.client.stats()["coherence"]["gaps"]
        dead = relays.pop(await leader())
        began = time.time()
        work.history.fault("leader killed")
        await dead.kill()
        await somebody_takes_over(began)

        frozen = await leader()
        zombie = relays.pop(frozen)
        began = time.time()
        work.history.fault("leader stopped")
        zombie.signal(signal.SIGSTOP)
        await somebody_takes_over(began)
        work.history.fault("leader continued")
        zombie.signal(signal.SIGCONT)
        await eventually(lambda: relay_is(zombie, "standby"), EVENTUAL)
    checked = await work.check()
    assert checked.ticks > 3
    assert reader.client.stats()["coherence"]["gaps"] == gaps
    assert reader.client.stats()["coherence"]["epochs"] == 1


async def leads(relay: Program) -> bool:
    return await relay_is(relay, "leader")


async def relay_is(relay: Program, state: str) -> bool:
    return bool((await relay.status())["relay"]["state"] == state)
