"""What is cached, and what must hold for it to be served."""

import math
from typing import Any, NamedTuple

import msgspec

__all__ = ["NO_TAGS", "Entry", "Moment"]

NO_TAGS: frozenset[str] = frozenset()


class Entry(msgspec.Struct, eq=False, gc=False):
    """A cached value and what must hold for it to be served.

    A million of them are no concern of the garbage collector: what an entry holds never leads back to it but through the
    cache, which drops it by itself.
    """

    value: Any
    load_started: float
    epoch: int
    generation: int
    expires_at: float
    tags: frozenset[str] = NO_TAGS
    serve_until: float = -math.inf
    standing: int = -1
    """Judged at this number of `Coherence.standing` to be good until `serve_until`, which is of a clock of the cache."""
    kept: bool = False
    """Whether an eviction only expires it, since it is to be had while loading fails; its epoch is negative then."""


class Moment(NamedTuple):
    """What is looked up elsewhere is judged as of before the look; see `Serving.moment`."""

    epoch: int
    generation: int
    until: float
    extends: float
    marks: int
    """How many marks of this instance the cache outside was known to have borne: see `Marks`."""
    stands: bool = True
    """Otherwise what was looked up may have been evicted before."""
