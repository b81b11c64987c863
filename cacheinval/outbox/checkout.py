"""A connection out of a pool for one write, and the way back."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Self

import asyncpg

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]

__all__ = ["Checkout", "Checkouts"]

ACQUIRE_TIMEOUT = 10.0
RELEASE_TIMEOUT = 5.0

_NO_DEADLINE = nullcontext()


class Checkouts:
    """What is taken out of one pool, with many writers at once.

    Args:
        pool: gives the pool; raises NoDatabaseError.
        aside: runs what a write is not to wait for.
    """

    def __init__(
        self, pool: Callable[[], "Pool"], aside: Callable[[Coroutine[Any, Any, None]], object]
    ) -> None:
        self.pool = pool
        self.aside = aside
        self.writing = 0
        """Who has a connection, or waits for one."""

    def connection(self) -> "Checkout":
        """A connection, in no transaction."""
        return Checkout(self)

    def transaction(self, options: dict[str, Any]) -> "Checkout":
        """A connection, in a transaction with these options of asyncpg, which is ended by whoever enters this."""
        return Checkout(self, options)


class Checkout:
    """A connection, while this is entered.

    Raises, as it is entered:
        NoDatabaseError: there is no database.
        TimeoutError: no connection in time, or no answer to BEGIN.
    """

    __slots__ = ("_leave_as_it_was", "_options", "_pool", "_shared", "_taken", "connection", "transaction")

    connection: "Connection"
    transaction: asyncpg.transaction.Transaction

    def __init__(self, shared: Checkouts, options: dict[str, Any] | None = None) -> None:
        self._shared = shared
        self._options = options
        self._taken = False

    async def __aenter__(self) -> Self:
        self._pool = self._shared.pool()
        self._shared.writing += 1
        try:
            # A deadline around it, and not `acquire(timeout=)`, which on Python 3.11 runs a task for it.
            async with asyncio.timeout(ACQUIRE_TIMEOUT):
                self.connection = await self._pool.acquire()
                self._taken = True
                if self._options is not None:
                    self.transaction = self.connection.transaction(**self._options)
                    await self.transaction.start()
        except BaseException as error:
            await self._give_back()
            if isinstance(error, TimeoutError):
                raise TimeoutError(
                    "no connection to the database in time (CACHEINVAL_DATABASE_URL): none can be made, or none answers, "
                    f"or all {self._pool.get_max_size()} of the pool are in use"
                ) from error
            raise
        self._leave_as_it_was = getattr(self.connection, "leave_as_it_was", None)
        return self

    def within(self, seconds: float) -> AbstractAsyncContextManager[object]:
        """A deadline for one statement, where the pool is borrowed: of ours each has one (`STATEMENT_TIMEOUT`) by itself."""
        return asyncio.timeout(seconds) if self._leave_as_it_was is None else _NO_DEADLINE

    def spare_reset(self) -> None:
        """All that was done leaves the session as it was, so that it need not be reset; to be called at the very end."""
        if self._leave_as_it_was is not None:
            self._leave_as_it_was()

    async def __aexit__(self, problem: type[BaseException] | None, *_: object) -> None:
        # To give it back takes one more round trip, in which asyncpg resets the session: who writes alone need not
        # wait for that. Of many at once each would take a further connection meanwhile, which costs more than it
        # saves; and after a failure what is still under way has to be cancelled first.
        giving_back = self._give_back()
        if problem is None and self._shared.writing == 1:
            self._shared.aside(giving_back)
        else:
            await giving_back

    async def _give_back(self) -> None:
        # Unbounded, giving back a half-open connection would hang; after the deadline asyncpg terminates it.
        try:
            with suppress(TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresError, OSError):
                if self._taken:
                    await self._pool.release(self.connection, timeout=RELEASE_TIMEOUT)
        finally:
            self._shared.writing -= 1
