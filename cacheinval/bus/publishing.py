"""Publishing with confirms, on a connection of its own: an alarm of the broker blocks publishers."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from aio_pika import DeliveryMode, ExchangeType
from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import AMQPChannelError, ChannelNotFoundEntity, ChannelPreconditionFailed
from aiormq.abc import ConfirmationFrameType, DeliveredMessage
from aiormq.channel import Channel
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from cacheinval.bus.connecting import LEAVE_WITHIN, Broker, Counts, explain, is_blocked, within
from cacheinval.bus.wire import Connection, Frame
from cacheinval.errors import BlockedError, PublishError
from cacheinval.messages import CONTENT_TYPE, MESSAGE_TYPE
from cacheinval.tracing import headers_of

ANSWERS = "amq.rabbitmq.reply-to"
"""RabbitMQ's direct reply-to: what is sent to it goes to the channel that asked, and ends with it. There is no queue."""

__all__ = ["Publishing", "RabbitChannel", "open_exchange"]


class RabbitChannel:
    """One publishing channel on the broker; `origin` is its name for as long as it lives."""

    def __init__(
        self,
        channel: AbstractChannel,
        underlay: Channel,
        connection: Connection,
        exchange: str,
        timeout: float,
        counts: Counts,
    ) -> None:
        self.origin = secrets.token_hex(16)
        self.failure: str | None = None
        self._channel = channel
        self._underlay = underlay
        self._part = underlay.max_content_size
        self._connection = connection
        self._exchange = exchange
        self._timeout = timeout
        self._counts = counts
        self._reply_to: str | None = None

    async def listen(self, answered: Callable[[str, bytes], None]) -> None:
        """From now on `answered` is given the correlation id and the body of each answer to what is sent here.

        Raises:
            PublishError: the broker does not give any; the channel is of no use any more.
        """

        async def arrive(message: DeliveredMessage) -> None:
            answered(message.header.properties.correlation_id or "", message.body)

        try:
            await within(self._timeout, self._underlay.basic_consume(ANSWERS, arrive, no_ack=True))
        except Exception as error:
            self.failure = f"the broker gives no answers: {explain(error)}"
            raise PublishError(self.failure) from error
        self._reply_to = ANSWERS

    async def send(
        self,
        body: bytes,
        correlation_id: str | None = None,
        contexts: Sequence[str] = (),
        *,
        to: str = "",
        reply_to: str | None = None,
    ) -> None:
        """Publishes `body`, with the routing key `to`; returns when the broker has confirmed it.

        With a `correlation_id` it asks for answers: to `reply_to`, else to whoever has called `listen`. The `contexts` go
        as headers.

        That no queue was there to take it is a success. Calls may overlap; they go out in their order.

        Raises:
            PublishError: not confirmed in time, or refused. It may still arrive; the channel is of no use
                any more.
        """
        if self.failure is not None:
            raise PublishError(self.failure)
        properties = Basic.Properties(
            content_type=CONTENT_TYPE,
            message_type=MESSAGE_TYPE,
            app_id=self.origin,
            timestamp=datetime.now(UTC),
            delivery_mode=DeliveryMode.PERSISTENT,
            reply_to=reply_to or (self._reply_to if correlation_id else None),
            correlation_id=correlation_id,
            headers=headers_of(contexts) if contexts else None,
        )
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        try:
            # All of it has a deadline: on a blocked connection even writing hangs.
            async with asyncio.timeout(self._timeout):
                result = await self._publish(body, to, properties)
        except asyncio.CancelledError as error:
            if task.cancelling() > cancelling:
                self.failure = "a message was given up before the broker confirmed it; it may still arrive"
                raise
            # Nobody cancelled us: so aiormq rejects whatever waits on a connection that it found dead.
            self.failure = self._describe(error)
            raise PublishError(self.failure) from error
        except AMQPChannelError as error:
            self.failure = self._describe(error)
            raise _refusal(self.failure) from error
        except TimeoutError as error:
            blocked = is_blocked(self._connection)
            self.failure = str(BlockedError()) if blocked else self._describe(error)
            raise (BlockedError() if blocked else PublishError(self.failure)) from error
        except Exception as error:  # down to a bare Exception, when a channel is closed
            self.failure = self._describe(error)
            raise PublishError(self.failure) from error
        self._counts.confirmed += 1
        self._counts.unrouted += isinstance(result, DeliveredMessage)

    def _publish(
        self, body: bytes, to: str, properties: Basic.Properties
    ) -> "asyncio.Future[ConfirmationFrameType | DeliveredMessage]":
        """What `aiormq.Channel.basic_publish` does, without waiting for anybody: the message goes out in this call."""
        channel = self._underlay
        if channel.is_closed:
            raise ConnectionError("the channel is closed")
        tag = channel.delivery_tag = channel.delivery_tag + 1
        properties.message_id = str(tag)  # by which aiormq finds out what was returned
        frames: list[Frame] = [
            Basic.Publish(exchange=self._exchange, routing_key=to, mandatory=True),
            ContentHeader(properties=properties, body_size=len(body)),
            *(ContentBody(body[at : at + self._part]) for at in range(0, len(body), self._part)),
        ]
        self._connection.wire.write(channel.number, *frames)
        confirmed = channel.confirmations[tag] = channel.create_future()
        channel.message_id_delivery_tag[properties.message_id] = tag
        confirmed.add_done_callback(lambda _: channel.message_id_delivery_tag.pop(str(tag), None))
        return confirmed

    def _describe(self, error: BaseException) -> str:
        if isinstance(error, ChannelNotFoundEntity):
            return f"the exchange {self._exchange} is missing: {explain(error)}"
        if isinstance(error, TimeoutError):
            return (
                f"the broker did not confirm within {self._timeout:g} s (CACHEINVAL_PUBLISH_TIMEOUT); the message may "
                "still arrive"
            )
        return f"the broker did not confirm: {explain(error)}"

    async def close(self) -> None:
        """Gives the channel back. Never raises, and ends within seconds."""
        self.failure = self.failure or "the channel is closed"
        with suppress(Exception):  # it closes with its connection
            await within(LEAVE_WITHIN, self._channel.close())


class Publishing:
    """The connection for publishing: made when it is needed, shared by the channels."""

    def __init__(self, broker: Broker, timeout: float, counts: Counts) -> None:
        self._broker = broker
        self._timeout = timeout
        self._counts = counts
        self._connection: Connection | None = None
        self._attempt: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def state(self) -> str:
        """`idle`, `connected` or `blocked` (by an alarm of the broker)."""
        if self._connection is None:
            return "idle"
        return "blocked" if is_blocked(self._connection) else "connected"

    async def open(self, exchange: str) -> RabbitChannel:
        """A channel that publishes to `exchange`, or, where that is empty, to queues by name.

        Raises:
            PublishError: the broker cannot be reached in time or blocks publishers, or the exchange is missing
                or of another type.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout
        connection = await self._connected()
        try:
            await self._unblocked(connection, deadline)
            opening = open_exchange(connection, exchange, self._timeout, self._counts)
            return await within(_left(deadline), opening)
        except PublishError:
            raise
        except Exception as error:
            self._drop(connection)  # it is dead, or the broker is: a new one finds out
            raise PublishError(f"the broker does not answer: {explain(error)}") from error

    async def _connected(self) -> Connection:
        if self._closed:
            raise PublishError("the bus is closed")
        if self._connection is None:
            if self._attempt is None:
                self._attempt = asyncio.create_task(self._connect())
                self._attempt.add_done_callback(self._attempted)
            attempt = self._attempt  # shared: whoever stops waiting for it cancels nobody else
            await asyncio.wait({attempt}, timeout=self._timeout)
            if not attempt.done():
                raise PublishError(
                    f"the broker cannot be reached within {self._timeout:g} s (CACHEINVAL_BROKER_URL)"
                )
            error = asyncio.CancelledError() if attempt.cancelled() else attempt.exception()
            if error is not None or self._connection is None:
                raise PublishError(
                    f"the broker cannot be reached (CACHEINVAL_BROKER_URL): {explain(error)}"
                ) from error
        return self._connection

    def _attempted(self, attempt: asyncio.Task[None]) -> None:
        self._attempt = None
        if not attempt.cancelled():
            attempt.exception()  # looked at, even if everybody has stopped waiting for it

    async def _connect(self) -> None:
        connection = await self._broker.connect("publishing")
        connection.close_callbacks.add(lambda *_: self._drop(connection))
        self._connection = connection

    async def _unblocked(self, connection: Connection, deadline: float) -> None:
        if connection.transport is None:
            raise ConnectionError("the connection was closed")
        try:
            await within(_left(deadline), connection.transport.ready())
        except TimeoutError as error:
            # Kept, not dropped: in an alarm the broker takes no note of closed connections, and they pile up.
            raise BlockedError from error

    def _drop(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
            self._broker.discard(connection)

    async def close(self) -> None:
        """Closes the connection. Never raises, and ends within seconds."""
        self._closed = True
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.wait({self._attempt}, timeout=LEAVE_WITHIN)
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await self._broker.leave(connection)


def _left(deadline: float) -> float:
    return max(0.0, deadline - asyncio.get_running_loop().time())


def _refusal(reason: str) -> PublishError:
    error = PublishError(reason)
    error.refused = True
    return error


async def open_exchange(connection: Connection, name: str, timeout: float, counts: Counts) -> RabbitChannel:
    """A channel on `connection` that publishes to the exchange `name`, which must be there.

    Raises:
        PublishError: it is missing or of another type, or may not be used.
        Exception: the connection is of no use.
    """
    try:
        channel = connection.channel(publisher_confirms=True, on_return_raises=False)
        await channel.initialize()
        underlay = await channel.get_underlay_channel()
        assert isinstance(underlay, Channel)
        if name:
            # Asked for before it is declared, since publishers declare nothing; declared, since only that
            # compares the type: an exchange of another type would drop everything and still confirm it.
            await channel.get_exchange(name)
            await channel.declare_exchange(name, ExchangeType.FANOUT, durable=True)
    except ChannelNotFoundEntity as error:
        reason = f"the exchange {name} is missing: nobody has subscribed yet ({explain(error)})"
        raise _refusal(reason) from error
    except ChannelPreconditionFailed as error:
        raise _refusal(f"the exchange {name} is not a durable fanout: {explain(error)}") from error
    except AMQPChannelError as error:
        raise _refusal(f"the broker refuses the exchange {name}: {explain(error)}") from error
    return RabbitChannel(channel, underlay, connection, name, timeout, counts)
