"""Sessions of SQLAlchemy that record what they change: the mapped classes that are cached, and under which keys.

pip install 'cacheinval[sqlalchemy]'
"""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from cacheinval.errors import ConfigurationError
from cacheinval.settings import Name
from cacheinval.sqlalchemy.recording import Recorder
from cacheinval.sqlalchemy.rules import rule_for

__all__ = ["record_changes"]

Sessions = type[Session] | sessionmaker[Any] | async_sessionmaker[Any]
Templates = str | Collection[str]


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
    comes within its poll (75 ms), here as everywhere. Without a transaction (isolation level AUTOCOMMIT) there is no
    promise. Call it once, when all models have been imported.

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
        raise ConfigurationError(
            f"version= names {entity!r}, for which there is no key template; accepted: classes in keys"
        )
    rules = [
        rule_for(entity, _several(keys.get(entity, ())), _several(tags.get(entity, ())), version.get(entity))
        for entity in {**keys, **tags}
    ]
    Recorder(rules, namespace).listen(_listened(sessions))


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
