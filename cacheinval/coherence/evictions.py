"""What has to go from the caches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cacheinval.coherence.floors import MAX_AT_ONCE

__all__ = ["INVALIDATED", "Eviction", "higher"]

INVALIDATED = "invalidated"
"""The reason of an eviction that somebody has asked for."""


@dataclass(slots=True)
class Eviction:
    """What has to go: some keys, all entries with some tags, or everything (a new epoch, with its reason).

    `versions` is empty, or what each key has become, None where that is unknown.
    """

    keys: Sequence[str] = ()
    tags: Sequence[str] = ()
    everything: bool = False
    reason: str = INVALIDATED
    versions: Sequence[int | None] = ()

    def __bool__(self) -> bool:
        return bool(self.keys or self.tags or self.everything)

    @classmethod
    def merged(cls, evictions: Iterable["Eviction"]) -> "Eviction":
        """One eviction that does what all of these do, in whatever order."""
        evictions = list(evictions)
        names = sum(len(eviction.keys) for eviction in evictions)
        tell_versions = names <= MAX_AT_ONCE  # else nobody would note them
        keys: dict[str, int | None] = {}
        tags: dict[str, None] = {}
        everything: Eviction | None = None
        for eviction in evictions:
            if eviction.versions and tell_versions:
                for key, version in zip(eviction.keys, eviction.versions, strict=True):
                    keys[key] = higher(keys.get(key, version), version)
            else:
                keys.update(dict.fromkeys(eviction.keys))
            tags.update(dict.fromkeys(eviction.tags))
            if eviction.everything:
                everything = eviction
        if everything:
            return cls(everything=True, reason=everything.reason)
        versions = tuple(keys.values()) if any(version is not None for version in keys.values()) else ()
        return cls(list(keys), list(tags), versions=versions)


def higher(one: int | None, other: int | None) -> int | None:
    """The higher of two versions of a key; unknown where one of them is."""
    return None if one is None or other is None else max(one, other)
