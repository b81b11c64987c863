"""Connections: a pool that is made and closed where it is ours, or borrowed from, and one that nobody else can occupy."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import asyncpg

from cacheinval.outbox.session import LOST
from cacheinval.settings import addresses

if TYPE_CHECKING:
    Pool = asyncpg.Pool[asyncpg.Record]

__all__ = [
    "CONNECT_TIMEOUT",
    "STATEMENT_TIMEOUT",
    "Borrowed",
    "OwnConnection",
    "close_pool",
    "connect",
    "make_pool",
]

CONNECT_TIMEOUT = 5.0
STATEMENT_TIMEOUT = 60.0
CLOSE_TIMEOUT = 1.0


class PooledConnection(asyncpg.Connection):
    """A connection of a pool of ours. Giving it back takes a round trip, in which asyncpg resets its session, unless
    whoever had it says that there is nothing to reset."""

    __slots__ = ("_is_as_it_was",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_as_it_was = False

    def leave_as_it_was(self) -> None:
        """All that was done since it was acquired leaves the session as it was; to be called just before it is given back."""
        self._is_as_it_was = True

    async def reset(self, *, timeout: float | None = None) -> None:
        """See asyncpg: without the round trip there is nothing that could take longer."""
        await super().reset(timeout=None if self._is_as_it_was else timeout)

    def get_reset_query(self) -> str:
        """See asyncpg, which asks for this as it takes the connection back, and sends nothing where it is empty."""
        is_as_it_was, self._is_as_it_was = self._is_as_it_was, False
        return "" if is_as_it_was else super().get_reset_query()


async def connect(url: str, *, timeout: float = CONNECT_TIMEOUT, **options: Any) -> Any:
    """A connection to the first host of `url` that answers, and is what its `target_session_attrs` asks for.

    asyncpg has one deadline for all hosts, of which one that swallows everything would leave nothing to the others.

    Args:
        timeout: seconds for all of them.
        options: as for `asyncpg.connect`, which raises what this raises.
    """
    first, *others = addresses(url)
    each = timeout / (1 + len(others))
    for following in others:
        with suppress(*LOST):
            return await asyncpg.connect(first, timeout=each, **options)
        first = following
    return await asyncpg.connect(first, timeout=each, **options)


async def make_pool(url: str) -> "Pool":
    """A pool of at most ten connections to the database at `url`."""
    # No connection is made before it is needed: a client can start, and wait, while the database is away.
    return await asyncpg.create_pool(
        url,
        connect=cast(Any, connect),  # it takes whatever asyncpg's own takes
        min_size=0,
        max_size=10,
        timeout=CONNECT_TIMEOUT,
        command_timeout=STATEMENT_TIMEOUT,
        connection_class=PooledConnection,
    )


async def close_pool(pool: "Pool") -> None:
    """Closes it, whatever its connections do. Never raises, and ends within seconds."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await pool.close()
    except Exception:  # it waits for connections that are in use, or that no longer answer
        pool.terminate()


class OwnConnection:
    """One connection of our own, for statements one after the other: made when it is needed, anew when it is lost."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> str:
        """As asyncpg's."""
        async with self._connected() as connection:
            return await connection.execute(query, *args, timeout=timeout)

    async def fetchrow(self, query: str, *args: object, timeout: float | None = None) -> Any:
        """As asyncpg's."""
        async with self._connected() as connection:
            return await connection.fetchrow(query, *args, timeout=timeout)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        connection = self._connection
        if connection is None or connection.is_closed():
            connection = self._connection = await connect(self._url, command_timeout=STATEMENT_TIMEOUT)
        try:
            yield connection
        except asyncpg.PostgresError:
            raise  # an answer: the connection is as good as before
        except BaseException:
            # It is lost, or was not answered in time; whoever comes next is not to wait for that.
            connection.terminate()
            self._connection = None
            raise

    async def close(self) -> None:
        """Never raises, and ends within a second or so."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await connection.close()
            except Exception:  # it no longer answers
                connection.terminate()


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
