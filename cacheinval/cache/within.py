"""What the code that runs now is part of: a load, or a transaction."""

from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from cacheinval.coherence import Load

__all__ = [
    "PastCache",
    "current_load",
    "running_transaction",
    "running_within",
    "within",
]

# What the code that runs now is part of: a load (whose value inherits what it reads), or a transaction (which must see
# its own changes, and so reads past the cache).
within: ContextVar["Load | PastCache | None"] = ContextVar("cacheinval_within", default=None)
running_within = within.get


class PastCache:
    """Within this block `get_or_set` calls its factory and leaves the cache alone.

    It says itself whether it is open: a task that was started in it may outlive it.

    Args:
        of: the transaction whose block it is, if it is one's.
    """

    __slots__ = ("_token", "of", "open")

    def __init__(self, of: Any = None) -> None:
        self.of = of

    def __enter__(self) -> None:
        self.open = True
        self._token = within.set(self)

    def __exit__(self, *problem: object) -> None:
        self.open = False
        with suppress(ValueError):  # left in another context than it was entered in, as some test fixtures do
            within.reset(self._token)


def running_transaction() -> Any:
    """The transaction in whose block this runs, if that is still open."""
    block = running_within()
    return block.of if type(block) is PastCache and block.open else None


def current_load() -> Load | None:
    """The load whose factory is what runs now."""
    part_of = running_within()
    return part_of if isinstance(part_of, Load) else None
