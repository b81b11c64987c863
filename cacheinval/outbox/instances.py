"""The table of live instances: being in it, and counting who is."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import asyncpg

from cacheinval import logs
from cacheinval.coherence.registration import NOT_YET, Registered, Registration
from cacheinval.errors import DatabaseError
from cacheinval.outbox.session import LOST
from cacheinval.outbox.writing import explain

__all__ = ["NOT_STOPPED", "SETTLED_AFTER", "Database", "Instances", "Registrar", "answer", "registered_in"]

log = logging.getLogger("cacheinval.registration")

LOOK_EVERY = 0.25  # seconds, for what is due, also when the clock was set or the process was asleep
RETRY = 1.0
LEAVE_WITHIN = 1.0
COUNT_WITHIN = 5.0
CANCEL_WITHIN = 0.1
FORGET_EVERY = 100  # renewals
SETTLED_AFTER = 3.0  # seconds

# `since` is when the row surely was seen by everybody: not when it was written, for it may have been committed later, but
# when another statement found it. It stays only while more than half the lease is left. So it is known of each renewal but the last
# that it was committed while the row before was still good: the one after it came within half a lease, and so before that
# ended. (Of the last one, whoever made it knows by when it was answered.) `clock_timestamp()` and not `now()`: an update
# that had to wait for another one's commit began before it.
_REGISTER = """
    INSERT INTO cacheinval.instances AS known (namespace, id, session, max_staleness, since, expires_at)
    VALUES ($1, $2, $3, $4, 'infinity', clock_timestamp() + make_interval(secs => $5::float8))
    ON CONFLICT (namespace, id, session) DO UPDATE SET
        since = CASE
            WHEN known.max_staleness IS DISTINCT FROM excluded.max_staleness
                OR known.expires_at <= clock_timestamp() + make_interval(secs => $5::float8 / 2) THEN 'infinity'
            WHEN known.since = 'infinity' THEN clock_timestamp()
            ELSE known.since
        END,
        max_staleness = excluded.max_staleness,
        expires_at = clock_timestamp() + make_interval(secs => $5::float8)
    RETURNING extract(epoch FROM since)::float8 AS since, extract(epoch FROM clock_timestamp())::float8 AS told
"""
_LEAVE = "DELETE FROM cacheinval.instances WHERE namespace = $1 AND id = $2 AND session = $3"

# The row of a cache that outlives its process stays until its lease ends, for the next process to go on with. So that nobody
# waits for an answer meanwhile, nor takes it for killed, who stops leaves a second row, which stands for nothing: it has
# expired from the start.
STOPPED = "stopped"
_STOP = """
    INSERT INTO cacheinval.instances (namespace, id, session, since, expires_at)
    VALUES ($1, $2, $3, 'infinity', clock_timestamp())
    ON CONFLICT (namespace, id, session) DO UPDATE SET expires_at = excluded.expires_at
"""
NOT_STOPPED = f"""(session <> '{STOPPED}' AND NOT (session = '' AND id IN (
    SELECT id FROM cacheinval.instances WHERE namespace = $1 AND session = '{STOPPED}')))"""  # noqa: S608 (constants)
_FORGET = "DELETE FROM cacheinval.instances WHERE namespace = $1 AND expires_at < clock_timestamp() - interval '1 hour'"

# `now()` is no later than the snapshot, so that a row which this one still finds good is not taken for one that has ended.
_COUNT = """
    SELECT extract(epoch FROM clock_timestamp())::float8 AS told,
        ARRAY(SELECT id FROM cacheinval.instances WHERE namespace = $1 AND expires_at > now() ORDER BY id, session) AS ids,
        ARRAY(SELECT session FROM cacheinval.instances WHERE namespace = $1 AND expires_at > now() ORDER BY id, session)
            AS sessions,
        ARRAY(SELECT max_staleness FROM cacheinval.instances
            WHERE namespace = $1 AND expires_at > now() ORDER BY id, session) AS stalenesses
"""


# Those that have been there for a while, and so should have subscribed.
_SETTLED = f"""
    WITH settled AS (
        SELECT * FROM cacheinval.instances
        WHERE namespace = $1 AND expires_at > now() AND since < now() - make_interval(secs => $2::float8)
            AND {NOT_STOPPED}
    )
    SELECT ARRAY(SELECT id FROM settled ORDER BY id, session) AS ids,
        ARRAY(SELECT session FROM settled ORDER BY id, session) AS sessions,
        ARRAY(SELECT max_staleness FROM settled ORDER BY id, session) AS stalenesses
"""  # noqa: S608 (constants)


class Database(Protocol):
    """What is asked of a pool of asyncpg, or of an `OwnConnection`."""

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> str: ...
    async def fetchrow(self, query: str, *args: object, timeout: float | None = None) -> Any: ...


class Instances:
    """The live instances of one namespace.

    Each call raises DatabaseError, which says why, where the database cannot be used.

    Args:
        database: gives the pool.
        max_clock_skew: seconds by which this host's clock and the database's may differ.
    """

    def __init__(self, database: Callable[[], Database], namespace: str, max_clock_skew: float) -> None:
        self._database = database
        self._namespace = namespace
        self._max_clock_skew = max_clock_skew

    async def register(self, me: Registered, lease: float, timeout: float) -> tuple[float, float]:
        """Makes or renews the row; returns the time by the database's clock, and since when the row stands by it."""
        row = await answer(
            timeout,
            lambda: self._database().fetchrow(
                _REGISTER, self._namespace, me.id, me.session, me.max_staleness, lease
            ),
        )
        return row["told"], row["since"]

    async def leave(self, me: Registered) -> None:
        """Takes the row away; of a cache that outlives its process it stays, and another one says that this has stopped."""
        statement, session = (_LEAVE, me.session) if me.session else (_STOP, STOPPED)
        await self._execute(statement, me.id, session)

    async def goes_on(self, me: Registered) -> None:
        """Takes away what another process of its id said when it stopped, before this one or beside it."""
        if not me.session:
            await self._execute(_LEAVE, me.id, STOPPED)

    async def _execute(self, statement: str, id_: str, session: str) -> None:
        await answer(LEAVE_WITHIN, lambda: self._database().execute(statement, self._namespace, id_, session))

    async def forget_old(self) -> None:
        """Takes away the rows of those that ended long ago without a word."""
        await answer(COUNT_WITHIN, lambda: self._database().execute(_FORGET, self._namespace))

    async def count(self) -> list[Registered]:
        """Who is registered, in a snapshot taken after this is called."""
        before = time.time()
        row = await answer(COUNT_WITHIN, lambda: self._database().fetchrow(_COUNT, self._namespace))
        apart = max(before - row["told"], row["told"] - time.time())
        if apart > self._max_clock_skew:
            # Whose lease has ended by a clock that is wrong may serve on.
            raise DatabaseError(
                f"this clock and the database's differ by {apart:.3f} s; accepted: at most "
                f"CACHEINVAL_MAX_CLOCK_SKEW={self._max_clock_skew:g}"
            )
        return registered_in(row)

    async def registered(self) -> list[Registered]:
        """Who is registered, and has been for so long that an answer of it can be expected."""
        query = self._database().fetchrow
        return registered_in(
            await answer(COUNT_WITHIN, lambda: query(_SETTLED, self._namespace, SETTLED_AFTER))
        )


def registered_in(row: Mapping[str, Any]) -> list[Registered]:
    """Who is told by a row of `ids`, `sessions` and `stalenesses`."""
    return [Registered(*one) for one in zip(row["ids"], row["sessions"], row["stalenesses"], strict=True)]


async def answer(timeout: float, query: Callable[[], Awaitable[Any]]) -> Any:
    """What `query` gives within so many seconds.

    Raises:
        DatabaseError: the database cannot be used, and why.
    """
    asking: asyncio.Future[Any] | None = None
    try:
        asking = asyncio.ensure_future(query())
        # Not by `asyncio.timeout`: a connection of a pool whose statement was cancelled is given back only when the server
        # has answered that.
        await asyncio.wait({asking}, timeout=timeout)
        if not asking.done():
            raise TimeoutError
        return asking.result()
    except asyncpg.PostgresError as error:
        raise (explain(error, ours=True) or DatabaseError(f"the database cannot be used: {error}")) from error
    except LOST as error:
        raise DatabaseError(f"the database cannot be used: {str(error) or 'no answer in time'}") from error
    finally:
        if asking is not None and not asking.done():
            asking.cancel()
            await asyncio.wait({asking}, timeout=CANCEL_WITHIN)
            asking.add_done_callback(
                lambda one: one.cancelled() or one.exception()
            )  # nobody looks at it any more


class Registrar:
    """Keeps one instance in the table.

    Args:
        me: how it is registered.
        registration: what it may rely on.
        clock: gives the time by which the instance serves.
        may_begin: False while it is not to be counted yet.
        changed: told whenever the registration begins to stand (None) or no longer does (why).
    """

    def __init__(
        self,
        instances: Instances,
        me: Registered,
        registration: Registration,
        clock: Callable[[], float],
        may_begin: Callable[[], bool],
        changed: Callable[[str | None], None],
    ) -> None:
        self._instances = instances
        self._me = me
        self._registration = registration
        self._clock = clock
        self._may_begin = may_begin
        self._changed = changed
        self._said: str | None = NOT_YET
        self._stood: bool | None = None
        self._renewals = 0
        self._there = False  # in the table, or on the way there

    @property
    def state(self) -> dict[str, Any]:
        """For status: whether writers find this instance, and if not, why."""
        problem = self._registration.problem(self._clock())
        return {
            "state": "registered" if problem is None else "unregistered",
            "reason": problem,
            "session": self._me.session,
            "required": self._registration.required,
        }

    async def run(self) -> None:
        """Registers, and renews, until cancelled."""
        begun = False
        while True:
            begun = begun or self._may_begin()
            if begun and self._registration.due(self._clock()):
                await self._renew()
            self._tell()
            await asyncio.sleep(LOOK_EVERY)

    async def _renew(self) -> None:
        registration = self._registration
        try:
            for _ in range(2):  # the second statement tells since when the row stands
                if not registration.due(self._clock()):
                    break
                self._tell()  # that it has lapsed, before it stands again
                registration.sending(self._clock())
                self._there = True
                told = await self._instances.register(self._me, registration.lease, registration.lease / 3)
                registration.answered(*told, self._clock())
            await self._instances.goes_on(self._me)
            self._renewals += 1
            if self._renewals % FORGET_EVERY == 0:
                await self._instances.forget_old()
        except DatabaseError as error:
            registration.failed(str(error), self._clock(), min(RETRY, registration.lease / 30))

    def _tell(self) -> None:
        problem = self._registration.problem(self._clock())
        stands = problem is None
        if stands != self._stood and problem != NOT_YET:
            self._stood = stands
            level = logging.INFO if stands else logging.WARNING
            text = "registered" if stands else "not registered: no writer waits for this instance"
            logs.event(log, level, text, id=self._me.id, reason=problem)
        if problem != self._said:
            self._said = problem
            self._changed(problem)

    async def leave(self) -> None:
        """Nothing is served on this registration any more, and the table says so."""
        self._registration.forget()
        if not self._there:
            return  # another process of its id may be
        try:
            await self._instances.leave(self._me)
        except DatabaseError as error:
            logs.event(log, logging.DEBUG, "the registration stays until it ends", reason=error)
