"""What one instance tells of itself: its state, what it knows of others, and every counter."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from cacheinval.audit import Auditor
from cacheinval.bus import Bus
from cacheinval.cache import CoherentCache, InProcessCache, TwoLevels
from cacheinval.cache.levels import SECOND_LEVEL
from cacheinval.cache.reloading import Warmer
from cacheinval.client.caches import Caches
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence
from cacheinval.fleet import Respondent
from cacheinval.outbox import Outbox
from cacheinval.outbox.instances import Registrar
from cacheinval.outbox.relay import Relay
from cacheinval.publisher import Publisher
from cacheinval.receiver import Instance
from cacheinval.settings import Settings, mask_url

__all__ = ["Status"]

VERSION = version("cacheinval")

# Of the settings that are told, those in which the instances of a namespace should agree.
SHARED_SETTINGS = ("max_staleness", "max_clock_skew", "tick_interval", "max_replica_lag")


@dataclass(kw_only=True)
class Status:
    """Reads from the parts of a client; `registrar` and `relay` are None where it has none."""

    settings: Settings
    clock: Clock
    coherence: Coherence
    cache: CoherentCache
    caches: Caches
    auditor: Auditor
    outbox: Outbox
    publisher: Publisher
    instance: Instance
    respondent: Respondent
    registrar: Registrar | None
    relay: Relay | None
    bus: Callable[[], Bus]
    started_at: float | None = None

    @property
    def state(self) -> Literal["starting", "ready", "suspect"]:
        """See `Client.state`."""
        if self.coherence.suspect is None:
            return "ready"
        return "suspect" if self.instance.ever_joined else "starting"

    @property
    def watermark_age(self) -> float | None:
        """See `Client.watermark_age`."""
        return _age(self.coherence.proof.watermark, self.clock.now())

    @property
    def _warmer(self) -> Warmer | None:
        return self.cache.warming if isinstance(self.cache, InProcessCache) else None

    def told(self) -> dict[str, Any]:
        """See `Client.status`."""
        reason, gap, refused = self.coherence.suspect, self.coherence.last_gap, self.outbox.refused
        # One for all ages: whoever compares them with others' has the moments that they are of.
        now = self.clock.now()
        broker, cache = getattr(self.bus(), "state", None), self.cache.counters
        reads = cache.hits + cache.misses + cache.bypasses
        return {
            "id": self.settings.instance_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": VERSION,
            "namespace": self.settings.namespace,
            "state": self.state,
            "reason": reason,
            "since": self.instance.since,
            "started_at": self.started_at,
            "now": now,
            "watermark_age": _age(self.coherence.proof.watermark, now),
            "tick_age": _age(self.coherence.proof.checked_until, now),
            "max_staleness": self.settings.max_staleness,
            "tick_refused": self.coherence.proof.refused,
            "source": self.coherence.proof.source,
            "last_gap": None if gap is None else {"at": gap.at, "reason": gap.reason},
            "queue_depth": None if broker is None else broker.get("unsettled"),
            "hit_ratio": cache.hits / reads if reads else None,
            "registration": None if self.registrar is None else self.registrar.state,
            "broker": broker,
            "relay": None if self.relay is None else self.relay.state,
            "writing": {
                "failing": refused is not None,
                "since": None if refused is None else refused.since,
                "reason": None if refused is None else refused.reason,
            },
            "publisher": {
                "failing": self.publisher.failing,
                "waiting": self.publisher.waiting,
                "reason": self.publisher.problem,
            },
            "answering": {
                "failing": self.respondent.problem is not None,
                "reason": self.respondent.problem,
            },
            "cache": {
                "url": mask_url(self.settings.cache_url),
                "entries": len(self.cache) if isinstance(self.cache, InProcessCache) else None,
                "attached": self.caches.attached,
                "epoch": self.coherence.epoch,
                "warming": None if self._warmer is None else self._warmer.state,
            },
            "settings": {name: getattr(self.settings, name) for name in SHARED_SETTINGS},
            "audit": self.auditor.state,
            "counters": self.counters(),
        }

    def counters(self) -> dict[str, Any]:
        """See `Client.stats`."""
        counters: dict[str, Any] = {
            name: _counted(part.counters)
            for name, part in (
                ("cache", self.cache),
                ("coherence", self.coherence),
                ("receiver", self.instance),
                ("publisher", self.publisher),
                ("audit", self.auditor),
            )
        }
        if self._warmer is not None:
            counters["warming"] = _counted(self._warmer.counters)
        if isinstance(self.cache, TwoLevels):
            second = self.cache.second.counters
            counters["second_level"] = {field: getattr(second, field) for field in SECOND_LEVEL}
        if self.relay is not None:
            counters["relay"] = self.relay.counters
        return counters


def _age(moment: float, now: float) -> float | None:
    return max(0.0, now - moment) if now - moment < float("inf") else None


def _counted(counters: object) -> dict[str, Any]:
    fields = [field for kind in type(counters).__mro__ for field in getattr(kind, "__slots__", ())]
    return {field: getattr(counters, field) for field in sorted(fields)}
