"""Sessions of SQLAlchemy that record what they change: the mapped classes that are cached, and under which keys.

pip install 'cacheinval[sqlalchemy]'
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from string import Formatter
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    Text,
    bindparam,
    event,
    func,
    inspect,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Mapper, ORMExecuteState, Session, object_session, sessionmaker

from cacheinval.errors import ConfigurationError, InvalidKeyError, SchemaMissingError
from cacheinval.messages import check_names
from cacheinval.settings import Name

__all__ = ["record_changes"]

Sessions = type[Session] | sessionmaker[Any] | async_sessionmaker[Any]
Templates = str | Collection[str]
Identity = tuple[Any, ...]
Values = dict[str, Any]

ROWS_PER_SELECT = (
    1_000  # a statement has at most 32,767 parameters, and a row takes one for each column of its key
)
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


def record_changes(
    sessions: Sessions,
    keys: Mapping[type[Any], Templates],
    *,
    tags: Mapping[type[Any], Templates] | None = None,
    version: Mapping[type[Any], str] | None = None,
    namespace: str = "default",
) -> None:
    """From now on, each flush of these sessions records the keys of what it inserts, updates and deletes.

    It does so by one `SELECT cacheinval.invalidate(…)` after the flush, in its transaction: what is rolled back, or back
    to a savepoint, is not recorded either. The relay publishes it after the commit, to this process too, so eviction
    comes within its poll (75 ms), here as everywhere. Call it once, when all models have been imported.

        >>> from sqlalchemy.ext.asyncio import async_sessionmaker
        >>> from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
        >>> class Base(DeclarativeBase): ...
        >>> class Product(Base):
        ...     __tablename__ = "products"
        ...     id: Mapped[str] = mapped_column(primary_key=True)
        ...     category: Mapped[str]
        >>> sessions = async_sessionmaker()
        >>> record_changes(sessions, {Product: "product:{id}"}, tags={Product: ["products", "category:{category}"]})

    A template names mapped columns, by the names of their attributes. A change of what it names records the old and the
    new name. The primary key costs nothing more; for anything else, and for `version`, the rows are read again, since
    what a session has loaded may be old: each row before it is changed, if a template names more than the primary key
    (`FOR UPDATE`), and all rows of a class by one SELECT after the flush. A row whose names cannot be told, for example
    because a column is NULL, invalidates everything in the namespace.

    An UPDATE, DELETE or INSERT that goes through `Session.execute` passes the unit of work by. If it is on a table of one
    of the classes, it invalidates everything in the namespace, unless it has the execution option `cacheinval_recorded`,
    by which you say that you record it yourself (`session.execute(select(func.cacheinval.invalidate([…])))`). Not seen at
    all, and to be recorded by you or by `cacheinval.track`: text, DML within a CTE, `Session.bulk_…`, what is executed on
    a connection, and what the database does by itself (triggers, ON DELETE CASCADE).

    Args:
        sessions: the factory of the sessions, or their class. An `async_sessionmaker` makes sessions with a
            `sync_session_class` of their own from now on.
        keys: for each mapped class one key template or several. Objects of subclasses count as its own.
        tags: the same for tags.
        version: for a class in `keys`, the attribute that counts the changes of a row: an integer that only grows. Loads
            with `version=` store nothing older. None is told of a deleted row.
        namespace: whose caches are told: what `CACHEINVAL_NAMESPACE` is there.

    Raises:
        InvalidKeyError: a template names what is no mapped column, or could not be a key.
        ConfigurationError: `sessions`, a class, a version or the namespace cannot be used.
        SchemaMissingError: (by a flush) the schema `cacheinval` is not in the database.
    """
    try:
        TypeAdapter(Name).validate_python(namespace, strict=True)
    except ValidationError:
        raise ConfigurationError(
            f"namespace {namespace!r} cannot be used; accepted: 1 to 64 letters, digits, '_' and '-'"
        ) from None
    tags, version = tags or {}, version or {}
    for entity in version.keys() - keys.keys():
        raise ConfigurationError(f"version= names {entity!r}, for which there is no key template")
    rules = [
        _rule(entity, _several(keys.get(entity, ())), _several(tags.get(entity, ())), version.get(entity))
        for entity in {**keys, **tags}
    ]
    _Recorder(rules, namespace).listen(_listened(sessions))


@dataclass(frozen=True)
class _Rule:
    """What is recorded of one mapped class."""

    entity: type[Any]
    keys: tuple[str, ...]
    tags: tuple[str, ...]
    version: str | None
    identity: tuple[str, ...]  # the attributes of the primary key
    others: tuple[str, ...]  # those that have to be read from the row
    reads_before: bool  # whether a template, and not only the version, is about one of them

    def identity_of(self, target: Any) -> Identity | None:
        """The primary key that the object has now; None while a part of it is not known."""
        identity = tuple(inspect(self.entity).primary_key_from_instance(target))
        return None if None in identity else identity

    def row_before(self, connection: Connection, identity: Identity) -> Values | None:
        """What the templates say of a row that is about to change, which nobody else can change from now on."""
        if not self.reads_before:
            return dict(zip(self.identity, identity, strict=True))
        return self._read(connection, [identity], lock=True).get(identity)

    def rows(self, connection: Connection, identities: Iterable[Identity]) -> dict[Identity, Values]:
        """What there is to tell of these rows, as far as they are there."""
        unread = list(dict.fromkeys(identities))
        if not self.others:
            return {identity: dict(zip(self.identity, identity, strict=True)) for identity in unread}
        return self._read(connection, unread)

    def _read(
        self, connection: Connection, unread: Sequence[Identity], *, lock: bool = False
    ) -> dict[Identity, Values]:
        primary = [getattr(self.entity, name) for name in self.identity]
        names = (*self.identity, *self.others)
        found: dict[Identity, Values] = {}
        for start in range(0, len(unread), ROWS_PER_SELECT):
            statement = select(*(getattr(self.entity, name) for name in names)).where(
                tuple_(*primary).in_(unread[start : start + ROWS_PER_SELECT])
            )
            for row in connection.execute(statement.with_for_update() if lock else statement):
                found[tuple(row[: len(primary)])] = dict(zip(names, row, strict=True))
        return found


@dataclass(slots=True)
class _Change:
    """One object in one flush."""

    rule: _Rule
    connection: Connection
    before: Values | None
    after: Identity | None = None


@dataclass(slots=True)
class _Names:
    """What one flush makes stale."""

    keys: dict[str, int | None] = field(default_factory=dict)
    tags: dict[str, None] = field(default_factory=dict)
    everything: bool = False

    def add(self, rule: _Rule, before: Values | None, after: Values | None) -> None:
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


class _Recorder:
    """Listens to the sessions; what it knows of a flush stands in the session's `info` until the flush ends."""

    def __init__(self, rules: Sequence[_Rule], namespace: str) -> None:
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

    def _before(self, rule: _Rule) -> Callable[[Any, Connection, Any], None]:
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

    def _after(self, rule: _Rule) -> Callable[[Any, Connection, Any], None]:
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
        if not (state.is_insert or state.is_update or state.is_delete) or state.execution_options.get(
            RECORDED
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


def _together(changes: Iterable[_Change]) -> Iterator[tuple[_Rule, Connection, list[_Change]]]:
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


def _rule(entity: type[Any], keys: Sequence[str], tags: Sequence[str], version: str | None) -> _Rule:
    mapper = inspect(entity, raiseerr=False)
    if not isinstance(mapper, Mapper):
        raise ConfigurationError(f"{entity!r} cannot be recorded; accepted: mapped classes")
    columns = {
        attribute.key: attribute.columns[0]
        for attribute in mapper.column_attrs
        if isinstance(attribute.columns[0], Column)
    }
    check_names(keys, f"key template of {entity.__qualname__}")
    check_names(tags, f"tag template of {entity.__qualname__}")
    named = {name for template in (*keys, *tags) for name in _fields(template, columns, entity)}
    if version is not None:
        # A system column can only be xmin, which is not monotone.
        counting = [
            n for n, column in columns.items() if isinstance(column.type, Integer) and not column.system
        ]
        if version not in counting:
            raise ConfigurationError(
                f"{entity.__qualname__} has no version in {version!r}; accepted: a mapped column of integers "
                f"({', '.join(counting) or 'there is none'})"
            )
    identity = tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)
    others = sorted((named | ({version} if version else set())) - set(identity))
    return _Rule(
        entity,
        tuple(keys),
        tuple(tags),
        version,
        identity,
        tuple(others),
        reads_before=not named <= set(identity),
    )


def _fields(template: str, columns: Collection[str], entity: type[Any]) -> Iterator[str]:
    try:
        for _, name, spec, _ in Formatter().parse(template):
            if name is None:
                continue
            if name not in columns or "{" in (spec or ""):
                raise InvalidKeyError(
                    f"template {template!r} of {entity.__qualname__} names {name!r}; accepted: the mapped columns "
                    f"{', '.join(columns)}"
                )
            yield name
    except InvalidKeyError:
        raise
    except ValueError as error:
        raise InvalidKeyError(f"template {template!r} of {entity.__qualname__}: {error}") from None


def _several(templates: Templates) -> tuple[str, ...]:
    return (templates,) if isinstance(templates, str) else tuple(templates)


def _listened(sessions: Sessions) -> Any:
    """What SQLAlchemy lets one listen to: within an asynchronous session works a synchronous one."""
    inner: Any = sessions
    if isinstance(sessions, async_sessionmaker):
        inner = sessions.kw.get("sync_session_class") or sessions.class_.sync_session_class
        if isinstance(inner, type):
            # A class of its own, so that nobody else's sessions are listened to.
            inner = type(inner.__name__, (inner,), {})
            sessions.configure(sync_session_class=inner)
    if isinstance(inner, sessionmaker) or (isinstance(inner, type) and issubclass(inner, Session)):
        return inner
    raise ConfigurationError(
        f"{sessions!r} cannot be listened to; accepted: a sessionmaker, an async_sessionmaker, or a class of Session"
    )
