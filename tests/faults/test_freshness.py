"""With `max_staleness` set, no hit is staler than that, whatever is frozen, blocked or cut off."""

import asyncio
import itertools
import signal

import asyncpg
import pytest
from actors import DELTA, Writer
from history import now
from proxy import Direction, Proxy
from scene import EVENTUAL, Eventually, through
from workload import Work, Working

from cacheinval.sandbox import RabbitMQ

pytest_plugins = ("scene", "workload")

DB = asyncpg.Connection
LONG = 2.5 * DELTA  # seconds that a fault lasts
GRACE = 0.25  # seconds for which the relay leaves a row to the client that has written it


@pytest.fixture
def work(working: Working, stock: DB, rabbitmq: RabbitMQ, database_url: str) -> Work:
    return working(stock, broker_url=rabbitmq.url, database_url=database_url)


@pytest.mark.timeout(180)
async def test_a_process_is_stopped_another_one_is_blocked(work: Work, eventually: Eventually) -> None:
    await work.relay()
    stopped, blocked = await asyncio.gather(work.process("stopped"), work.process("blocked", blocked=LONG))
    untroubled = await work.reader("untroubled")
    # Who writes as well has evicted at home when a write returns, and does so no second time.
    at_home = Writer("untroubled", untroubled.client, work.history)
    async with work.writing(await work.writer(), at_home):
        for name in work.instances:
            await work.sees(name, "hit", now())
        began = work.history.fault("SIGSTOP, and a blocked loop")
        stopped.signal(signal.SIGSTOP)
        blocked.signal(signal.SIGUSR1)
        await asyncio.sleep(LONG)
        ended = work.history.fault("SIGCONT")
        stopped.signal(signal.SIGCONT)
        for name in work.instances:
            await work.sees(name, "hit", ended)
    # They were really away, and what they gave then is checked below.
    for name in ("stopped", "blocked"):
        times = [read.begun for read in work.reads(name, began - 1)]
        assert max(later - earlier for earlier, later in itertools.pairwise(times)) > DELTA
    checked = await work.check()
    assert checked.ticks > 0
    assert untroubled.client.stats()["coherence"]["skipped_echoes"] > 0


@pytest.mark.timeout(180)
@pytest.mark.parametrize("direction", ["both", "request", "reply"])
async def test_a_half_open_connection(
    direction: Direction, work: Work, rabbitmq: RabbitMQ, eventually: Eventually
) -> None:
    await work.relay()
    await work.reader("untroubled")
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        # With few messages in hand it also goes deaf when nobody gets its acknowledgements.
        await work.reader("deaf", broker_url=through(proxy, rabbitmq.url), prefetch=10)
        async with work.writing(await work.writer()):
            await work.sees("deaf", "hit", now())
            epoch = work.says("deaf").epoch
            began = work.history.fault(f"{direction} swallowed")
            proxy.swallow(direction)
            # By its own age an entry is a hit for DELTA; then each is loaded again, though nobody said that it is stale.
            await work.sees("deaf", "bypass", began)
            await eventually(lambda: not work.says("deaf").ready, EVENTUAL)
            assert work.says("deaf").reason
            await asyncio.sleep(LONG)
            ended = work.history.fault("passed again")
            proxy.pass_()
            await eventually(lambda: work.says("deaf").ready, EVENTUAL)
            assert work.says("deaf").epoch > epoch
            await work.sees("deaf", "hit", ended)
        await work.check()


@pytest.mark.timeout(180)
async def test_a_writer_whose_way_to_the_broker_is_slow(
    work: Work, rabbitmq: RabbitMQ, eventually: Eventually
) -> None:
    """Ticks have to wait for what it has committed, and neither it nor the relay has told anybody yet."""
    await work.relay()
    reader = await work.reader("reader")
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        writer = await work.writer(broker_url=through(proxy, rabbitmq.url))
        assert await writer.write("k0")
        assert await writer.client.publisher.flush(EVENTUAL)
        work.history.fault("slow")
        proxy.delay(GRACE / 2)
        async with work.writing(writer, ways=("transaction", "statement")):
            heard = reader.client.stats()["coherence"]["ticks"]
            await eventually(lambda: reader.client.stats()["coherence"]["ticks"] > heard + 15, EVENTUAL)
        await work.check()
