"""Tables that record their own changes, on a real Postgres."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import asyncpg
import pytest
from waiting import Eventually

from cacheinval import Client, Settings
from cacheinval.messages import Invalidate, decode
from cacheinval.outbox import apply_schema
from cacheinval.outbox.relay import Relay

Connection = asyncpg.Connection
Keys = dict[str, int | None]

EVERYTHING: Keys = {"*": None}


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Connection]:
    """A connection to a database with the schema, and a table `items` that nobody tracks yet."""
    async with connected(database_url) as connection:
        await apply_schema(connection)
        await connection.execute(
            "CREATE TABLE items (id text PRIMARY KEY, name text, version bigint NOT NULL DEFAULT 1)"
        )
        yield connection


@pytest.fixture
async def role(db: Connection, namespace: str) -> AsyncIterator[str]:
    """A role without any grant."""
    await db.execute(f"CREATE ROLE {namespace}")
    try:
        yield namespace
    finally:
        await db.execute(f"RESET ROLE; DROP OWNED BY {namespace} CASCADE; DROP ROLE {namespace}")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(url, command_timeout=50)
    try:
        yield connection
    finally:
        connection.terminate()


@contextmanager
def warnings_of(db: Connection) -> Iterator[list[str]]:
    """The messages that the server sends beside its results."""
    messages: list[str] = []

    def listener(_: object, message: Any) -> None:
        if message.severity_en == "WARNING":
            messages.append(message.message)

    db.add_log_listener(listener)
    try:
        yield messages
    finally:
        db.remove_log_listener(listener)


async def track(db: Connection, arguments: str) -> None:
    """Calls track(), and takes away what it records itself."""
    await db.execute(f"SELECT cacheinval.track({arguments})")
    assert await taken(db) == EVERYTHING


async def rows_taken(db: Connection) -> list[asyncpg.Record]:
    return await db.fetch("DELETE FROM cacheinval.outbox RETURNING *")


async def taken(db: Connection) -> Keys:
    """What was recorded since the last call: the version of each key, and "*" for everything."""
    keys: Keys = {}
    for row in await rows_taken(db):
        keys |= EVERYTHING if row["everything"] else {}
        keys |= zip(row["keys"], row["versions"] or [None] * len(row["keys"]), strict=True)
    return keys


async def recorded(db: Connection, statement: str) -> Keys:
    await db.execute(statement)
    return await taken(db)


# What is recorded


async def test_each_kind_of_change_records_its_keys(db: Connection) -> None:
    await track(db, "'items', 'item:{id}', 'version'")
    for statement, keys in [
        ("INSERT INTO items VALUES ('a'), ('b'), ('c')", {"item:a": 1, "item:b": 1, "item:c": 1}),
        ("UPDATE items SET name = 'x', version = 2 WHERE id <> 'c'", {"item:a": 2, "item:b": 2}),
        ("UPDATE items SET name = 'y' WHERE id = 'a'", {"item:a": 3}),  # whoever forgets the version
        ("UPDATE items SET name = 'z' WHERE id = 'nobody'", {}),
        ("DELETE FROM items WHERE id IN ('a', 'c')", {"item:a": 3, "item:c": 2}),
        ("DELETE FROM items WHERE id = 'a'", {}),
        ("INSERT INTO items SELECT 'a' WHERE false", {}),
        ("COPY items FROM PROGRAM 'printf ''d\tn\t7\\ne\tn\t8\\n'''", {"item:d": 7, "item:e": 8}),
        (
            "INSERT INTO items VALUES ('d'), ('f') ON CONFLICT (id) DO UPDATE SET version = items.version + 1",
            {"item:d": 8, "item:f": 1},
        ),
        ("INSERT INTO items VALUES ('d') ON CONFLICT DO NOTHING", {}),
        ("TRUNCATE items", EVERYTHING),
    ]:
        assert await recorded(db, statement) == keys, statement


async def test_a_row_is_due_at_once_and_says_what_track_was_told(db: Connection) -> None:
    await track(db, "'items', 'item:{id}', tags => ARRAY['items', 'it''s, \"ours\"'], namespace => 'shop'")
    await db.execute("INSERT INTO items VALUES ('a')")
    assert await db.fetchval("SELECT publish_at <= clock_timestamp() FROM cacheinval.outbox")
    (row,) = await rows_taken(db)
    assert (row["namespace"], row["keys"], row["versions"], row["tags"], row["everything"]) == (
        "shop",
        ["item:a"],
        None,
        ["items", 'it\'s, "ours"'],
        False,
    )


async def test_merge_records_each_of_its_actions(db: Connection) -> None:
    await track(db, "'items', 'item:{id}', 'version'")
    await recorded(db, "INSERT INTO items VALUES ('a'), ('b')")
    assert await recorded(
        db,
        "MERGE INTO items USING (VALUES ('a'), ('b'), ('c')) AS source (id) ON items.id = source.id"
        " WHEN MATCHED AND items.id = 'a' THEN DELETE WHEN MATCHED THEN UPDATE SET version = 5"
        " WHEN NOT MATCHED THEN INSERT VALUES (source.id)",
    ) == {"item:a": 2, "item:b": 5, "item:c": 1}


async def test_a_changed_key_invalidates_the_old_and_the_new(db: Connection) -> None:
    await track(db, "'items', 'item:{id}', 'version'")
    await recorded(db, "INSERT INTO items VALUES ('a', NULL, 1), ('b', NULL, 4)")
    assert await recorded(db, "UPDATE items SET id = 'c' WHERE id = 'b'") == {"item:b": 5, "item:c": 4}
    swapped = "UPDATE items SET id = CASE id WHEN 'a' THEN 'A' ELSE 'C' END, version = version + 1"
    assert await recorded(db, swapped) == {"item:a": 2, "item:A": 2, "item:c": 5, "item:C": 5}


async def test_a_key_that_another_row_takes_is_told_with_a_version_that_its_last_row_never_had(
    db: Connection,
) -> None:
    await track(db, "'items', 'item:{id}', 'version'")
    await recorded(db, "INSERT INTO items VALUES ('a', NULL, 10), ('b', NULL, 1)")
    moved = "UPDATE items SET id = CASE id WHEN 'a' THEN 'c' ELSE 'a' END, version = version + 1"
    assert await recorded(db, moved) == {"item:a": 11, "item:b": 2, "item:c": 11}


async def test_what_foreign_keys_and_truncate_cascade_to_is_recorded(db: Connection) -> None:
    await db.execute(
        "CREATE TABLE parts (item text REFERENCES items ON UPDATE CASCADE ON DELETE CASCADE, number integer)"
        " PARTITION BY LIST (number); CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1)"
    )
    await db.execute("INSERT INTO items VALUES ('a'); INSERT INTO parts VALUES ('a', 1)")
    await track(db, "'parts', 'part:{item}:{number}'")
    assert await recorded(db, "UPDATE items SET id = 'b'") == {"part:a:1": None, "part:b:1": None}
    assert await recorded(db, "DELETE FROM items") == {"part:b:1": None}
    assert await recorded(db, "TRUNCATE items CASCADE") == EVERYTHING


async def test_it_is_part_of_the_transaction(db: Connection) -> None:
    await track(db, "'items', 'item:{id}'")
    with suppress(ZeroDivisionError):
        async with db.transaction():
            await db.execute("INSERT INTO items VALUES ('a')")
            raise ZeroDivisionError
    async with db.transaction():
        await db.execute("INSERT INTO items VALUES ('b'); SAVEPOINT s; INSERT INTO items VALUES ('c')")
        await db.execute("ROLLBACK TO s; INSERT INTO items VALUES ('d')")
    assert await taken(db) == {"item:b": None, "item:d": None}


async def test_track_covers_what_was_changed_before(db: Connection) -> None:
    await db.execute("SELECT cacheinval.track('items', 'item:{id}', namespace => 'shop')")
    (row,) = await rows_taken(db)
    assert (row["namespace"], row["everything"]) == ("shop", True)


# Keys


async def test_templates(db: Connection) -> None:
    await db.execute('CREATE TABLE odd (a integer, b text, "C d" text, "ö""\'\\%s" text)')
    for template, key in [
        ("{a}", "1"),
        ("{a}{b}", "1two"),
        ("{a}:{b}:{a}", "1:two:1"),
        ("x {C d}", "x three"),
        ("{ö\"''\\%s}", "four"),
        ("{{{a}}}", "{1}"),
        ("{{a}} ''%s\\", "{a} '%s\\"),
        ("odd:all", "odd:all"),
        ("ключ\n{b}", "ключ\ntwo"),
    ]:
        await track(db, f"'odd', E'{template.replace(chr(92), chr(92) * 2)}'")
        assert await recorded(db, "INSERT INTO odd VALUES (1, 'two', 'three', 'four')") == {key: None}
        await db.execute("SELECT cacheinval.untrack('odd')")


async def test_tables_of_any_name_in_any_schema(db: Connection) -> None:
    await db.execute('CREATE SCHEMA "My Shop"; CREATE TABLE "My Shop"."Ordérs; --" ("Id" integer)')
    name = '"My Shop"."Ordérs; --"'
    await track(db, f"'{name}', 'order:{{Id}}'")
    assert await recorded(db, f"INSERT INTO {name} VALUES (1)") == {"order:1": None}
    await db.execute(f'ALTER TABLE {name} RENAME TO "new"; ALTER TABLE "My Shop"."new" SET SCHEMA public')
    assert await recorded(db, 'DELETE FROM "new"') == {"order:1": None}
    await db.execute("SELECT cacheinval.untrack('\"new\"')")
    assert await recorded(db, 'INSERT INTO "new" VALUES (1)') == {}


async def test_text_does_not_depend_on_the_session(db: Connection) -> None:
    types = ("timestamptz", "date", "interval", "bytea", "float8", "money", "boolean", "uuid", "numeric(6,2)")
    columns = [f"c{number}" for number in range(len(types))]
    await db.execute(f"CREATE TABLE shown ({', '.join(map(' '.join, zip(columns, types, strict=True)))})")
    await track(db, f"'shown', '{'|'.join(f'{{{column}}}' for column in columns)}'")
    insert = (
        "INSERT INTO shown VALUES ('2026-02-01 12:00+00', '2026-02-01', '1 day 2 hours', '\\x00ff', 0.1, 1.5, true,"
        " '6B1F0000-0000-0000-0000-000000000000', 1.5)"
    )
    plain = await recorded(db, insert)
    assert plain == {
        "2026-02-01 12:00:00+00|2026-02-01|1 day 02:00:00|\\x00ff|0.1|$1.50|true|"
        "6b1f0000-0000-0000-0000-000000000000|1.50": None
    }
    await db.execute(
        "SET datestyle = 'German'; SET intervalstyle = 'iso_8601'; SET timezone = 'Asia/Tokyo';"
        "SET bytea_output = 'escape'; SET extra_float_digits = -5"
    )
    assert await recorded(db, insert) == plain
    assert await db.fetchval("SHOW datestyle") == "German, DMY"


async def test_keys_that_a_collation_holds_for_equal_are_all_recorded(db: Connection) -> None:
    await db.execute(
        "CREATE COLLATION anycase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);"
        "CREATE TABLE words (word text COLLATE anycase)"
    )
    await track(db, "'words', '{word}'")
    assert await recorded(db, "INSERT INTO words VALUES ('a'), ('A'), ('a')") == {"a": None, "A": None}


@pytest.mark.parametrize("value", ["NULL", "''", "repeat('a', 513)", "repeat('é', 257)"])
async def test_what_cannot_be_a_key_invalidates_everything(db: Connection, value: str) -> None:
    await track(db, "'items', '{name}'")
    with warnings_of(db) as warnings:
        assert await recorded(db, f"INSERT INTO items VALUES ('a', 'b'), ('c', {value})") == EVERYTHING
    assert "since trigger cacheinval_insert_" in warnings[0]
    assert "on public.items cannot tell the keys: a key is NULL, empty, or longer than 512" in warnings[0]
    assert await recorded(db, "DELETE FROM items WHERE id = 'a'") == {"b": None}


async def test_the_longest_key_is_recorded(db: Connection) -> None:
    await track(db, "'items', '{name}'")
    assert await recorded(db, "INSERT INTO items VALUES ('a', repeat('é', 256))") == {"é" * 256: None}


async def test_the_highest_version_has_none_after_it(db: Connection) -> None:
    await track(db, "'items', '{id}', 'version'")
    assert await recorded(db, f"INSERT INTO items VALUES ('a', '', {2**63 - 1})") == {"a": 2**63 - 1}
    with warnings_of(db) as warnings:
        assert await recorded(db, "DELETE FROM items") == EVERYTHING
    assert "bigint out of range" in warnings[0]


# Size


async def test_many_keys_take_rows_of_1000(db: Connection) -> None:
    await track(db, "'items', 'item:{id}', 'version', ARRAY['items']")
    await db.execute("INSERT INTO items SELECT n, '', n FROM generate_series(1, 100000) AS n")
    rows = await rows_taken(db)
    assert [len(row["keys"]) for row in rows] == [1_000] * 100
    assert [row["tags"] for row in rows] == [["items"]] + [[]] * 99
    keys = {key: version for row in rows for key, version in zip(row["keys"], row["versions"], strict=True)}
    assert keys == {f"item:{n}": n for n in range(1, 100_001)}
    await db.execute("UPDATE items SET id = '-' || id")
    assert sum(len(row["keys"]) for row in await rows_taken(db)) == 200_000
    await db.execute("INSERT INTO items VALUES ('one more')")
    assert await taken(db) == {"item:one more": 1}
    for statement in ("UPDATE items SET version = 5", "DELETE FROM items"):
        await db.execute(statement)
        assert [row["everything"] for row in await rows_taken(db)] == [True]


async def test_a_statement_of_a_million_rows_takes_one(db: Connection) -> None:
    await db.execute("CREATE UNLOGGED TABLE numbers (id integer)")
    await track(db, "'numbers', 'number:{id}'")
    for statement in (
        "INSERT INTO numbers SELECT generate_series(1, 1000000)",
        "UPDATE numbers SET id = id + 1 WHERE id <= 200000",
        "DELETE FROM numbers",
    ):
        await db.execute(statement)
        assert [row["everything"] for row in await rows_taken(db)] == [True], statement


# Partitions and children


async def test_partitions_record_through_the_whole_and_directly(db: Connection) -> None:
    await db.execute(
        "CREATE TABLE orders (id integer, region text, version integer) PARTITION BY LIST (region);"
        "CREATE TABLE orders_eu PARTITION OF orders FOR VALUES IN ('eu') PARTITION BY RANGE (id);"
        "CREATE TABLE orders_eu_1 PARTITION OF orders_eu FOR VALUES FROM (0) TO (100);"
        "CREATE TABLE orders_us (version integer, junk text, region text, id integer);"
        "ALTER TABLE orders_us DROP COLUMN junk;"
        "ALTER TABLE orders ATTACH PARTITION orders_us FOR VALUES IN ('us')"
    )
    await track(db, "'orders', '{region}:{id}', 'version'")
    for statement, keys in [
        ("INSERT INTO orders VALUES (1, 'eu', 1), (1, 'us', 1)", {"eu:1": 1, "us:1": 1}),
        ("INSERT INTO orders_us VALUES (1, 'us', 2)", {"us:2": 1}),
        ("UPDATE orders SET version = 2 WHERE id = 1", {"eu:1": 2, "us:1": 2}),
        ("UPDATE orders_eu_1 SET version = 3", {"eu:1": 3}),
        ("UPDATE orders SET region = 'us', id = 3, version = 4 WHERE region = 'eu'", {"eu:1": 4, "us:3": 4}),
        ("UPDATE orders_eu SET version = 5", {}),
        ("DELETE FROM orders_us WHERE id = 2", {"us:2": 2}),
        ("DELETE FROM orders", {"us:1": 3, "us:3": 5}),
        ("TRUNCATE orders_eu_1", EVERYTHING),
        ("TRUNCATE orders", EVERYTHING),
    ]:
        assert await recorded(db, statement) == keys, statement


async def test_a_partition_that_comes_later(db: Connection) -> None:
    await db.execute("CREATE TABLE orders (id integer, region text) PARTITION BY LIST (region)")
    await track(db, "'orders', '{id}'")
    await db.execute("CREATE TABLE orders_eu PARTITION OF orders FOR VALUES IN ('eu')")
    assert await recorded(db, "INSERT INTO orders VALUES (1, 'eu')") == {"1": None}
    assert await recorded(db, "INSERT INTO orders_eu VALUES (2, 'eu')") == {}  # the limit
    await track(db, "'orders', '{id}'")
    assert await recorded(db, "INSERT INTO orders_eu VALUES (3, 'eu')") == {"3": None}
    await db.execute("ALTER TABLE orders DETACH PARTITION orders_eu")
    assert await recorded(db, "INSERT INTO orders_eu VALUES (4, 'eu')") == {"4": None}
    await db.execute("SELECT cacheinval.untrack('orders_eu')")
    assert await recorded(db, "INSERT INTO orders_eu VALUES (5, 'eu')") == {}


async def test_tables_that_inherit_come_along(db: Connection) -> None:
    await db.execute(
        "CREATE TABLE special (extra text) INHERITS (items); CREATE TABLE more () INHERITS (special)"
    )
    await track(db, "'items', 'item:{id}'")
    assert await recorded(db, "INSERT INTO more VALUES ('a')") == {"item:a": None}
    assert await recorded(db, "UPDATE items SET name = 'x'") == {"item:a": None}
    assert await recorded(db, "DELETE FROM special") == {"item:a": None}
    await db.execute("SELECT cacheinval.untrack('items')")
    assert await recorded(db, "INSERT INTO more VALUES ('a')") == {}


# track() and untrack()

REFUSED = [
    ("NULL, '{id}'", "NULL is not a table"),
    ("0, '{id}'", "is not a table"),
    ("'seen', '{id}'", "seen is not a table"),
    ("'items_pkey', '{id}'", "items_pkey is not a table"),
    ("'passing', '{id}'", "passing is a temporary table"),
    ("'cacheinval.outbox', '{id}'", "cacheinval.outbox is a table of cacheinval itself"),
    (
        "'parts_1', '{id}'",
        "public.parts_1 is a part of public.parts, and a write to that would pass by unseen",
    ),
    ("'distant', '{id}'", "public.distant has a part that is a foreign table"),
    ("'items', NULL", "key_template has a NULL"),
    ("'items', ''", "key_template has an empty string"),
    ("'items', repeat('a', 513)", "key_template has a string of 513 bytes"),
    ("'items', 'item:{id'", "key_template 'item:{id' has a lone \"{\"; accepted: {column}, {{ for"),
    ("'items', 'item:id}'", 'has a lone "}"'),
    ("'items', 'item:{}'", 'has a lone "{"'),
    ("'items', '{id}:{Name}'", 'public.items has no column "Name"; accepted: id, name, version'),
    ("'items', '{ctid}'", "has no column ctid"),
    ("'items', '{gone}'", "has no column gone"),
    ("'items', '{id}', 'nothing'", "has no column nothing; accepted: id, name, version"),
    ("'items', '{id}', 'xmin'", "has no column xmin"),
    ("'items', '{id}', 'name'", "version_column name of public.items is of type text; accepted: smallint,"),
    ("'items', '{id}', tags => ARRAY['a', NULL]", "tags has a NULL at position 2"),
    ("'items', '{id}', tags => ARRAY[['a']]", "tags has 2 dimensions"),
    ("'items', '{id}', namespace => 'a.b'", "namespace 'a.b' is not accepted"),
    ("'items', '{id}', namespace => NULL", "namespace NULL is not accepted"),
]


async def test_track_says_what_is_wrong(db: Connection) -> None:
    await db.execute(
        "CREATE VIEW seen AS SELECT id FROM items; CREATE TEMPORARY TABLE passing (id text);"
        "ALTER TABLE items ADD COLUMN gone text; ALTER TABLE items DROP COLUMN gone;"
        "CREATE TABLE parts (id integer) PARTITION BY LIST (id);"
        "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);"
        "CREATE TABLE distant (id integer) PARTITION BY LIST (id);"
        "CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER away FOREIGN DATA WRAPPER nowhere;"
        "CREATE FOREIGN TABLE distant_1 PARTITION OF distant FOR VALUES IN (1) SERVER away"
    )
    for arguments, message in REFUSED:
        with pytest.raises(asyncpg.PostgresError) as caught:
            await db.execute(f"SELECT cacheinval.track({arguments})")
        assert message in str(caught.value), arguments
    assert await db.fetchval("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'cacheinval%'") == 0
    assert await taken(db) == {}


async def test_domains_of_integers_are_versions(db: Connection) -> None:
    await db.execute("CREATE DOMAIN revision AS smallint; CREATE TABLE docs (id integer, at revision)")
    await track(db, "'docs', '{id}', 'at'")
    assert await recorded(db, "INSERT INTO docs VALUES (1, 2)") == {"1": 2}
    assert await recorded(db, "INSERT INTO docs VALUES (2, NULL)") == {"2": None}


async def test_a_column_that_may_be_null_is_warned_of(db: Connection) -> None:
    with warnings_of(db) as warnings:
        await track(db, "'items', '{id}:{name}'")
    assert warnings == [
        "column name of public.items may be NULL: a row where it is will invalidate everything in namespace default"
    ]


async def test_tracking_again_replaces_or_does_nothing(db: Connection, database_url: str) -> None:
    await track(db, "'items', 'item:{id}', 'version', ARRAY['a']")
    await track(db, "'items', 'item:{id}', NULL, ARRAY['b']")
    await db.execute("INSERT INTO items VALUES ('a')")
    (row,) = await rows_taken(db)
    assert (row["versions"], row["tags"]) == (None, ["b"])
    async with connected(database_url) as writer, writer.transaction():
        await writer.execute("UPDATE items SET name = 'x'")
        # No lock to wait for where there is nothing to do:
        assert await recorded(db, "SELECT cacheinval.track('items', 'item:{id}', NULL, ARRAY['b'])") == {}


async def test_a_trigger_that_was_disabled_or_dropped_is_restored(db: Connection) -> None:
    await track(db, "'items', 'item:{id}'")
    await db.execute("ALTER TABLE items DISABLE TRIGGER ALL")
    assert await recorded(db, "INSERT INTO items VALUES ('a')") == {}
    await track(db, "'items', 'item:{id}'")
    assert await recorded(db, "INSERT INTO items VALUES ('b')") == {"item:b": None}


async def test_several_templates_and_namespaces_of_one_table(db: Connection) -> None:
    for arguments in ("'{id}', 'version'", "'name:{name}'", "'{id}', namespace => 'other'"):
        await track(db, f"'items', {arguments}")
    await db.execute("INSERT INTO items VALUES ('a', 'n')")
    rows = [(row["namespace"], row["keys"], row["versions"]) for row in await rows_taken(db)]
    assert sorted(rows, key=str) == [
        ("default", ["a"], [1]),
        ("default", ["name:n"], None),
        ("other", ["a"], None),
    ]
    await db.execute("SELECT cacheinval.untrack('items')")
    assert await recorded(db, "UPDATE items SET name = 'm'") == {}
    await db.execute("SELECT cacheinval.untrack('items')")


async def test_the_schema_may_be_applied_again(db: Connection) -> None:
    await track(db, "'items', 'item:{id}'")
    await db.execute("DROP FUNCTION cacheinval.untrack")
    await apply_schema(db)
    assert await recorded(db, "INSERT INTO items VALUES ('a')") == {"item:a": None}
    await db.execute("SELECT cacheinval.untrack('items')")


async def test_invalidate_all(db: Connection, role: str) -> None:
    await db.execute(f"SET ROLE {role}; SELECT cacheinval.invalidate_all('shop'); RESET ROLE")
    (row,) = await rows_taken(db)
    assert (row["namespace"], row["keys"], row["tags"], row["everything"]) == ("shop", [], [], True)
    with pytest.raises(asyncpg.PostgresError, match=r"namespace 'a\.b' is not accepted"):
        await db.execute("SELECT cacheinval.invalidate_all('a.b')")


# What changes beneath it


async def test_a_column_that_is_no_more_invalidates_everything(db: Connection) -> None:
    await track(db, "'items', 'item:{id}'")
    assert await recorded(db, "INSERT INTO items VALUES ('a')") == {"item:a": None}
    await db.execute("ALTER TABLE items RENAME COLUMN id TO code")
    for statement in ("INSERT INTO items VALUES ('b')", "UPDATE items SET name = 'x'", "DELETE FROM items"):
        with warnings_of(db) as warnings:
            assert await recorded(db, statement) == EVERYTHING
        assert 'on public.items cannot tell the keys: column "id" does not exist' in warnings[0]
    await db.execute("SELECT cacheinval.untrack('items')")
    await track(db, "'items', 'item:{code}'")
    assert await recorded(db, "INSERT INTO items VALUES ('c')") == {"item:c": None}


async def test_columns_may_come_go_and_change_their_type(db: Connection) -> None:
    await track(db, "'items', 'item:{id}', 'version'")
    await recorded(db, "INSERT INTO items VALUES ('1')")
    await db.execute("ALTER TABLE items ADD COLUMN more text DEFAULT 'x'; ALTER TABLE items DROP COLUMN name")
    assert await recorded(db, "UPDATE items SET more = 'y'") == {"item:1": 2}
    await db.execute("ALTER TABLE items ALTER COLUMN id TYPE integer USING id::integer")
    assert await recorded(db, "UPDATE items SET id = 2") == {"item:1": 2, "item:2": 1}
    await db.execute("ALTER TABLE items ALTER COLUMN version TYPE text")
    with warnings_of(db):
        assert await recorded(db, "UPDATE items SET version = 'one'") == EVERYTHING
    await db.execute("DROP TABLE items")


async def test_without_an_outbox_the_change_fails(db: Connection) -> None:
    await track(db, "'items', 'item:{id}'")
    with pytest.raises(asyncpg.DependentObjectsStillExistError):
        await db.execute("DROP SCHEMA cacheinval")
    await db.execute("DROP TABLE cacheinval.outbox")
    with pytest.raises(asyncpg.UndefinedTableError, match=r"cacheinval\.outbox"):
        await db.execute("INSERT INTO items VALUES ('a')")
    assert await db.fetchval("SELECT count(*) FROM items") == 0


async def test_replication_role_does_not_silence_it(db: Connection) -> None:
    await track(db, "'items', 'item:{id}'")
    await db.execute("SET session_replication_role = replica")
    assert await recorded(db, "INSERT INTO items VALUES ('a')") == {"item:a": None}


# Rights


async def test_who_may_only_write_the_table_records(db: Connection, role: str) -> None:
    await track(db, "'items', 'item:{id}', 'version'")
    await db.execute(f"GRANT INSERT, DELETE ON items TO {role}; SET ROLE {role}")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await db.execute("SELECT id FROM items")
    await db.execute("INSERT INTO items VALUES ('a'); DELETE FROM items; RESET ROLE")
    assert await taken(db) == {"item:a": 2}


async def test_only_the_owner_may_track(db: Connection, role: str) -> None:
    await db.execute(f"GRANT ALL ON items TO {role}; SET ROLE {role}")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match=r"must be owner of (table|relation) items"):
        await db.execute("SELECT cacheinval.track('items', '{id}')")
    await db.execute("RESET ROLE")
    await track(db, "'items', '{id}'")
    await db.execute(f"SET ROLE {role}")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await db.execute("SELECT cacheinval.untrack('items')")
    await db.execute(f"RESET ROLE; ALTER TABLE items OWNER TO {role}; SET ROLE {role}")
    await db.execute("SELECT cacheinval.untrack('items'); SELECT cacheinval.track('items', '{id}')")
    await db.execute("INSERT INTO items VALUES ('a'); RESET ROLE")
    assert await taken(db) == EVERYTHING | {"a": None}


async def test_only_the_owner_may_hide_that_triggers_are_gone(db: Connection, role: str) -> None:
    await track(db, "'items', '{id}'")
    for event in ("insert", "update", "delete", "truncate"):
        name = await db.fetchval(
            "SELECT tgname FROM pg_trigger WHERE tgrelid = 'items'::regclass AND tgname LIKE $1",
            f"cacheinval_{event}_%",
        )
        await db.execute(f"DROP TRIGGER {name} ON items")
    gone = [("items", 0)]
    for owner in ("postgres", role):
        await db.execute(f"ALTER TABLE items OWNER TO {owner}; SET SESSION AUTHORIZATION {role}")
        await db.execute("DELETE FROM cacheinval.forgettable")
        if owner != role:
            with pytest.raises(
                asyncpg.InsufficientPrivilegeError, match=r"must be owner of table public\.items"
            ):
                await db.execute("SELECT cacheinval.untrack('items')")
        await db.execute("RESET SESSION AUTHORIZATION")
        left = await db.fetch("SELECT relation::text, triggers FROM cacheinval.tracking()")
        assert [tuple(row) for row in left] == ([] if owner == role else gone)


async def test_who_may_untrack_by_the_rights_of_a_function_leaves_nothing_noted(
    db: Connection, role: str
) -> None:
    """Such as a migration's, which others may run: whose session it is says nothing."""
    await track(db, "'items', '{id}'")
    await db.execute(
        "CREATE FUNCTION public.end_it() RETURNS void LANGUAGE sql SECURITY DEFINER AS $$ SELECT cacheinval.untrack('items') $$"
    )
    await db.execute(f"SET SESSION AUTHORIZATION {role}; SELECT public.end_it(); RESET SESSION AUTHORIZATION")
    assert await db.fetch("SELECT relation FROM cacheinval.tracking()") == []


async def test_columns_whose_text_runs_code_lend_nobody_rights(db: Connection, role: str) -> None:
    """The trigger casts a column of a type made by its table's owner, who would like the rights of the schema's."""
    await db.execute(f"GRANT CREATE ON SCHEMA public TO {role}; SET ROLE {role}")
    await db.execute(
        "CREATE TYPE public.mood AS ENUM ('good');"
        "CREATE FUNCTION public.shout(mood) RETURNS text LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE 'cast as %', current_user; END $$;"
        "CREATE CAST (public.mood AS text) WITH FUNCTION public.shout(mood);"
        "CREATE TABLE public.moods (mood mood NOT NULL)"
    )
    await db.execute("SELECT cacheinval.track('moods', '{mood}')")
    with warnings_of(db) as warnings:
        await db.execute("INSERT INTO moods VALUES ('good')")
    assert warnings[0].endswith(f"cannot tell the keys: cast as {role}")


async def test_arguments_of_a_trigger_are_not_run_as_sql(db: Connection, role: str) -> None:
    await db.execute(
        "CREATE TRIGGER mine AFTER INSERT ON items REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION"
        " cacheinval.record_change('default', 'version\"; DROP TABLE items --', '{}', ''' || 1/0 || ''', 'id', '''')"
    )
    with warnings_of(db) as warnings:
        assert await recorded(db, "INSERT INTO items VALUES ('a')") == EVERYTHING
    assert 'column "version"; DROP TABLE items --" does not exist' in warnings[0]


async def test_search_path_does_not_matter(db: Connection, role: str) -> None:
    await track(db, "'items', 'item:{id}'")
    await db.execute(
        f"GRANT CREATE ON SCHEMA public TO {role}; GRANT INSERT ON items TO {role}; SET ROLE {role}"
    )
    raising = "LANGUAGE plpgsql AS $$ BEGIN RAISE 'trapped %', current_user; END $$;"
    await db.execute(
        f"CREATE FUNCTION public.format(text, text, text) RETURNS text {raising}"
        f"CREATE FUNCTION public.octet_length(bytea) RETURNS integer {raising}"
        f"CREATE FUNCTION public.join(text, text) RETURNS text {raising}"
        "CREATE OPERATOR public.|| (leftarg = text, rightarg = text, function = public.join);"
        "CREATE TEMPORARY TABLE new_rows (id text); CREATE TEMPORARY TABLE unnest (id text);"
        "SET search_path = public, pg_catalog"
    )
    with pytest.raises(asyncpg.RaiseError, match="trapped"):
        await db.fetchval("SELECT 'a'::text || 'b'::text")
    with warnings_of(db) as warnings:
        await db.execute("INSERT INTO items VALUES ('a'); RESET ROLE")
        assert await taken(db) == {"item:a": None}
    assert warnings == []


# Locks and cost


async def test_a_change_takes_no_lock_that_others_wait_for(db: Connection, database_url: str) -> None:
    await track(db, "'items', 'item:{id}'")
    await recorded(db, "INSERT INTO items VALUES ('a'), ('b')")
    async with connected(database_url) as other, other.transaction():
        await other.execute("UPDATE items SET name = 'x' WHERE id = 'a'")
        locks = await other.fetch(
            "SELECT DISTINCT locktype, mode FROM pg_locks WHERE pid = pg_backend_pid() AND locktype NOT LIKE '%xid'"
        )
        assert {tuple(lock) for lock in locks} <= {
            ("relation", "RowExclusiveLock"),
            ("relation", "RowShareLock"),
            ("relation", "AccessShareLock"),
            ("transactionid", "ExclusiveLock"),
        }
        assert await recorded(db, "UPDATE items SET name = 'y' WHERE id = 'b'") == {"item:b": None}


async def test_a_change_takes_no_transaction_id_of_its_own(db: Connection) -> None:
    await track(db, "'items', 'item:{id}'")
    async with db.transaction():
        first = await db.fetchval("SELECT pg_current_xact_id()::text::bigint")
        for number in range(100):
            await db.execute("INSERT INTO items VALUES ($1)", str(number))
    # Autovacuum may take one or another meanwhile.
    assert await db.fetchval("SELECT pg_current_xact_id()::text::bigint") - first < 20


@pytest.mark.parametrize("call", ["track('items', '{id}')", "untrack('items')"])
async def test_track_does_not_wait_long_for_its_lock(db: Connection, database_url: str, call: str) -> None:
    if call.startswith("untrack"):
        await track(db, "'items', '{id}'")
    async with connected(database_url) as writer, writer.transaction():
        await writer.execute("INSERT INTO items VALUES ('a')")
        with pytest.raises(
            asyncpg.LockNotAvailableError, match="items is in use by a transaction that did not end"
        ):
            await db.execute(f"SELECT cacheinval.{call}")
    await db.execute(f"SELECT cacheinval.{call}")


# With a client, and with the relay


class Broker:
    """Confirms what is sent, and notes when it came."""

    origin = "relay"

    def __init__(self) -> None:
        self.messages: list[tuple[float, Invalidate]] = []

    async def open_channel(self) -> "Broker":
        return self

    async def send(self, body: bytes) -> None:
        message = decode(body)
        if isinstance(message, Invalidate):  # and not a tick
            self.messages.append((time.monotonic(), message))

    async def close(self) -> None:
        pass


async def test_the_relay_publishes_it_at_once(
    db: Connection, database_url: str, eventually: Eventually
) -> None:
    await track(db, "'items', 'item:{id}', 'version', ARRAY['items'], 'shop'")
    broker = Broker()
    relay = Relay(lambda: asyncpg.connect(database_url), broker.open_channel, namespace="shop")
    task = asyncio.create_task(relay.run())
    try:
        await eventually(lambda: relay.leads)
        delays = []
        for version in range(1, 12):
            committed = time.monotonic()
            await db.execute(
                "INSERT INTO items VALUES ('a') ON CONFLICT (id) DO UPDATE SET version = items.version + 1"
            )
            await eventually(lambda: len(broker.messages) == version)  # noqa: B023 (awaited here)
            arrived, message = broker.messages[-1]
            assert (message.keys, message.versions, message.tags) == (["item:a"], [version], ["items"])
            delays.append(arrived - committed)
        # At once, and not with the grace that a client's own rows have: of several, since a busy machine delays some.
        assert min(delays) < 0.25, delays
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_whoever_changes_the_table_a_client_notices(
    db: Connection, database_url: str, namespace: str, eventually: Eventually
) -> None:
    await db.execute("INSERT INTO items VALUES ('a', 'old')")
    await track(db, f"'items', 'item:{{id}}', 'version', namespace => '{namespace}'")
    settings = Settings(
        broker_url="memory://", database_url=database_url, namespace=namespace, relay="auto", http_port=0
    )
    async with Client(settings) as client:
        await client.wait_ready(30)

        async def name() -> Any:
            return await client.cache.get_or_set(
                "item:a", lambda: client.pool.fetchval("SELECT name FROM items WHERE id = 'a'")
            )

        assert await name() == "old"
        await db.execute("UPDATE items SET name = 'by another', version = version + 1")

        async def seen() -> bool:
            return await name() == "by another"

        await eventually(seen)
        # The client records the same key as well, in both of its ways.
        await client.execute(
            "UPDATE items SET name = $1, version = version + 1", "by execute", invalidate=["item:a"]
        )
        assert await name() == "by execute"
        async with client.transaction() as tx:
            await tx.execute("UPDATE items SET name = 'by transaction', version = version + 1")
            tx.invalidate("item:a")
        assert await name() == "by transaction"
        await eventually(lambda: db.fetchval("SELECT count(*) = 0 FROM cacheinval.outbox"))
        assert await name() == "by transaction"
        assert client.state == "ready"
