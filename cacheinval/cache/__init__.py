"""Read-through caching that obeys `coherence`: in the process, outside it, or both, one in front of the other."""

from cacheinval.cache.coherent import CoherentCache
from cacheinval.cache.in_process import InProcessCache
from cacheinval.cache.levels import TwoLevels
from cacheinval.cache.reads import BypassReason, CacheCounters, Policies, Read
from cacheinval.cache.shared import SharedCache
from cacheinval.cache.within import PastCache, running_transaction

__all__ = [
    "BypassReason",
    "CacheCounters",
    "CoherentCache",
    "InProcessCache",
    "PastCache",
    "Policies",
    "Read",
    "SharedCache",
    "TwoLevels",
    "running_transaction",
]
