"""Each write as it fans out: who has evicted it, and after how long."""

from collections import deque
from dataclasses import dataclass, field

from cacheinval.recent import Evicted
from cacheinval.verdict.reports import Identity

__all__ = ["Line", "Writes"]

MOST_LINES = 100
SAME_WITHIN = 2.0
"""Seconds: what programs publish that number nothing is the same message if it names the same at about the same time."""


@dataclass(slots=True)
class Line:
    """One invalidation; or, where `reason` is set, one instance that dropped everything by itself."""

    at: float
    """When it was committed, or else published or first evicted; seconds since 1970."""
    keys: list[str]
    tags: list[str]
    more: int
    all: bool
    origin: str | None
    reason: str | None = None
    number: int = 0
    dated: bool = True
    """Whether `at` is the time of the write, and not only of its first eviction."""
    evicted: dict[Identity, Evicted] = field(default_factory=dict)
    """By instance; two that share an id by mistake are two."""

    def after(self, instance: Identity) -> float | None:
        """Seconds after which that instance had evicted it; 0 where it had before anybody was told."""
        evicted = self.evicted.get(instance)
        if evicted is None:
            return None
        return 0.0 if evicted.own else max(0.0, evicted.at - self.at)

    @property
    def slowest(self) -> float:
        """Seconds after which the last of those who have evicted it had."""
        return max((self.after(instance) or 0.0 for instance in self.evicted), default=0.0)


class Writes:
    """The last writes, put together from what instances tell of their evictions."""

    def __init__(self) -> None:
        self._lines: deque[Line] = deque(maxlen=MOST_LINES)
        self._by_name: dict[object, Line] = {}
        self._begun = 0

    def told(self, instance: Identity, evicted: Evicted) -> None:
        """One eviction of an instance, which it has not told before."""
        name = _name(instance, evicted)
        line = self._by_name.get(name)
        if line is None or (evicted.origin is None and not _belongs(line, instance, evicted)):
            line = self._begin(name, evicted)
        if not line.dated:
            line.at = min(line.at, evicted.at)
        line.evicted.setdefault(instance, evicted)

    def _begin(self, name: object, evicted: Evicted) -> Line:
        if len(self._lines) == MOST_LINES:
            gone = self._lines.popleft()
            self._by_name = {name: line for name, line in self._by_name.items() if line is not gone}
        self._begun += 1
        line = Line(
            number=self._begun,
            at=evicted.at if evicted.committed_at is None else evicted.committed_at,
            keys=evicted.keys,
            tags=evicted.tags,
            more=evicted.more,
            all=evicted.all,
            origin=evicted.origin,
            reason=evicted.reason,
            dated=evicted.committed_at is not None,
        )
        self._lines.append(line)
        self._by_name[name] = line
        return line

    def newest(self, number: int) -> list[Line]:
        """The last ones, the newest first."""
        return sorted(self._lines, key=lambda line: line.at, reverse=True)[:number]


def _name(instance: Identity, evicted: Evicted) -> object:
    if evicted.reason is not None:
        return instance, evicted.at
    if evicted.origin is not None and evicted.seq is not None:
        return evicted.origin, evicted.seq
    return evicted.committed_at, *evicted.keys, None, *evicted.tags, evicted.more, evicted.all


def _belongs(line: Line, instance: Identity, evicted: Evicted) -> bool:
    if line.reason is not None:
        return True
    first = min((other.at for other in line.evicted.values()), default=evicted.at)
    return instance not in line.evicted and abs(evicted.at - first) <= SAME_WITHIN
