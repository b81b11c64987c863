"""What an instance exports to Prometheus, as the real collector says it."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from cacheinval.client import Client
from cacheinval.metrics import Metrics
from cacheinval.settings import Settings


class _Fixed:
    """A status that stands still."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def status(self) -> dict[str, Any]:
        return self._status


def leading(namespace: str) -> dict[str, Any]:
    """The status of an instance that has everything: a database, a relay that leads, Δ, a tick that came."""
    settings = Settings(namespace=namespace, instance_id="one", max_staleness=30, warm_keys=10)
    status = Client(settings).status()
    relay = {"state": "leader", "since": 1.0, "reason": None, "oldest_row_age": 0.5, "rows": 7}
    return status | {"started_at": 1.0, "watermark_age": 0.25, "tick_age": 0.125, "relay": relay}


def exposition(status: dict[str, Any], write: Callable[[Collector], bytes] = generate_latest) -> str:
    """What `/metrics` says where this is the status."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Metrics(_Fixed(status)))
    return write(registry).decode()


def samples(text: str) -> dict[str, set[str]]:
    """The samples by name, each with the names of its labels."""
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
