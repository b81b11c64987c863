"""What the code that runs now is part of: a load, or a transaction."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from cacheinval.coherence import Load

__all__ = [
    "TransactionBlock",
    "current_load",
    "running_transaction",
    "running_within",
    "within",
    "without_cache",
]

# What the code that runs now is part of: a load (whose value inherits what it reads), or a transaction (which must see
# its own changes, and so reads past the cache).
within: ContextVar["Load | TransactionBlock | None"] = ContextVar("cacheinval_within", default=None)
running_within = within.get


class TransactionBlock:
    """Marks what runs within a transaction, for as long as that is open: a task started there may outlive it."""

    __slots__ = ("open", "this")

    def __init__(self, this: Any) -> None:
        self.open = True
        self.this = this


@contextmanager
def without_cache(transaction: Any = None) -> Iterator[None]:
    """Within this block, of `transaction`, `get_or_set` calls its factory and leaves the cache alone."""
    block = TransactionBlock(transaction)
    token = within.set(block)
    try:
        yield
    finally:
        block.open = False
        with suppress(ValueError):  # left in another context than it was entered in, as some test fixtures do
            within.reset(token)


def running_transaction() -> Any:
    """What the block of `without_cache` was entered for in which this runs, if it is still open."""
    block = running_within()
    return block.this if type(block) is TransactionBlock and block.open else None


def current_load() -> Load | None:
    """The load whose factory is what runs now."""
    part_of = running_within()
    return part_of if isinstance(part_of, Load) else None
