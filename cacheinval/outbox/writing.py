"""Writing the outbox in the transaction of the change, and emptying it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol
from uuid import UUID, uuid4

import asyncpg

from cacheinval.errors import DatabaseError, SchemaMissingError
from cacheinval.tracing import Tracing

__all__ = ["Executor", "Outbox", "Row", "explain", "insert_sql"]

MAX_NAMES = 1_000  # of each row: what a reader of the outbox takes into memory stays bounded
IDS_PER_DELETE = 5_000

_UNDEFINED = frozenset({"42P01", "42703", "42883", "3F000"})  # table, column, function, schema

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


@dataclass(frozen=True, slots=True)
class Row:
    """One row to be written; `arguments` are the values for the parameters of `insert_sql`."""

    id: UUID
    arguments: tuple[object, ...]
    context: str | None = None
    """That of the write, where it is traced; among the arguments, too."""


def insert_sql(first: int = 1) -> str:
    """The statement that writes one row, its parameters numbered from `first`.

    Each has its type beside it, so that none depends on the statement in which this one may be embedded.
    """
    types = ("uuid", "text", "text[]", "bigint[]", "text[]", "boolean", "text", "interval")
    values = [f"${number}::{name}" for number, name in enumerate(types, first)]
    values[-1] = f"clock_timestamp() + {values[-1]}"
    columns = "id, namespace, keys, versions, tags, everything, context, publish_at"
    return f"INSERT INTO cacheinval.outbox ({columns}) VALUES ({', '.join(values)})"  # noqa: S608 (constants)


class Outbox:
    """The outbox of one namespace.

    Args:
        namespace: whose rows these are.
        grace: seconds for which the relay leaves a row to the client that publishes it itself.
    """

    def __init__(self, namespace: str, grace: float = 0.25) -> None:
        self._namespace = namespace
        self._grace = timedelta(seconds=grace)
        self._insert = insert_sql()
        self.tracing: Tracing | None = None
        """With it rows bear the context of the span in which they are made."""

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
        grace = self._grace if publish_here else timedelta()
        context = self.tracing.current() if self.tracing is not None else None
        if everything:
            return [self._row([], None, [], True, context, grace)]
        return [self._row(*part, False, context, grace) for part in _parts(keys, versions, tags)]

    def _row(
        self,
        keys: list[str],
        versions: list[int | None] | None,
        tags: list[str],
        everything: bool,
        context: str | None,
        grace: timedelta,
    ) -> Row:
        row_id = uuid4()
        arguments = (row_id, self._namespace, keys, versions, tags, everything, context, grace)
        return Row(row_id, arguments, context)

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
                await connection.execute(self._insert, *row.arguments, timeout=timeout)
        except asyncpg.PostgresError as error:
            problem = explain(error)
            if problem is None:
                raise
            raise problem from error

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
            problem = explain(error)
            if problem is None:
                raise
            raise problem from error
        return deleted


def explain(error: asyncpg.PostgresError) -> DatabaseError | None:
    """What to do about `error`, where it is about the outbox and not about the caller's own statement."""
    text = str(error.args[0]) if error.args else ""
    if error.sqlstate in _UNDEFINED and ("cacheinval" in text or re.search(r"\boutbox\b", text)):
        return SchemaMissingError()
    if error.sqlstate == "42501" and _names_ours(text):
        return DatabaseError(
            f"{text}; a role that writes or publishes the outbox needs: "
            "GRANT SELECT, INSERT, DELETE ON cacheinval.outbox TO …; "
            "GRANT SELECT, INSERT, UPDATE, DELETE ON cacheinval.origins, cacheinval.instances TO …"
        )
    return None


def _names_ours(text: str) -> bool:
    words = text.replace('"', " ").replace(".", " ").split()
    return not {"outbox", "origins", "instances", "cacheinval"}.isdisjoint(words)


def _parts(
    keys: Sequence[str], versions: Sequence[int | None], tags: Sequence[str]
) -> Iterator[tuple[list[str], list[int | None] | None, list[str]]]:
    known = any(version is not None for version in versions)
    for start in range(0, len(keys), MAX_NAMES):
        part = slice(start, start + MAX_NAMES)
        few = list(keys[part])
        with_tags = list(tags) if len(few) + len(tags) <= MAX_NAMES and start + MAX_NAMES >= len(keys) else []
        yield few, list(versions[part]) if known else None, with_tags
        if with_tags:
            return
    for start in range(0, len(tags), MAX_NAMES):
        yield [], None, list(tags[start : start + MAX_NAMES])
