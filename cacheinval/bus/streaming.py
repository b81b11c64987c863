"""The same as a subscription, to a stream that all instances of a namespace read: what is published is in it once."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel
from pamqp.common import FieldTable

from cacheinval.bus import Delivery, Receiver
from cacheinval.bus.connecting import ANSWER_WITHIN, Broker, Counts, place, within
from cacheinval.bus.consuming import Subscription
from cacheinval.logs import event

__all__ = ["STREAM", "StreamSubscription"]

_log = logging.getLogger("cacheinval.bus")

STREAM: FieldTable = {
    "x-queue-type": "stream",
    "x-max-age": "1h",
    "x-max-length-bytes": 1_000_000_000,
    "x-stream-max-segment-size-bytes": 50_000_000,
}
FOUND_WITHIN = 2.0  # seconds; a message that is in the stream is delivered at once


class StreamSubscription(Subscription):
    """A reader of the stream, from where its receiver left it, or else with what is published from now on.

    "From now on" is no later than the broker's answer to `consume`: it looks up the end of the stream before it answers.
    """

    def __init__(
        self,
        broker: Broker,
        receiver: Receiver,
        counts: Counts,
        *,
        prefetch: int,
        lost: Callable[[str], None],
    ) -> None:
        super().__init__(broker, receiver, counts, name=None, prefetch=prefetch, lost=lost)
        self.queue = broker.stream
        self._something_arrived = asyncio.Event()

    async def open(self, standing_by: Callable[[], None]) -> None:
        """Connects, declares and consumes; nobody ever stands by.

        Raises:
            SubscriptionError, TimeoutError, OSError, AMQPError: it could not be made.
        """
        position = self._receiver.position
        self._connection = await self._broker.connect("subscription", self._arrive, offsets=True)
        self.node = place(self._connection.url)
        channel = await self._consuming_channel()
        await self._declare(channel)
        self.resumed = position is not None and await self._goes_on_from(position)
        if not self.resumed:
            await self._read_from("next")
        self._see_to_it(channel)

    async def _goes_on_from(self, position: int) -> bool:
        """Whether anything is delivered from there; the receiver will see whether it is what was there.

        A broker that is asked for an offset which the stream has not reached yet delivers nothing until it has.
        """
        await self._read_from(position)
        with suppress(TimeoutError):
            async with asyncio.timeout(FOUND_WITHIN):
                await self._something_arrived.wait()
                return True
        assert self._underlay is not None
        # Where this fails it was not the stream that was silent, and the position is good for another attempt.
        await within(ANSWER_WITHIN, self._underlay.basic_cancel(self._consumer))
        event(_log, logging.WARNING, "the stream was made again", queue=self.queue, position=position)
        await self._receiver.renewing()
        return False

    async def _read_from(self, offset: int | str) -> None:
        await self._begin(arguments={"x-stream-offset": offset})

    async def depth(self) -> int | None:
        """None: the broker says how many messages the stream holds, not how many of them are yet to be read."""
        return None

    async def _declare(self, channel: AbstractChannel) -> None:
        exchange = self._broker.exchange
        await within(ANSWER_WITHIN, channel.declare_exchange(exchange, ExchangeType.FANOUT, durable=True))
        declaring = channel.declare_queue(self.queue, durable=True, arguments=STREAM)
        await within(ANSWER_WITHIN, (await within(ANSWER_WITHIN, declaring)).bind(exchange, ""))

    def _arrive(self, deliveries: list[tuple[int, Delivery]]) -> None:
        self._something_arrived.set()
        if any(delivery.offset is None for _, delivery in deliveries):
            self._reception.end("a delivery of the stream without its offset")
            return
        super()._arrive(deliveries)

    def _settle(self, problems: Sequence[str | None]) -> None:
        """All of it is acknowledged, for that only asks for more: what cannot be understood stays in the stream."""
        self._counts.rejected += sum(problem is not None for problem in problems)
        super()._settle([None] * len(problems))
