"""Loads in the background, which nobody waits for."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

__all__ = ["Reloads"]

MOST_AT_ONCE = 1_000
"""Reloads that run or wait for a place; what would be one more is left to the next read."""

STOP_TIMEOUT = 4.0


class Reloads:
    """Owns the tasks of reloads, at most one of a key, and sees how they end.

    Args:
        failed: told the key and the error of a reload that failed.
    """

    def __init__(self, failed: Callable[[str, Exception], None]) -> None:
        self._failed = failed
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    def start(self, key: str, reload: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Begins to run `reload`; False where one of `key` runs already, or too many do."""
        if key in self._tasks or len(self._tasks) >= MOST_AT_ONCE or self._closed:
            return False
        task = self._tasks[key] = asyncio.create_task(reload(), name=f"cacheinval reload of {key}")
        task.add_done_callback(partial(self._ended, key))
        return True

    def _ended(self, key: str, task: "asyncio.Task[None]") -> None:
        del self._tasks[key]
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._failed(key, error)

    def __len__(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Cancels what runs, and waits until it has ended, for at most `STOP_TIMEOUT` seconds; nothing starts any more."""
        self._closed = True
        tasks = set(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_TIMEOUT)
