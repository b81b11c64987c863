"""What the soak does to the broker, the network, processes and the database: each fault begins, lasts, and ends."""

import asyncio
import json
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import asyncpg
from actors import WRITE, Writer, make_stock
from aio_pika import ExchangeType, Message
from history import Write, now
from proxy import Direction, Proxy
from scene import Program, operating
from workload import Work

from cacheinval.errors import SandboxError
from cacheinval.sandbox import Sandbox

NAMESPACE = "soak"
KEYS = tuple(f"k{number}" for number in range(24))
BLOCKED = 10.0


@dataclass
class Stage:
    """The servers, the ways to them, and who is at work."""

    sandbox: Sandbox
    work: Work
    to_broker: Proxy
    to_database: Proxy
    writers: list[Writer]
    relays: list[Program]
    start_relay: Callable[[], Program]
    chance: random.Random

    async def operate(self, *command: str) -> None:
        with suppress(SandboxError):  # the queue that was named may be gone by now
            await self.sandbox.rabbitmq.ctl(*command)

    def queue_of(self, name: str) -> str:
        return str(self.work.instances[name].client.status()["broker"]["queue"])


Breaks = Callable[[Stage], Awaitable[None]]

# The broker, and the way to it


async def half_open(stage: Stage) -> None:
    """A connection over which nothing comes any more."""
    direction: Direction = stage.chance.choice(["both", "request", "reply"])
    stage.work.history.fault(f"swallowing: {direction}")
    stage.to_broker.swallow(direction)
    await asyncio.sleep(30)
    stage.to_broker.pass_()


async def cut(stage: Stage) -> None:
    """A connection that is reset again and again."""
    for _ in range(20):
        stage.to_broker.cut_open()
        await asyncio.sleep(stage.chance.uniform(0, 2))


async def slow(stage: Stage) -> None:
    """A network that takes its time."""
    stage.to_broker.delay(0.7)
    await asyncio.sleep(20)
    stage.to_broker.pass_()


async def broker_stopped(stage: Stage) -> None:
    """No broker for a minute."""
    await stage.sandbox.rabbitmq.stop()
    await asyncio.sleep(60)
    await stage.sandbox.rabbitmq.start()


async def broker_killed(stage: Stage) -> None:
    """A broker that dies and comes back at once."""
    await stage.sandbox.rabbitmq.kill()
    await stage.sandbox.rabbitmq.start()


async def broker_frozen(stage: Stage) -> None:
    """A broker that answers nobody."""
    stage.sandbox.rabbitmq.pause()
    await asyncio.sleep(25)
    stage.sandbox.rabbitmq.resume()


async def memory_alarm(stage: Stage) -> None:
    """A broker that takes no messages."""
    await stage.operate("set_vm_memory_high_watermark", "0.0000001")
    await asyncio.sleep(40)
    await stage.operate("set_vm_memory_high_watermark", "0.4")


async def disk_alarm(stage: Stage) -> None:
    """The same, for another reason."""
    await stage.operate("set_disk_free_limit", "1000000GB")
    await asyncio.sleep(40)
    await stage.operate("set_disk_free_limit", "50MB")


async def queues_purged(stage: Stage) -> None:
    """An operator who empties queues."""
    for _ in range(8):
        name = stage.chance.choice(["direct", "behind", "redis"])
        held = stage.work.instances[name]
        held.free.clear()
        await asyncio.sleep(1)  # what is written meanwhile waits in its queue, or in its hands
        await stage.operate("purge_queue", stage.queue_of(name))
        held.free.set()
        await asyncio.sleep(stage.chance.uniform(0, 4))


async def queues_deleted(stage: Stage) -> None:
    """An operator who deletes queues."""
    for _ in range(4):
        await stage.operate(
            "delete_queue", stage.queue_of(stage.chance.choice(["direct", "behind", "redis"]))
        )
        await asyncio.sleep(stage.chance.uniform(0, 6))


async def exchange_deleted(stage: Stage) -> None:
    """An operator who deletes the exchange, and may declare it again."""
    for again in (False, True):
        async with operating(stage.sandbox.rabbitmq.url) as operator:
            await operator.exchange_delete(f"cacheinval.{NAMESPACE}")
            if again:
                await operator.declare_exchange(f"cacheinval.{NAMESPACE}", ExchangeType.FANOUT, durable=True)
        await asyncio.sleep(15)


async def nonsense(stage: Stage) -> None:
    """Messages that nobody understands, and some that mean nothing."""
    async with operating(stage.sandbox.rabbitmq.url) as operator:
        for number in range(20):
            exchange = await operator.get_exchange(f"cacheinval.{NAMESPACE}")
            strange = stage.chance.choice(
                [b"", b"{", b'{"v": 2, "kind": "invalidate"}', b'{"v": 1, "kind": "x"}']
            )
            await exchange.publish(Message(strange), routing_key="")
            forged = {"v": 1, "kind": "invalidate", "keys": [stage.chance.choice(KEYS)], "at": number}
            await exchange.publish(Message(json.dumps(forged).encode()), routing_key="")
            await asyncio.sleep(0.5)


# Processes


async def stopped(stage: Stage) -> None:
    """A process that is stopped for a minute."""
    program = stage.work.instances["one process"]
    program.signal(signal.SIGSTOP)
    await asyncio.sleep(60)
    program.signal(signal.SIGCONT)


async def blocked(stage: Stage) -> None:
    """An event loop that is blocked for ten seconds, twice."""
    for _ in range(2):
        stage.work.instances["another process"].signal(signal.SIGUSR1)
        await asyncio.sleep(1.5 * BLOCKED)


async def relay_killed(stage: Stage) -> None:
    """Relays that die, the leader among them, and are replaced."""
    for _ in range(len(stage.relays)):
        dead = stage.relays.pop(0)
        await dead.kill()
        await asyncio.sleep(stage.chance.uniform(0, 5))
        stage.relays.append(stage.start_relay())


async def relay_stopped(stage: Stage) -> None:
    """Relays that are frozen one after the other, and wake as zombies."""
    for zombie in list(stage.relays):
        zombie.signal(signal.SIGSTOP)
        await asyncio.sleep(15)
        zombie.signal(signal.SIGCONT)


# The database


async def database_killed(stage: Stage) -> None:
    """A database that dies, and comes back some seconds later."""
    await stage.sandbox.postgres.kill()
    await asyncio.sleep(stage.chance.uniform(0, 15))
    await stage.sandbox.postgres.start()


async def database_frozen(stage: Stage) -> None:
    """A database that answers nobody."""
    stage.sandbox.postgres.pause()
    await asyncio.sleep(20)
    stage.sandbox.postgres.resume()


async def replies_cut(stage: Stage) -> None:
    """Replies to COMMIT that are lost."""
    for _ in range(15):
        stage.to_database.cut_reply_after(b"COMMIT")
        await asyncio.sleep(stage.chance.uniform(0, 2))


async def replies_swallowed(stage: Stage) -> None:
    """A connection to the database that is half open."""
    stage.to_database.swallow("reply")
    await asyncio.sleep(15)
    stage.to_database.pass_()


async def pool_exhausted(stage: Stage) -> None:
    """Somebody who takes all connections of a writer."""
    pool = stage.writers[0].client.pool
    async with AsyncExitStack() as stack:
        with suppress(TimeoutError):
            for _ in range(pool.get_max_size()):
                await stack.enter_async_context(pool.acquire(timeout=10))
        await asyncio.sleep(15)


async def long_transaction(stage: Stage) -> None:
    """A transaction that has the oldest row of the outbox, and takes its time."""
    key = "slowly"
    connection = await asyncpg.connect(stage.sandbox.postgres.url, timeout=30)
    try:
        await make_stock(connection, [key])
        write = Write(key, now())
        async with connection.transaction():
            await connection.execute(
                "SELECT cacheinval.invalidate(ARRAY[$1], namespace => $2)", key, NAMESPACE
            )
            write.version = await connection.fetchval(WRITE, key)
            await asyncio.sleep(30)
        write.acknowledged = now()
        stage.work.history.note(write)
    finally:
        connection.terminate()


FAULTS: dict[str, tuple[Breaks, ...]] = {
    "the broker": (
        half_open,
        cut,
        slow,
        broker_stopped,
        broker_killed,
        broker_frozen,
        memory_alarm,
        disk_alarm,
        queues_purged,
        queues_deleted,
        exchange_deleted,
        nonsense,
    ),
    "processes": (stopped, blocked, relay_killed, relay_stopped),
    "the database": (
        database_killed,
        database_frozen,
        replies_cut,
        replies_swallowed,
        pool_exhausted,
        long_transaction,
    ),
}
