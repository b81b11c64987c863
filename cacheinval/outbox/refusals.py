"""Finding out that the outbox takes rows again, where nobody writes any."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress

from cacheinval.errors import DatabaseError
from cacheinval.outbox.session import LOST
from cacheinval.outbox.writing import Executor, Outbox

__all__ = ["find_out"]

SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 10.0  # seconds
ANSWER_WITHIN = 10.0


async def find_out(outbox: Outbox, database: Callable[[], Executor]) -> None:
    """Asks again and again, while `outbox` refuses rows, whether it would take one; runs until cancelled."""
    while True:
        await outbox.refusing.wait()
        pause = SHORTEST_PAUSE
        while outbox.refused is not None:
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE)
            with suppress(DatabaseError, *LOST):
                async with asyncio.timeout(ANSWER_WITHIN):
                    await outbox.ask(database())
