"""What may be put together with the writing of an outbox row, told from the text alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheinval.outbox.statements import LONGEST, combine, leaves_session, tokens
from cacheinval.outbox.writing import Insert

INSERT = Insert("shop")
NASTY = "'\"$;-/*\\\n\r1ab_Eeuq& é\u2028().,:+|"


@pytest.mark.parametrize(
    ("query", "arguments"),
    [
        ("UPDATE t SET a = 1", 0),
        ("  \t\r\n\fupdate t set a = $1", 1),
        ("Delete From t Where id = $2 AND a = $1::int", 2),
        ("DELETE FROM t WHERE id = $1 OR a = $1", 1),
        ("INSERT INTO t (a) VALUES ($1) ON CONFLICT (id) DO UPDATE SET a = excluded.a RETURNING *;", 1),
        ("INSERT INTO t WITH x AS (SELECT 1 AS a) SELECT a FROM x", 0),
        ("UPDATE t SET a = 1;; ; -- the end", 0),
        ("UPDATE t SET a = 1 -- no newline", 0),
        ("-- first\n/* and /* nested */ ; $9 */ UPDATE t SET a = 1", 0),
        ("UPDATE t SET a = ';', b = '''; $2', c = '$$' WHERE id = $1", 1),
        ("UPDATE t SET a = E'\\'; $2 ', b = e'''\\\\' WHERE id = $1", 1),
        ('UPDATE t SET a = U&\'\\0041; $2\', "b;$3""" = 1, U&"c;" = 2 WHERE id = $1', 1),
        ("UPDATE t SET a = B'1', b = X'1f', c = N'x;'", 0),
        ("UPDATE t SET a = $$; ' $2 $$, b = $é1$ $$ ; $é$ $é1$ WHERE id = $1", 1),
        ("UPDATE t SET a = col$2$ + $1", 1),
        ('UPDATE "returning" SET "returning" = 1 RETURNING "returning"', 0),
        ("UPDATE tabelle_größe SET größe = 1", 0),
        ("UPDATE t SET a = a-$1/*x*/*2--$7\n", 1),
        ("UPDATE t SET a = 'x'\n'; continued'", 0),
        ("UPDATE t SET a = 1.5e-3 + .5 + 0x1F", 0),
    ],
)
def test_one_statement_is_combined(query: str, arguments: int) -> None:
    combined = combine(query, arguments, INSERT)
    assert combined is not None
    assert combined == f"WITH cacheinval_recorded AS ({INSERT.sql(arguments + 1)}) {query}"


@pytest.mark.parametrize(
    ("query", "arguments"),
    [
        ("", 0),
        (";", 0),
        ("-- UPDATE t SET a = 1", 0),
        ("SELECT 1", 0),
        ("WITH x AS (SELECT 1) UPDATE t SET a = 1", 0),
        ("MERGE INTO t USING u ON t.id = u.id WHEN MATCHED THEN DELETE", 0),
        ("TRUNCATE t", 0),
        ("CREATE RULE r AS ON UPDATE TO t DO ALSO DELETE FROM u", 0),
        ("EXPLAIN ANALYZE UPDATE t SET a = 1", 0),
        ("COPY t FROM STDIN", 0),
        ("updates t SET a = 1", 0),
        ('"update" t SET a = 1', 0),
        ("(UPDATE t SET a = 1)", 0),
        ("; UPDATE t SET a = 1", 0),
        ("UPDATE t SET a = 1; UPDATE t SET a = 2", 0),
        ("UPDATE t SET a = 1; 'x'", 0),
        ("UPDATE t SET a = '", 0),
        ("UPDATE t SET a = 'it''s", 0),
        ('UPDATE t SET "a = 1', 0),
        ("UPDATE t SET a = $x$ never closed $X$", 0),
        ("UPDATE t SET a = 1 /* /* */", 0),
        ("UPDATE t SET a = E'\\'", 0),
        ("UPDATE t SET a = 'a\\b'", 0),
        ("UPDATE t SET a = 'x\\'; DELETE FROM t; --'", 0),
        ("UPDATE t SET a = \\ 1", 0),
        ("UPDATE t SET a = 1\0", 0),
        ("UPDATE t SET a = $1", 0),
        ("UPDATE t SET a = $1", 2),
        ("UPDATE t SET a = $2", 2),
        ("UPDATE t SET a = $0", 0),
        ("UPDATE t SET a = $1and", 1),
        ("UPDATE t SET a = $", 0),
        ("UPDATE t SET a = '$1'", 1),
        ("UPDATE t SET a = (SELECT id FROM CacheInval_Recorded)", 0),
        ("UPDATE t SET a = '" + "x" * LONGEST + "'", 0),
    ],
)
def test_anything_else_is_left_alone(query: str, arguments: int) -> None:
    assert combine(query, arguments, INSERT) is None


def _plain(text: str) -> str:
    return "'" + text.replace("\\", "").replace("'", "''") + "'"


def _escaped(text: str) -> str:
    return "E'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _identifier(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _dollars(text: str, tag: str) -> str:
    return f"${tag}${text}${tag}$"


def _comment(text: str, depth: int) -> str:
    inner = text.replace("/", "").replace("*", "")
    return "/*" * depth + inner + "*/" * depth


texts = st.text(NASTY, max_size=12)
quoted = st.one_of(
    texts.map(_plain),
    texts.map(_escaped),
    texts.map(_identifier),
    st.tuples(texts, st.sampled_from(["", "q", "é", "_1"]))
    .filter(lambda drawn: f"${drawn[1]}$" not in f"{drawn[0]}${drawn[1]}")
    .map(lambda drawn: _dollars(*drawn)),
)
others = st.sampled_from(["a", "é$1", "$12", "12", "(", ")", "+", "=", ":", ".", ";"])
skipped = st.one_of(
    st.sampled_from([" ", "\n", "\t "]),
    st.tuples(texts, st.integers(1, 3)).map(lambda drawn: _comment(*drawn)),
    texts.map(lambda text: "--" + text.replace("\n", "").replace("\r", "") + "\n"),
)


@given(st.lists(st.tuples(st.one_of(quoted, others), st.lists(skipped, min_size=1, max_size=3))))
def test_tokens_are_what_was_put_in(parts: list[tuple[str, list[str]]]) -> None:
    # Without the space a minus and the comment after it would be one comment.
    query = "".join(token + " " + "".join(gap) for token, gap in parts)
    assert [text for _, text in tokens(query)] == [token for token, _ in parts]


@given(st.lists(quoted, min_size=1), st.sampled_from(["", ";", " ; ;", "; -- x"]))
def test_no_content_of_a_literal_is_taken_for_sql(literals: list[str], end: str) -> None:
    query = f"UPDATE t SET a = {' || '.join(literals)}{end}"
    assert combine(query, 0, INSERT) is not None
    assert combine(query.removesuffix("-- x") + "; DELETE FROM t", 0, INSERT) is None
    assert combine(query.removesuffix("-- x") + " $1", 0, INSERT) is None


@given(st.text(NASTY))
def test_any_text_is_read_to_its_end(text: str) -> None:
    found = list(tokens(text))
    assert all(kind != "unknown" for kind, _ in found[:-1])
    rest = text
    for _, token in found:
        assert token
        _, at, rest = rest.partition(token)
        assert at
    for arguments in range(2):
        combined = combine(f"DELETE {text}", arguments, INSERT)
        assert combined is None or combined.endswith(f") DELETE {text}")


@pytest.mark.parametrize(
    "query",
    [
        "UPDATE products SET price = price + 1, version = version + 1 WHERE id = $1",
        "INSERT INTO shop.products (id, price) VALUES ($1, round($2, 2)) ON CONFLICT (id) DO UPDATE SET price = 1",
        'INSERT INTO "shop"."left out" (id) SELECT id FROM (SELECT 1 AS id) AS it WHERE id IN (1, 2) RETURNING *;',
        "DELETE FROM t USING u WHERE t.id = u.id AND EXISTS (SELECT FROM v) AND (t.a OR u.b)",
        "SELECT count(*), coalesce(sum(price::numeric(10, 2)), 0) FROM products FOR UPDATE",
        "select 'pg_advisory_lock(1)' -- set_config()",
    ],
)
def test_statements_after_which_a_session_is_as_it_was(query: str) -> None:
    assert leaves_session(query)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT set_config('app.tenant', 'one', false)",
        "SELECT pg_catalog . set_config ('app.tenant', 'one', false)",
        "UPDATE t SET a = 1 WHERE pg_advisory_lock(1) IS NULL",
        'SELECT "set_tenant"(1)',
        'SELECT "Set Tenant" (1)',
        "SELECT shop.count(1)",
        "SELECT/**/set_tenant/**/(1)",
        "INSERT INTO t (a) VALUES (set_tenant(1))",
        "INSERT INTO t SELECT set_tenant(1)",
        "SET search_path = shop",
        "SELECT 1; SET search_path = shop",
        "WITH it AS (SELECT 1) SELECT * FROM it",
        "LISTEN it",
        "DECLARE it CURSOR WITH HOLD FOR SELECT 1",
        "DISCARD ALL",
        "CALL it()",
        "DO $$ BEGIN END $$",
        "SELECT 'not closed",
        "",
    ],
)
def test_statements_after_which_it_may_not_be(query: str) -> None:
    assert not leaves_session(query)
