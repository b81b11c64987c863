"""Who carries messages: what a bus gives, and what it asks of whoever receives."""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

__all__ = ["Bus", "Channel", "Delivery", "Receiver"]


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """One message as it arrived; the AMQP properties are None where the sender set none."""

    body: bytes
    reply_to: str | None = None
    correlation_id: str | None = None
    redelivered: bool = False
    contexts: tuple[str, ...] = ()
    """Those of the writes that it tells of, where these were traced; see `cacheinval.tracing`."""
    offset: int | None = None
    """Its place in the stream, where it came from one."""


class Receiver(Protocol):
    """Whoever keeps caches honest by what the bus delivers."""

    @property
    def position(self) -> int | None:
        """The offset in the stream at which to go on reading; None: with what is published from now on."""

    async def renewing(self) -> None:
        """A queue that outlives its subscriptions is about to be made, since there is none: whatever was known of an
        older one is to be forgotten first. `joined` follows, be it in another process that finds the queue. The same where
        a stream does not hold the `position`."""

    async def joined(self, *, resumed: bool) -> None:
        """The subscription stands: every message published from now on will be received.

        `resumed` says that the queue was there before, with everything published meanwhile, or that a stream is read
        from `position`; otherwise messages may have been missed.
        """

    def lost(self, reason: str) -> None:
        """The subscription is lost, from now until `joined` is called again."""

    async def receive(self, deliveries: Sequence[Delivery]) -> list[str | None]:
        """Evicts, in order, what the deliveries say, and returns when that is done.

        Returns for each delivery None (acknowledge it) or why it cannot be understood (dead-letter it). Where this
        raises, nothing is acknowledged and the subscription starts over.
        """

    def receive_now(self, deliveries: Sequence[Delivery]) -> list[str | None] | None:
        """The same as `receive`, at once; None where that cannot be done, and then nothing has been done. It is not called
        while `joined` or `receive` is under way."""

    def overhear(self, deliveries: Sequence[Delivery]) -> None:
        """These have arrived, and wait for what is under way; `receive` is given them when that is done."""


class Channel(Protocol):
    """One publishing channel: what is sent arrives in order, or not at all."""

    @property
    def origin(self) -> str:
        """The random name of this channel's lifetime."""

    async def send(
        self, body: bytes, correlation_id: str | None = None, contexts: Sequence[str] = ()
    ) -> None:
        """Publishes `body` to every subscriber; returns when the broker has confirmed it.

        With a `correlation_id` it asks each of them for an answer, which `listen` has to be called for before. The
        `contexts` arrive with it.

        Raises:
            PublishError: not confirmed in time, or refused. It may still arrive; the channel is to be closed.
        """

    async def listen(self, answered: Callable[[str, bytes], None]) -> None:
        """From now on `answered` is given the correlation id and the body of each answer to what is sent here.

        Raises:
            PublishError: no answers can be had; the channel is to be closed.
        """

    async def close(self) -> None:
        """Gives the channel back. Never raises, and ends within seconds."""


class Bus(Protocol):
    """A fanout of messages to every instance of a namespace, each with a queue of its own."""

    async def run(self, receiver: Receiver) -> None:
        """Keeps `receiver` subscribed until cancelled, whatever happens to the broker."""

    async def open_channel(self) -> Channel:
        """A publishing channel with an origin of its own.

        Raises:
            PublishError: the broker cannot be reached, or the exchange is missing or of another type.
        """

    async def answer(self, delivery: Delivery, body: bytes) -> None:
        """Sends `body` to whoever asked by `delivery` (`reply_to`).

        Raises:
            PublishError: it could not be sent.
        """

    async def ask(
        self, body: bytes, wait: float, enough: Callable[[Sequence[bytes]], bool] = lambda answers: False
    ) -> list[bytes]:
        """Publishes `body` with a `reply_to` and returns the answers that arrive within `wait` seconds.

        It returns at once when `enough`, which is called with those so far as each arrives, says so.

        Raises:
            PublishError: the broker cannot be reached, or the exchange is missing.
        """

    async def depth(self) -> int | None:
        """How many messages wait in the queue of this instance, those not counted that are evicted; None if unknown.

        Asks the broker. Never raises, and ends within a second.
        """

    async def close(self) -> None:
        """Closes every connection. Never raises, and ends within seconds."""
