"""One transaction, and what it makes stale."""

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import asyncpg

from cacheinval import logs
from cacheinval.coherence.receipts import Receipt
from cacheinval.errors import DatabaseError
from cacheinval.messages import check_names
from cacheinval.outbox import Row, combine, leaves_session

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = PoolConnectionProxy[asyncpg.Record]
    AnyConnection = asyncpg.Connection[asyncpg.Record] | Connection

__all__ = ["Invalidations", "Transaction"]

LARGE = 10_000
"""Names in one write above which it is said, before it is committed, that there is a better way: each thousand of them is
a message to every instance, which evicts them one by one."""

log = logging.getLogger("cacheinval.writes")


@dataclass(slots=True)
class Invalidations:
    """What a write makes stale."""

    keys: list[str] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    everything: bool = False

    def add(
        self,
        keys: Collection[str] = (),
        tags: Collection[str] = (),
        versions: Sequence[int | None] | None = None,
        everything: bool = False,
    ) -> None:
        """Notes more of it.

        Raises:
            InvalidKeyError: a key or tag is not 1 to 512 bytes of UTF-8 without NUL.
            ValueError: there are not as many versions as keys.
        """
        checked, checked_tags = check_names(keys), check_names(tags, "tag")
        if versions is not None and len(versions) != len(checked):
            raise ValueError(
                f"{len(versions)} versions for {len(checked)} keys; accepted: one for each, or None"
            )
        self.keys += checked
        self.versions += [None] * len(checked) if versions is None else versions
        self.tags += checked_tags
        self.everything |= everything

    def merge(self, other: "Invalidations") -> None:
        """Notes all of `other`, too."""
        self.keys += other.keys
        self.versions += other.versions
        self.tags += other.tags
        self.everything |= other.everything

    def __bool__(self) -> bool:
        return bool(self.keys or self.tags or self.everything)

    def warn_if_large(self) -> None:
        """To be called once, before the write is committed."""
        if len(self.keys) + len(self.tags) > LARGE and not self.everything:
            logs.event(
                log,
                logging.WARNING,
                "a large write: give these entries a tag and invalidate that, or everything",
                keys=len(self.keys),
                tags=len(self.tags),
                above=LARGE,
            )


class Transaction:
    """An asyncpg transaction that knows what it makes stale; every method of the connection can be called on it.

    >>> async with client.transaction() as tx:
    ...     await tx.executemany("INSERT INTO prices VALUES ($1, $2)", [("lamp", 20), ("chair", 80)])
    ...     tx.invalidate("price:lamp", "price:chair")
    """

    receipt: Receipt | None = None
    """Who has evicted, once the transaction has committed and the others were waited for (`wait=`)."""

    def __init__(
        self,
        connection: "Connection",
        rows: Callable[[Invalidations], list[Row]],
        explain: Callable[[asyncpg.PostgresError], DatabaseError | None],
    ) -> None:
        self._connection = connection
        self._rows_of = rows
        self._explain = explain
        self._only_statements = True
        self._recorded = Invalidations()  # by a row that went along with its statement
        self.invalidations = Invalidations()
        """What is to be recorded before COMMIT."""
        self.rows: list[Row] = []
        """Those that are written."""

    @property
    def connection(self) -> "Connection":
        """asyncpg's connection.

        >>> async with client.transaction() as tx:
        ...     await tx.connection.copy_records_to_table("prices", records=[("lamp", 20)])
        ...     tx.invalidate("price:lamp")
        'COPY 1'
        """
        self._only_statements = False  # whatever is done with it is not seen here
        return self._connection

    @property
    def leaves_session(self) -> bool:
        """Whether what was done here surely lasts no longer than the transaction in the connection's session."""
        return self._only_statements

    # These four are seen, so that nearly all transactions need no reset of their session. Where something else was done,
    # a savepoint may have been rolled back, too, and a row that went along with a statement with it.

    async def execute(
        self,
        query: str,
        *args: Any,
        invalidate: Collection[str] = (),
        tags: Collection[str] = (),
        timeout: float | None = None,
    ) -> str:
        """As asyncpg's `Connection.execute`, and says what the statement makes stale.

        >>> async with client.transaction() as tx:
        ...     await tx.execute("DELETE FROM prices WHERE id = $1", "abc-123", invalidate=["price:abc-123"])
        'DELETE 1'

        That has the effect of `tx.invalidate`, and takes no round trip of its own where the statement is one INSERT, UPDATE
        or DELETE: its outbox row goes along with it.

        Args:
            invalidate, tags: keys and tags that are evicted everywhere, once the transaction has committed.

        Raises:
            InvalidKeyError: a key or tag is not 1 to 512 bytes of UTF-8 without NUL.
            SchemaMissingError: `cacheinval schema apply` has not been run.
        """
        result: str = await self._call("execute", query, args, invalidate, tags, timeout=timeout)
        return result

    async def fetch(
        self,
        query: str,
        *args: Any,
        invalidate: Collection[str] = (),
        tags: Collection[str] = (),
        timeout: float | None = None,
        record_class: type[asyncpg.Record] | None = None,
    ) -> list[asyncpg.Record]:
        """As asyncpg's `Connection.fetch`; `invalidate` and `tags` as in `execute`.

        >>> async with client.transaction() as tx:
        ...     rows = await tx.fetch("UPDATE prices SET price = price + 1 RETURNING id")
        ...     tx.invalidate(*(f"price:{row['id']}" for row in rows))
        """
        options = {"timeout": timeout, "record_class": record_class}
        result: list[asyncpg.Record] = await self._call("fetch", query, args, invalidate, tags, **options)
        return result

    async def fetchrow(
        self,
        query: str,
        *args: Any,
        invalidate: Collection[str] = (),
        tags: Collection[str] = (),
        timeout: float | None = None,
        record_class: type[asyncpg.Record] | None = None,
    ) -> asyncpg.Record | None:
        """As asyncpg's `Connection.fetchrow`; `invalidate` and `tags` as in `execute`.

        >>> async with client.transaction() as tx:
        ...     row = await tx.fetchrow("SELECT price FROM prices WHERE id = $1 FOR UPDATE", "abc-123")
        ...     await tx.execute("UPDATE prices SET price = $2 WHERE id = $1", "abc-123", row["price"] + 1)
        ...     tx.invalidate("price:abc-123")
        'UPDATE 1'
        """
        options = {"timeout": timeout, "record_class": record_class}
        result: asyncpg.Record | None = await self._call("fetchrow", query, args, invalidate, tags, **options)
        return result

    async def fetchval(
        self,
        query: str,
        *args: Any,
        invalidate: Collection[str] = (),
        tags: Collection[str] = (),
        column: int = 0,
        timeout: float | None = None,
    ) -> Any:
        """As asyncpg's `Connection.fetchval`; `invalidate` and `tags` as in `execute`.

        >>> raised = "UPDATE prices SET price = price + 1 WHERE id = $1 RETURNING price"
        >>> async with client.transaction() as tx:
        ...     price = await tx.fetchval(raised, "abc-123", invalidate=["price:abc-123"])
        >>> price
        100
        """
        options = {"column": column, "timeout": timeout}
        return await self._call("fetchval", query, args, invalidate, tags, **options)

    async def _call(
        self,
        method: str,
        query: str,
        args: Sequence[Any],
        invalidate: Collection[str],
        tags: Collection[str],
        **options: Any,
    ) -> Any:
        self._only_statements = self._only_statements and leaves_session(query)
        named = Invalidations()
        named.add(invalidate, tags)
        call = getattr(self._connection, method)
        try:
            if named:
                return await self._call_with(named, call, query, args, options)
            return await call(query, *args, **options)
        except BaseException:
            # Whoever catches this may go on to a COMMIT that the server answers by a rollback, without an error: what is
            # named is written once more before it, and that fails.
            self._only_statements = False
            raise

    async def _call_with(
        self,
        named: Invalidations,
        call: Callable[..., Awaitable[Any]],
        query: str,
        args: Sequence[Any],
        options: dict[str, Any],
    ) -> Any:
        rows = self._rows_of(named)
        combined = combine(query, len(args), rows[0].insert) if len(rows) == 1 else None
        recorded = False
        try:
            if combined is None:
                return await call(query, *args, **options)
            result = await call(combined, *args, *rows[0].arguments, **options)
            recorded = True
            self.rows += rows
            return result
        except asyncpg.PostgresError as error:
            problem = self._explain(error)
            if problem is None:
                raise
            raise problem from error
        finally:
            # What has failed, or was given up, may have been done all the same, or may be tried again in another way.
            (self._recorded if recorded else self.invalidations).merge(named)

    def invalidate(
        self,
        *keys: str,
        tags: Collection[str] = (),
        versions: Sequence[int | None] | None = None,
        everything: bool = False,
    ) -> None:
        """Evicts these everywhere, once the transaction has committed; never if it does not.

        >>> async with client.transaction() as tx:
        ...     await tx.execute("UPDATE prices SET price = 109 WHERE id = $1", "abc-123")
        ...     tx.invalidate("price:abc-123", versions=[8])
        ...     tx.invalidate(tags=["reports"])
        'UPDATE 1'

        Args:
            versions: what the rows have become, one for each key, None where unknown; for a deleted row one more than
                its last. Loads with `version=` store nothing older.

        Raises:
            InvalidKeyError: a key or tag is not 1 to 512 bytes of UTF-8 without NUL.
        """
        self.invalidations.add(keys, tags, versions, everything)

    @property
    def unrecorded(self) -> list[Row]:
        """The rows that are still to be written before COMMIT."""
        left = Invalidations()
        if not self._only_statements:
            left.merge(self._recorded)
        left.merge(self.invalidations)
        return self._rows_of(left)

    @property
    def named(self) -> Invalidations:
        """All that it makes stale."""
        named = Invalidations()
        named.merge(self._recorded)
        named.merge(self.invalidations)
        return named

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)
