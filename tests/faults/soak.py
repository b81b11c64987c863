"""Random faults of full length under load, round after round, with one history that is checked after each.

    PYTHONPATH=tests python tests/faults/soak.py --minutes 10 [--seed 7]

The servers are private ones. One line is printed each minute, and one for each round; where a promise is broken the
history is kept, its path is printed, and the exit code is 1.
"""

import argparse
import asyncio
import json
import logging
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from actors import WRITE, Writer, make_stock
from aio_pika import ExchangeType, Message
from history import Checked, Write, now
from proxy import Direction, Proxy
from scene import Program, operating, through
from waiting import until
from workload import Work

from cacheinval import Client, Settings
from cacheinval.errors import SandboxError
from cacheinval.processes import Guard
from cacheinval.sandbox import Sandbox

NAMESPACE = "soak"
DELTA = 5.0
SETTINGS: dict[str, Any] = {
    "namespace": NAMESPACE,
    "max_staleness": DELTA,
    "tick_interval": 1,
    "max_clock_skew": 0.1,
    "cache_ttl": 3600,
}
KEYS = tuple(f"k{number}" for number in range(24))
QUIET = 120.0  # seconds within which everything has recovered from whatever it was
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
    programs: Callable[..., Program]
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
        stage.relays.append(relay(stage.programs, stage.sandbox))


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
    connection = await asyncpg.connect(stage.sandbox.postgres.url, timeout=10)
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


# The load


def relay(programs: Callable[..., Program], sandbox: Sandbox) -> Program:
    return programs(
        "-m",
        "cacheinval",
        "relay",
        **{**SETTINGS, "broker_url": sandbox.rabbitmq.url, "database_url": sandbox.postgres.url},
    )


@asynccontextmanager
async def on_stage(folder: Path, chance: random.Random) -> AsyncIterator[Stage]:
    """Servers, readers in this process and in others, writers and relays, all ready."""
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(Sandbox(("rabbitmq", "postgres", "redis")))
        guard = Guard(None)
        stack.callback(guard.close)
        started: list[Program] = []

        def programs(*arguments: str, **settings: Any) -> Program:
            program = Program(arguments, folder / f"{len(started)}.log", settings)
            started.append(program)
            guard.watch(program.pid)
            stack.push_async_callback(program.close)
            return program

        async def clients(*, subscribe: bool = True, **settings: Any) -> Client:
            settings = {"relay": "off", **settings}
            return await stack.enter_async_context(Client(Settings(**settings), subscribe=subscribe))

        truth = await asyncpg.connect(sandbox.postgres.url, timeout=10, command_timeout=30)
        await make_stock(truth, KEYS)
        servers = {"broker_url": sandbox.rabbitmq.url, "database_url": sandbox.postgres.url}
        to_broker = await stack.enter_async_context(Proxy("127.0.0.1", sandbox.rabbitmq.port))
        to_database = await stack.enter_async_context(Proxy("127.0.0.1", sandbox.postgres.port))
        work = Work(clients, programs, folder, truth, {**SETTINGS, **servers}, KEYS)
        relays = [relay(programs, sandbox) for _ in range(2)]
        await work.reader("direct")
        await work.reader("behind", broker_url=through(to_broker, sandbox.rabbitmq.url), prefetch=50)
        await work.reader("redis", cache_url=sandbox.redis.url, instance_id="redis")
        await work.process("one process")
        await work.process("another process", blocked=BLOCKED)
        writers = [
            await work.writer("writer", database_url=through(to_database, sandbox.postgres.url)),
            await work.writer("another writer", broker_url=through(to_broker, sandbox.rabbitmq.url)),
        ]
        stack.push_async_callback(work.close)
        yield Stage(sandbox, work, to_broker, to_database, writers, relays, programs, chance)


async def play(stage: Stage) -> tuple[str, Checked]:
    """One round: faults of one to three kinds at once, the rest of the time nothing, then the check."""
    kinds = stage.chance.sample(sorted(FAULTS), stage.chance.choice([1, 1, 2, 2, 3]))
    faults = [stage.chance.choice(FAULTS[kind]) for kind in kinds]
    names = ", ".join(fault.__name__ for fault in faults)
    async with stage.work.writing(*stage.writers):
        await asyncio.sleep(stage.chance.uniform(1, 5))
        stage.work.history.fault(f"begun: {names}")
        await asyncio.gather(*(fault(stage) for fault in faults))
        stage.work.history.fault("over")
        await asyncio.sleep(stage.chance.uniform(1, 5))

    async def look() -> bool:  # through a connection that has not been broken
        with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            stage.work.truth.terminate()
            stage.work.truth = await asyncpg.connect(
                stage.sandbox.postgres.url, timeout=10, command_timeout=30
            )
            return bool(await stage.work.truth.fetchval("SELECT true"))
        return False

    await until(look, QUIET)
    return names, await stage.work.check(timeout=QUIET)


async def soak(minutes: float, seed: int, folder: Path) -> int:
    """Rounds until the time is over; the exit code."""
    began = time.monotonic()
    total = Checked()
    rounds = 0

    def say(text: str) -> None:
        print(f"{(time.monotonic() - began) / 60:5.1f} min  {text}", flush=True)

    async with on_stage(folder, random.Random(seed)) as stage:

        async def say_how_it_is() -> None:
            while True:
                await asyncio.sleep(60)
                done = sum(writer.done for writer in stage.writers)
                failed = sum(writer.failed for writer in stage.writers)
                history = stage.work.history
                say(
                    f"round {rounds + 1}: {total.reads + len(history.reads)} reads, {done} writes and {failed} of "
                    f"unknown outcome, {total.ticks + len(history.ticks)} ticks, no promise broken so far; "
                    f"last fault {history.faults[-1].what if history.faults else 'none'}"
                )

        telling = asyncio.create_task(say_how_it_is())
        try:
            while time.monotonic() - began < 60 * minutes:
                names, checked = await play(stage)
                rounds += 1
                for name in (
                    "reads",
                    "hits",
                    "writes",
                    "unknown_writes",
                    "evictions",
                    "ticks",
                    "settled_hits",
                ):
                    setattr(total, name, getattr(total, name) + getattr(checked, name))
                say(
                    f"round {rounds} held: {names} ({checked.reads} reads, {checked.hits} hits, {checked.writes} writes)"
                )
                assert stage.work.settled is not None
                stage.work.history.forget(stage.work.settled)
        except (Exception, pytest.fail.Exception) as error:
            say(f"FAILED in round {rounds + 1}: {error}")
            for name in stage.work.instances:
                say(f"{name}: {stage.work.state(name)}")
            return 1
        finally:
            telling.cancel()
    say(f"{rounds} rounds held: {total}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=f"cacheinval-soak-{options.seed}-"))
    logging.basicConfig(
        filename=folder / "soak.log",
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    print(f"seed {options.seed}; logs in {folder}", flush=True)
    code = asyncio.run(soak(options.minutes, options.seed, folder))
    if code:
        print(f"seed {options.seed}; history and logs in {folder}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
