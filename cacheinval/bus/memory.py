"""The bus within one process: the same bytes and the same contract, without a server."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from cacheinval.bus import Delivery, Receiver
from cacheinval.bus.receiving import LONGEST_PAUSE, Answers, Reception, pause
from cacheinval.errors import PublishError

__all__ = ["EventBus", "EventChannel"]

ROOM = 10_000  # messages that may wait for one receiver; what comes beyond is dropped, and so a gap


class EventBus:
    """Carries messages between the clients of one event loop.

    Hand the same one to each of them, or let each take `EventBus.of(namespace)`.
    """

    def __init__(self) -> None:
        self._receptions: set[Reception] = set()
        self._listeners: dict[str, Callable[[str, bytes], None]] = {}
        self._since = time.time()
        self._deliveries = self._rejected = self._confirmed = self._unrouted = 0

    @classmethod
    def of(cls, namespace: str) -> "EventBus":
        """The one bus of `namespace` in the running event loop; it lasts while anybody holds it."""
        buses = _buses.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
        return buses.setdefault(namespace, cls())

    @property
    def state(self) -> dict[str, Any]:
        """For status; the same names as those of `RabbitBus.state`, for all clients of this bus together."""
        return {
            "url": "memory://",
            "consumer": "connected" if self._receptions else "idle",
            "publisher": "connected",
            "queue": None,
            "since": self._since,
            "reason": None,
            "unsettled": sum(reception.waiting for reception in self._receptions),
            "sessions": len(self._receptions),
            "deliveries": self._deliveries,
            "rejected": self._rejected,
            "confirmed": self._confirmed,
            "unrouted": self._unrouted,
        }

    async def run(self, receiver: Receiver) -> None:
        """Keeps `receiver` subscribed until cancelled; what it has in hand is then finished."""
        attempt = 0
        while True:
            began = time.monotonic()
            reception = Reception(receiver, self._settle, receiver.lost)
            self._receptions.add(reception)
            try:
                await reception.run(partial(self._leave, reception))
            finally:
                self._receptions.discard(reception)
            attempt = 1 if time.monotonic() - began > LONGEST_PAUSE else attempt + 1
            await asyncio.sleep(pause(attempt))

    async def _leave(self, reception: Reception) -> None:
        self._receptions.discard(reception)

    def _settle(self, problems: Sequence[str | None]) -> None:
        self._rejected += sum(problem is not None for problem in problems)

    def publish(self, delivery: Delivery) -> None:
        """Hands `delivery` to every subscriber, in the order of the calls."""
        self._confirmed += 1
        self._unrouted += not self._receptions
        for reception in tuple(self._receptions):
            if reception.waiting < ROOM:
                self._deliveries += 1
                reception.put(delivery)
            else:
                reception.end(f"more than {ROOM} messages wait")

    async def open_channel(self) -> "EventChannel":
        """A publishing channel with an origin of its own."""
        return EventChannel(self)

    async def answer(self, delivery: Delivery, body: bytes) -> None:
        """Sends `body` to whoever asked by `delivery`; whether that still waits does not matter."""
        answered = self._listeners.get(delivery.reply_to or "")
        if answered is not None:
            answered(delivery.correlation_id or "", body)

    async def ask(
        self, body: bytes, wait: float, enough: Callable[[Sequence[bytes]], bool] = lambda answers: False
    ) -> list[bytes]:
        """Publishes `body` with a `reply_to` and returns the answers that arrive within `wait` seconds.

        It returns at once when `enough`, which is called with those so far as each arrives, says so.
        """
        question = secrets.token_hex(16)
        answers = Answers(enough)
        self._listeners[question] = lambda _, answer: answers.add(answer)
        try:
            self.publish(Delivery(body, reply_to=question, correlation_id=question))
            return await answers.wait(wait)
        finally:
            del self._listeners[question]

    def listen(self, address: str, answered: Callable[[str, bytes], None] | None) -> None:
        """Answers to what is sent with this `reply_to` go to `answered`; None: to nobody any more."""
        if answered is None:
            self._listeners.pop(address, None)
        else:
            self._listeners[address] = answered

    async def depth(self) -> int | None:
        """None: the clients of this bus share it, and each has a queue of its own."""
        return None

    async def close(self) -> None:
        """Does nothing: other clients may hold the same bus."""


class EventChannel:
    """One publishing channel of an `EventBus`; `origin` is its name for as long as it lives."""

    def __init__(self, bus: EventBus) -> None:
        self.origin = secrets.token_hex(16)
        self._bus: EventBus | None = bus

    async def send(
        self, body: bytes, correlation_id: str | None = None, contexts: Sequence[str] = ()
    ) -> None:
        """Publishes `body` to every subscriber; it waits for each of them when this returns.

        Raises:
            PublishError: the channel is closed.
        """
        if self._bus is None:
            raise PublishError("the channel is closed")
        self._bus.publish(
            Delivery(body, correlation_id and self.origin, correlation_id, contexts=tuple(contexts))
        )

    async def listen(self, answered: Callable[[str, bytes], None]) -> None:
        """See `bus.Channel.listen`."""
        if self._bus is not None:
            self._bus.listen(self.origin, answered)

    async def close(self) -> None:
        """Gives the channel back."""
        if self._bus is not None:
            self._bus.listen(self.origin, None)
        self._bus = None


_buses: "WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[str, EventBus]]" = (
    WeakKeyDictionary()
)
