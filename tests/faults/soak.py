"""Random faults of full length under load, round after round, with one history that is checked after each.

    PYTHONPATH=tests python tests/faults/soak.py --minutes 10 [--seed 7]

The servers are private ones. One line is printed each minute, and one for each round; where a promise is broken the
history is kept, its path is printed, and the exit code is 1.
"""

import argparse
import asyncio
import logging
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from actors import Writer, make_stock
from breaking import BLOCKED, FAULTS, KEYS, NAMESPACE, Breaks, Stage
from history import Checked
from proxy import Proxy
from scene import Program, through
from waiting import until
from workload import Work

from cacheinval import Client, Settings
from cacheinval.sandbox import Sandbox
from cacheinval.sandbox.processes import Guard

DELTA = 5.0
SETTINGS: dict[str, Any] = {
    "namespace": NAMESPACE,
    "max_staleness": DELTA,
    "tick_interval": 1,
    "max_clock_skew": 0.1,
    "cache_ttl": 3600,
}
QUIET = 120.0  # seconds within which everything has recovered from whatever it was


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

        truth = await asyncpg.connect(sandbox.postgres.url, timeout=30, command_timeout=30)
        await make_stock(truth, KEYS)
        servers = {"broker_url": sandbox.rabbitmq.url, "database_url": sandbox.postgres.url}
        to_broker = await stack.enter_async_context(Proxy("127.0.0.1", sandbox.rabbitmq.port))
        to_database = await stack.enter_async_context(Proxy("127.0.0.1", sandbox.postgres.port))
        work = Work(clients, programs, folder, truth, {**SETTINGS, **servers}, KEYS)

        def start_relay() -> Program:
            return programs("-m", "cacheinval", "relay", **SETTINGS, **servers)

        relays = [start_relay() for _ in range(2)]
        direct = await work.reader("direct")
        await work.reader("behind", broker_url=through(to_broker, sandbox.rabbitmq.url), prefetch=50)
        await work.reader("redis", cache_url=sandbox.redis.url, instance_id="redis")
        await work.process("one process")
        await work.process("another process", blocked=BLOCKED)
        writers = [
            await work.writer("writer", database_url=through(to_database, sandbox.postgres.url)),
            await work.writer("another writer", broker_url=through(to_broker, sandbox.rabbitmq.url)),
            Writer("direct", direct.client, work.history, KEYS),  # whose own messages come back to it
        ]
        stack.push_async_callback(work.close)
        yield Stage(sandbox, work, to_broker, to_database, writers, relays, start_relay, chance)


def draw(deck: list[Breaks], chance: random.Random) -> list[Breaks]:
    """Faults of one to three kinds; each comes once before any comes again."""
    kind_of = {fault: kind for kind, faults in FAULTS.items() for fault in faults}
    if not deck:
        deck += kind_of
        chance.shuffle(deck)
    drawn: dict[str, Breaks] = {}
    most = chance.choice([1, 1, 2, 2, 3])
    for fault in list(deck):
        if len(drawn) < most and kind_of[fault] not in drawn:
            drawn[kind_of[fault]] = fault
            deck.remove(fault)
    return list(drawn.values())


async def play(stage: Stage, faults: list[Breaks]) -> tuple[str, Checked]:
    """One round: faults at once, the rest of the time nothing, then the check."""
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
    deck: list[Breaks] = []
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
                names, checked = await play(stage, draw(deck, stage.chance))
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
