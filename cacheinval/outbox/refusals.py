"""Finding out whether the outbox refuses rows, where something makes one think so, and that it takes them again."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress

from cacheinval.errors import DatabaseError
from cacheinval.outbox.instances import answer
from cacheinval.outbox.writing import Executor, Outbox

__all__ = ["find_out"]

PAUSE = (
    1.0  # seconds at most: however many writes fail, by however many tables and roles, it asks no more often
)
ANSWER_WITHIN = 10.0


async def find_out(outbox: Outbox, pool: Callable[[], Executor]) -> None:
    """Asks, at once and then again and again while it is suspected, whether `outbox` refuses rows; runs until cancelled.

    Args:
        pool: gives the client's own, whose role is meant.
    """
    while True:
        await outbox.suspected.wait()
        with suppress(DatabaseError):
            await answer(ANSWER_WITHIN, lambda: outbox.ask(pool()))
        await asyncio.sleep(PAUSE * random.uniform(0.5, 1))
