"""What Prometheus is told of an instance: its status, turned into metrics when somebody asks."""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, Protocol, get_args

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cacheinval.cache import BypassReason
from cacheinval.coherence import GapReason
from cacheinval.latencies import BUCKETS, Latencies
from cacheinval.outbox.relay import State

__all__ = ["Metrics", "Observed"]


class Observed(Protocol):
    """What is measured: a `Client`."""

    def status(self) -> dict[str, Any]: ...


_HELP = {
    "cache_hits": "Reads answered from the cache.",
    "cache_misses": "Reads of what was not in the cache.",
    "cache_bypasses": "Reads past the cache: because the freshness of what is in it could not be proven, or on purpose.",
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
    "coherence_voided_loads": "Loads in flight that an eviction voided.",
    "coherence_skipped_echoes": "Messages of this instance's own that needed no eviction when they came back.",
    "coherence_unknown_messages": "Messages of a kind that this version does not know.",
    "coherence_below_floor": "Loaded values whose version, or absence, is older than what was evicted.",
    "coherence_duplicates": "Messages that had arrived before.",
    "coherence_ticks": "Ticks of a relay that arrived.",
    "coherence_refused_ticks": "Ticks that were not believed: of another database, or from the future.",
    "receiver_messages": "Messages that arrived.",
    "receiver_malformed": "Messages that could not be understood, and were dead-lettered.",
    "receiver_evictions": "Evictions done because of messages.",
    "receiver_retries": "Evictions that failed and were tried again.",
    "publisher_confirmed_writes": "Writes whose invalidation the broker confirmed.",
    "publisher_confirmed_messages": "Messages that the broker confirmed.",
    "publisher_deleted_rows": "Rows of the outbox deleted after their confirm.",
    "publisher_failures": "Publishes that failed.",
    "publisher_timeouts": "Those that the broker did not answer in time.",
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
    "relay_ticks": "Ticks that the relay sent.",
    "relay_bad_rows": "Rows that could not be encoded, for which everything was invalidated.",
    "relay_errors": "Failures of the database or the broker that the relay met.",
}

_NAMES = {"audit_inconsistent": "inconsistent_entries"}
"""Metrics whose name is not that of part and counter."""

_REASONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cache_bypasses": ("bypass_reasons", get_args(BypassReason)),
    "coherence_gaps": ("gap_reasons", get_args(GapReason)),
}
"""Counters that are told by reason: where the counts are, and every reason there is. Each is told from the start, since
Prometheus cannot see a counter grow that it first sees with its first count."""

_BROKER = {
    "deliveries": ("broker_deliveries", "Messages that the broker delivered."),
    "rejected": ("broker_dead_letters", "Messages handed back to the broker for its dead letters."),
    "confirmed": ("broker_confirms", "Messages of this process that the broker confirmed, of whatever kind."),
    "unrouted": ("broker_unrouted", "Those confirmed while nobody was subscribed."),
}

_LATENCIES = {
    "receiver": (
        "eviction_latency_seconds",
        "From a commit to its eviction here, or from its publish where that is all that is known.",
    ),
    "publisher": ("publish_latency_seconds", "From the beginning of a publish to its last confirm."),
}


class Metrics(Collector):
    """Turns the status into metrics when Prometheus asks for them."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    def collect(self) -> Iterator[Metric]:
        status = self._observed.status()
        yield _info(status)
        yield _states("state", "1 for the state that the instance is in.", _STATES, status["state"])
        if status["relay"] is not None:
            text = "1 for what the relay in this process does."
            yield _states("relay_state", text, get_args(State), status["relay"]["state"])
        for name, (value, text) in _gauges(status).items():
            if value is not None:
                yield GaugeMetricFamily(f"cacheinval_{name}", text, value=float(value))
        for name, (metric, text) in _BROKER.items():
            if (count := (status["broker"] or {}).get(name)) is not None:
                yield CounterMetricFamily(f"cacheinval_{metric}", text, value=count)
        for part, counters in status["counters"].items():
            yield from _counters(part, counters)
        for part, (name, text) in _LATENCIES.items():
            yield _histogram(name, text, status["counters"][part])


_STATES = ("starting", "ready", "suspect")


def _info(status: Mapping[str, Any]) -> Metric:
    about = {name: str(status[name]) for name in ("version", "namespace", "id", "host")}
    return InfoMetricFamily("cacheinval_instance", "What runs here.", value=about)


def _states(name: str, text: str, states: tuple[str, ...], present: str) -> Metric:
    family = GaugeMetricFamily(f"cacheinval_{name}", text, labels=["state"])
    for state in states:
        family.add_metric([state], float(state == present))
    return family


def _gauges(status: Mapping[str, Any]) -> dict[str, tuple[float | None, str]]:
    broker, registration, relay = status["broker"] or {}, status["registration"], status["relay"]
    cache, publisher = status["cache"], status["publisher"]
    gauges: dict[str, tuple[float | None, str]] = {
        "start_time_seconds": (status["started_at"], "When the instance started, in seconds since 1970."),
        "state_since_timestamp_seconds": (
            status["since"],
            "When the state last changed, in seconds since 1970.",
        ),
        "watermark_age_seconds": (status["watermark_age"], "Age of the newest proof of freshness."),
        "last_tick_age_seconds": (
            status["tick_age"],
            "Age of what the last tick said, whether or not it proved anything.",
        ),
        "max_staleness_seconds": (
            status["max_staleness"],
            "The setting: how old a value may be that is served without proof.",
        ),
        "cache_entries": (cache["entries"], "Entries in the cache of this process."),
        "cache_epoch": (cache["epoch"], "Number of the present epoch."),
        "broker_subscribed": (broker.get("consumer") == "connected", "Whether the subscription stands."),
        "writing_failing": (
            status["writing"]["failing"],
            "Whether the outbox refuses each write that says what it makes stale.",
        ),
        "publisher_failing": (publisher["failing"], "Whether the last publish failed."),
        "publisher_waiting": (publisher["waiting"], "Writes that wait to be published."),
    }
    if registration is not None:
        registered = registration["state"] == "registered"
        gauges["registered"] = (registered, "Whether writers that wait for the others count this instance.")
    if relay is not None:
        leads = relay["state"] in ("leader", "blocked")
        gauges["relay_leader"] = (leads, "Whether this process relays the outbox.")
        gauges["outbox_rows"] = (
            relay["rows"],
            "Rows in the outbox, as its leader counts them: every five seconds, no further than 100,000.",
        )
        gauges["outbox_oldest_row_age_seconds"] = (
            relay["oldest_row_age"] or 0.0 if leads else None,
            "Age of the oldest row that is due and not published, as the leader sees it; 0 where there is none.",
        )
    return gauges


def _counters(part: str, counters: Mapping[str, Any]) -> Iterator[Metric]:
    told_by_reason = {field for field, _ in _REASONS.values()}
    for field, value in counters.items():
        if field in told_by_reason or field in Latencies.__slots__:
            continue
        name = _NAMES.get(f"{part}_{field}", f"{part}_{field}")
        text = _HELP.get(name, name.replace("_", " ").capitalize() + ".")
        if name not in _REASONS:
            yield CounterMetricFamily(f"cacheinval_{name}", text, value=value)
            continue
        family = CounterMetricFamily(f"cacheinval_{name}", text, labels=["reason"])
        counts, reasons = counters[_REASONS[name][0]], _REASONS[name][1]
        for reason in reasons:
            family.add_metric([reason], counts.get(reason, 0))
        yield family


def _histogram(name: str, text: str, counters: Mapping[str, Any]) -> Metric:
    bounds = [*map(floatToGoString, BUCKETS), "+Inf"]
    buckets = list(zip(bounds, accumulate(counters["latencies"]), strict=True))
    return HistogramMetricFamily(
        f"cacheinval_{name}", text, buckets=buckets, sum_value=counters["latency_sum"]
    )
