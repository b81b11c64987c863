"""What a read gives, what holds for it, and how reads are counted."""

from typing import Any, Literal, NamedTuple

from cacheinval.coherence import Matter

__all__ = ["BypassReason", "CacheCounters", "Policies", "Read"]


class Read(NamedTuple):
    """What a read gave, and how.

    >>> async def load():
    ...     return 99

    >>> read = await client.cache.read("price:abc-123", load)
    >>> read.value, read.outcome, read.stored
    (99, 'miss', True)
    """

    value: Any
    outcome: Literal["hit", "miss", "bypass"]
    """`bypass`: loaded because the freshness of what is cached could not be proven, or past the cache on purpose."""
    stored: bool
    """Whether the value is now in the cache because of this read."""
    detail: Literal["shared", "stale-if-error", "stale-while-revalidate"] | None = None
    """Of a hit: that it was not in the process but in the cache outside it that stands behind, or by which exception a stale
    value was given."""


class Policies(NamedTuple):
    """What holds for reads that do not say otherwise; see `CoherentCache.get_or_set`."""

    ttl_jitter: float = 0.0
    stale_if_error: float = 0.0
    stale_while_revalidate: float = 0.0
    warm_keys: int = 0
    """How many of the hottest keys are loaded again after an eviction."""
    warm_interval: float = 1.0
    """Seconds between two such loads of one key."""


BypassReason = Literal[Matter, "age", "refresh", "transaction"]
"""Why a read goes past the cache: what the instance is in doubt about, that what is cached is older than is proven, or
that the reader wants it so."""


class CacheCounters:
    """What the cache did, counted since the start."""

    __slots__ = (
        "bypass_reasons",
        "bypasses",
        "evicted_entries",
        "hits",
        "load_errors",
        "loads",
        "misses",
        "not_stored",
        "primary_loads",
        "queued_loads",
        "stale_if_error",
        "stale_while_revalidate",
    )

    def __init__(self) -> None:
        self.hits = self.misses = self.bypasses = 0
        self.bypass_reasons: dict[BypassReason, int] = {}
        self.loads = self.primary_loads = self.queued_loads = self.load_errors = 0
        self.not_stored = self.evicted_entries = 0
        self.stale_if_error = self.stale_while_revalidate = 0

    def bypassed(self, reason: BypassReason) -> None:
        """Counts a read past the cache."""
        self.bypasses += 1
        self.bypass_reasons[reason] = self.bypass_reasons.get(reason, 0) + 1
