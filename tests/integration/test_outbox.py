"""The schema, the rows, and the one-statement form, on a real Postgres."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from itertools import chain, product
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheinval.errors import DatabaseError, SchemaMissingError
from cacheinval.outbox import SCHEMA_VERSION, Outbox, apply_schema, combine, explain, schema_sql
from cacheinval.outbox.writing import Insert

OUTBOX = "SELECT * FROM cacheinval.outbox ORDER BY keys"


@pytest.fixture
async def bare(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a database without the schema."""
    connection = await asyncpg.connect(database_url)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def db(bare: asyncpg.Connection) -> asyncpg.Connection:
    await apply_schema(bare)
    return bare


@pytest.fixture
async def role(bare: asyncpg.Connection, namespace: str) -> AsyncIterator[str]:
    """A role without any grant."""
    await bare.execute(f"CREATE ROLE {namespace}")
    try:
        yield namespace
    finally:
        await bare.execute(f"RESET ROLE; DROP OWNED BY {namespace}; DROP ROLE {namespace}")


def _joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


# Schema


async def test_schema_is_made_once_and_kept(bare: asyncpg.Connection, database_url: str) -> None:
    await apply_schema(bare)
    await bare.execute("SELECT cacheinval.invalidate(ARRAY['a'])")
    made = await bare.fetch("SELECT * FROM cacheinval.schema_version")
    await apply_schema(bare)
    await bare.execute(schema_sql())
    assert await bare.fetch("SELECT * FROM cacheinval.schema_version") == made
    assert [row["version"] for row in made] == [SCHEMA_VERSION]
    assert len(await bare.fetch(OUTBOX)) == 1


async def test_schema_is_completed_where_a_part_is_gone(db: asyncpg.Connection) -> None:
    await db.execute("DROP FUNCTION cacheinval.invalidate")
    await apply_schema(db)
    await db.execute("SELECT cacheinval.invalidate(ARRAY['a'])")


async def test_ten_apply_the_schema_at_once(database_url: str) -> None:
    connections = [await asyncpg.connect(database_url) for _ in range(10)]
    try:
        await asyncio.gather(*map(apply_schema, connections))
        assert await connections[0].fetchval("SELECT count(*) FROM cacheinval.schema_version") == 1
    finally:
        for connection in connections:
            await connection.close()


async def test_a_newer_schema_is_refused(db: asyncpg.Connection) -> None:
    await db.execute("INSERT INTO cacheinval.schema_version VALUES ($1)", SCHEMA_VERSION + 1)
    with pytest.raises(DatabaseError, match=f"has version {SCHEMA_VERSION + 1}; this program knows"):
        await apply_schema(db)
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="knows versions up to"):
        await db.execute(schema_sql())


async def test_a_role_without_rights_is_told_what_it_needs(bare: asyncpg.Connection, role: str) -> None:
    await bare.execute(f"SET SESSION AUTHORIZATION {role}")
    try:
        with pytest.raises(DatabaseError, match=f"role {role} .*GRANT CREATE ON DATABASE"):
            await apply_schema(bare)
    finally:
        await bare.execute("RESET SESSION AUTHORIZATION")


async def test_a_schema_of_somebody_else_is_not_trusted(bare: asyncpg.Connection, role: str) -> None:
    await bare.execute(f"CREATE SCHEMA cacheinval AUTHORIZATION {role}")
    with pytest.raises(DatabaseError, match=f"belongs to role {role}"):
        await apply_schema(bare)


async def test_public_may_invalidate_and_nothing_else(db: asyncpg.Connection, role: str) -> None:
    await db.execute(f"SET ROLE {role}")
    await db.execute("SELECT cacheinval.invalidate(ARRAY['a'])")
    for refused in (
        OUTBOX,
        "SELECT * FROM cacheinval.schema_version",
        "DELETE FROM cacheinval.outbox",
        "INSERT INTO cacheinval.outbox (namespace) VALUES ('x')",
        "CREATE TABLE cacheinval.mine ()",
        "SELECT cacheinval.check_names('keys', '{}')",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await db.execute(refused)
    await db.execute("RESET ROLE")
    assert [row["keys"] for row in await db.fetch(OUTBOX)] == [["a"]]


async def test_search_path_of_the_caller_does_not_matter(db: asyncpg.Connection, role: str) -> None:
    await db.execute(f"GRANT CREATE ON SCHEMA public TO {role}; SET ROLE {role}")
    await db.execute(
        "CREATE FUNCTION public.cardinality(anyarray) RETURNS integer LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE 'called with the rights of %', current_user; END $$;"
        "SET search_path = public, pg_catalog"
    )
    with pytest.raises(asyncpg.RaiseError, match="called with the rights"):
        await db.fetchval("SELECT cardinality(ARRAY[1])")
    await db.execute("SELECT cacheinval.invalidate(ARRAY['a'])")


# cacheinval.invalidate()


async def test_invalidate_records_a_row_that_is_due_at_once(db: asyncpg.Connection) -> None:
    await db.execute("SELECT cacheinval.invalidate(ARRAY['a', 'b'], ARRAY[1, NULL], ARRAY['t'], 'shop')")
    (row,) = await db.fetch(OUTBOX)
    assert (row["namespace"], row["keys"], row["versions"], row["tags"], row["everything"]) == (
        "shop",
        ["a", "b"],
        [1, None],
        ["t"],
        False,
    )
    assert await db.fetchval("SELECT publish_at <= clock_timestamp() FROM cacheinval.outbox")


async def test_invalidate_splits_many_keys(db: asyncpg.Connection) -> None:
    keys = [f"k{number:04}" for number in range(2_500)]
    await db.execute("SELECT cacheinval.invalidate($1, $2, ARRAY['t'])", keys, list(range(2_500)))
    rows = await db.fetch(OUTBOX)
    assert [len(row["keys"]) for row in rows] == [1_000, 1_000, 500]
    assert _joined(row["keys"] for row in rows) == keys
    assert _joined(row["versions"] for row in rows) == list(range(2_500))
    assert _joined(row["tags"] for row in rows) == ["t"]


async def test_invalidate_takes_arrays_with_other_bounds(db: asyncpg.Connection) -> None:
    await db.execute("SELECT cacheinval.invalidate('[0:1]={a,b}', '[7:8]={1,2}', '[-1:0]={t,u}')")
    (row,) = await db.fetch(OUTBOX)
    assert (row["keys"], row["versions"], row["tags"]) == (["a", "b"], [1, 2], ["t", "u"])


BAD_ARGUMENTS = [
    ("NULL", "neither keys nor tags"),
    ("'{}', '{}', '{}'", "neither keys nor tags"),
    ("'{}', tags => NULL", "neither keys nor tags"),
    ("ARRAY['a', NULL]", "keys has a NULL at position 2"),
    ("ARRAY['a', 'b', '']", "keys has an empty string at position 3"),
    ("ARRAY['a'], tags => ARRAY[NULL]", "tags has a NULL at position 1"),
    ("ARRAY[repeat('a', 513)]", "keys has a string of 513 bytes at position 1; accepted: at most 512"),
    ("ARRAY[repeat('é', 257)]", "keys has a string of 514 bytes at position 1"),
    ("ARRAY[['a'], ['b']]", "keys has 2 dimensions; accepted: 1"),
    ("ARRAY['a'], tags => ARRAY[['a']]", "tags has 2 dimensions; accepted: 1"),
    ("ARRAY['a'], ARRAY[1, 2]", "versions has 2 elements for 1 keys"),
    ("ARRAY['a'], '{}'", "versions has 0 elements for 1 keys"),
    ("ARRAY['a'], ARRAY[[1]]", "versions has 2 dimensions"),
    ("ARRAY['a'], namespace => NULL", "namespace NULL is not accepted"),
    ("ARRAY['a'], namespace => ''", "namespace '' is not accepted"),
    ("ARRAY['a'], namespace => 'a.b'", "namespace 'a.b' is not accepted: 1 to 64 letters"),
    ("ARRAY['a'], namespace => E'a\\n'", "is not accepted"),
    ("ARRAY['a'], namespace => repeat('a', 65)", "is not accepted"),
]


async def test_invalidate_says_which_argument_is_bad(db: asyncpg.Connection) -> None:
    for arguments, message in BAD_ARGUMENTS:
        with pytest.raises(asyncpg.PostgresError) as caught:
            await db.execute(f"SELECT cacheinval.invalidate({arguments})")
        assert message in str(caught.value), arguments
    assert await db.fetch(OUTBOX) == []


async def test_longest_names_are_accepted(db: asyncpg.Connection) -> None:
    await db.execute(
        "SELECT cacheinval.invalidate(ARRAY[repeat('a', 512), repeat('é', 256), repeat('😀', 128)])"
    )
    assert len(await db.fetch(OUTBOX)) == 1


# Rows written by clients


async def _recorded(db: asyncpg.Connection) -> list[tuple[Any, ...]]:
    return [
        (row["namespace"], row["keys"], row["versions"], row["tags"], row["everything"])
        for row in await db.fetch(OUTBOX)
    ]


async def test_record_is_part_of_the_transaction(db: asyncpg.Connection) -> None:
    outbox = Outbox("shop")
    rows = outbox.rows(["a", "b"], versions=[None, 3], tags=["t"], publish_here=True)
    transaction = db.transaction()
    await transaction.start()
    await outbox.record(db, rows)
    await transaction.rollback()
    assert await db.fetch(OUTBOX) == []
    async with db.transaction():
        await outbox.record(db, rows)
    assert await _recorded(db) == [("shop", ["a", "b"], [None, 3], ["t"], False)]
    assert await db.fetchval("SELECT id FROM cacheinval.outbox") == rows[0].id


@pytest.mark.parametrize(("publish_here", "grace"), [(True, 0.25), (False, 0.0)])
async def test_grace_is_for_rows_that_are_published_here(
    db: asyncpg.Connection, publish_here: bool, grace: float
) -> None:
    outbox = Outbox("shop")
    await outbox.record(db, outbox.rows(["a"], publish_here=publish_here))
    waits = await db.fetchval(
        "SELECT extract(epoch FROM publish_at - recorded_at)::float8 FROM cacheinval.outbox"
    )
    assert waits == pytest.approx(grace, abs=0.01)


async def test_everything_needs_no_names(db: asyncpg.Connection) -> None:
    outbox = Outbox("shop")
    await outbox.record(db, outbox.rows(["a"], everything=True, publish_here=True))
    assert await _recorded(db) == [("shop", [], None, [], True)]


@pytest.mark.parametrize(
    ("keys", "tags", "sizes"),
    [
        (0, 1, [(0, 1)]),
        (1000, 0, [(1000, 0)]),
        (999, 1, [(999, 1)]),
        (1000, 1, [(1000, 0), (0, 1)]),
        (1001, 1500, [(1000, 0), (1, 0), (0, 1000), (0, 500)]),
        (2001, 5, [(1000, 0), (1000, 0), (1, 5)]),
        (0, 0, []),
    ],
)
def test_a_row_has_at_most_1000_names(keys: int, tags: int, sizes: list[tuple[int, int]]) -> None:
    all_keys, all_tags = [f"k{n}" for n in range(keys)], [f"t{n}" for n in range(tags)]
    rows = Outbox("shop").rows(all_keys, versions=range(keys), tags=all_tags, publish_here=True)
    parts = [dict(zip(row.insert.columns, row.arguments, strict=True)) for row in rows]
    assert [(len(part["keys"]), len(part.get("tags", []))) for part in parts] == sizes
    assert _joined(part["keys"] for part in parts) == all_keys
    assert _joined(part.get("versions", []) for part in parts) == list(range(keys))
    assert _joined(part.get("tags", []) for part in parts) == all_tags
    assert len({row.id for row in rows}) == len(rows)


async def test_a_hundred_thousand_keys_do_not_hold_the_loop(db: asyncpg.Connection) -> None:
    outbox, worst = Outbox("shop"), 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            began = time.thread_time()
            await asyncio.sleep(0)
            worst = max(worst, time.thread_time() - began)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    rows = outbox.rows([f"product:{n}" for n in range(100_000)], publish_here=True)
    async with db.transaction():
        await outbox.record(db, rows)
    watcher.cancel()
    assert await db.fetchval("SELECT sum(cardinality(keys)) FROM cacheinval.outbox") == 100_000
    assert worst < 0.05


async def test_delete_returns_how_many_were_there(db: asyncpg.Connection) -> None:
    outbox = Outbox("shop")
    rows = [outbox.rows([f"k{n}"], publish_here=True)[0] for n in range(12)]
    await outbox.record(db, rows)
    assert await outbox.delete(db, []) == 0
    assert await outbox.delete(db, [row.id for row in rows[:10]]) == 10
    assert await outbox.delete(db, [row.id for row in rows]) == 2
    assert await db.fetchval("SHOW synchronous_commit") == "on"


async def test_numbers_are_noted_also_where_there_is_nothing_to_delete(db: asyncpg.Connection) -> None:
    assert await Outbox("shop").delete(db, [], {"o": 7}) == 0
    assert await db.fetch("SELECT origin, seq FROM cacheinval.origins") == [("o", 7)]


async def test_delete_takes_many_ids_and_a_pool(db: asyncpg.Connection, database_url: str) -> None:
    await db.execute(
        "INSERT INTO cacheinval.outbox (namespace, keys) SELECT 'shop', ARRAY['k'] FROM generate_series(1, 5200)"
    )
    ids = [row["id"] for row in await db.fetch("SELECT id FROM cacheinval.outbox")]
    async with asyncpg.create_pool(database_url, min_size=1, max_size=1) as pool:
        assert await Outbox("shop").delete(pool, ids) == 5200


@pytest.mark.parametrize(
    "damage",
    ["", "CREATE SCHEMA cacheinval", "CREATE SCHEMA cacheinval; CREATE TABLE cacheinval.outbox (id uuid)"],
)
async def test_a_missing_schema_is_said(bare: asyncpg.Connection, damage: str) -> None:
    if damage:
        await bare.execute(damage)
    outbox = Outbox("shop")
    rows = outbox.rows(["a"], publish_here=True)
    with pytest.raises(SchemaMissingError, match="cacheinval schema apply"):
        await outbox.record(bare, rows)
    if "outbox" not in damage:
        with pytest.raises(SchemaMissingError, match="cacheinval schema apply"):
            await outbox.delete(bare, [rows[0].id])
    await bare.execute("CREATE TABLE t (id int)")
    with pytest.raises(asyncpg.PostgresError) as caught:
        await bare.execute(combine("INSERT INTO t VALUES (1)", 0, rows[0].insert), *rows[0].arguments)
    assert isinstance(explain(caught.value), SchemaMissingError)
    with pytest.raises(asyncpg.UndefinedTableError) as missing:
        await bare.execute("SELECT * FROM nowhere")
    assert explain(missing.value) is None


async def test_missing_grants_are_said(db: asyncpg.Connection, role: str) -> None:
    outbox = Outbox("shop")
    rows = outbox.rows(["a"], publish_here=True)
    await db.execute(f"CREATE TABLE orders_outbox (); SET ROLE {role}")
    with pytest.raises(DatabaseError, match="needs what `cacheinval schema grant ROLE` gives"):
        await outbox.record(db, rows)
    with pytest.raises(DatabaseError, match="needs what `cacheinval schema grant ROLE` gives"):
        await outbox.delete(db, [rows[0].id])
    with pytest.raises(asyncpg.InsufficientPrivilegeError) as caught:
        await db.execute("DELETE FROM orders_outbox")
    assert explain(caught.value) is None
    await db.execute(
        f"RESET ROLE; GRANT SELECT, INSERT, DELETE ON cacheinval.outbox TO {role};"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON cacheinval.origins TO {role}; SET ROLE {role}"
    )
    await outbox.record(db, rows)
    assert await outbox.delete(db, [rows[0].id]) == 1


async def test_other_errors_pass_unchanged(db: asyncpg.Connection) -> None:
    outbox = Outbox("shop")
    rows = outbox.rows(["a"], publish_here=True)
    await outbox.record(db, rows)
    with pytest.raises(asyncpg.UniqueViolationError):
        await outbox.record(db, rows)


# The one-statement form

TABLES = """
    CREATE TABLE t (id int PRIMARY KEY, a int DEFAULT 0, name text, price numeric(10, 2), flags bool[], "returning" int);
    CREATE TABLE u (id int REFERENCES t DEFERRABLE INITIALLY DEFERRED, b text CHECK (b <> 'bad'));
    INSERT INTO t SELECT n, n, 'n' || n, n / 4.0, ARRAY[true, null], -n FROM generate_series(1, 5) AS n;
    INSERT INTO u VALUES (1, 'x');
    CREATE VIEW v AS SELECT id, a FROM t;
    CREATE TABLE p (id int, part int) PARTITION BY LIST (part);
    CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
    CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2);
    INSERT INTO p VALUES (1, 1), (2, 1), (3, 2);
    CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
    CREATE TRIGGER skip BEFORE DELETE ON t FOR EACH ROW WHEN (OLD.id = 5) EXECUTE FUNCTION skip();
"""

NO_TABLES = "DROP TABLE u, t, p CASCADE; DROP FUNCTION skip;"

STATEMENTS: list[tuple[str, tuple[Any, ...]]] = [
    ("UPDATE t SET a = a + 1", ()),
    ("UPDATE t SET a = a + 1 WHERE id > $1", (2,)),
    ("UPDATE t SET a = a + 1 WHERE id = $1", (77,)),
    ("UPDATE t SET price = $2 WHERE id = $1 RETURNING *", (1, "12.30")),
    ("UPDATE t SET a = 0 WHERE id < $1 RETURNING *, 1 AS a, 2 AS a, 'x', NULL, now() IS NULL", (4,)),
    ("UPDATE t SET flags = $1::bool[] RETURNING flags, t, ARRAY['x'], '{1}'::int[] AS \"Ünïcode name\"", ([True],)),
    ("UPDATE t SET a = 1 WHERE id = ANY($1) RETURNING id -- the end", ([3, 1],)),
    ("UPDATE t AS x SET \"returning\" = y.a FROM t AS y WHERE y.id = x.id + 1 RETURNING x.\"returning\", y.id;", ()),
    ("/* first */ UPDATE v SET a = a * 2 WHERE id IN (SELECT id FROM u) RETURNING a;;", ()),
    ("UPDATE p SET part = 2 RETURNING *", ()),
    ("UPDATE p SET part = 3 - part", ()),
    ("INSERT INTO t (id, name) VALUES ($1, $2)", (9, "it's; $1")),
    ("INSERT INTO t (id, name) VALUES ($1, 'a'), ($2, $$b'; --$$) RETURNING id, name", (10, 9)),
    ("INSERT INTO t (id) SELECT n FROM generate_series(1, 9) AS n ON CONFLICT DO NOTHING", ()),
    ("INSERT INTO t (id) SELECT n FROM generate_series(1, 9) AS n ON CONFLICT DO NOTHING RETURNING *", ()),
    ("INSERT INTO t (id, a) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET a = excluded.a RETURNING a, xmax = 0", (1, 8)),
    ("INSERT INTO t (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET a = 1 WHERE t.a = 99", ()),
    ("INSERT INTO t WITH x AS (SELECT 20 AS id) SELECT id FROM x RETURNING id", ()),
    ("INSERT INTO t (id) WITH x AS (DELETE FROM u RETURNING id) SELECT id + 30 FROM x RETURNING id", ()),
    ("INSERT INTO p DEFAULT VALUES", ()),
    ("INSERT INTO u (b) SELECT NULL WHERE EXISTS (SELECT 1 WHERE $1)", (False,)),
    ("DELETE FROM t WHERE id <> 1", ()),
    ("DELETE FROM t WHERE id <> 1 RETURNING *", ()),
    ("DELETE FROM t USING u WHERE t.id = u.id + $1::int RETURNING t.id, u.b", (1,)),
    # Errors: in the text, in the types, in the data, at the end of the transaction.
    ("UPDATE t SET nonsense = 1", ()),
    ("UPDATE t SET a = ", ()),
    ("UPDATE t SET a = 1 WHERE (id = 1", ()),
    ("DELETE FROM nowhere", ()),
    ("UPDATE t SET a = 'x'::text", ()),
    ("UPDATE t SET a = 1 WHERE CURRENT OF c", ()),
    ("INSERT INTO t (id) VALUES ($1)", (1,)),
    ("INSERT INTO u (b) VALUES ($1)", ("bad",)),
    ("INSERT INTO p VALUES (1, 9)", ()),
    ("UPDATE t SET a = 1 / (id - $1)", (3,)),
    ("DELETE FROM t WHERE id = 1", ()),
    ("UPDATE t SET id = 2 RETURNING nothing", ()),
    ("DELETE FROM t WHERE id = $1", ("x",)),
    ("DELETE FROM t WHERE id = ANY(ARRAY(WITH x AS (DELETE FROM u RETURNING id) SELECT id FROM x))", ()),
]  # fmt: skip

Outcome = tuple[str, Any]


async def _outcome(connection: asyncpg.Connection, method: str, query: str, *arguments: object) -> Outcome:
    """What the caller sees: the tag, or names, types and values of the records; or the error."""
    try:
        result = await getattr(connection, method)(query, *arguments)
    except asyncpg.PostgresError as error:
        return "error", (error.sqlstate, error.args[0])
    except (asyncpg.InterfaceError, asyncpg.DataError) as error:
        return "error", type(error)
    if method == "execute":
        return "tag", result
    records = [] if result is None else [result] if method == "fetchrow" else result
    return "records", [[(name, type(value), value) for name, value in record.items()] for record in records]


async def test_combined_is_like_bare(db: asyncpg.Connection) -> None:
    row = Outbox("shop").rows(["k"], publish_here=True)[0]
    contents = "SELECT (SELECT array_agg(t ORDER BY id) FROM t)::text, (SELECT array_agg(p ORDER BY id) FROM p)::text"
    await db.execute("SET synchronous_commit = off")  # hundreds of commits, none of which has to last
    for (query, arguments), method in product(STATEMENTS, ("execute", "fetch", "fetchrow")):
        combined = combine(query, len(arguments), row.insert)
        assert combined is not None, query
        # Each in a transaction of its own that really commits, for the sake of what fails only then.
        await db.execute(TABLES)
        before = await db.fetch(contents)
        expected = await _outcome(db, method, query, *arguments)
        after = await db.fetch(contents)
        await db.execute(NO_TABLES + TABLES)
        assert await db.fetch(contents) == before
        found = await _outcome(db, method, combined, *arguments, *row.arguments)

        assert (method, query, found) == (method, query, expected)
        assert await db.fetch(contents) == after, query
        # The row is there exactly if the change was committed, however many rows that was.
        recorded = [] if expected[0] == "error" else [("shop", ["k"], None, [], False)]
        assert await _recorded(db) == recorded, query
        await db.execute(NO_TABLES + "DELETE FROM cacheinval.outbox")


async def test_parameters_have_the_types_of_the_bare_statement(db: asyncpg.Connection) -> None:
    await db.execute(TABLES)
    query = "UPDATE t SET price = $2, name = $3, flags = $4 WHERE id = $1 RETURNING *"
    bare, combined = await db.prepare(query), await db.prepare(combine(query, 4, Insert("shop")))
    assert combined.get_parameters()[:4] == bare.get_parameters()
    assert combined.get_attributes() == bare.get_attributes()


async def test_a_role_that_may_only_write_needs_no_right_to_read(db: asyncpg.Connection, role: str) -> None:
    await db.execute(f"{TABLES}; GRANT UPDATE ON t TO {role}; GRANT INSERT ON cacheinval.outbox TO {role}")
    await db.execute(f"SET ROLE {role}")
    row = Outbox("shop").rows(["k"], publish_here=True)[0]
    assert await db.execute(combine("UPDATE t SET a = 1", 0, row.insert), *row.arguments) == "UPDATE 5"


async def test_two_commands_are_never_half_run(db: asyncpg.Connection) -> None:
    """What the tokenizer takes for one statement and the server does not is refused as a whole."""
    await db.execute(TABLES)
    row = Outbox("shop").rows(["k"], publish_here=True)[0]
    one = combine("UPDATE t SET a = 7", 0, row.insert)
    assert one is not None
    with pytest.raises(asyncpg.PostgresSyntaxError, match="multiple commands"):
        await db.execute(f"{one}; DELETE FROM p", *row.arguments)
    assert await db.fetchval("SELECT count(*) FROM t WHERE a = 7") == 0
    assert await _recorded(db) == []


PIECES = ["'it''s'", "E'\\'x'", '$$;"$$', "$q$ ' $q$", "a", '"a"', "(", ")", "+", "||", ",", ";", "--", "/*", "*/", "\n", "'", '"', "$", "$1"]  # fmt: skip
PIECES += [
    " ",
    "\\",
    "::text",
    "NULL",
    "WHERE true",
    "RETURNING *",
    "id",
    "1",
    "U&'\\0041'",
    "B'1'",
    "x'1f'",
    "é",
    "e",
    "-",
    "/",
    "q",
]


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.sampled_from(PIECES), max_size=8), st.sampled_from(["on", "off"]))
async def test_the_server_agrees(
    parsed: asyncpg.Connection, pieces: list[str], standard_strings: str
) -> None:
    """Whatever is combined is one statement for the server too, valid or not for the same reason."""
    query = f"UPDATE t SET a = a{''.join(pieces)}"
    arguments = 1 if "$1" in pieces else 0
    combined = combine(query, arguments, Insert("shop"))
    if combined is None:
        return
    await parsed.execute(
        f"SET escape_string_warning = off; SET standard_conforming_strings = {standard_strings}"
    )
    expected, found = await _verdict(parsed, query), await _verdict(parsed, combined)
    assert (found, combined) == (expected, combined)


@pytest.fixture
async def parsed(db: asyncpg.Connection) -> asyncpg.Connection:
    await db.execute("CREATE TABLE t (id text, a text, e text, q text, é text)")
    return db


async def _verdict(connection: asyncpg.Connection, query: str) -> str | None:
    try:
        await connection.prepare(query)
    except asyncpg.PostgresError as error:
        return error.sqlstate
    return None


async def test_what_a_row_does_not_say_has_its_default(db: asyncpg.Connection) -> None:
    outbox = Outbox("shop")
    await outbox.record(db, outbox.rows(["k"], publish_here=False))
    await outbox.record(db, outbox.rows(["l"], versions=[None], tags=["t"], publish_here=True))
    await outbox.record(db, outbox.rows(["m", "n"], versions=[7, None], publish_here=False))
    await outbox.record(db, outbox.rows(["k"], everything=True, publish_here=False))
    assert sorted(await _recorded(db)) == [
        ("shop", [], None, [], True),
        ("shop", ["k"], None, [], False),
        ("shop", ["l"], None, ["t"], False),
        ("shop", ["m", "n"], [7, None], [], False),
    ]
