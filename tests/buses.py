"""What tests of buses on a real broker share, for annotations; the fixtures are in `integration/conftest.py`."""

import asyncio
from contextlib import suppress
from typing import Any, Protocol

from recorder import Recorder

from cacheinval.bus import Bus
from cacheinval.bus.rabbitmq import RabbitBus


class Buses(Protocol):
    """The fixture `buses`: a bus of its own on the test's namespace; keyword arguments are settings."""

    def __call__(self, url: str | None = None, /, **settings: Any) -> RabbitBus: ...


class Subscribe(Protocol):
    """The fixture `subscribe`: runs a receiver on a bus in the background until the test ends."""

    def __call__(self, bus: Bus, receiver: Recorder) -> "asyncio.Task[None]": ...


async def stop(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
