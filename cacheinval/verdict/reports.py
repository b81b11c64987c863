"""What instances answer about themselves, as far as it is judged and shown: of any version, and believed in nothing."""

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from cacheinval.coherence.registration import NOT_YET
from cacheinval.recent import Recent

__all__ = ["Identity", "Report", "understand"]

Identity = tuple[str, str]
"""An id, and what tells apart those that share it by mistake, or are one after the other."""


_CACHE_FAILED = re.compile(r"^eviction failed|not evicted within|^the (attached )?\S+ cache failed")


class Broker(msgspec.Struct):
    url: str = ""
    consumer: str | None = None
    publisher: str | None = None
    reason: str | None = None


class Relay(msgspec.Struct):
    state: str
    reason: str | None = None
    oldest_row_age: float | None = None
    no_ticks: str | None = None


class Sending(msgspec.Struct):
    """Of what an instance writes, publishes, or answers."""

    failing: bool = False
    since: float | None = None
    reason: str | None = None


class Gap(msgspec.Struct):
    at: float
    reason: str = ""


class Cache(msgspec.Struct):
    url: str = "memory://"

    @property
    def outside(self) -> bool:
        """Whether it outlives the process, as its queue then does."""
        return not self.url.startswith("memory:")


class Shared(msgspec.Struct):
    max_staleness: float | None = None
    max_clock_skew: float = 0.1
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
    namespace: str = ""
    host: str = ""
    pid: int | None = None
    version: str = ""
    reason: str | None = None
    since: float | None = None
    started_at: float | None = None
    now: float | None = None
    watermark_age: float | None = None
    tick_refused: str | None = None
    source: str | None = None
    registration: Any = None
    broker: Broker | None = None
    relay: Relay | None = None
    writing: Sending = msgspec.field(default_factory=Sending)
    publisher: Sending = msgspec.field(default_factory=Sending)
    answering: Sending = msgspec.field(default_factory=Sending)
    queue_depth: int | None = None
    hit_ratio: float | None = None
    last_gap: Gap | None = None
    cache: Cache = msgspec.field(default_factory=Cache)
    settings: Shared = msgspec.field(default_factory=Shared)
    counters: Counts = msgspec.field(default_factory=Counts)
    evictions: Recent | None = None

    @property
    def url(self) -> str:
        """How it reaches the broker; without the password, and empty if that is not known."""
        return "" if self.broker is None else self.broker.url

    @property
    def unsubscribed(self) -> str | None:
        """Why it has no subscription, in the words of the broker or the system; None if it has one, or nobody knows."""
        broker = self.broker
        return broker.reason if broker is not None and broker.consumer == "connecting" else None

    @property
    def unregistered(self) -> str | None:
        """Why it is not registered, where it wants to be and cannot."""
        registration = self.registration
        if not isinstance(registration, Mapping) or registration.get("state") != "unregistered":
            return None
        reason = registration.get("reason")
        return reason if isinstance(reason, str) and reason != NOT_YET else None

    @property
    def cache_failure(self) -> str | None:
        """Why a cache of it cannot be used, where that is what keeps it from being ready."""
        said = (self.reason, self.unsubscribed)
        return next((one for one in said if one is not None and _CACHE_FAILED.search(one)), None)

    @property
    def cache_server(self) -> str:
        """Which cache cannot be used, in the words of a sentence: the address, unless it is one that was attached."""
        attached = "the attached " in (self.cache_failure or "")
        return f"of {self.id}" if attached or not self.cache.outside else f"at {self.cache.url}"

    @property
    def why(self) -> str | None:
        """Why it is not ready."""
        reason = self.unsubscribed
        if reason is None or self.cache_failure is not None:
            return self.cache_failure or self.reason
        refused = re.match(r"[A-Z]+_[A-Z]+ - |the broker refuses", reason) is not None
        return f"the broker {'refuses it' if refused else 'cannot be reached'} ({reason.rstrip('.')})"

    @property
    def session(self) -> str | None:
        """As it is registered."""
        session = self.registration.get("session") if isinstance(self.registration, Mapping) else None
        return session if isinstance(session, str) else None

    @property
    def identity(self) -> Identity:
        """Two that share an id are told apart by their sessions, or else as processes."""
        return self.id, self.session or f"{self.host} {self.pid} {self.started_at}"

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
    ages = (report.since, report.started_at, report.now, report.watermark_age, report.hit_ratio)
    return report if all(age is None or math.isfinite(age) for age in ages) else None
