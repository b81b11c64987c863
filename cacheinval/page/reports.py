"""What instances answer about themselves, as far as the page shows it: of any version, and believed in nothing."""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from cacheinval.recent import Recent

__all__ = ["Report", "understand"]


class Broker(msgspec.Struct):
    consumer: str | None = None
    reason: str | None = None


class Relay(msgspec.Struct):
    state: str
    reason: str | None = None
    oldest_row_age: float | None = None


class Gap(msgspec.Struct):
    at: float
    reason: str = ""


class Shared(msgspec.Struct):
    max_staleness: float | None = None
    tick_interval: float = 1.0


class CacheCounts(msgspec.Struct):
    hits: int = 0
    misses: int = 0
    bypasses: int = 0


class ReceiverCounts(msgspec.Struct):
    latencies: list[int] = []


class Counts(msgspec.Struct):
    cache: CacheCounts = msgspec.field(default_factory=CacheCounts)
    receiver: ReceiverCounts = msgspec.field(default_factory=ReceiverCounts)


class Report(msgspec.Struct):
    """One answer. What is absent is not known."""

    id: str
    state: str
    host: str = ""
    pid: int | None = None
    version: str = ""
    reason: str | None = None
    since: float | None = None
    started_at: float | None = None
    watermark_age: float | None = None
    tick_refused: str | None = None
    registration: Any = None
    broker: Broker | None = None
    relay: Relay | None = None
    queue_depth: int | None = None
    hit_ratio: float | None = None
    last_gap: Gap | None = None
    settings: Shared = msgspec.field(default_factory=Shared)
    counters: Counts = msgspec.field(default_factory=Counts)
    evictions: Recent | None = None

    @property
    def session(self) -> str | None:
        """As it is registered."""
        session = self.registration.get("session") if isinstance(self.registration, Mapping) else None
        return session if isinstance(session, str) else None

    @property
    def hits(self) -> float | None:
        """Which part of the reads since its start was answered from its cache."""
        cache = self.counters.cache
        reads = cache.hits + cache.misses + cache.bypasses
        return self.hit_ratio if self.hit_ratio is not None or not reads else cache.hits / reads


def understand(status: Mapping[str, Any]) -> Report | None:
    """What `status` says; None where it cannot be understood."""
    try:
        report = msgspec.convert(status, Report, from_attributes=True)
    except (msgspec.ValidationError, OverflowError):
        return None
    ages = (report.since, report.started_at, report.watermark_age, report.hit_ratio)
    return report if all(age is None or math.isfinite(age) for age in ages) else None
