"""Bringing the schema `cacheinval` into a database."""

import asyncio
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import asyncpg

from cacheinval.errors import DatabaseError

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    AnyConnection = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]

__all__ = ["SCHEMA_VERSION", "apply_schema", "schema_sql"]

SCHEMA_VERSION = 2
OLDEST_SERVER = 14  # idle_session_timeout, on which the relay's leadership stands

_FILES = ("schema.sql", "track.sql")

MIGRATIONS: dict[int, str] = {
    2: "ALTER TABLE cacheinval.outbox ADD COLUMN IF NOT EXISTS context text;",
}
"""By version: SQL that turns the tables of the version before into those of this one, where CREATE … IF NOT EXISTS would leave
them as they were; functions need none. Clients of the version before go on working on what it makes: it may add what they
need not know of, and take nothing away that they use. Each is kept for good, so that every released version migrates."""

_LOCK = 0x63616368_65696E76  # "cacheinv"
_LOCK_WAIT = 30.0
_TABLE_LOCK_WAIT = 1.0  # whoever writes meanwhile queues behind it
_AGAIN = 0.5
_DEADLINE = 60.0

_COMPLETE = """
    SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('cacheinval.outbox') AND attname = 'context')
        AND to_regclass('cacheinval.instances') IS NOT NULL
        AND to_regprocedure('cacheinval.invalidate(text[], bigint[], text[], text)') IS NOT NULL
        AND to_regprocedure('cacheinval.untrack(regclass)') IS NOT NULL
        AND to_regclass('cacheinval.forgettable') IS NOT NULL
        AND to_regprocedure('cacheinval.tracking()') IS NOT NULL
"""


@cache
def schema_sql() -> str:
    """The SQL that makes the schema; it may be run by any other tool, again and again."""
    folder = files(__package__)
    text = "\n".join(folder.joinpath(name).read_text("utf-8") for name in _FILES)
    migrations = "\n".join(_migration(version, MIGRATIONS[version]) for version in sorted(MIGRATIONS))
    return text.replace("-- {MIGRATIONS}\n", migrations).replace("{SCHEMA_VERSION}", str(SCHEMA_VERSION))


def _migration(version: int, sql: str) -> str:
    """`sql` for a database that has an older version than this one, and not for one that has none."""
    older = f"(SELECT max(version) FROM cacheinval.schema_version) < {version}"  # noqa: S608 (a number)
    return f"DO $migrate$ BEGIN\n    IF {older} THEN\n        {sql}\n    END IF;\nEND $migrate$;\n"


async def apply_schema(connection: "AnyConnection") -> None:
    """Makes or updates the schema `cacheinval`, in one transaction; does nothing where it is up to date.

    Any number of processes may do this at once: one works, the others wait for it. Only the schema `cacheinval` is
    touched. `connection` must not be in a transaction.

    Raises:
        DatabaseError: the schema is newer than this program, the role lacks a right, the server is too old, or the
            database did not answer in time.
    """
    major = connection.get_server_version().major
    if major < OLDEST_SERVER:
        raise DatabaseError(f"the database server is PostgreSQL {major}; accepted: {OLDEST_SERVER} or newer")
    try:
        async with asyncio.timeout(_DEADLINE):
            if await _is_current(connection):
                return
            while True:
                if await _try_to_apply(connection):
                    return
                await asyncio.sleep(_AGAIN)  # in which writers that queued up behind have their turn
    except TimeoutError:
        raise DatabaseError(f"the schema cacheinval could not be applied within {_DEADLINE:g} s") from None
    except asyncpg.InsufficientPrivilegeError as error:
        role = connection.get_settings().session_authorization
        raise DatabaseError(
            f"role {role} may not apply the schema cacheinval: {_text(error)}. Needed: CREATE on the database for the "
            "first time (GRANT CREATE ON DATABASE …), later the role that owns the schema; or let that role run "
            f"`cacheinval schema apply` and `cacheinval schema grant {role}`"
        ) from error
    except asyncpg.LockNotAvailableError as error:
        raise DatabaseError(
            f"another process kept the schema cacheinval locked for {_LOCK_WAIT:g} s"
        ) from error
    except asyncpg.PostgresError as error:
        raise DatabaseError(f"the schema cacheinval could not be applied: {_text(error)}") from error


async def _try_to_apply(connection: "AnyConnection") -> bool:
    """Whether the schema is up to date now; if not, a transaction that has not ended uses its tables."""
    alone = False
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_WAIT:g}s'")
            await connection.execute("SET LOCAL search_path = pg_catalog, pg_temp")
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            alone = True
            if not await _is_current(connection):
                await connection.execute(f"SET LOCAL lock_timeout = '{_TABLE_LOCK_WAIT:g}s'")
                await connection.execute(schema_sql())
    except asyncpg.LockNotAvailableError:
        if not alone:
            raise
        return False
    return True


async def _is_current(connection: "AnyConnection") -> bool:
    if await connection.fetchval("SELECT to_regclass('cacheinval.schema_version') IS NULL"):
        return False
    version: int = await connection.fetchval(
        "SELECT coalesce(max(version), 0) FROM cacheinval.schema_version"
    )
    if version > SCHEMA_VERSION:
        raise DatabaseError(
            f"the schema cacheinval in this database has version {version}; this program knows versions up to "
            f"{SCHEMA_VERSION}: upgrade cacheinval here"
        )
    return version == SCHEMA_VERSION and bool(await connection.fetchval(_COMPLETE))


def _text(error: asyncpg.PostgresError) -> str:
    hint = getattr(error, "hint", None)
    return f"{error.args[0]} ({hint})" if hint else str(error.args[0])
