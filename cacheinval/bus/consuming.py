"""One subscription to the exchange on RabbitMQ: made once, served until it ends, and never used again."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import ChannelNotFoundEntity
from aiormq.abc import AbstractChannel as UnderlayChannel
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelAccessRefused
from pamqp.commands import Basic
from pamqp.common import FieldTable

from cacheinval.bus import Delivery, Receiver
from cacheinval.bus.connecting import (
    ANSWER_WITHIN,
    LEAVE_WITHIN,
    Broker,
    Counts,
    explain,
    is_away,
    place,
    within,
)
from cacheinval.bus.receiving import Reception
from cacheinval.bus.wire import Connection
from cacheinval.errors import SubscriptionError

__all__ = ["Subscription"]

FORGET_WITHIN = 10.0  # seconds for the receiver to forget what it knew of an older queue
ACKNOWLEDGE_WITHIN = 0.01  # seconds
DEPTH_WITHIN = 1.0  # seconds
STAND_BY = 1.0  # seconds between attempts to consume a queue that another process consumes

DURABLE_QUEUE: FieldTable = {
    "x-queue-type": "classic",  # whatever the default of the virtual host: only these can be consumed exclusively
    "x-expires": 86_400_000,
    "x-max-length": 1_000_000,
    "x-overflow": "drop-head",
}
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
        self.node: str | None = None
        self.resumed = False
        self._broker = broker
        self._counts = counts
        self._durable = name is not None
        self._prefetch = prefetch
        self._receiver = receiver
        self._reception = Reception(receiver, self._settle, lost)
        self._connection: Connection | None = None
        self._channel: AbstractChannel | None = None  # held, for aio-pika's callbacks live no longer than it
        self._consumer = ""
        self._underlay: UnderlayChannel | None = None
        self._last_arrived = 0  # delivery tags
        self._last_settled = 0
        self._last_good = 0
        self._last_acknowledged = 0
        self._ack_at = max(1, prefetch // 4)  # so many make the broker wait no longer
        self._soon: asyncio.TimerHandle | None = None
        self._counting: asyncio.Task[int] | None = None

    async def open(self, standing_by: Callable[[], None]) -> None:
        """Connects, declares and consumes.

        While another process consumes the durable queue, this calls `standing_by` once, and waits.

        Raises:
            SubscriptionError, CacheError, TimeoutError, OSError, AMQPError: it could not be made.
        """
        self._connection = await self._broker.connect("subscription", self._arrive)
        self.node = place(self._connection.url)
        await self._declare_dead_letters()
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
            # Also where it is on a node of the cluster that is down. It will be there again then, with what it held,
            # and without what was published meanwhile: so what is known of it is forgotten now, and that is a gap.
            return False
        await within(ANSWER_WITHIN, channel.close())
        return True

    async def _consume(self) -> bool:
        """Whether the queue is consumed now; if not, another process consumes it."""
        channel = await self._consuming_channel()
        if not self.resumed:
            await self._declare(channel)
        try:
            await self._begin(exclusive=self._durable)
        except ChannelAccessRefused as error:
            if "exclusive use" in str(error):
                return False
            raise
        if self.resumed:
            # Only now: had it been deleted since it was seen, declaring would have made an empty one and called
            # that resumed. While it is consumed, its deletion is noticed.
            await self._declare(channel)
        self._see_to_it(channel)
        return True

    async def _consuming_channel(self) -> AbstractChannel:
        channel = self._channel = await self._new_channel()
        underlay = self._underlay = await channel.get_underlay_channel()
        await within(ANSWER_WITHIN, channel.set_qos(self._prefetch))
        # The one and only sign of a deleted queue: neither channel nor connection is closed.
        underlay.on_consumer_cancel_callbacks.add(
            lambda _: self._reception.end("the broker cancelled the consumer: queue deleted")
        )
        return channel

    async def _begin(self, *, exclusive: bool = False, arguments: FieldTable | None = None) -> None:
        assert self._underlay is not None
        consuming = self._underlay.basic_consume(
            self.queue, self._arrive_elsewhere, exclusive=exclusive, arguments=arguments
        )
        self._consumer = (await within(ANSWER_WITHIN, consuming)).consumer_tag or ""

    def _see_to_it(self, channel: AbstractChannel) -> None:
        """From now on the end of `channel` is the end of this.

        Raises:
            SubscriptionError: it has ended already.
        """
        channel.close_callbacks.add(lambda _, error: self._reception.end(explain(error)))
        if channel.is_closed:  # before there was a callback to say so
            self._reception.end("closed by the broker")
        if self._reception.ended is not None:
            raise SubscriptionError(self._reception.ended)

    async def _new_channel(self) -> AbstractChannel:
        assert self._connection is not None
        channel = self._connection.channel(publisher_confirms=False)
        await within(ANSWER_WITHIN, channel.initialize())
        return channel

    async def _declare_dead_letters(self) -> None:
        channel = await self._new_channel()  # of its own, because a 404 closes it
        dead = self._broker.dead_letters
        await within(ANSWER_WITHIN, channel.declare_exchange(dead, ExchangeType.FANOUT, durable=True))
        try:
            declaring = channel.declare_queue(dead, durable=True, arguments=DEAD_LETTER_QUEUE)
            await within(ANSWER_WITHIN, (await within(ANSWER_WITHIN, declaring)).bind(dead, ""))
        except ChannelNotFoundEntity as error:
            if is_away(error):
                return  # nobody has to wait for that
            raise
        await within(ANSWER_WITHIN, channel.close())

    async def _declare(self, channel: AbstractChannel) -> None:
        declaring_exchange = channel.declare_exchange(
            self._broker.exchange, ExchangeType.FANOUT, durable=True
        )
        await within(ANSWER_WITHIN, declaring_exchange)
        arguments: FieldTable = {"x-dead-letter-exchange": self._broker.dead_letters}
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

    @property
    def unsettled(self) -> int:
        """Deliveries that arrived and are not evicted yet."""
        return self._last_arrived - self._last_settled

    async def depth(self) -> int | None:
        """How many messages wait, in the broker and here; None if the broker does not say. Never raises."""
        counting = self._counting
        if counting is None or counting.done():
            counting = self._counting = asyncio.create_task(self._ready())
            counting.add_done_callback(
                lambda task: task.cancelled() or task.exception()
            )  # asyncio need not complain
        # Where it takes too long it is left to end, and asked again: the number of a channel that is given up half-way is
        # used again, which to the broker is an error of the connection, and so the end of the subscription.
        await asyncio.wait({counting}, timeout=DEPTH_WITHIN)
        if not counting.done() or counting.cancelled() or counting.exception() is not None:
            return None  # or the subscription has ended, or is about to
        return counting.result() + self.unsettled

    async def _ready(self) -> int:
        # On a channel of its own, since what fails closes it; on no other connection is an exclusive queue to be seen.
        assert self._connection is not None
        channel = self._connection.channel(publisher_confirms=False)
        await channel.initialize()
        try:
            found = await channel.declare_queue(self.queue, passive=True)
        finally:
            await channel.close()
        return found.declaration_result.message_count or 0

    async def _stop_consuming(self) -> None:
        with suppress(Exception):  # then the connection, which is closed next, takes the consumer with it
            assert self._underlay is not None
            await within(LEAVE_WITHIN, self._underlay.basic_cancel(self._consumer))

    def _arrive(self, deliveries: list[tuple[int, Delivery]]) -> None:
        arrived = []
        for tag, delivery in deliveries:
            if tag != self._last_arrived + 1:
                # Acknowledging several at once would acknowledge one that was never seen.
                self._reception.end(f"delivery {tag} came after {self._last_arrived}")
                return
            self._last_arrived = tag
            arrived.append(delivery)
        self._counts.deliveries += len(arrived)
        self._reception.take(arrived)

    async def _arrive_elsewhere(self, message: DeliveredMessage) -> None:
        self._reception.end("a delivery was not recognised as one")

    def _settle(self, problems: Sequence[str | None]) -> None:
        """Rejects what could not be understood; the rest is acknowledged by one frame, soon, with whatever follows."""
        first, self._last_settled = self._last_settled + 1, self._last_settled + len(problems)
        for tag, problem in enumerate(problems, first):
            if problem is None:
                self._last_good = tag
            else:
                self._counts.rejected += 1
                # At once, or the acknowledgement of all up to the last good one would include it.
                self._write(Basic.Reject(tag, requeue=False))
        if self._last_good - self._last_acknowledged >= self._ack_at:
            self._acknowledge()
        elif self._soon is None:
            # Not now: a write costs more than an eviction, and keeps others in this process from theirs.
            self._soon = asyncio.get_running_loop().call_later(ACKNOWLEDGE_WITHIN, self._acknowledge)

    def _acknowledge(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if self._last_good > self._last_acknowledged:
            self._last_acknowledged = self._last_good
            self._write(Basic.Ack(self._last_good, multiple=True))

    def _write(self, frame: Basic.Reject | Basic.Ack) -> None:
        if self._connection is None or self._underlay is None or self._underlay.is_closed:
            return  # what was not acknowledged comes again, or the queue went with the channel
        with suppress(OSError):  # the same
            # There is never more of this than the prefetch, so it needs no bound.
            self._connection.wire.write(self._underlay.number, frame)

    async def close(self) -> None:
        """Closes the connection. Never raises, and ends within seconds."""
        self._acknowledge()
        if self._counting is not None:
            self._counting.cancel()
        if self._connection is not None:
            await self._broker.leave(self._connection)
