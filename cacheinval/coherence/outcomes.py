"""How a write ended, as far as its client can know, and what it still owes (PROTOCOL.md, "Writing")."""

import enum
from dataclasses import dataclass
from functools import cache

__all__ = ["Owed", "WriteOutcome", "outcome_of_error", "owed_after"]


class WriteOutcome(enum.Enum):
    """How a COMMIT (or a write that is one statement) ended, as far as its client can know."""

    COMMITTED = "committed"
    ABORTED = "aborted"  # a definite server error, or it was never sent
    UNKNOWN = "unknown"  # reply lost, cancelled, connection cut: it may yet become visible


@dataclass(frozen=True, slots=True)
class Owed:
    """What a write still owes after it ended."""

    publish: bool
    delete_rows: bool
    """The outbox rows may be deleted once a publish that begins from now on is confirmed."""
    may_skip_echo: bool
    """Its own message need not be processed here, provided that every cache of this client has evicted."""


def outcome_of_error(sqlstate: str | None) -> WriteOutcome:
    """How a COMMIT (or a write that is one statement) ended that raised: `sqlstate` is the server's, None if it said nothing.

    Only an error that the server reports while it lives is definite. A connection failure (class 08), an intervention
    or shutdown (57), a failure of the system (58) or an internal one (XX) may come after the commit; 40003 says so itself.
    """
    if sqlstate is None or sqlstate[:2] in ("08", "57", "58", "XX") or sqlstate == "40003":
        return WriteOutcome.UNKNOWN
    return WriteOutcome.ABORTED


@cache
def owed_after(outcome: WriteOutcome) -> Owed:
    """What follows from `outcome`.

    The rows of a write whose outcome is unknown are never deleted by its client: the commit may become visible after
    everybody has evicted and loaded the old value again; the relay publishes them when they are visible. Nor may its
    echo be skipped, for the same reason.
    """
    committed = outcome is WriteOutcome.COMMITTED
    return Owed(publish=outcome is not WriteOutcome.ABORTED, delete_rows=committed, may_skip_echo=committed)
