"""The schema of every released version becomes that of this one, while others write; and the rights that a role is given."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from waiting import Eventually

from cacheinval import Client, DatabaseError, SchemaMissingError, Settings
from cacheinval.outbox import SCHEMA_VERSION, apply_schema, schema, schema_sql
from cacheinval.outbox.grants import grant, lacking

RELEASED = {int(path.stem): path.read_text() for path in (Path(__file__).parent / "schemas").glob("*.sql")}

# All that makes two databases behave alike, in an order of its own.
CATALOG = """
    SELECT 'column', attrelid::regclass::text || '.' || attname, format_type(atttypid, atttypmod) || attnotnull
            || coalesce(pg_get_expr(adbin, adrelid), '')
        FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        JOIN pg_class ON pg_class.oid = attrelid
        WHERE relnamespace = 'cacheinval'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
    UNION ALL SELECT 'table', relname, coalesce(reloptions::text, '') || coalesce(relacl::text, '')
            || CASE relkind WHEN 'v' THEN pg_get_viewdef(oid) ELSE '' END
        FROM pg_class WHERE relnamespace = 'cacheinval'::regnamespace AND relkind IN ('r', 'v')
    UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'cacheinval'::regnamespace
    UNION ALL SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'cacheinval'
    UNION ALL SELECT 'function', oid::regprocedure::text, pg_get_functiondef(oid) || coalesce(proacl::text, '')
        FROM pg_proc WHERE pronamespace = 'cacheinval'::regnamespace
    ORDER BY 1, 2
"""


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to an empty database."""
    connection = await asyncpg.connect(database_url, timeout=10, command_timeout=60)
    yield connection
    connection.terminate()


async def catalog(connection: asyncpg.Connection) -> list[tuple[str, ...]]:
    return [tuple(row) for row in await connection.fetch(CATALOG)]


def test_the_schema_as_it_is_now_is_kept_for_those_who_migrate_from_it() -> None:
    assert schema_sql() == RELEASED[SCHEMA_VERSION], (
        "the schema has changed: raise SCHEMA_VERSION, with what turns the older one into it in MIGRATIONS, and keep it in "
        "tests/integration/schemas; before its first release that file may be written anew"
    )


@pytest.mark.parametrize("version", sorted(RELEASED))
async def test_every_version_becomes_the_present_one(version: int, db: asyncpg.Connection) -> None:
    await db.execute(RELEASED[version])
    await db.execute("CREATE TABLE things (id int); SELECT cacheinval.track('things', 'thing:{id}')")
    await db.execute("DELETE FROM cacheinval.outbox; SELECT cacheinval.invalidate('{a}')")
    await apply_schema(db)
    await db.execute("DELETE FROM things")
    tracked = await db.fetch("SELECT relation::text, triggers FROM cacheinval.tracking()")
    assert [tuple(row) for row in tracked] == [("things", 4)], "also what was tracked before"
    migrated = await catalog(db)
    assert await db.fetchval("SELECT max(version) FROM cacheinval.schema_version") == SCHEMA_VERSION
    assert await db.fetchval("SELECT keys FROM cacheinval.outbox") == ["a"]
    await db.execute("DROP TABLE things")
    await db.execute("DROP SCHEMA cacheinval CASCADE")
    await apply_schema(db)
    assert migrated == await catalog(db)


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if there were a version after this one, whose outbox has a column more."""
    new = SCHEMA_VERSION + 1
    read = Path.read_text

    def with_a_column(path: Path, *args: Any) -> str:
        text = read(path, *args)
        return text.replace("    versions bigint[], --", "    note text,\n    versions bigint[], --")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "SCHEMA_VERSION", new)
        patch.setattr(schema, "MIGRATIONS", {new: "ALTER TABLE cacheinval.outbox ADD COLUMN note text;"})
        patch.setattr(Path, "read_text", with_a_column)
        schema_sql.cache_clear()
        yield patch
    schema_sql.cache_clear()


async def test_it_migrates_while_a_writer_writes_and_nothing_is_lost(
    db: asyncpg.Connection,
    database_url: str,
    namespace: str,
    next_version: pytest.MonkeyPatch,
    eventually: Eventually,
) -> None:
    await db.execute(RELEASED[SCHEMA_VERSION])
    await db.execute("CREATE TABLE prices AS SELECT 'a' AS id, 0 AS price")
    settings = Settings(
        broker_url="memory://", database_url=database_url, namespace=namespace, tick_interval=0.2
    )
    other = await asyncpg.connect(database_url, timeout=10, command_timeout=60)
    try:
        async with Client(settings) as client:
            await client.wait_ready(30)
            written = 0

            async def write() -> None:
                nonlocal written
                while True:
                    await client.execute("UPDATE prices SET price = price + 1", invalidate=["a"])
                    await client.pool.execute(
                        "SELECT cacheinval.invalidate('{b}', namespace => $1)", namespace
                    )
                    written += 1

            writing = asyncio.create_task(write())
            await eventually(lambda: written > 5, 30)
            # Somebody has written, and does not end: whoever migrates has to wait, and writers must not wait with it.
            transaction = other.transaction()
            await transaction.start()
            await other.execute("SELECT cacheinval.invalidate('{c}', namespace => $1)", namespace)
            migrating = asyncio.create_task(apply_schema(db))
            asked = (
                "SELECT count(*) FROM pg_locks WHERE relation = 'cacheinval.outbox'::regclass AND NOT granted"
            )
            await eventually(lambda: client.pool.fetchval(f"SELECT ({asked}) > 0"), 30)
            before = written
            await eventually(lambda: written > before + 5, 30)
            assert not migrating.done()
            await transaction.commit()
            await asyncio.wait_for(migrating, 60)
            after = written
            await eventually(lambda: written > after + 5, 30)
            assert not writing.done(), "a client of the version before works with the one after it"
            writing.cancel()
            with suppress(asyncio.CancelledError):
                await writing
            await eventually(lambda: db.fetchval("SELECT count(*) = 0 FROM cacheinval.outbox"), 30)
            assert await client.pool.fetchval("SELECT price FROM prices") >= written
    finally:
        other.terminate()
    migrated = await catalog(db)
    versions = [row[0] for row in await db.fetch("SELECT version FROM cacheinval.schema_version ORDER BY 1")]
    assert versions == [SCHEMA_VERSION, SCHEMA_VERSION + 1]
    await db.execute("DROP SCHEMA cacheinval CASCADE")
    await apply_schema(db)
    assert [one for one in migrated if one not in await catalog(db)] == []
    assert ("column", "cacheinval.outbox.note", "textfalse") in migrated


async def test_the_sql_that_is_shown_migrates_too_and_an_older_program_is_told_so(
    db: asyncpg.Connection, next_version: pytest.MonkeyPatch
) -> None:
    await db.execute(RELEASED[SCHEMA_VERSION])
    for _ in range(2):
        await db.execute(schema_sql())
    await db.execute("SELECT note FROM cacheinval.outbox")
    next_version.undo()
    schema_sql.cache_clear()
    with pytest.raises(DatabaseError, match="upgrade cacheinval here"):
        await apply_schema(db)


# Rights


@pytest.fixture
async def role(db: asyncpg.Connection, namespace: str) -> AsyncIterator[str]:
    """A role with a name that has to be quoted."""
    name = f"Team {namespace}"
    await db.execute(f'CREATE ROLE "{name}"')
    try:
        yield name
    finally:
        await db.execute(f'RESET ROLE; DROP OWNED BY "{name}"; DROP ROLE "{name}"')


async def test_a_role_is_given_what_it_needs_and_no_more(db: asyncpg.Connection, role: str) -> None:
    with pytest.raises(SchemaMissingError):
        await grant(db, role)
    await apply_schema(db)
    assert [right.name for right in await lacking(db, role)] == [
        f"cacheinval.{table}" for table in ("schema_version", "outbox", "origins", "instances")
    ]
    await grant(db, role)
    assert await lacking(db, role) == []
    await db.execute(f'SET ROLE "{role}"')
    for statement in (
        "UPDATE cacheinval.outbox SET keys = keys",
        "TRUNCATE cacheinval.outbox",
        "INSERT INTO cacheinval.schema_version VALUES (99)",
        "CREATE TABLE cacheinval.mine ()",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await db.execute(statement)


async def test_rights_that_cannot_be_given_are_refused(db: asyncpg.Connection, role: str) -> None:
    await apply_schema(db)
    with pytest.raises(DatabaseError, match='role "nobody at all" does not exist: make it first'):
        await grant(db, "nobody at all")
    await db.execute(f'SET ROLE "{role}"')
    with pytest.raises(DatabaseError, match="the role that owns the schema cacheinval"):
        await grant(db, role)
    await db.execute("RESET ROLE")
    await grant(db, role)
    await db.execute(f'CREATE ROLE "{role} 2"; SET ROLE "{role}"')
    try:
        # It has them, but not to pass on: of that Postgres only warns.
        with pytest.raises(DatabaseError, match=r"not granted.*cacheinval\.outbox"):
            await grant(db, f"{role} 2")
    finally:
        await db.execute(f'RESET ROLE; DROP ROLE "{role} 2"')
