"""The relay's session with the database: the lock that makes it leader, and the rows that are due."""

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from uuid import UUID

import asyncpg

from cacheinval.errors import DatabaseError
from cacheinval.outbox.leading import session_name
from cacheinval.outbox.schema import OLDEST_SERVER
from cacheinval.outbox.writing import DELETE, explain

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
    Prepared = asyncpg.prepared_stmt.PreparedStatement[asyncpg.Record]

__all__ = ["LOST", "MOST_WAITING", "Look", "Session"]

_T = TypeVar("_T")

ROWS_PER_ROUND = 5_000
BYTES_PER_ROUND = 1 << 20  # as stored; names compress about tenfold at best
MOST_WAITING = 100_000  # rows; with more, a tick waits until the backlog is shorter
ANSWER_TIMEOUT = 10.0
CLOSE_TIMEOUT = 2.0

LOST = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What is raised when a database cannot be reached, or is lost."""

_LOST_STATES = ("08", "57")  # connection exception, operator intervention

# A frozen leader is noticed by the server alone: an idle one is disconnected after `idle_…`, and one to which the
# server waits to hand a result, after `tcp_user_timeout`.
_SETTINGS = """
    SELECT pg_is_in_recovery(),
        set_config('application_name', coalesce(nullif(current_setting('application_name'), ''), $1), false),
        set_config('idle_session_timeout', $2, false),
        set_config('idle_in_transaction_session_timeout', $2, false),
        set_config('tcp_user_timeout', $3, false),
        set_config('synchronous_commit', 'off', false)
"""
# (A name that the address or the pool has given it stays: somebody looks for that. A row whose DELETE is lost in a crash of
# the server is published once more, so no DELETE waits for the disk.)

_LOCK = "SELECT pg_try_advisory_lock(hashtextextended('cacheinval.relay.' || $1, 0))"

# Whatever is visible, as a set: rows become visible in any order. One row at least, however large it is.
_DUE = """
    SELECT id, {names}, everything, extract(epoch FROM recorded_at)::float8 AS recorded_at
    FROM (
        SELECT *, sum(pg_column_size(keys) + pg_column_size(tags))
            OVER (ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
        FROM (
            SELECT * FROM cacheinval.outbox WHERE namespace = $1 AND publish_at <= clock_timestamp() LIMIT $2
        ) AS due
    ) AS measured
    WHERE bytes_before IS NULL OR bytes_before < $3
"""

# `now()` is when the transaction began, and each statement sees what was committed before *it* began: the time is taken by
# a statement of its own, before the one that looks. (In one statement it would come after the look's snapshot.)
_TIME = "SELECT extract(epoch FROM now())::float8"
_LOOK = """
    SELECT cacheinval.source() AS source,
        ARRAY(SELECT id FROM cacheinval.outbox WHERE namespace = $1 LIMIT $2) AS waiting
"""
# Also of which tables this was seen: rows of a schema that was dropped are not left either, and were not confirmed.
_LEFT = """
    SELECT to_regclass('cacheinval.outbox')::oid::text AS schema,
        ARRAY(SELECT id FROM cacheinval.outbox WHERE id = ANY($2::uuid[])) AS ids,
        ARRAY(SELECT origin FROM cacheinval.origins WHERE namespace = $1 ORDER BY origin) AS origins,
        ARRAY(SELECT seq FROM cacheinval.origins WHERE namespace = $1 ORDER BY origin) AS seqs
"""
_COUNT = "SELECT count(*) FROM (SELECT FROM cacheinval.outbox WHERE namespace = $1 LIMIT $2) AS counted"
_FORGET = "DELETE FROM cacheinval.origins WHERE namespace = $1 AND confirmed_at < now() - interval '1 hour'"

# A database whose encoding is not UTF8 may hold names that cannot be sent to anybody.
_UNREADABLE = (
    UnicodeDecodeError,
    asyncpg.CharacterNotInRepertoireError,
    asyncpg.UntranslatableCharacterError,
)


class Look(NamedTuple):
    """The outbox at one moment."""

    as_of: float
    """The database's time: all that was committed before is in here, or was confirmed."""
    took: tuple[float, float]
    """Our own wall clock before and after that moment."""
    source: str
    waiting: set[UUID]


class Confirmed(NamedTuple):
    """What has been noted in the schema when nothing of a look was left."""

    schema: str
    """Which one it was: another after it was dropped and made again."""
    seqs: dict[str, int]
    """The last confirmed numbers by origin."""


class Session:
    """One connection, prepared to lead; each call raises one of `LOST`, or DatabaseError where retrying is no help."""

    def __init__(self, connection: "Connection", namespace: str) -> None:
        self._connection = connection
        self._namespace = namespace
        self._due: Prepared | None = None
        self._due_unreadable: Prepared | None = None
        self._delete: Prepared | None = None
        self._others: dict[str, Prepared] = {}

    async def prepare(self, idle_timeout: float) -> None:
        """Makes ready for everything, and tries it, so that whoever gets the lock is able to use it.

        Between the two halves of preparing a statement the server waits for its client without any limit, and would
        keep a lock just as long: nothing is prepared later.

        Args:
            idle_timeout: seconds without a word from here after which the server ends the session.
        """
        connection = self._connection
        major = connection.get_server_version().major
        if major < OLDEST_SERVER:
            raise DatabaseError(f"the server is PostgreSQL {major}; accepted: {OLDEST_SERVER} or newer")
        idle, unread = max(1, int(1_000 * idle_timeout)), int(1_000 * max(5.0, idle_timeout))
        if await _answer(connection.fetchval(_SETTINGS, session_name(), str(idle), str(unread))):
            raise DatabaseError("the database is a standby (in recovery); accepted: the primary")
        self._due = await _answer(
            connection.prepare(_DUE.format(names="keys, versions, tags, left(context, 600) AS context"))
        )
        self._due_unreadable = await _answer(
            connection.prepare(
                _DUE.format(names="NULL AS keys, NULL AS versions, NULL AS tags, NULL AS context")
            )
        )
        self._delete = await _answer(connection.prepare(DELETE))
        for statement in (_TIME, _LOOK, _LEFT, _COUNT, _FORGET):
            self._others[statement] = await _answer(connection.prepare(statement))
        await self.due(rows=0)
        await self.delete([UUID(int=0)], {})
        await self.look()
        await self.left(set())
        await self.count()
        await _answer(self._others[_FORGET].fetch(""))

    async def lead(self) -> bool:
        """Takes the lock, if nobody else has it; to be tried until it is taken, and only by one for a namespace."""
        return bool(await _answer(self._connection.fetchval(_LOCK, self._namespace)))

    async def due(self, rows: int = ROWS_PER_ROUND) -> Sequence[Mapping[str, Any]]:
        """Rows that are visible and due; with names None where these cannot be read."""
        assert self._due is not None
        assert self._due_unreadable is not None
        limits = (self._namespace, rows, BYTES_PER_ROUND)
        try:
            found = await _answer(self._due.fetch(*limits))
        except _UNREADABLE:
            found = await _answer(self._due_unreadable.fetch(*limits))
        return cast("Sequence[Mapping[str, Any]]", found)

    async def delete(self, ids: Sequence[UUID], confirmed: Mapping[str, int]) -> None:
        """Deletes these rows, and notes the last confirmed number of each origin."""
        assert self._delete is not None
        if ids:
            numbers = list(confirmed), list(confirmed.values())
            await _answer(self._delete.fetch(ids, self._namespace, *numbers))

    async def look(self) -> Look:
        """What the outbox holds, due or not."""
        before = time.time()
        await _answer(self._connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY"))
        after = time.time()  # when it began is what the database tells, however long we take to ask for it
        as_of = await _answer(self._others[_TIME].fetchval())
        row = await _answer(self._others[_LOOK].fetchrow(self._namespace, MOST_WAITING))
        await _answer(self._connection.execute("COMMIT"))
        assert row is not None
        return Look(as_of, (before, after), row["source"], set(row["waiting"]))

    async def left(self, ids: set[UUID]) -> tuple[set[UUID], Confirmed]:
        """Which of these rows nobody has deleted yet, and what is noted as confirmed, in one snapshot."""
        row = await _answer(self._others[_LEFT].fetchrow(self._namespace, list(ids)))
        assert row is not None
        return set(row["ids"]), Confirmed(row["schema"], dict(zip(row["origins"], row["seqs"], strict=True)))

    async def count(self) -> int:
        """How many rows the outbox holds, due or not; no more than `MOST_WAITING` are counted."""
        return int(await _answer(self._others[_COUNT].fetchval(self._namespace, MOST_WAITING)))

    async def forget_old_origins(self) -> None:
        """Removes the numbers of channels that have long been silent: every instance has been told them."""
        await _answer(self._others[_FORGET].fetch(self._namespace))

    async def keep(self) -> None:
        """A word to the server, so that it does not end the session for being idle."""
        await _answer(self._connection.execute("SELECT 1"))

    async def close(self) -> None:
        """Ends the session, and with it the leadership. Raises nothing, and ends within seconds."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._connection.close()
        except LOST:
            pass
        finally:
            self._connection.terminate()


async def _answer(query: Awaitable[_T]) -> _T:
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            return await query
    except _UNREADABLE:
        raise
    except asyncpg.PostgresError as error:
        if (error.sqlstate or "")[:2] in _LOST_STATES:
            raise
        raise (explain(error, ours=True) or DatabaseError(str(error))) from error
