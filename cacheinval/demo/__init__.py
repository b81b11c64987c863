"""`cacheinval demo`: a story of one service and three readers, in four acts, whose every figure is measured."""

import asyncio
import signal
import time
from collections.abc import Coroutine
from typing import Any, Literal

from cacheinval import logs
from cacheinval.demo import memory
from cacheinval.demo.page import Page
from cacheinval.demo.stage import Wrong
from cacheinval.errors import CacheinvalError

__all__ = ["run"]

TIME_LIMIT = 120.0  # seconds; it takes about 35, and must end by itself on the slowest machine

_NEXT = {
    "memory": [
        ("cacheinval demo", "the same with RabbitMQ, Postgres, and a broker that dies"),
        ("README.md", "how to use it in a service of yours"),
    ],
    "rabbitmq": [
        ("cacheinval sandbox", "private servers of your own, to try things out"),
        ("cacheinval serve", "the product service, to read and to copy from"),
        ("README.md", "how to use it in a service of yours"),
    ],
}


def run(bus: Literal["rabbitmq", "memory"]) -> int:
    """Tells the story on stdout, and returns the exit code: 0 if every reader ended with the right price, else 1.

    Args:
        bus: `memory` for acts 1 to 3 in this process, `rabbitmq` for all four on private servers.

    Raises:
        SandboxError: a server is not installed, or did not start.
        CacheinvalError: the story could not be told to its end.
        KeyboardInterrupt: Ctrl-C; everything has been cleaned up.
    """
    logs.configure("CRITICAL", "text")  # the story says what there is to say
    page, began = Page(), time.monotonic()
    wrong = asyncio.run(_bounded(_tell(bus, page)))
    took = time.monotonic() - began
    page.end(wrong, f"Every reader ended with the right price, after {took:.0f} s in all.", _NEXT[bus])
    return 1 if wrong else 0


def _tell(bus: str, page: Page) -> Coroutine[Any, Any, list[Wrong]]:
    if bus == "memory":
        return memory.tell(page)
    from cacheinval.demo import servers  # not before: the small story needs nothing of it

    return servers.tell(page)


async def _bounded(story: Coroutine[Any, Any, list[Wrong]]) -> list[Wrong]:
    telling = asyncio.current_task()
    assert telling is not None
    signals: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        signals.append(number)
        telling.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):  # asyncio itself sees to SIGINT
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        async with asyncio.timeout(TIME_LIMIT) as limit:
            return await story
    except TimeoutError:
        if not limit.expired():
            raise
        raise CacheinvalError(f"the demo did not come to its end in {TIME_LIMIT:g} s") from None
    except asyncio.CancelledError:
        if not signals:
            raise
        raise SystemExit(128 + signals[0]) from None
