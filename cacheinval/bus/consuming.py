"""One subscription to the exchange on RabbitMQ: made once, served until it ends, and never used again."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity
from aiormq.abc import AbstractChannel as UnderlayChannel
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelAccessRefused
from pamqp.common import FieldTable

from cacheinval.bus import Delivery, Receiver
from cacheinval.bus.connecting import ANSWER_WITHIN, LEAVE_WITHIN, Broker, Counts, explain, within
from cacheinval.bus.receiving import Reception
from cacheinval.errors import SubscriptionError

__all__ = ["Subscription"]

FORGET_WITHIN = 10.0  # seconds for the receiver to forget what it knew of an older queue
STAND_BY = 1.0  # seconds between attempts to consume a queue that another process consumes

DURABLE_QUEUE: FieldTable = {"x-expires": 86_400_000, "x-max-length": 1_000_000, "x-overflow": "drop-head"}
DEAD_LETTER_QUEUE: FieldTable = {"x-max-length": 10_000, "x-overflow": "drop-head"}


class Subscription:
    """A queue of its own on the exchange, and whoever receives what it holds.

    Args:
        name: of the durable queue of a cache outside the process; None for a queue that lives as long as this.
        lost: called once and at once when the subscription ends while it is served, with the reason.
    """

    def __init__(
        self,
        broker: Broker,
        receiver: Receiver,
        counts: Counts,
        *,
        name: str | None,
        prefetch: int,
        lost: Callable[[str], None],
    ) -> None:
        self.queue = name or ""
        self.resumed = False
        self._broker = broker
        self._counts = counts
        self._durable = name is not None
        self._prefetch = prefetch
        self._receiver = receiver
        self._reception = Reception(receiver, self._settle, lost)
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None  # held, for aio-pika's callbacks live no longer than it
        self._consumer = ""
        self._last_arrived = 0  # delivery tags
        self._last_settled = 0

    async def open(self, standing_by: Callable[[], None]) -> None:
        """Connects, declares and consumes.

        While another process consumes the durable queue, this calls `standing_by` once, and waits.

        Raises:
            SubscriptionError, CacheError, TimeoutError, OSError, AMQPError: it could not be made.
        """
        self._connection = await self._broker.connect("subscription")
        if self._durable:
            self.resumed = await self._exists()
            if not self.resumed:
                async with asyncio.timeout(FORGET_WITHIN):
                    await self._receiver.renewing()
        told = False
        while not await self._consume():
            if not told:
                standing_by()
                told = True
            await asyncio.sleep(STAND_BY)

    async def _exists(self) -> bool:
        channel = await self._new_channel()  # of its own, because a 404 closes it
        try:
            await within(ANSWER_WITHIN, channel.declare_queue(self.queue, passive=True))
        except ChannelNotFoundEntity:
            return False
        await within(ANSWER_WITHIN, channel.close())
        return True

    async def _consume(self) -> bool:
        """Whether the queue is consumed now; if not, another process consumes it."""
        channel = self._channel = await self._new_channel()
        underlay = await channel.get_underlay_channel()
        await within(ANSWER_WITHIN, channel.set_qos(self._prefetch))
        if not self.resumed:
            await self._declare(channel)
        # The one and only sign of a deleted queue: neither channel nor connection is closed.
        underlay.on_consumer_cancel_callbacks.add(
            lambda _: self._reception.end("the broker cancelled the consumer: queue deleted")
        )
        try:
            consuming = underlay.basic_consume(self.queue, self._arrive, exclusive=self._durable)
            self._consumer = (await within(ANSWER_WITHIN, consuming)).consumer_tag or ""
        except ChannelAccessRefused as error:
            if "exclusive use" in str(error):
                return False
            raise
        if self.resumed:
            # Only now: had it been deleted since it was seen, declaring would have made an empty one and called
            # that resumed. While it is consumed, its deletion is noticed.
            await self._declare(channel)
        channel.close_callbacks.add(lambda _, error: self._reception.end(explain(error)))
        if channel.is_closed:  # before there was a callback to say so
            self._reception.end("closed by the broker")
        if self._reception.ended is not None:
            raise SubscriptionError(self._reception.ended)
        return True

    async def _new_channel(self) -> AbstractChannel:
        assert self._connection is not None
        channel = self._connection.channel(publisher_confirms=False)
        await within(ANSWER_WITHIN, channel.initialize())
        return channel

    async def _declare(self, channel: AbstractChannel) -> None:
        dead = self._broker.dead_letters
        for name in (self._broker.exchange, dead):
            await within(ANSWER_WITHIN, channel.declare_exchange(name, ExchangeType.FANOUT, durable=True))
        declaring = channel.declare_queue(dead, durable=True, arguments=DEAD_LETTER_QUEUE)
        await within(ANSWER_WITHIN, (await within(ANSWER_WITHIN, declaring)).bind(dead, ""))
        arguments: FieldTable = {"x-dead-letter-exchange": dead}
        if self._durable:
            arguments.update(DURABLE_QUEUE)
            declaring = channel.declare_queue(self.queue, durable=True, arguments=arguments)
        else:
            declaring = channel.declare_queue(exclusive=True, auto_delete=True, arguments=arguments)
        queue = await within(ANSWER_WITHIN, declaring)
        await within(ANSWER_WITHIN, queue.bind(self._broker.exchange, ""))
        self.queue = queue.name

    async def serve(self) -> None:
        """Tells the receiver that it has joined, and gives it what arrives until the subscription ends.

        Cancelling this ends it gently: what the receiver has in hand is finished and acknowledged.
        """
        await self._reception.run(self._stop_consuming, resumed=self.resumed)

    async def _stop_consuming(self) -> None:
        with suppress(Exception):  # then the connection, which is closed next, takes the consumer with it
            await within(LEAVE_WITHIN, (await self._underlay()).basic_cancel(self._consumer))

    async def _arrive(self, message: DeliveredMessage) -> None:
        """Puts away, no more: aiormq runs this in a task for each message, so the order would be lost here."""
        if message.delivery_tag != self._last_arrived + 1:
            # Acknowledging several at once would acknowledge one that was never seen.
            self._reception.end(f"delivery {message.delivery_tag} came after {self._last_arrived}")
            return
        self._last_arrived += 1
        self._counts.deliveries += 1
        properties = message.header.properties
        self._reception.put(
            Delivery(message.body, properties.reply_to, properties.correlation_id, bool(message.redelivered))
        )

    async def _settle(self, problems: Sequence[str | None]) -> None:
        """Rejects what could not be understood; then one frame acknowledges all the rest."""
        first, self._last_settled = self._last_settled + 1, self._last_settled + len(problems)
        good = [tag for tag, problem in enumerate(problems, first) if problem is None]
        bad = [tag for tag, problem in enumerate(problems, first) if problem is not None]
        self._counts.rejected += len(bad)
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                underlay = await self._underlay()
                # First, or the acknowledgement of all up to the last good one would include them.
                for tag in bad:
                    await underlay.basic_reject(tag, requeue=False)
                if good:
                    await underlay.basic_ack(good[-1], multiple=True)
        except TimeoutError as error:
            raise SubscriptionError("the broker takes no acknowledgements") from error
        except (AMQPError, OSError):
            pass  # the channel is gone: what was not acknowledged comes again, or the queue went with it

    async def _underlay(self) -> UnderlayChannel:
        assert self._channel is not None
        return await self._channel.get_underlay_channel()

    async def close(self) -> None:
        """Closes the connection. Never raises, and ends within seconds."""
        if self._connection is not None:
            await self._broker.leave(self._connection)
