"""What is recorded of a mapped class: its templates, and the reading of the rows that they speak of."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from sqlalchemy import Column, Connection, Integer, inspect, select, tuple_
from sqlalchemy.orm import Mapper

from cacheinval.errors import ConfigurationError, InvalidKeyError
from cacheinval.messages import check_names

__all__ = ["Identity", "Rule", "Values", "rule_for"]

Identity = tuple[Any, ...]
Values = dict[str, Any]

ROWS_PER_SELECT = (
    1_000  # a statement has at most 32,767 parameters, and a row takes one for each column of its key
)


@dataclass(frozen=True)
class Rule:
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


def rule_for(entity: type[Any], keys: Sequence[str], tags: Sequence[str], version: str | None) -> Rule:
    """The rule of these templates.

    Raises:
        InvalidKeyError: a template names what is no mapped column, or could not be a key.
        ConfigurationError: the class is not mapped, or has no such version.
    """
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
    return Rule(
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
