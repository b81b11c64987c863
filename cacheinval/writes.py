"""Changing the database: the outbox row in the same transaction, and after COMMIT the eviction here and everywhere."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import asyncpg

from cacheinval.asking import Asking
from cacheinval.cache import PastCache, running_transaction
from cacheinval.coherence import Eviction, WriteOutcome, outcome_of_error, owed_after
from cacheinval.coherence.receipts import Question
from cacheinval.errors import DatabaseError
from cacheinval.outbox import Checkout, Checkouts, Outbox, Row, combine, leaves_session
from cacheinval.outbox.pool import STATEMENT_TIMEOUT
from cacheinval.publisher import Publisher, Unpublished
from cacheinval.transactions import Invalidations, Transaction

if TYPE_CHECKING:
    Pool = asyncpg.Pool[asyncpg.Record]

__all__ = ["Writes"]

COMMIT_TIMEOUT = STATEMENT_TIMEOUT  # which connections of our own pool have for each statement
ROLLBACK_TIMEOUT = 5.0


class Writes:
    """The write path of one client.

    Args:
        pool: gives the pool; raises NoDatabaseError.
        evict: evicts in every cache of this client; returns None when it has, or a future that ends (never with an
            error) when it has been tried.
        asking: told who is known to have evicted.
        aside: runs what a write is not to wait for.
    """

    def __init__(
        self,
        pool: Callable[[], "Pool"],
        outbox: Outbox,
        publisher: Publisher,
        evict: Callable[[Eviction], "asyncio.Future[None] | None"],
        asking: Asking,
        aside: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._outbox = outbox
        self._publisher = publisher
        self._evict = evict
        self._asking = asking
        self._checkouts = Checkouts(pool, aside)

    @asynccontextmanager
    async def transaction(
        self, question: Question | None = None, **options: Any
    ) -> AsyncIterator[Transaction]:
        """See `Client.transaction`."""
        async with self._checkouts.transaction(options) as checkout:
            connection = checkout.connection
            tx = Transaction(connection, self._rows, self._outbox.explain)
            try:
                with PastCache((self, tx)):
                    yield tx
                rows, named = tx.unrecorded, tx.named
                named.warn_if_large()
                await self._outbox.record(connection, rows, timeout=COMMIT_TIMEOUT)
            except BaseException:
                with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
                    async with asyncio.timeout(ROLLBACK_TIMEOUT):
                        await checkout.transaction.rollback()
                raise
            await self._settle(lambda: _commit(checkout), named, [*tx.rows, *rows], question)
            if tx.leaves_session:
                checkout.spare_reset()

    @property
    def running(self) -> Transaction | None:
        """The transaction of this client in which this runs."""
        owner, tx = running_transaction() or (None, None)
        return tx if owner is self else None

    async def statement(
        self,
        method: str,
        query: str,
        args: Sequence[Any],
        invalidations: Invalidations,
        timeout: float | None,
    ) -> Any:
        """`execute`, `fetch` or `fetchrow` with its outbox row, in one round trip where the statement allows it."""
        rows = self._rows(invalidations)
        combined = combine(query, len(args), rows[0].insert) if len(rows) == 1 else None
        if combined is None:
            async with self.transaction() as tx:
                result = await getattr(tx.connection, method)(query, *args, timeout=timeout)
                tx.invalidations = invalidations
            return result
        arguments = (*args, *rows[0].arguments)
        async with self._checkouts.connection() as checkout:
            call = getattr(checkout.connection, method)
            result = await self._settle(
                lambda: call(combined, *arguments, timeout=timeout), invalidations, rows
            )
            if leaves_session(query):
                checkout.spare_reset()
            return result

    async def invalidate(self, invalidations: Invalidations, question: Question | None = None) -> None:
        """Commits the outbox rows alone: a change that is not in this database."""
        rows = self._rows(invalidations)
        if len(rows) > 1:
            async with self.transaction(question) as tx:
                tx.invalidations = invalidations
            return
        async with self._checkouts.connection() as checkout:
            connection, record = checkout.connection, self._outbox.record
            await self._settle(
                lambda: record(connection, rows, timeout=COMMIT_TIMEOUT), invalidations, rows, question
            )

    async def _settle(
        self,
        commit: Callable[[], Any],
        invalidations: Invalidations,
        rows: Sequence[Row],
        question: Question | None = None,
    ) -> Any:
        """Runs what commits, and does what is then owed, whether its outcome is known or not."""
        outcome = WriteOutcome.UNKNOWN
        try:
            result = await commit()
            outcome = WriteOutcome.COMMITTED
            if self._outbox.refused is not None and invalidations:
                self._outbox.took_rows()
        except asyncpg.PostgresError as error:
            outcome = outcome_of_error(error.sqlstate)
            problem = self._outbox.explain(error)
            if problem is None:
                raise
            raise problem from error
        except DatabaseError as error:  # the same, explained before
            if isinstance(error.__cause__, asyncpg.PostgresError):
                outcome = outcome_of_error(error.__cause__.sqlstate)
            raise
        finally:
            # No await before everything owed is handed over: a cancelled writer still tells the others.
            evicting = self._tell(outcome, invalidations, rows, question) if invalidations else None
        if evicting is not None:
            await asyncio.wait(
                {evicting}
            )  # it goes on where nobody waits for it any more, and ends for reasons of its own
        if question is not None and not invalidations:
            # What triggers or `record` have made of it is not known here: it may be stale anywhere, here too.
            self._asking.committed(question, evicted_here=False, names_something=False)
        return result

    def _tell(
        self,
        outcome: WriteOutcome,
        invalidations: Invalidations,
        rows: Sequence[Row],
        question: Question | None,
    ) -> "asyncio.Future[None] | None":
        owed = owed_after(outcome)
        if not owed.publish:
            return None
        evicting = self._evict(
            Eviction(
                invalidations.keys,
                invalidations.tags,
                invalidations.everything,
                reason="own write",
                versions=invalidations.versions,
            )
        )
        evicted_here = owed.may_skip_echo and evicting is None
        if question is not None and outcome is WriteOutcome.COMMITTED:
            self._asking.committed(question, evicted_here=evicted_here)
        self._publisher.submit(
            Unpublished(
                keys=invalidations.keys,
                tags=invalidations.tags,
                versions=invalidations.versions,
                everything=invalidations.everything,
                rows=[row.id for row in rows] if owed.delete_rows else (),
                evicted_here=evicted_here,
                committed_at=time.time(),
                question=question,
                context=rows[0].context,
            )
        )
        return evicting

    def _rows(self, invalidations: Invalidations) -> list[Row]:
        if not invalidations:
            return []
        return self._outbox.rows(
            invalidations.keys,
            versions=invalidations.versions,
            tags=invalidations.tags,
            everything=invalidations.everything,
            publish_here=True,
        )


async def _commit(checkout: Checkout) -> None:
    try:
        async with checkout.within(COMMIT_TIMEOUT):
            await checkout.transaction.commit()
    except TimeoutError as error:
        raise TimeoutError("COMMIT was not answered in time; it may have been made") from error
