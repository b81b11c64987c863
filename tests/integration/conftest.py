"""Fixtures of the tests of buses on a real broker."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from buses import Buses, Subscribe
from recorder import Recorder

from cacheinval.bus import Bus
from cacheinval.bus.rabbitmq import RabbitBus
from cacheinval.sandbox import RabbitMQ
from cacheinval.settings import Settings


@pytest.fixture
async def buses(rabbitmq: RabbitMQ, namespace: str) -> AsyncIterator[Buses]:
    made: list[RabbitBus] = []

    def make(url: str | None = None, /, **settings: Any) -> RabbitBus:
        made.append(RabbitBus(Settings(broker_url=url or rabbitmq.url, namespace=namespace, **settings)))
        return made[-1]

    yield make
    for bus in made:
        await bus.close()


@pytest.fixture
async def subscribe(buses: Buses) -> AsyncIterator[Subscribe]:
    running: list[asyncio.Task[None]] = []

    def run(bus: Bus, receiver: Recorder) -> "asyncio.Task[None]":
        running.append(asyncio.create_task(bus.run(receiver)))
        return running[-1]

    yield run
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


@pytest.fixture
async def operator(rabbitmq: RabbitMQ, namespace: str) -> AsyncIterator[AbstractChannel]:
    """A channel of somebody else, who looks at queues and meddles; what all instances share is deleted in the end."""
    async with asyncio.timeout(55), await aio_pika.connect(rabbitmq.url) as connection:
        yield await connection.channel()
        async with connection.channel() as channel:
            await channel.queue_delete(f"cacheinval.{namespace}.stream")
            await channel.queue_delete(f"cacheinval.{namespace}.dead")
            await channel.exchange_delete(f"cacheinval.{namespace}")
            await channel.exchange_delete(f"cacheinval.{namespace}.dead")
