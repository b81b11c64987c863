"""What people put in the place of cacheinval: one key a message over a bus, and a dictionary in each instance.

Each is set up as its own documentation advises: a prefetch where there is one, an acknowledgement for each message, and a
connection of its own for each instance and for whoever publishes. None of them has an outbox, a number on its messages or
anything else that would notice a loss.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, Self

import aio_pika
import aiormq
import asyncpg
import pika
import redis.asyncio
from aiormq.abc import DeliveredMessage
from faststream.rabbit import Channel, ExchangeType, RabbitBroker, RabbitExchange, RabbitQueue
from pamqp.commands import Basic
from pika.adapters.asyncio_connection import AsyncioConnection

from .bare import BareConnection
from .servers import Urls

__all__ = ["CALLERS", "FLOOR", "PEERS", "Peer"]

logging.getLogger("pika").setLevel(logging.CRITICAL)

EXCHANGE = "benchmark"
PREFETCH = 100
CALLERS = 500
"""Who wait for a confirm at a time, where that is all that bounds them."""

Evict = Callable[[str], None]


class Peer:
    """One bus with any number of instances; as a context manager it closes what was opened."""

    writers = 16
    """How many publish at a time: one or sixteen, whichever was faster."""
    server = "rabbitmq"
    """Who passes it on: a service of the sandbox."""

    def __init__(self, urls: Urls, *, publishes: bool = True) -> None:
        self.urls = urls
        self._publishes = publishes
        self.stack = AsyncExitStack()
        self.publish: Callable[[str], Awaitable[Any]]

    async def __aenter__(self) -> Self:
        try:
            if self._publishes:
                await self.open()
        except BaseException:
            await self.stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stack.aclose()

    async def open(self) -> None:
        """Connects whoever publishes, and sets `publish`."""
        raise NotImplementedError

    async def subscribe(self, evict: Evict) -> None:
        """One more instance: `evict` is called with each key that arrives, before it is acknowledged."""
        raise NotImplementedError


class AioPika(Peer):
    """aio-pika without confirms."""

    writers = 1
    confirms = False

    async def connect(self) -> aio_pika.abc.AbstractConnection:
        return await self.stack.enter_async_context(await aio_pika.connect(self.urls.rabbitmq))

    async def open(self) -> None:
        connection = await self.connect()
        channel = await connection.channel(publisher_confirms=self.confirms)
        exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.FANOUT)

        async def publish(key: str) -> None:
            await exchange.publish(aio_pika.Message(key.encode()), "", mandatory=False)

        self.publish = publish

    async def subscribe(self, evict: Evict) -> None:
        connection = await self.connect()
        channel = await connection.channel(publisher_confirms=False)
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(EXCHANGE)

        async def arrive(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            async with message.process():
                evict(message.body.decode())

        await queue.consume(arrive)


class ConfirmedAioPika(AioPika):
    """aio-pika, each message confirmed."""

    writers = 16
    confirms = True


class Aiormq(Peer):
    """What lies below aio-pika."""

    writers = 1

    async def connect(self) -> aiormq.abc.AbstractConnection:
        connection = await aiormq.connect(self.urls.rabbitmq)
        self.stack.push_async_callback(connection.close)
        return connection

    async def open(self) -> None:
        channel = await (await self.connect()).channel(publisher_confirms=False)
        await channel.exchange_declare(EXCHANGE, exchange_type="fanout")

        async def publish(key: str) -> None:
            await channel.basic_publish(key.encode(), exchange=EXCHANGE)

        self.publish = publish

    async def subscribe(self, evict: Evict) -> None:
        channel = await (await self.connect()).channel(publisher_confirms=False)
        await channel.basic_qos(prefetch_count=PREFETCH)
        queue = (await channel.queue_declare(exclusive=True)).queue
        assert queue is not None
        await channel.queue_bind(queue, EXCHANGE)

        async def arrive(message: DeliveredMessage) -> None:
            evict(message.body.decode())
            assert message.delivery_tag is not None
            await channel.basic_ack(message.delivery_tag)

        await channel.basic_consume(queue, arrive)


class FastStream(Peer):
    """FastStream's subscribers."""

    writers = 1

    async def broker(self) -> RabbitBroker:
        broker = RabbitBroker(
            self.urls.rabbitmq,
            logger=None,
            default_channel=Channel(prefetch_count=PREFETCH, publisher_confirms=False),
        )
        self.stack.push_async_callback(broker.stop)
        return broker

    async def open(self) -> None:
        broker = await self.broker()
        await broker.start()
        exchange = RabbitExchange(EXCHANGE, type=ExchangeType.FANOUT, durable=False)
        await broker.declare_exchange(exchange)

        async def publish(key: str) -> None:
            await broker.publish(key, exchange=exchange, mandatory=False)

        self.publish = publish

    async def subscribe(self, evict: Evict) -> None:
        broker = await self.broker()
        queue = RabbitQueue("", exclusive=True, durable=False)

        @broker.subscriber(queue, RabbitExchange(EXCHANGE, type=ExchangeType.FANOUT, durable=False))
        async def arrive(key: str) -> None:
            evict(key)

        await broker.start()


class Pika(Peer):
    """pika's AsyncioConnection: callbacks on the event loop."""

    async def connect(self) -> Any:
        loop = asyncio.get_running_loop()
        opened, closed = loop.create_future(), loop.create_future()
        connection = AsyncioConnection(
            pika.URLParameters(self.urls.rabbitmq),
            on_open_callback=lambda connection: connection.channel(on_open_callback=opened.set_result),
            on_close_callback=lambda *_: closed.set_result(None),
            custom_ioloop=loop,
        )

        async def close() -> None:
            connection.close()
            await closed

        channel = await opened
        self.stack.push_async_callback(close)
        return channel

    async def open(self) -> None:
        channel = await self.connect()
        await _answer(channel.exchange_declare, EXCHANGE, exchange_type="fanout")

        async def publish(key: str) -> None:
            channel.basic_publish(EXCHANGE, "", key.encode())
            await asyncio.sleep(0)  # it only fills a buffer, which the loop empties

        self.publish = publish

    async def subscribe(self, evict: Evict) -> None:
        channel = await self.connect()
        await _answer(channel.basic_qos, prefetch_count=PREFETCH)
        queue = (await _answer(channel.queue_declare, "", exclusive=True)).method.queue
        await _answer(channel.queue_bind, queue, EXCHANGE)

        def arrive(channel: Any, delivery: Basic.Deliver, properties: object, body: bytes) -> None:
            evict(body.decode())
            channel.basic_ack(delivery.delivery_tag)

        await _answer(channel.basic_consume, queue, arrive)


async def _answer(ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    answered = asyncio.get_running_loop().create_future()
    ask(*args, callback=answered.set_result, **kwargs)
    return await answered


class RedisPubSub(Peer):
    """redis-py, with a pool of connections for whoever publishes."""

    server = "redis"

    def client(self) -> redis.asyncio.Redis:
        client = redis.asyncio.Redis.from_url(self.urls.redis)
        self.stack.push_async_callback(client.aclose)
        return client

    async def open(self) -> None:
        client = self.client()

        async def publish(key: str) -> None:
            await client.publish(EXCHANGE, key)

        self.publish = publish

    async def subscribe(self, evict: Evict) -> None:
        subscription = self.client().pubsub(ignore_subscribe_messages=True)
        await subscription.subscribe(EXCHANGE)
        await subscription.get_message(timeout=5)

        async def listen() -> None:
            async for message in subscription.listen():
                evict(message["data"].decode())

        listening = asyncio.create_task(listen())

        async def stop() -> None:
            listening.cancel()
            await asyncio.wait({listening})
            await subscription.aclose()

        self.stack.push_async_callback(stop)


class ListenNotify(Peer):
    """asyncpg's LISTEN, and NOTIFY in a transaction each, without any other change in it."""

    server = "postgres"

    async def open(self) -> None:
        pool = await asyncpg.create_pool(self.urls.postgres, min_size=self.writers, max_size=self.writers)
        self.stack.push_async_callback(pool.close)

        async def publish(key: str) -> None:
            await pool.execute("SELECT pg_notify('benchmark', $1)", key)

        self.publish = publish

    async def subscribe(self, evict: Evict) -> None:
        connection = await asyncpg.connect(self.urls.postgres)
        self.stack.push_async_callback(connection.close)
        await connection.add_listener("benchmark", lambda _, __, ___, key: evict(key))


class Bare(Peer):
    """The protocol with nothing on top of it, each message confirmed."""

    writers = CALLERS

    async def connect(self, evict: Evict = lambda key: None) -> BareConnection:
        connection = await BareConnection.connect(self.urls.rabbitmq, lambda body: evict(body.decode()))
        self.stack.push_async_callback(connection.close)
        return connection

    async def open(self) -> None:
        connection = await self.connect()
        await connection.publish_to(EXCHANGE)

        async def publish(key: str) -> None:
            await connection.publish(key.encode())

        self.publish = publish

    async def subscribe(self, evict: Evict) -> None:
        await (await self.connect(evict)).consume(EXCHANGE, prefetch=CALLERS)


FLOOR = "the bare protocol, confirmed"

PEERS: dict[str, type[Peer]] = {
    FLOOR: Bare,
    "aio-pika": AioPika,
    "aio-pika, confirmed": ConfirmedAioPika,
    "aiormq": Aiormq,
    "FastStream": FastStream,
    "pika": Pika,
    "Redis pub/sub": RedisPubSub,
    "LISTEN/NOTIFY": ListenNotify,
}
