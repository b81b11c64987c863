"""How one client reaches its database: by a pool, its own or its user's, and by connections beside it."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from cacheinval.errors import DatabaseError, NoDatabaseError
from cacheinval.outbox.instances import Database
from cacheinval.outbox.pool import (
    CONNECT_TIMEOUT,
    STATEMENT_TIMEOUT,
    Borrowed,
    OwnConnection,
    close_pool,
    connect,
    make_pool,
)
from cacheinval.outbox.session import LOST

if TYPE_CHECKING:
    from cacheinval.writes import Pool

__all__ = ["Connections"]

RESTART_PAUSE = 1.0


class Connections:
    """Opens, gives and closes what is not the user's.

    Args:
        url: of the database; empty: there is none but that of `pool`.
        pool: the user's, used and never closed.
    """

    def __init__(self, url: str, pool: "Pool | None") -> None:
        self.exist = pool is not None or bool(url)
        """Whether there is a database."""
        self._url, self._pool, self._own_pool = url, pool, pool is None
        self._own_connection = OwnConnection(url)

    async def open(self, stack: AsyncExitStack) -> None:
        """Opens the pool, and has `stack` close it."""
        if self.exist and self._own_pool:
            self._pool = await make_pool(self._url)
            stack.push_async_callback(close_pool, self._pool)
            stack.push_async_callback(self._own_connection.close)

    @property
    def pool(self) -> "Pool":
        """See `Client.pool`."""
        if self._pool is None:
            if self.exist:
                raise DatabaseError("the client has not been entered: `async with Client(…) as client:`")
            raise NoDatabaseError
        return self._pool

    @property
    def registering(self) -> Database:
        """What the registration is renewed by, however busy a pool of the client's own is."""
        return self._own_connection if self._own_pool else self.pool

    async def connect_relay(self) -> Any:
        """A connection that the relay keeps."""
        if self._own_pool:
            return await connect(self._url, command_timeout=STATEMENT_TIMEOUT)
        return Borrowed(self.pool, await self.pool.acquire(timeout=CONNECT_TIMEOUT))

    async def learn_source(self, trust_only: Callable[[str], None]) -> None:
        """Asks the database who it is, once: only its own relay's ticks prove anything here."""
        while True:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    source = await self.pool.fetchval("SELECT cacheinval.source()")
                trust_only(source)
                await asyncio.Event().wait()  # for good: the task ends with the client
            except LOST:
                await asyncio.sleep(RESTART_PAUSE)
