"""Publishing what is left in the outbox, by one leader for a database and namespace (PROTOCOL.md, "Writing").

Leadership is an advisory lock, and only spares work: with two leaders everything is published twice, with none later.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from uuid import UUID

import asyncpg

from cacheinval import logs
from cacheinval.errors import DatabaseError, PublishError
from cacheinval.outbox.schema import OLDEST_SERVER
from cacheinval.outbox.sending import Channel, Sender
from cacheinval.outbox.writing import Outbox, explain

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Relay"]

log = logging.getLogger("cacheinval.relay")
_T = TypeVar("_T")

POLL_INTERVAL = 0.075
ROWS_PER_ROUND = 5_000
BYTES_PER_ROUND = 1 << 20  # as stored; names compress about tenfold at best
CONNECT_TIMEOUT = 10.0
QUERY_TIMEOUT = 10.0
CLOSE_TIMEOUT = 2.0
PAUSES = (0.2, 5.0)  # the first and the longest between two attempts
REASONS_SAID = 5

State = Literal["starting", "disconnected", "unready", "standby", "leader", "blocked", "stopped"]
_SAID: dict[State, tuple[int, str]] = {
    "disconnected": (logging.WARNING, "the relay has no database"),
    "unready": (logging.ERROR, "the relay cannot use the database"),
    "standby": (logging.INFO, "another relay leads, standing by"),
    "leader": (logging.INFO, "leading the relay"),
    "blocked": (logging.ERROR, "the outbox waits for the broker"),
}
_LOST = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

# A frozen leader is noticed by the server alone: idle it is disconnected after `idle_…`, and while the server waits to
# hand it a result, by `tcp_user_timeout`.
_SETTINGS = """
    SELECT pg_is_in_recovery(),
        set_config('application_name', $1, false),
        set_config('idle_session_timeout', $2, false),
        set_config('idle_in_transaction_session_timeout', $2, false),
        set_config('tcp_user_timeout', $3, false)
"""
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
_DUE_ROWS = _DUE.format(names="keys, versions, tags")
_DUE_UNREADABLE = _DUE.format(names="NULL AS keys, NULL AS versions, NULL AS tags")


class Relay:
    """Publishes rows of the outbox that nobody else has, and deletes them when the broker has confirmed.

    Args:
        connect: opens a session of the relay's own, directly to the primary (no pooler in between).
        open_channel: opens a publishing channel, which becomes the relay's own; raises PublishError.
        namespace: whose rows are relayed.
        tick_interval: seconds; a standby tries this often, and takes over from a frozen leader after 2.5 times this.
        publish_timeout: seconds for a message to be confirmed.
    """

    def __init__(
        self,
        connect: "Callable[[], Awaitable[Connection]]",
        open_channel: Callable[[], Awaitable[Channel]],
        *,
        namespace: str,
        tick_interval: float = 1.0,
        publish_timeout: float = 5.0,
    ) -> None:
        self._connect = connect
        self._namespace = namespace
        self._tick_interval = tick_interval
        self._poll_interval = min(POLL_INTERVAL, tick_interval / 2)
        self._outbox = Outbox(namespace)
        self._sender = Sender(open_channel, publish_timeout)
        self._pauses = _Pauses()
        self._state: State = "starting"
        self._since = time.time()
        self._reason: str | None = None
        self._reasons_said: set[str] = set()
        self._oldest: float | None = None
        self._errors = 0

    @property
    def leads(self) -> bool:
        """Whether this is the one that relays, be it that it waits for the broker just now."""
        return self._state in ("leader", "blocked")

    @property
    def state(self) -> dict[str, Any]:
        """For status: what the relay is doing, since when (seconds since 1970) and why; `oldest_row_age` in seconds."""
        age = None if self._oldest is None else max(0.0, time.time() - self._oldest)
        return {"state": self._state, "since": self._since, "reason": self._reason, "oldest_row_age": age}

    @property
    def counters(self) -> dict[str, int]:
        """Numbers since the start."""
        return {
            "published_rows": self._sender.published_rows,
            "published_messages": self._sender.published_messages,
            "bad_rows": self._sender.bad_rows,
            "errors": self._errors,
        }

    async def run(self) -> None:
        """Leads, or stands by to lead, until cancelled; whatever happens to database and broker."""
        try:
            while True:
                try:
                    await self._session()
                except DatabaseError as error:
                    self._enter("unready", str(error))
                except _LOST as error:
                    self._enter("disconnected", _describe(error))
                self._errors += 1
                await asyncio.sleep(self._pauses.next())
        finally:
            self._enter("stopped")

    async def _session(self) -> None:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            connection = await self._connect()
        try:
            await self._prepare(connection)
            while not await _answer(connection.fetchval(_LOCK, self._namespace)):
                self._enter("standby")
                self._pauses.start_over()
                await asyncio.sleep(self._tick_interval)
            await self._lead(connection)
        finally:
            self._oldest = None
            try:
                await _close(connection)  # first of all, since it frees the lock
            finally:
                await self._sender.close()

    async def _prepare(self, connection: "Connection") -> None:
        major = connection.get_server_version().major
        if major < OLDEST_SERVER:
            raise DatabaseError(f"the server is PostgreSQL {major}; accepted: {OLDEST_SERVER} or newer")
        idle, unread = int(1_500 * self._tick_interval), int(1_000 * max(5.0, 1.5 * self._tick_interval))
        name = f"cacheinval relay {self._namespace}"[:63]
        if await _answer(connection.fetchval(_SETTINGS, name, str(max(1, idle)), str(unread))):
            raise DatabaseError("the database is a standby (in recovery); accepted: the primary")

    async def _lead(self, connection: "Connection") -> None:
        while True:
            try:
                more = await self._round(connection)
            except PublishError as error:
                self._enter("blocked", str(error))
            except DatabaseError as error:
                self._enter("unready", str(error))
            except asyncpg.PostgresError as error:
                if connection.is_closed() or (error.sqlstate or "")[:2] in ("08", "57"):
                    raise
                self._enter("unready", _describe(error))
            else:
                self._enter("leader")
                self._pauses.start_over()
                if not more:
                    await asyncio.sleep(self._poll_interval)
                continue
            self._errors += 1
            await self._meanwhile(connection, asyncio.sleep(self._pauses.next()))

    async def _round(self, connection: "Connection") -> bool:
        """Publishes and deletes what is due; returns whether there is probably more of it."""
        rows = await self._due(connection)
        self._oldest = min((row["recorded_at"] for row in rows), default=None)
        if self._state in ("starting", "standby", "disconnected"):
            self._enter("leader")
        if not rows:
            return False
        before = self._sender.published_messages
        confirmed: list[UUID] = []
        failure = await self._meanwhile(connection, self._sender.publish(rows, confirmed))
        # Each of these was seen in the table before its publish began.
        await _answer(self._outbox.delete(connection, confirmed))
        if failure is not None:
            raise failure
        self._oldest = None
        return self._sender.published_messages > before + 1

    async def _due(self, connection: "Connection") -> Sequence[Mapping[str, Any]]:
        limits = (self._namespace, ROWS_PER_ROUND, BYTES_PER_ROUND)
        try:
            try:
                return await _answer(connection.fetch(_DUE_ROWS, *limits))
            except UnicodeDecodeError:  # a database in SQL_ASCII holds any bytes
                return await _answer(connection.fetch(_DUE_UNREADABLE, *limits))
        except asyncpg.PostgresError as error:
            problem = explain(error)
            if problem is None:
                raise
            raise problem from error

    async def _meanwhile(self, connection: "Connection", work: Coroutine[Any, Any, _T]) -> _T:
        """Awaits `work`, and uses the session often enough to keep it, and with it the leadership."""
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait({task}, timeout=self._tick_interval / 2))[0]:
                await _answer(connection.execute("SELECT 1"))
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=CLOSE_TIMEOUT)

    def _enter(self, state: State, reason: str | None = None) -> None:
        """Notes the state, and says it once, with each of the first few reasons that it has."""
        if state != self._state:
            self._state, self._since = state, time.time()
            self._reasons_said.clear()
        elif (
            reason in self._reasons_said or reason == self._reason or len(self._reasons_said) >= REASONS_SAID
        ):
            self._reason = reason
            return
        self._reason = reason
        self._reasons_said.add(reason or "")
        if state in _SAID:
            level, text = _SAID[state]
            logs.event(log, level, text, namespace=self._namespace, reason=reason)


class _Pauses:
    """Growing seconds between attempts; the jitter keeps many processes from trying in step."""

    def __init__(self) -> None:
        self._next = PAUSES[0]

    def next(self) -> float:
        pause, self._next = self._next, min(self._next * 2, PAUSES[1])
        return pause * random.uniform(0.5, 1)

    def start_over(self) -> None:
        self._next = PAUSES[0]


async def _answer(query: Awaitable[_T]) -> _T:
    async with asyncio.timeout(QUERY_TIMEOUT):
        return await query


async def _close(connection: "Connection") -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await connection.close()
    except _LOST:
        pass
    finally:
        connection.terminate()


def _describe(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
