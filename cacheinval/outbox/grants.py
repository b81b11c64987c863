"""Which rights a role needs that is a client, a worker or a relay, and no more than these."""

from typing import NamedTuple

from cacheinval.errors import DatabaseError

__all__ = ["NEEDED", "Right", "grants"]

LONGEST_NAME = 63  # bytes; Postgres cuts off what is longer


class Right(NamedTuple):
    """What a role may do with one object of the schema."""

    kind: str
    """`SCHEMA`, `TABLE` or `FUNCTION`."""
    name: str
    privileges: tuple[str, ...]

    def grant(self, role: str) -> str:
        """The statement that grants it; `role` as it is to stand there."""
        return f"GRANT {', '.join(self.privileges)} ON {self.kind} {self.name} TO {role};"


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
        DatabaseError: no role can have that name.
    """
    if not 1 <= len(role.encode()) <= LONGEST_NAME or not role.isprintable():
        raise DatabaseError(
            f"role {role!r}: accepted: a name of 1 to {LONGEST_NAME} bytes, all of them printable"
        )
    quoted = '"' + role.replace('"', '""') + '"'
    return [right.grant(quoted) for right in NEEDED]
