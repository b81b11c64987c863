"""Waiting for a state, and doing something else meanwhile."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from cacheinval.errors import CacheinvalError

__all__ = ["PATIENCE", "meanwhile", "together", "until"]

PATIENCE = 10.0  # seconds, for what takes a few when all is well


async def until(state: Callable[[], Awaitable[bool]], what: str, patience: float = PATIENCE) -> None:
    """Waits for a state.

    Args:
        state: whether it is reached.
        what: the state in words, after "waited in vain until …".
        patience: seconds.

    Raises:
        CacheinvalError: the state was not reached.
    """
    end, pause = time.monotonic() + patience, 0.002
    while not await state():
        if time.monotonic() > end:
            raise CacheinvalError(f"waited {patience:g} s in vain until {what}")
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.05)


@asynccontextmanager
async def meanwhile(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` for as long as the block lasts; what one of them raises ends the block, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
            yield
            for task in tasks:
                task.cancel()
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def together(*work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` to its end; what one of them raises ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
