"""One stream for all instances, while the way to it, the broker and the stream itself are broken; held against the promise."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from actors import Observed
from aio_pika import Message
from history import now
from proxy import Proxy
from scene import EVENTUAL, Eventually, operating, through
from workload import Work, Working

from cacheinval.bus import streaming
from cacheinval.messages import Invalidate, encode
from cacheinval.sandbox import RabbitMQ

pytest_plugins = ("scene", "workload")

DB = asyncpg.Connection
GOES_ON_ELSEWHERE = "the stream does not go on where it was left"


def epoch(observed: Observed) -> int:
    return int(observed.client.status()["cache"]["epoch"])


def gaps(observed: Observed) -> dict[str, int]:
    return dict(observed.client.stats()["coherence"]["gap_reasons"])


class Stage:
    """Two who read the stream, one of them through a proxy, and one with a queue of its own; a relay, and who writes."""

    def __init__(self, work: Work, broker: RabbitMQ, proxy: Proxy, eventually: Eventually) -> None:
        self.work = work
        self.broker = broker
        self.proxy = proxy
        self.namespace = str(work.settings["namespace"])
        self.stream = f"cacheinval.{self.namespace}.stream"
        self.eventually = eventually
        self.near: Observed
        self.far: Observed

    async def open(self) -> None:
        await self.work.relay()
        self.near = await self.work.reader("near")
        self.far = await self.work.reader("far", broker_url=through(self.proxy, self.broker.url))
        await self.work.reader("with a queue", bus="fanout")
        for one in (self.near, self.far):
            await self.eventually(lambda one=one: one.client.instance.position is not None, EVENTUAL)


async def cut(stage: Stage) -> None:
    """Cut again and again: nobody clears anything, since nothing was missed."""
    before = epoch(stage.far)
    for _ in range(3):
        stage.proxy.cut_open()
        await stage.eventually(lambda: stage.far.client.state == "suspect", EVENTUAL)
        await stage.far.client.wait_ready(EVENTUAL)
        await asyncio.sleep(random.uniform(0, 0.3))
    assert (epoch(stage.far), gaps(stage.far)) == (before, {})


async def killed(stage: Stage) -> None:
    """The broker dies and comes back, with the stream: everybody reads on, and clears for what it has lost, if anything.

    What it was given while it fell, or before the stream was up again, may not be in it. Numbers tell.
    """
    await asyncio.sleep(3)  # the first stream of a broker that is killed at once may never come back
    before = epoch(stage.near), epoch(stage.far)
    await stage.broker.kill()
    await stage.broker.start()
    for one in (stage.near, stage.far):
        await one.client.wait_ready(EVENTUAL)
    for one, was in zip((stage.near, stage.far), before, strict=True):
        assert epoch(one) == was or gaps(one).keys() == {"missing messages"}, gaps(one)


async def deleted(stage: Stage) -> None:
    """Somebody deletes the stream, twice: everybody begins anew."""
    for _ in range(2):
        before = epoch(stage.near), epoch(stage.far)
        async with operating(stage.broker.url) as operator:
            await operator.queue_delete(stage.stream)
        for one, was in zip((stage.near, stage.far), before, strict=True):
            await stage.eventually(lambda one=one, was=was: epoch(one) > was, EVENTUAL)
            await one.client.wait_ready(EVENTUAL)


async def long_away(stage: Stage) -> None:
    """When it comes back, the stream holds nothing any more of what was published meanwhile."""
    stage.proxy.cut()
    await stage.eventually(lambda: stage.far.client.state == "suspect", EVENTUAL)
    padding = encode(Invalidate(v=1, keys=[f"{number}-" + "x" * 400 for number in range(10)]))
    async with operating(stage.broker.url) as operator:
        exchange = await operator.get_exchange(f"cacheinval.{stage.namespace}")
        for _ in range(12):
            await asyncio.gather(*(exchange.publish(Message(padding), routing_key="") for _ in range(10)))
    stage.proxy.pass_()
    await stage.far.client.wait_ready(EVENTUAL)
    assert gaps(stage.far).get(GOES_ON_ELSEWHERE) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("breaks", [cut, killed, deleted, long_away], ids=lambda breaks: breaks.__name__)
async def test_nobody_keeps_what_was_replaced(
    breaks: Callable[[Stage], Awaitable[None]],
    request: pytest.FixtureRequest,
    database_url: str,
    namespace: str,
    stock: DB,
    working: Working,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if breaks is long_away:
        for name, value in {
            "x-max-length-bytes": 60_000,
            "x-stream-max-segment-size-bytes": 20_000,
        }.items():
            monkeypatch.setitem(streaming.STREAM, name, value)
    if breaks in (cut, killed):
        # Which tells of a stream that is not the same; a broker that is busy may take longer to deliver.
        monkeypatch.setattr(streaming, "FOUND_WITHIN", EVENTUAL)
    broker: RabbitMQ = request.getfixturevalue("own_rabbitmq" if breaks is killed else "rabbitmq")
    settings: dict[str, Any] = {"broker_url": broker.url, "database_url": database_url}
    async with Proxy("127.0.0.1", broker.port) as proxy:
        work = working(stock, bus="stream", namespace=namespace, **settings)
        stage = Stage(work, broker, proxy, eventually)
        await stage.open()
        writers = [await work.writer(f"writer {number}") for number in range(2)]
        async with work.writing(*writers):
            await work.sees("far", "hit", now())
            await breaks(stage)
            await asyncio.sleep(0.5)
        await work.check()
        if broker.running:
            async with operating(broker.url) as operator:
                await operator.queue_delete(stage.stream)
