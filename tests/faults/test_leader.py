"""Who relays the outbox is killed, or frozen: somebody else goes on."""

import signal
from typing import Any

import asyncpg
import pytest
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

from cacheinval.sandbox import RabbitMQ

pytest_plugins = ("scene",)

DB = asyncpg.Connection


@pytest.mark.timeout(60)
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


async def leads(relay: Program) -> bool:
    return await relay_is(relay, "leader")


async def relay_is(relay: Program, state: str) -> bool:
    return bool((await relay.status())["relay"]["state"] == state)
