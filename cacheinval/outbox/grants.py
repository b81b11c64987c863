"""Which rights a role needs that is a client, a worker or a relay, and no more than these."""

from typing import TYPE_CHECKING, NamedTuple

import asyncpg

from cacheinval.errors import DatabaseError, SchemaMissingError

if TYPE_CHECKING:
    from cacheinval.outbox.schema import AnyConnection

__all__ = ["NEEDED", "Right", "grant", "grants", "lacking", "quoted"]

LONGEST_NAME = 63  # bytes; Postgres cuts off what is longer

_EXISTS = {"SCHEMA": "to_regnamespace", "TABLE": "to_regclass", "FUNCTION": "to_regprocedure"}


class Right(NamedTuple):
    """What a role may do with one object of the schema."""

    kind: str
    """`SCHEMA`, `TABLE` or `FUNCTION`."""
    name: str
    privileges: tuple[str, ...]

    def grant(self, role: str) -> str:
        """The statement that grants it; `role` as it is to stand there."""
        return f"GRANT {', '.join(self.privileges)} ON {self.kind} {self.name} TO {role};"

    async def lacking(self, connection: "AnyConnection", role: str) -> "Right | None":
        """What of it the role has not; None if it has all, or if there is no such object."""
        if await connection.fetchval(f"SELECT {_EXISTS[self.kind]}($1) IS NULL", self.name):
            return None
        has = f"SELECT has_{self.kind.lower()}_privilege($1, $2, $3)"
        there = [await connection.fetchval(has, role, self.name, privilege) for privilege in self.privileges]
        missing = tuple(name for name, has_it in zip(self.privileges, there, strict=True) if not has_it)
        return Right(self.kind, self.name, missing) if missing else None


NEEDED = (
    Right("SCHEMA", "cacheinval", ("USAGE",)),
    Right("TABLE", "cacheinval.schema_version", ("SELECT",)),
    Right("TABLE", "cacheinval.outbox", ("SELECT", "INSERT", "DELETE")),
    Right("TABLE", "cacheinval.origins", ("SELECT", "INSERT", "UPDATE", "DELETE")),
    Right("TABLE", "cacheinval.instances", ("SELECT", "INSERT", "UPDATE", "DELETE")),
    Right("FUNCTION", "cacheinval.source()", ("EXECUTE",)),
)


def grants(role: str) -> list[str]:
    """The statements that give `role` all that it needs.

    Raises:
        ValueError: no role can have that name.
    """
    if not 1 <= len(role.encode()) <= LONGEST_NAME or not role.isprintable():
        raise ValueError(f"accepted: the name of a role, 1 to {LONGEST_NAME} bytes, all of them printable")
    return [right.grant(quoted(role)) for right in NEEDED]


def quoted(role: str) -> str:
    """The name of a role as it may stand in a statement."""
    return '"' + role.replace('"', '""') + '"'


async def lacking(connection: "AnyConnection", role: str) -> list[Right]:
    """What `role` needs and has not; without the schema nothing else, of which nobody is told then whether it is there."""
    schema, *within = NEEDED
    missing = await schema.lacking(connection, role)
    if missing is not None:
        return [missing]
    rights = [await right.lacking(connection, role) for right in within]
    return [right for right in rights if right is not None]


async def grant(connection: "AnyConnection", role: str) -> None:
    """Gives `role` all that it needs, in one transaction.

    Raises:
        ValueError: no role can have that name.
        DatabaseError: there is no such role or no schema, or the rights are not this session's to give.
    """
    statements = grants(role)
    try:
        async with connection.transaction():
            for statement in statements:
                await connection.execute(statement)
            # Of what is not its own to give, Postgres grants nothing, and only warns.
            left = await lacking(connection, role)
    except asyncpg.UndefinedObjectError as error:
        raise DatabaseError(f"{error.args[0]}: make it first (CREATE ROLE … LOGIN)") from error
    except (asyncpg.InvalidSchemaNameError, asyncpg.UndefinedTableError) as error:
        raise SchemaMissingError from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseError(f"{error.args[0]}; needed: the role that owns the schema cacheinval") from error
    if left:
        names = ", ".join(right.name for right in left)
        raise DatabaseError(
            f"not granted, for they are not this role's to give: {names}; needed: the role that owns the schema cacheinval"
        )
