"""Reading statements as far as needed to save round trips.

The outbox row goes into the statement that makes the change: one round trip, one implicit transaction.

`WITH cacheinval_recorded AS (INSERT INTO cacheinval.outbox …) UPDATE …` leaves the caller's text as it is, and at the
top: its records, its command tag and its errors are those of the bare statement. PostgreSQL runs an INSERT in WITH
whether or not anybody reads from it, after the statement itself, and however many rows that has changed.

The text is only read as far as needed to tell one INSERT, UPDATE or DELETE, with its parameters, from everything else.
A mistake here cannot run half of something: the combined text goes to the server as a prepared statement, which holds
exactly one command or is refused. (A whole parser, libpg_query as in pglast, would know no more about that; it is a
compiled dependency of several megabytes under the GPL.)
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from cacheinval.outbox.writing import Insert

__all__ = ["combine", "leaves_session"]

LONGEST = 15 * 1024  # asyncpg keeps no longer statement prepared; and a round trip is little beside it
MOST_PARAMETERS = 32_767 - 8

_NAME = "cacheinval_recorded"
# PostgreSQL takes every byte above 127 for a letter. (A range of them takes `re` ten times as long as all the rest.)
_LETTER = r"(?:[A-Za-z_]|[^\x00-\x7f])"
_TOKEN = re.compile(
    rf"""
      (?P<space> [ \t\n\r\f\v]++ | --[^\n\r]*+ )
    | (?P<comment> /\* )
    | (?P<quoted> [eE]'(?:[^'\\]|''|\\.)*+' | [uU]&'(?:[^']|'')*+' | '(?:[^'\\]|'')*+' | (?:[uU]&)?"(?:[^"]|"")*+" )
    | (?P<dollars> \$(?:{_LETTER}(?:{_LETTER}|[0-9])*+)?\$ )
    | (?P<parameter> \$[0-9]++(?!{_LETTER}) )
    | (?P<word> {_LETTER}(?:{_LETTER}|[0-9$])*+ )
    | (?P<number> [0-9](?:{_LETTER}|[0-9.])*+ )
    | (?P<end> ; )
    | (?P<other> [^'"$\\\0] )
    """,
    re.VERBOSE | re.DOTALL,
)
# What may stand before a parenthesis in a statement of which it is known that no function in it changes its session.
_WORDS = (
    "all and any as by case conflict else exists filter from having in is join lateral like not on or over returning "
    "select set some then update using values when where with within"
)
_FUNCTIONS = (
    "abs array_agg array_length avg cardinality ceil char coalesce concat count date_trunc decimal extract floor format "
    "gen_random_uuid greatest interval json_agg json_build_object jsonb_agg jsonb_build_object jsonb_set least left "
    "length lower ltrim max md5 min mod now nullif numeric octet_length power replace right round row row_number "
    "row_to_json rtrim string_agg substr substring sum to_char to_date to_json to_jsonb to_number to_timestamp trim "
    "unnest upper varchar"
)
_HARMLESS = frozenset(f"{_WORDS} {_FUNCTIONS}".split())
_COMMENT_EDGE = re.compile(r"/\*|\*/")


@lru_cache(maxsize=1024)
def combine(query: str, arguments: int, insert: Insert) -> str | None:
    """`query` together with the writing of one outbox row by `insert`, or None where they cannot surely be one statement.

    Wanted is a single INSERT, UPDATE or DELETE that uses each of its `arguments` parameters. The result takes these
    first, and then `Row.arguments`.
    """
    if len(query) > LONGEST or arguments > MOST_PARAMETERS or _NAME in query.lower():
        return None
    first, ended = None, False
    parameters = set()
    for kind, text in tokens(query):
        if kind == "unknown" or (ended and kind != "end"):
            return None
        first = first or text.lower()
        ended = kind == "end"
        if kind == "parameter":
            parameters.add(int(text[1:]))
    # With a gap in the numbers, or one argument too many, the bare statement fails, and is left to fail by itself.
    if first not in ("insert", "update", "delete") or parameters != set(range(1, arguments + 1)):
        return None
    return f"WITH {_NAME} AS ({insert.sql(arguments + 1)}) {query}"


@lru_cache(maxsize=1024)
def leaves_session(query: str) -> bool:
    """Whether `query` surely changes nothing that lasts longer than its transaction: no setting, lock, cursor or channel.

    So is a SELECT, INSERT, UPDATE or DELETE that calls no function but well-known ones. (What a
    trigger, a view, a rule, an operator or the default of a column does is not seen.)
    """
    if len(query) > LONGEST:
        return False
    first = before = called = ""
    ended = names_target = False
    for kind, text in tokens(query):
        if kind == "unknown" or (ended and kind != "end"):
            return False
        if text == "(" and called and not names_target and called not in _HARMLESS:
            return False
        word = text.lower() if kind == "word" else text
        first, ended = first or word, kind == "end"
        # In `INSERT INTO shop.products (` a name stands before the columns: no call.
        names_target = word == "into" or (names_target and (text == "." or before in ("into", ".")))
        is_name = kind == "word" or text.endswith('"')
        called = f"{'.' if before == '.' else ''}{word}" if is_name else ""
        before = word
    return first in ("select", "insert", "update", "delete")


def tokens(query: str) -> Iterator[tuple[str, str]]:
    """The kind and text of each token but space and comments; `unknown`, the last, is what cannot be told for sure.

    That is what is not closed, and a backslash in a plain string, whose meaning depends on a setting of the server.
    """
    at = 0
    while at < len(query):
        match = _TOKEN.match(query, at)
        kind = match.lastgroup if match else None
        end: int | None = match.end() if match else None
        if match and kind == "comment":
            end = _end_of_comment(query, at)
        elif match and kind == "dollars":
            close = query.find(match[0], match.end())
            kind, end = "quoted", close + len(match[0]) if close >= 0 else None
        if kind is None or end is None:
            yield "unknown", query[at:]
            return
        if kind not in ("space", "comment"):
            yield kind, query[at:end]
        at = end


def _end_of_comment(query: str, at: int) -> int | None:
    depth = 0
    for edge in _COMMENT_EDGE.finditer(query, at):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    return None
