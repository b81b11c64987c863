"""Listening to sessions: what each flush makes stale, recorded by one statement in its transaction."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from sqlalchemy import BigInteger, Connection, Text, bindparam, event, func, inspect, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import ORMExecuteState, Session, object_session

from cacheinval.errors import SchemaMissingError
from cacheinval.messages import check_names
from cacheinval.sqlalchemy.rules import Identity, Rule, Values

__all__ = ["Recorder"]

RECORDED = "cacheinval_recorded"
_MISSING = frozenset({"42883", "3F000"})  # function, schema

_INVALIDATE = select(
    func.cacheinval.invalidate(
        bindparam("keys", type_=ARRAY(Text)),
        bindparam("versions", type_=ARRAY(BigInteger)),
        bindparam("tags", type_=ARRAY(Text)),
        bindparam("namespace", type_=Text),
    )
)
_INVALIDATE_ALL = select(func.cacheinval.invalidate_all(bindparam("namespace", type_=Text)))


@dataclass(slots=True)
class _Change:
    """One object in one flush."""

    rule: Rule
    connection: Connection
    before: Values | None
    after: Identity | None = None


@dataclass(slots=True)
class _Names:
    """What one flush makes stale."""

    keys: dict[str, int | None] = field(default_factory=dict)
    tags: dict[str, None] = field(default_factory=dict)
    everything: bool = False

    def add(self, rule: Rule, before: Values | None, after: Values | None) -> None:
        """Notes the names of a row as it was and as it is; None where there is none."""
        try:
            old = _formatted(rule.keys, before), _formatted(rule.tags, before)
            new = _formatted(rule.keys, after), _formatted(rule.tags, after)
        except (ValueError, TypeError):  # by a format that does not fit, too
            self.everything = True
            return
        version = after[rule.version] if after and rule.version else None
        for key in new[0]:
            self._tell(key, version)
        for key in set(old[0]) - set(new[0]):
            self._tell(key, None)
        self.tags.update(dict.fromkeys(old[1] + new[1]))

    def _tell(self, key: str, version: int | None) -> None:
        known = self.keys.get(key, version)
        self.keys[key] = None if known is None or version is None else max(known, version)


class Recorder:
    """Listens to the sessions; what it knows of a flush stands in the session's `info` until the flush ends."""

    def __init__(self, rules: Sequence[Rule], namespace: str) -> None:
        self._rules = rules
        self._namespace = namespace
        self._tables = {table for rule in rules for table in inspect(rule.entity).tables}

    def listen(self, sessions: Any) -> None:
        event.listen(sessions, "before_flush", self._begin)
        event.listen(sessions, "after_flush", self._record)
        event.listen(sessions, "do_orm_execute", self._statement)
        for rule in self._rules:
            # The events of mappers, and not the session's lists: these lack the orphans that a flush deletes.
            for name in ("insert", "update", "delete"):
                event.listen(rule.entity, f"before_{name}", self._before(rule), propagate=True)
            for name in ("insert", "update"):
                event.listen(rule.entity, f"after_{name}", self._after(rule), propagate=True)

    def _begin(self, session: Session, context: object, instances: object) -> None:
        session.info[self] = {}

    def _changes(self, target: Any) -> dict[Any, _Change] | None:
        """What is known of the present flush; None if it is another session's."""
        session = object_session(target)
        return None if session is None else session.info.get(self)

    def _before(self, rule: Rule) -> Callable[[Any, Connection, Any], None]:
        def before(mapper: object, connection: Connection, target: Any) -> None:
            changes = self._changes(target)
            if changes is None:
                return
            state = inspect(target)
            # A new object has a row already where another one of the same key is deleted by the same flush.
            identity = state.identity or rule.identity_of(target)
            row = None if identity is None else rule.row_before(connection, identity)
            changes[rule.entity, state] = _Change(rule, connection, row)

        return before

    def _after(self, rule: Rule) -> Callable[[Any, Connection, Any], None]:
        def after(mapper: object, connection: Connection, target: Any) -> None:
            changes = self._changes(target)
            if changes is not None:
                changes[rule.entity, inspect(target)].after = rule.identity_of(target)

        return after

    def _record(self, session: Session, context: object) -> None:
        told: dict[Connection, _Names] = {}
        for rule, connection, changes in _together(session.info.pop(self, {}).values()):
            names = told.setdefault(connection, _Names())
            rows = rule.rows(connection, [change.after for change in changes if change.after is not None])
            for change in changes:
                row = rows.get(change.after) if change.after is not None else None
                # A row that is not found again, such as one that a policy hides, has names that nobody knows.
                names.everything |= change.after is not None and row is None
                names.add(rule, change.before, row)
        for connection, names in told.items():
            self._invalidate(connection, names)

    def _statement(self, state: ORMExecuteState) -> None:
        if state.execution_options.get(RECORDED) or not (
            state.is_insert or state.is_update or state.is_delete
        ):
            return
        statement: Any = getattr(state.statement, "element", state.statement)
        if statement.entity_description["table"] in self._tables:
            connection = state.session.connection(bind_arguments=state.bind_arguments)
            self._invalidate(connection, _Names(everything=True))

    def _invalidate(self, connection: Connection, names: _Names) -> None:
        try:
            if names.everything:
                connection.execute(_INVALIDATE_ALL, {"namespace": self._namespace})
            elif names.keys or names.tags:
                versions = list(names.keys.values())
                known = any(version is not None for version in versions)
                connection.execute(
                    _INVALIDATE,
                    {
                        "keys": list(names.keys),
                        "versions": versions if known else None,
                        "tags": list(names.tags),
                        "namespace": self._namespace,
                    },
                )
        except DBAPIError as error:
            code = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
            if code in _MISSING:
                raise SchemaMissingError() from error
            raise


def _together(changes: Iterable[_Change]) -> Iterator[tuple[Rule, Connection, list[_Change]]]:
    """The changes of one rule on one connection at a time."""

    def same(change: _Change) -> tuple[int, int]:
        return id(change.rule), id(change.connection)

    for _, group in groupby(sorted(changes, key=same), same):
        some = list(group)
        yield some[0].rule, some[0].connection, some


def _formatted(templates: Sequence[str], values: Values | None) -> list[str]:
    if values is None or not templates:
        return []
    known = {name: value for name, value in values.items() if value is not None}
    try:
        return check_names([template.format(**known) for template in templates])
    except KeyError as error:
        raise ValueError(f"{error} is NULL") from None
