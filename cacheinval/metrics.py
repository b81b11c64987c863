"""What Prometheus is told of an instance: its status, turned into metrics when somebody asks."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cacheinval.receiver import LATENCY_BUCKETS

__all__ = ["Metrics", "Observed"]


class Observed(Protocol):
    """What is measured: a `Client`."""

    def status(self) -> dict[str, Any]: ...


_HELP = {
    "cache_hits": "Reads answered from the cache.",
    "cache_misses": "Reads of what was not in the cache.",
    "cache_bypasses": "Reads past what was in the cache, because its freshness could not be proven.",
    "cache_loads": "Calls of loaders.",
    "cache_load_errors": "Loaders that failed.",
    "cache_primary_loads": "Those that read the primary, because a replica may lag behind.",
    "cache_queued_loads": "Loads that waited, because as many as may run at a time did.",
    "cache_not_stored": "Loaded values that were not stored, because their key was evicted meanwhile, or they lag behind.",
    "cache_stale_if_error": "Reads given a stale value, because loading failed.",
    "cache_stale_while_revalidate": "Reads given a value whose ttl had run out, while it was loaded again.",
    "cache_evicted_entries": "Entries that an invalidation dropped.",
    "second_level_hits": "Looks into the cache outside the process, for what the one in it had not, that found an entry.",
    "second_level_misses": "Such looks that found none that may be served.",
    "second_level_bypasses": "Such looks that failed.",
    "second_level_not_stored": "Loaded values that were not stored there.",
    "second_level_evicted_entries": "Keys evicted there.",
    "coherence_epochs": "Whole-cache resets.",
    "coherence_gaps": "Occasions on which messages may have been missed.",
    "coherence_gap_reasons": "The same, by reason.",
    "coherence_voided_loads": "Loads in flight that an eviction voided.",
    "coherence_skipped_echoes": "Messages of this instance's own that needed no eviction when they came back.",
    "coherence_unknown_messages": "Messages of a kind that this version does not know.",
    "coherence_below_floor": "Loaded values whose version, or absence, is older than what was evicted.",
    "coherence_duplicates": "Messages that had arrived before.",
    "receiver_messages": "Messages that arrived.",
    "receiver_malformed": "Messages that could not be understood, and were dead-lettered.",
    "receiver_evictions": "Evictions done because of messages.",
    "receiver_retries": "Evictions that failed and were tried again.",
    "publisher_confirmed_writes": "Writes whose invalidation the broker confirmed.",
    "publisher_confirmed_messages": "Messages that the broker confirmed.",
    "publisher_deleted_rows": "Rows of the outbox deleted after their confirm.",
    "publisher_failures": "Publishes that failed.",
    "publisher_left_to_relay": "Writes whose invalidation was left to the relay.",
    "warming_loads": "Loads of hot keys after they were evicted.",
    "warming_stored": "Those whose value was stored.",
    "warming_failures": "Those that failed.",
    "warming_needless": "Evicted hot keys that a reader had loaded before it was their turn.",
    "audit_runs": "Audits done.",
    "audit_checked": "Entries compared with their source.",
    "audit_consistent": "Entries that were as their source.",
    "audit_settling": "Entries that differed from their source, and no more when looked at again.",
    "audit_failed": "Entries that could not be compared, mostly because their loader failed.",
    "inconsistent_entries": "Entries that differed from their source, and still did when looked at again.",
    "relay_published_rows": "Rows of the outbox that the relay published.",
    "relay_published_messages": "Messages that the relay published.",
    "relay_bad_rows": "Rows that could not be encoded, for which everything was invalidated.",
    "relay_errors": "Failures of the database or the broker that the relay met.",
}


_NAMES = {"audit_inconsistent": "inconsistent_entries"}
"""Metrics whose name is not that of part and counter."""


class Metrics(Collector):
    """Turns the status into metrics when Prometheus asks for them."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    def collect(self) -> Iterator[Metric]:
        status = self._observed.status()
        yield _info(status)
        yield from _gauges(status)
        for part, counters in status["counters"].items():
            for name, value in counters.items():
                if not name.startswith("latenc"):
                    yield _counter(f"{part}_{name}", value)
        receiver = status["counters"]["receiver"]
        yield _latency(receiver["latencies"], receiver["latency_sum"])


def _info(status: Mapping[str, Any]) -> Metric:
    about = {name: str(status[name]) for name in ("version", "namespace", "id", "host")}
    return InfoMetricFamily("cacheinval_instance", "What runs here.", value=about)


def _gauges(status: Mapping[str, Any]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "cacheinval_state", "1 for the state that the instance is in.", labels=["state"]
    )
    for one in ("starting", "ready", "suspect"):
        state.add_metric([one], float(status["state"] == one))
    yield state
    broker, relay = status["broker"] or {}, status["relay"]
    cache, publisher = status["cache"], status["publisher"]
    values: dict[str, tuple[float | None, str]] = {
        "start_time_seconds": (status["started_at"], "When the instance started, in seconds since 1970."),
        "state_since_seconds": (status["since"], "When the state last changed, in seconds since 1970."),
        "watermark_age_seconds": (status["watermark_age"], "Age of the newest proof of freshness."),
        "cache_entries": (cache["entries"], "Entries in the cache of this process."),
        "cache_epoch": (cache["epoch"], "Number of the present epoch."),
        "broker_subscribed": (broker.get("consumer") == "connected", "Whether the subscription stands."),
        "publisher_failing": (publisher["failing"], "Whether the last publish failed."),
        "publisher_waiting": (publisher["waiting"], "Names that wait to be published."),
    }
    registration = status.get("registration")
    if registration is not None:
        registered = registration["state"] == "registered"
        values["registered"] = (registered, "Whether writers that wait for the others count this instance.")
    if relay is not None:
        leads = relay["state"] in ("leader", "blocked")
        values["relay_leader"] = (leads, "Whether this process relays the outbox.")
        values["outbox_oldest_row_age_seconds"] = (
            relay["oldest_row_age"],
            "Age of the oldest row that is due.",
        )
    for name, (value, text) in values.items():
        if value is not None:
            yield GaugeMetricFamily(f"cacheinval_{name}", text, value=float(value))


def _counter(name: str, value: float | Mapping[str, float]) -> Metric:
    name = _NAMES.get(name, name)
    text = _HELP.get(name, name.replace("_", " ").capitalize() + ".")
    if not isinstance(value, Mapping):
        return CounterMetricFamily(f"cacheinval_{name}", text, value=value)
    family = CounterMetricFamily(f"cacheinval_{name}", text, labels=["reason"])
    for reason, count in value.items():
        family.add_metric([reason], count)
    return family


def _latency(counts: Sequence[int], total: float) -> Metric:
    bounds = [*map(floatToGoString, LATENCY_BUCKETS), "+Inf"]
    buckets = list(zip(bounds, accumulate(counts), strict=True))
    return HistogramMetricFamily(
        "cacheinval_eviction_latency_seconds", "From commit to eviction.", buckets=buckets, sum_value=total
    )
