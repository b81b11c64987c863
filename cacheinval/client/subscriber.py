"""The bus of one client, and the subscription over it."""

import asyncio
import logging
from typing import Any

from cacheinval import logs
from cacheinval.bus import Bus, Channel
from cacheinval.bus.memory import EventBus
from cacheinval.bus.rabbitmq import RabbitBus
from cacheinval.receiver import Instance
from cacheinval.settings import Settings
from cacheinval.tasks import STOP_TIMEOUT

__all__ = ["Subscriber"]

log = logging.getLogger("cacheinval.client")


class Subscriber:
    """Makes the bus when it is first used, and a subscription whenever there is none.

    Args:
        bus: who carries messages; chosen by `BROKER_URL` if None.
    """

    def __init__(self, bus: Bus | None, settings: Settings) -> None:
        self._bus, self._settings = bus, settings
        self._run: asyncio.Task[None] | None = None

    @property
    def bus(self) -> Bus:
        """Who carries messages."""
        if self._bus is None:  # not before: an `EventBus` belongs to the event loop that runs
            memory = self._settings.broker_url.startswith("memory:")
            self._bus = EventBus.of(self._settings.namespace) if memory else RabbitBus(self._settings)
        return self._bus

    async def stay_subscribed(self, instance: Instance) -> None:
        """Runs the bus for `instance`, again and again, for good."""
        while True:
            run = self._run = asyncio.create_task(self.bus.run(instance))
            try:
                await asyncio.wait({run})
            finally:
                run.cancel()
                await asyncio.wait({run}, timeout=STOP_TIMEOUT)
            if not run.cancelled():
                run.result()

    def resubscribe(self, reason: str) -> None:
        """Ends the subscription, so that another one is made."""
        logs.event(log, logging.WARNING, "subscribing anew", reason=reason)
        if self._run is not None:
            self._run.cancel()

    async def publish_probe(self, body: bytes) -> None:
        """Publishes a probe over a channel of its own."""
        async with asyncio.timeout(2 * self._settings.publish_timeout):
            channel: Channel = await self.bus.open_channel()
            try:
                await channel.send(body)
            finally:
                await channel.close()

    async def answer(self, delivery: Any, body: bytes) -> None:
        """Answers who has sent `delivery`."""
        await self.bus.answer(delivery, body)
