"""The pool of connections: made and closed where it is ours, borrowed from where it is somebody else's."""

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import asyncpg

from cacheinval.outbox.session import LOST

if TYPE_CHECKING:
    Pool = asyncpg.Pool[asyncpg.Record]

__all__ = ["CONNECT_TIMEOUT", "STATEMENT_TIMEOUT", "Borrowed", "close_pool", "make_pool"]

CONNECT_TIMEOUT = 5.0
STATEMENT_TIMEOUT = 60.0
CLOSE_TIMEOUT = 1.0


async def make_pool(url: str) -> "Pool":
    """A pool of at most ten connections to the database at `url`."""
    # No connection is made before it is needed: a client can start, and wait, while the database is away.
    return await asyncpg.create_pool(
        url, min_size=0, max_size=10, timeout=CONNECT_TIMEOUT, command_timeout=STATEMENT_TIMEOUT
    )


async def close_pool(pool: "Pool") -> None:
    """Closes it, whatever its connections do. Never raises, and ends within seconds."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await pool.close()
    except Exception:  # it waits for connections that are in use, or that no longer answer
        pool.terminate()


class Borrowed:
    """A session out of somebody else's pool: closing it gives it back, which also resets it and frees its locks."""

    def __init__(self, pool: "Pool", connection: Any) -> None:
        self._pool = pool
        self._connection = connection
        self._given_back = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def close(self) -> None:
        """Gives the session back; ends within seconds."""
        if self._given_back:
            return
        self._given_back = True
        with suppress(*LOST):
            # asyncpg does this, too, unless the pool's owner has set a `reset` of his own.
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._connection.execute("SELECT pg_advisory_unlock_all(); RESET ALL")
        await self._pool.release(self._connection, timeout=CLOSE_TIMEOUT)

    def terminate(self) -> None:
        """`close` has given it back, or ended it where the database did not answer."""
