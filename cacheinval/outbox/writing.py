"""Writing the outbox in the transaction of the change, and emptying it."""

import asyncio
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from uuid import UUID, uuid4

import asyncpg

from cacheinval import logs
from cacheinval.errors import DatabaseError, SchemaMissingError
from cacheinval.tracing import Tracing

__all__ = ["Executor", "Insert", "Outbox", "Refusal", "Row", "explain"]

log = logging.getLogger("cacheinval.writes")

MAX_NAMES = 1_000  # of each row: what a reader of the outbox takes into memory stays bounded
IDS_PER_DELETE = 5_000

_TYPES = {
    "id": "uuid",
    "keys": "text[]",
    "versions": "bigint[]",
    "tags": "text[]",
    "everything": "boolean",
    "context": "text",
}
_UNDEFINED = frozenset({"42P01", "42703", "42883", "3F000"})  # table, column, function, schema
_WRITTEN = frozenset({"outbox", "cacheinval"})  # beside a caller's own tables, of which many have `instances`
_OURS = _WRITTEN | {"origins", "instances"}

# A row that comes back after a crash of the server is only published once more: the DELETE need not wait for the disk.
# (The setting lasts for this statement's own transaction; a caller's transaction keeps it until its end.)
DELETE = """
    WITH unhurried AS (SELECT set_config('synchronous_commit', 'off', true)),
    confirmed AS (
        INSERT INTO cacheinval.origins AS known (namespace, origin, seq)
        SELECT $2, origin, seq FROM unnest($3::text[], $4::bigint[]) AS told (origin, seq)
        ON CONFLICT (namespace, origin) DO UPDATE
            SET seq = greatest(known.seq, excluded.seq), confirmed_at = clock_timestamp()
    )
    DELETE FROM cacheinval.outbox USING unhurried WHERE id = ANY($1::uuid[])
"""


class Executor(Protocol):
    """What is asked of a connection or a pool of asyncpg."""

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> str: ...


class Insert:
    """The statement that writes one row.

    It names no column that is to have its default: what is sent and read for nothing would cost every write.

    Args:
        namespace: whose row it is; letters, digits, `_` and `-`.
        grace: seconds for which the relay is to leave it alone.
        columns: those that are given beside `id` and `keys`: `versions`, `tags`, `everything`, `context`.
    """

    def __init__(self, namespace: str, grace: float = 0.0, columns: Sequence[str] = ()) -> None:
        self.columns = ("id", "keys", *columns)
        """What it takes values for."""
        self._constants = f"'{namespace}', clock_timestamp() + interval '{grace:f} s'"

    def sql(self, first: int = 1) -> str:
        """Its text, with parameters numbered from `first`.

        Each has its type beside it, so that none depends on the statement in which this one may be embedded.
        """
        names = ", ".join(["namespace", "publish_at", *self.columns])
        values = [f"${number}::{_TYPES[column]}" for number, column in enumerate(self.columns, first)]
        values.insert(0, self._constants)
        return f"INSERT INTO cacheinval.outbox ({names}) VALUES ({', '.join(values)})"  # noqa: S608


class Row(NamedTuple):
    """One row to be written, by `insert`, for whose parameters `arguments` are the values."""

    id: UUID
    insert: Insert
    arguments: tuple[object, ...]
    context: str | None = None
    """That of the write, where it is traced; among the arguments, too."""


class Refusal(NamedTuple):
    """Why the outbox takes no rows, and since when: each write that says what it makes stale fails by that."""

    since: float
    """Seconds since 1970, when it was found out."""
    reason: str


class Outbox:
    """The outbox of one namespace.

    Args:
        namespace: whose rows these are.
        grace: seconds for which the relay leaves a row to the client that publishes it itself.
    """

    def __init__(self, namespace: str, grace: float = 0.25) -> None:
        self._namespace = namespace
        self._grace = grace
        self._inserts: dict[tuple[float, tuple[str, ...]], Insert] = {}
        self.tracing: Tracing | None = None
        """With it rows bear the context of the span in which they are made."""
        self.refused: Refusal | None = None
        """Whether it would refuse a row of the client itself; only `ask` finds that out."""
        self.suspected = asyncio.Event()
        """Set while that has to be asked: a write failed, though maybe by a table of the caller's that is called the same, or
        for another role's want of a grant."""

    def rows(
        self,
        keys: Sequence[str] = (),
        *,
        versions: Sequence[int | None] = (),
        tags: Sequence[str] = (),
        everything: bool = False,
        publish_here: bool,
    ) -> list[Row]:
        """The rows, nearly always one, that say this; more than 1000 names take several.

        Args:
            keys, tags: names that `check_names` has passed.
            versions: empty, or one for each key.
            everything: all entries of the namespace; keys and tags are then left out.
            publish_here: the caller will publish them itself, so the relay is to wait a moment.
        """
        grace = self._grace if publish_here else 0.0
        context = self.tracing.current() if self.tracing is not None else None
        if everything:
            return [self._row([], grace, everything=True, context=context)]
        if 0 < len(keys) + len(tags) <= MAX_NAMES:
            known = _known(versions)
            return [self._row(list(keys), grace, versions=known, tags=list(tags), context=context)]
        return [
            self._row(few, grace, versions=known, tags=some, context=context)
            for few, known, some in _parts(keys, versions, tags)
        ]

    def _row(self, keys: list[str], grace: float, **more: Any) -> Row:
        given = {column: value for column, value in more.items() if value}
        shape = grace, tuple(given)
        insert = self._inserts.get(shape)
        if insert is None:
            insert = self._inserts[shape] = Insert(self._namespace, *shape)
        row_id = uuid4()
        return Row(row_id, insert, (row_id, keys, *given.values()), more.get("context"))

    async def record(
        self, connection: Executor, rows: Sequence[Row], *, timeout: float | None = None
    ) -> None:
        """Writes `rows` in the transaction that `connection` is in; `timeout` in seconds for each.

        Raises:
            SchemaMissingError: `cacheinval schema apply` has not been run.
            DatabaseError: the role may not write the outbox.
        """
        try:
            for row in rows:
                await connection.execute(row.insert.sql(), *row.arguments, timeout=timeout)
        except asyncpg.PostgresError as error:
            problem = self.explain(error)
            if problem is None:
                raise
            raise problem from error

    def explain(self, error: asyncpg.PostgresError) -> DatabaseError | None:
        """As the function `explain`, of a statement that was to write a row; whether it was refused will be asked."""
        problem = explain(error)
        if problem is not None:
            self.suspected.set()
        return problem

    def took_rows(self) -> None:
        """It is known to refuse them no more, since the client has written one."""
        self.suspected.clear()
        self._takes()

    async def ask(self, pool: Executor) -> None:
        """Notes whether it would take a row of the client. None is written: to explain a statement, the server looks at all
        that it names, and at what the role may do.

        Raises:
            DatabaseError: it would not. That, or no answer, has to be asked again.
        """
        self.suspected.clear()  # what is suspected from here on may be newer than the answer
        (row,) = self.rows(["key"], versions=[1], tags=["tag"], publish_here=True)
        try:
            await pool.execute(f"EXPLAIN {row.insert.sql()}", *row.arguments)
        except BaseException as error:
            self.suspected.set()
            problem = explain(error, ours=True) if isinstance(error, asyncpg.PostgresError) else None
            if problem is None:
                raise
            self._refuses(str(problem))
            raise problem from error
        if self.refused is not None:
            self._takes()

    def _refuses(self, reason: str) -> None:
        if self.refused is None:
            logs.event(log, logging.ERROR, "the outbox refuses what is written", reason=reason)
        self.refused = Refusal(self.refused.since if self.refused else time.time(), reason)

    def _takes(self) -> None:
        self.refused = None
        logs.event(log, logging.INFO, "the outbox takes what is written")

    async def delete(
        self,
        executor: Executor,
        ids: Sequence[UUID],
        confirmed: Mapping[str, int] | None = None,
        *,
        timeout: float | None = None,
    ) -> int:
        """Removes rows whose publish began after their commit was known, and was confirmed; returns how many it found.

        `confirmed` are the last confirmed numbers by origin, which ticks will tell: whoever has not seen them has missed
        something. `executor` is a pool, or a connection that is in no transaction; `timeout` in seconds for each 5000 ids.

        Raises:
            SchemaMissingError: `cacheinval schema apply` has not been run.
            DatabaseError: the role may not delete from the outbox.
        """
        deleted, origins = 0, confirmed or {}
        try:
            for start in range(0, len(ids), IDS_PER_DELETE) or (range(1) if origins else ()):
                few = ids[start : start + IDS_PER_DELETE]
                tag = await executor.execute(
                    DELETE, few, self._namespace, list(origins), list(origins.values()), timeout=timeout
                )
                deleted += int(tag.rpartition(" ")[2])
        except asyncpg.PostgresError as error:
            problem = explain(error, ours=True)
            if problem is None:
                raise
            raise problem from error
        return deleted


def explain(error: asyncpg.PostgresError, *, ours: bool = False) -> DatabaseError | None:
    """What to do about `error`, where it is about the outbox and not about the caller's own statement.

    `ours`: the statement names nothing but what is in the schema. (Of a column the server does not say whose it was to be.)
    """
    text = str(error.args[0]) if error.args else ""
    if error.sqlstate in _UNDEFINED and (ours or "cacheinval" in text or re.search(r"\boutbox\b", text)):
        return SchemaMissingError()
    if error.sqlstate == "42501" and _names(_OURS if ours else _WRITTEN, text):
        return DatabaseError(
            f"{text}; a role that writes or publishes the outbox needs what `cacheinval schema grant ROLE` gives "
            "(with `--print` it shows the SQL)"
        )
    return None


def _names(ours: frozenset[str], text: str) -> bool:
    return not ours.isdisjoint(text.replace('"', " ").replace(".", " ").split())


def _known(versions: Sequence[int | None]) -> list[int | None] | None:
    return None if versions.count(None) == len(versions) else list(versions)


def _parts(
    keys: Sequence[str], versions: Sequence[int | None], tags: Sequence[str]
) -> Iterator[tuple[list[str], list[int | None] | None, list[str]]]:
    for start in range(0, len(keys), MAX_NAMES):
        part = slice(start, start + MAX_NAMES)
        few = list(keys[part])
        with_tags = list(tags) if len(few) + len(tags) <= MAX_NAMES and start + MAX_NAMES >= len(keys) else []
        yield few, _known(versions[part]), with_tags
        if with_tags:
            return
    for start in range(0, len(tags), MAX_NAMES):
        yield [], None, list(tags[start : start + MAX_NAMES])
