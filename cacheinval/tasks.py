"""The tasks of a client: parts that run for as long as it lives, and short ones beside them."""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from cacheinval import logs
from cacheinval.errors import CacheinvalError

__all__ = ["STOP_TIMEOUT", "Tasks"]

log = logging.getLogger("cacheinval.client")

RESTART_PAUSE = 1.0
STOP_TIMEOUT = 4.0
"""Seconds that parts have to end what they have begun."""


class Tasks:
    """Owns tasks, and sees their exceptions."""

    def __init__(self) -> None:
        self._parts: dict[str, asyncio.Task[None]] = {}
        self._asides: set[asyncio.Task[None]] = set()

    def start(
        self,
        name: str,
        run: Callable[[], Coroutine[Any, Any, None]],
        failed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Runs a part until it is stopped.

        None of them ends by itself, so an error is a defect: it is said loudly, `failed` is told, and the part starts over.
        """
        self._parts[name] = asyncio.create_task(self._supervise(name, run, failed), name=f"cacheinval {name}")

    async def _supervise(
        self, name: str, run: Callable[[], Coroutine[Any, Any, None]], failed: Callable[[str], None]
    ) -> None:
        while True:
            try:
                await run()
                raise CacheinvalError(f"{name} ended by itself")
            except (Exception, asyncio.CancelledError) as error:
                # The libraries cancel futures of their own; only who cancels this task means it.
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                    raise
                failed(f"{name} failed: {error!r}")
                log.exception("%s failed, starting it again", name)
            await asyncio.sleep(RESTART_PAUSE * random.uniform(0.5, 1.5))

    def aside(self, run: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """A short task beside the others; `run` sees to its own errors."""
        task = asyncio.create_task(run)
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)
        return task

    async def stop(self, *names: str) -> None:
        """Cancels these parts, and waits until they have ended, for at most `STOP_TIMEOUT` seconds."""
        await self._cancel({self._parts.pop(name) for name in names if name in self._parts})

    async def stop_all(self) -> None:
        """The same for all parts that are left, and what runs beside them."""
        await asyncio.sleep(
            0
        )  # what is cancelled before it has begun cannot give back what it was made to give back
        await self._cancel({*self._parts.values(), *self._asides})
        self._parts.clear()

    async def _cancel(self, tasks: "set[asyncio.Task[None]]") -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=STOP_TIMEOUT)
            for task in pending:
                logs.event(log, logging.WARNING, "still busy after its time to stop", task=task.get_name())
