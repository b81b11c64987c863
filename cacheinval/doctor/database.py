"""What can be seen of the database, as the role that the settings name."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import asyncpg

from cacheinval.coherence.registration import Registered
from cacheinval.doctor.checking import Checks
from cacheinval.doctor.findings import (
    DATABASE_HERE,
    VERY_OLD_ROW,
    Finding,
    failed,
    of_clock,
    of_leader,
    of_outbox,
    of_rights,
    of_schema,
    of_strays,
    of_tracking,
    ok,
    warning,
)
from cacheinval.errors import DatabaseError
from cacheinval.outbox import SCHEMA_VERSION
from cacheinval.outbox.grants import lacking
from cacheinval.outbox.instances import Instances
from cacheinval.outbox.leading import LEADER, leader_in
from cacheinval.outbox.looking import OLDEST
from cacheinval.outbox.pool import connect
from cacheinval.outbox.schema import OLDEST_SERVER
from cacheinval.overview import Leader
from cacheinval.settings import Settings, mask_url
from cacheinval.verdict import remedies
from cacheinval.verdict.words import short

__all__ = ["DatabaseSeen"]

CONNECT_WITHIN = 5.0  # seconds
ANSWER_WITHIN = 5.0
CLOCK_ROUNDS = 5
ROWS_COUNTED = 10_000
DEPENDENT = ("clock", "schema", "grants", "outbox", "leader", "tracked tables")

_STRAYS = """
    SELECT DISTINCT namespace FROM (
        SELECT namespace FROM cacheinval.outbox
        WHERE namespace <> $1 AND publish_at <= clock_timestamp() - $2 * interval '1 second' LIMIT $3
    ) AS rows ORDER BY namespace LIMIT 10
"""

_TRACKED = """
    SELECT array_agg(DISTINCT relation::text) FILTER (WHERE triggers < 4 AND NOT attached_later) AS incomplete,
        array_agg(DISTINCT relation::text) FILTER (WHERE triggers < 4 AND attached_later) AS untracked,
        count(DISTINCT relation) AS tracked
    FROM cacheinval.tracking()
"""


class DatabaseSeen:
    """The checks of the database; `checks` is told what they find."""

    def __init__(self, settings: Settings, checks: Checks) -> None:
        self._settings = settings
        self._checks = checks
        self._connection: Any = None
        self._role = ""  # that it works as
        self.source: str | None = None
        self.registered: list[Registered] = []
        self.leader: Leader | None = None

    async def examine(self) -> None:
        """Runs the checks, each of which needs a connection."""
        if not await self._checks.run("database", CONNECT_WITHIN + ANSWER_WITHIN, self._reach):
            self._checks.not_checked(DEPENDENT, ("database",))
            return
        await self._checks.run("clock", ANSWER_WITHIN, self._clock)
        if await self._checks.run("schema", ANSWER_WITHIN, self._schema) and await self._checks.run(
            "grants", ANSWER_WITHIN, self._grants
        ):
            await self._checks.run("outbox", ANSWER_WITHIN, self._outbox)
            await self._checks.run("tracked tables", ANSWER_WITHIN, self._tracked)
        else:
            self._checks.not_checked(("grants", "outbox", "tracked tables"), DATABASE_HERE)
        await self._checks.run("leader", ANSWER_WITHIN, self._leader)
        await self._checks.run("registered instances", ANSWER_WITHIN, self._registered)

    def close(self) -> None:
        """Ends the connection."""
        if self._connection is not None:
            self._connection.terminate()

    async def _reach(self) -> Finding:
        url = mask_url(self._settings.database_url)
        try:
            async with asyncio.timeout(CONNECT_WITHIN):
                self._connection = await connect(
                    self._settings.database_url, timeout=CONNECT_WITHIN, command_timeout=ANSWER_WITHIN - 1
                )
        except Exception as error:
            reason = " ".join(str(error).split()) or f"no answer within {CONNECT_WITHIN:g} s"
            return failed("database", f"{url}: {reason}", remedies.database(reason))
        major = self._connection.get_server_version().major
        if major < OLDEST_SERVER:
            text = f"{url} is PostgreSQL {major}; accepted: {OLDEST_SERVER} or newer"
            return failed("database", text, "upgrade the server")
        if await self._connection.fetchval("SELECT pg_is_in_recovery()"):
            return failed(
                "database",
                f"{url} is a standby: it takes no writes, and no relay works there",
                "CACHEINVAL_DATABASE_URL has to lead to the primary: name its host, or a name that follows it",
            )
        self._role = await self._connection.fetchval("SELECT current_user")
        return ok("database", f"PostgreSQL {major} at {url}, role {self._role}")

    async def _clock(self) -> Finding:
        best: tuple[float, float] | None = None
        for _ in range(CLOCK_ROUNDS):
            before = time.time()
            told = await self._connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
            after = time.time()
            offset = max(0.0, told - after) - max(0.0, before - told)
            best = min(best or (after - before, offset), (after - before, offset))
        assert best is not None
        return of_clock(best[1], self._settings.max_clock_skew)

    async def _schema(self) -> Finding:
        try:
            if await self._connection.fetchval("SELECT to_regclass('cacheinval.schema_version') IS NULL"):
                return of_schema(None, SCHEMA_VERSION)
            version = await self._connection.fetchval("SELECT max(version) FROM cacheinval.schema_version")
        except asyncpg.InsufficientPrivilegeError as error:
            text = f"it is there; its version may not be read: {error.args[0]}"
            return warning("schema", text, remedies.grant(self._role), ("grants",))
        return of_schema(version, SCHEMA_VERSION)

    async def _grants(self) -> list[Finding]:
        missing = await lacking(self._connection, self._role)
        if not missing:
            self.source = await self._connection.fetchval("SELECT cacheinval.source()")
        return of_rights(self._role, missing)

    async def _outbox(self) -> Sequence[Finding]:
        own = self._settings.namespace
        row = await self._connection.fetchrow(OLDEST, own, ROWS_COUNTED)
        strays = await self._connection.fetch(_STRAYS, own, VERY_OLD_ROW, ROWS_COUNTED)
        return [of_outbox(row["count"], row["oldest"]), *of_strays([row["namespace"] for row in strays], own)]

    async def _leader(self) -> Finding:
        settings = self._settings
        self.leader = leader_in(await self._connection.fetchrow(LEADER, settings.namespace))
        return of_leader(self.leader, settings.relay == "auto", settings.tick_interval)

    async def _tracked(self) -> Sequence[Finding]:
        row = await self._connection.fetchrow(_TRACKED)
        return of_tracking(row["incomplete"] or [], row["untracked"] or [], row["tracked"])

    async def _registered(self) -> list[Finding]:
        instances = Instances(
            lambda: self._connection, self._settings.namespace, self._settings.max_clock_skew
        )
        try:
            self.registered = await instances.registered()
        except DatabaseError as error:
            remedy = remedies.database(str(error), role=self._role)
            return [warning("registered instances", short(str(error)), remedy, DATABASE_HERE)]
        return []
