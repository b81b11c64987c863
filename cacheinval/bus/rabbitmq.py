"""The bus on RabbitMQ: keeps one subscription standing, publishes with confirms, asks and answers."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from aiormq.abc import DeliveredMessage

from cacheinval.bus import Delivery, Receiver
from cacheinval.bus.connecting import ANSWER_WITHIN, Broker, Counts, explain, within
from cacheinval.bus.consuming import Subscription
from cacheinval.bus.publishing import Publishing, RabbitChannel, open_exchange
from cacheinval.bus.receiving import LONGEST_PAUSE, STOPPED, Answers, pause
from cacheinval.bus.streaming import StreamSubscription
from cacheinval.bus.wire import Connection
from cacheinval.errors import CacheError, PublishError, SubscriptionError
from cacheinval.logs import event
from cacheinval.settings import Settings

__all__ = ["RabbitBus"]

_log = logging.getLogger("cacheinval.bus")


class RabbitBus:
    """A fanout exchange of RabbitMQ, with a queue for this instance, or a stream for all (PROTOCOL.md, "RabbitMQ").

    A cache in this process gets a new queue with each subscription; for one outside it the queue is durable and
    named after `instance_id`. With `bus=stream` there is one stream, and each instance reads it.

    Raises:
        ConfigurationError: a file of `broker_ca_file`, `broker_cert_file` or `broker_key_file` cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._broker = Broker(settings)
        self._timeout = settings.publish_timeout
        self._counts = Counts()
        self._publishing = Publishing(self._broker, self._timeout, self._counts)
        self._answers: RabbitChannel | None = None
        self._opening_answers = asyncio.Lock()
        self._prefetch = settings.prefetch
        self._durable_queue = (
            f"{self._broker.exchange}.{settings.instance_id}" if settings.cache_is_external else None
        )
        self._reads_stream = settings.bus == "stream"
        self._queue = self._durable_queue
        self._subscription: Subscription | None = None
        self._consumer = "idle"
        self._since = time.time()
        self._reason: str | None = None
        self._told: tuple[str, str | None] | None = None

    @property
    def state(self) -> dict[str, Any]:
        """For status: the masked URL; how the subscription stands, where, since when (wall clock) and why; counters.

        `consumer` is `idle`, `connecting`, `standby` or `connected`.
        """
        return {
            "url": self._broker.url,
            "consumer": self._consumer,
            "publisher": self._publishing.state,
            "queue": self._queue,
            "node": None if self._subscription is None else self._subscription.node,
            "since": self._since,
            "reason": self._reason,
            "unsettled": 0 if self._subscription is None else self._subscription.unsettled,
            **asdict(self._counts),
        }

    async def run(self, receiver: Receiver) -> None:
        """Keeps `receiver` subscribed until cancelled; what it has in hand is then finished and acknowledged."""
        attempt = 0
        self._become("connecting", None)
        try:
            while True:
                began = time.monotonic()
                await self._subscribe_once(receiver)
                # Only what lasted starts afresh: a receiver that fails with each message must not make this spin.
                attempt = 1 if time.monotonic() - began > 2 * LONGEST_PAUSE else attempt + 1
                await asyncio.sleep(pause(attempt))
        finally:
            self._become("idle", STOPPED)

    async def _subscribe_once(self, receiver: Receiver) -> None:
        """One subscription, from the first attempt to connect until it has ended, or could not be made."""

        def lost(reason: str) -> None:
            receiver.lost(reason)
            self._become("connecting", reason)
            if reason == STOPPED:
                self._tell(logging.INFO, "unsubscribed", None)
            else:
                self._tell(logging.WARNING, "subscription lost", reason)

        subscription = self._new_subscription(receiver, lost)
        try:
            await subscription.open(self._stand_by)
            self._queue, self._subscription = subscription.queue, subscription
            self._counts.sessions += 1
            self._become("connected", None)
            self._tell(
                logging.INFO,
                "joined",
                None,
                queue=subscription.queue,
                node=subscription.node,
                resumed="yes" if subscription.resumed else "no",
            )
            await subscription.serve()
        except Exception as error:
            self._become("connecting", explain(error))
            if isinstance(error, CacheError):
                self._tell(logging.WARNING, "not subscribing before the cache can be used", explain(error))
            elif isinstance(error, (OSError, SubscriptionError)):
                self._tell(logging.WARNING, "broker unreachable, retrying", explain(error))
            else:  # it is there, and says no
                self._tell(logging.ERROR, "subscription refused, retrying", explain(error))
            _log.debug("no subscription", exc_info=error)
        finally:
            self._subscription = None
            await subscription.close()

    def _new_subscription(self, receiver: Receiver, lost: Callable[[str], None]) -> Subscription:
        broker, counts, prefetch = self._broker, self._counts, self._prefetch
        if self._reads_stream:
            return StreamSubscription(broker, receiver, counts, prefetch=prefetch, lost=lost)
        return Subscription(broker, receiver, counts, name=self._durable_queue, prefetch=prefetch, lost=lost)

    def _stand_by(self) -> None:
        text = "standing by: another process consumes this queue"
        self._become("standby", text)
        self._tell(logging.WARNING, text, None, queue=self._durable_queue)

    def _become(self, consumer: str, reason: str | None) -> None:
        if consumer != self._consumer:
            self._consumer, self._since = consumer, time.time()
        self._reason = reason

    def _tell(self, level: int, text: str, reason: str | None, **fields: Any) -> None:
        """One line for each change, however many attempts it takes."""
        if self._told != (text, reason):
            self._told = (text, reason)
            event(_log, level, text, broker=self._broker.url, reason=reason, **fields)

    async def open_channel(self) -> RabbitChannel:
        """A publishing channel with an origin of its own.

        Raises:
            PublishError: the broker cannot be reached or blocks publishers, or the exchange is missing or of
                another type.
        """
        return await self._publishing.open(self._broker.exchange)

    async def answer(self, delivery: Delivery, body: bytes) -> None:
        """Sends `body` to whoever asked by `delivery`; whether that is still there does not matter.

        Raises:
            PublishError: it could not be sent.
        """
        if delivery.reply_to is None:
            return
        async with self._opening_answers:
            if self._answers is None or self._answers.failure is not None:
                if self._answers is not None:
                    await self._answers.close()
                self._answers = await self._publishing.open("")
            channel = self._answers
        await channel.send(body, to=delivery.reply_to, correlation_id=delivery.correlation_id)

    async def ask(
        self, body: bytes, wait: float, enough: Callable[[Sequence[bytes]], bool] = lambda answers: False
    ) -> list[bytes]:
        """Publishes `body` with a `reply_to` and returns the answers that arrive within `wait` seconds.

        It returns at once when `enough`, which is called with those so far as each arrives, says so.

        Raises:
            PublishError: the broker cannot be reached, or the exchange is missing.
        """
        try:
            connection = await self._broker.connect(
                "asking"
            )  # its own: it publishes, and consumes the answers
        except Exception as error:
            raise PublishError(
                f"the broker cannot be reached (CACHEINVAL_BROKER_URL): {explain(error)}"
            ) from error
        try:
            return await self._ask(connection, body, wait, Answers(enough))
        except PublishError:
            raise
        except Exception as error:
            raise PublishError(f"the broker does not answer: {explain(error)}") from error
        finally:
            await self._broker.leave(connection)

    async def _ask(self, connection: Connection, body: bytes, wait: float, answers: Answers) -> list[bytes]:
        question = secrets.token_hex(16)

        async def arrive(message: DeliveredMessage) -> None:
            if message.header.properties.correlation_id == question:
                answers.add(message.body)

        opening = open_exchange(connection, self._broker.exchange, self._timeout, self._counts)
        channel = await within(ANSWER_WITHIN, opening)
        replies = connection.channel(publisher_confirms=False)
        await within(ANSWER_WITHIN, replies.initialize())
        queue = await within(ANSWER_WITHIN, replies.declare_queue(exclusive=True, auto_delete=True))
        underlay = await replies.get_underlay_channel()
        await within(ANSWER_WITHIN, underlay.basic_consume(queue.name, arrive, no_ack=True))
        await channel.send(body, reply_to=queue.name, correlation_id=question)
        return await answers.wait(wait)

    async def depth(self) -> int | None:
        """How many messages wait in the queue of this instance, in the broker and here; None if that is unknown."""
        return None if self._subscription is None else await self._subscription.depth()

    async def close(self) -> None:
        """Closes every connection. Never raises, and ends within seconds."""
        await self._publishing.close()
        await self._broker.close()
