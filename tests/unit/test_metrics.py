"""What Prometheus is told: that it is all there, by the names of the field, and counts what happened."""

import re
import shutil
import subprocess
from typing import get_args

import pytest
from exported import exposition, leading, samples
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from cacheinval import metrics
from cacheinval.cache import BypassReason
from cacheinval.client import Client
from cacheinval.coherence import GapReason
from cacheinval.errors import PublishError
from cacheinval.settings import Settings

WANTED = """
    cache_hits_total cache_misses_total cache_bypasses_total{reason} cache_loads_total cache_load_errors_total
    cache_not_stored_total cache_evicted_entries_total cache_entries
    coherence_voided_loads_total coherence_gaps_total{reason} coherence_epochs_total
    receiver_evictions_total receiver_malformed_total receiver_retries_total
    eviction_latency_seconds_bucket{le} eviction_latency_seconds_sum eviction_latency_seconds_count
    watermark_age_seconds last_tick_age_seconds max_staleness_seconds registered
    outbox_rows outbox_oldest_row_age_seconds relay_leader relay_state{state}
    publisher_confirmed_messages_total publisher_failures_total publisher_timeouts_total publisher_left_to_relay_total
    writing_failing publisher_failing publisher_waiting
    publish_latency_seconds_bucket{le} publish_latency_seconds_sum publish_latency_seconds_count
    broker_dead_letters_total broker_confirms_total broker_subscribed
    inconsistent_entries_total state{state} instance_info{host,id,namespace,version}
"""
"""What somebody on call looks for, with its labels; an exporter that loses one of these breaks their dashboards."""


def value(text: str, name: str, **labels: str) -> float:
    (found,) = (
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if (sample.name, sample.labels) == (f"cacheinval_{name}", labels)
    )
    return found


class TestExposition:
    def test_it_is_complete(self, namespace: str) -> None:
        exported = samples(exposition(leading(namespace)))
        for wanted in WANTED.split():
            name, _, labels = wanted.rstrip("}").partition("{")
            assert exported.get(f"cacheinval_{name}") == set(filter(None, labels.split(","))), wanted

    def test_every_counter_of_the_client_is_in_it(self, namespace: str) -> None:
        status = leading(namespace)
        exported = samples(exposition(status))
        elsewhere = {"latencies", "latency_sum", "bypass_reasons", "gap_reasons"}
        for part, counters in status["counters"].items():
            for name in counters.keys() - elsewhere:
                metric = metrics._NAMES.get(f"{part}_{name}", f"{part}_{name}")
                assert f"cacheinval_{metric}_total" in exported
                assert metric in metrics._HELP, f"nobody says what {metric} means"

    def test_names_follow_the_conventions(self, namespace: str) -> None:
        families = list(text_string_to_metric_families(exposition(leading(namespace))))
        assert len({family.name for family in families}) == len(families)
        for family in families:
            assert family.name.startswith("cacheinval_")
            assert family.documentation.endswith("."), family.name
            assert not re.search(r"_(ms|milliseconds|count|number|duration)$", family.name), family.name
            if family.type == "counter":
                assert all(sample.name.endswith("_total") for sample in family.samples)
            if family.type == "gauge":
                assert not family.name.endswith("_total")
            if "age" in family.name.split("_") or "latency" in family.name.split("_"):
                assert family.name.endswith("_seconds")

    def test_openmetrics_can_be_read_too(self, namespace: str) -> None:
        assert list(parse_openmetrics(exposition(leading(namespace), openmetrics.generate_latest)))

    @pytest.mark.skipif(shutil.which("promtool") is None, reason="apt-get install prometheus")
    def test_promtool_has_nothing_against_it(self, namespace: str) -> None:
        text = exposition(leading(namespace))
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestLabels:
    def test_reasons_are_told_before_they_occur_and_no_others_ever(self, namespace: str) -> None:
        text = exposition(leading(namespace))
        told: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if "reason" in sample.labels:
                    told.setdefault(family.name, set()).add(sample.labels["reason"])
        assert told == {
            "cacheinval_cache_bypasses": set(get_args(BypassReason)),
            "cacheinval_coherence_gaps": set(get_args(GapReason)),
        }

    def test_no_label_has_values_without_bound(self, namespace: str) -> None:
        exported = samples(exposition(leading(namespace)))
        assert set().union(*exported.values()) == {
            *("reason", "state", "le"),
            *("host", "id", "namespace", "version"),  # of the one sample that says who this is
        }
        assert {name for name, labels in exported.items() if "id" in labels} == {"cacheinval_instance_info"}


class TestWhoLeads:
    @pytest.mark.parametrize(("state", "leads"), [("leader", 1), ("blocked", 1), ("standby", 0)])
    def test_one_of_the_states_is_set(self, namespace: str, state: str, leads: int) -> None:
        status = leading(namespace)
        status["relay"] |= {"state": state}
        text = exposition(status)
        assert value(text, "relay_leader") == leads
        assert value(text, "relay_state", state=state) == 1
        assert value(text, "relay_state", state="stopped") == 0

    def test_the_leader_has_an_empty_outbox_and_others_know_nothing_of_it(self, namespace: str) -> None:
        status = leading(namespace)
        status["relay"] |= {"oldest_row_age": None, "rows": 0}
        assert value(exposition(status), "outbox_oldest_row_age_seconds") == 0
        status["relay"] |= {"state": "standby", "rows": None}
        assert not [name for name in samples(exposition(status)) if "outbox" in name]


class TestCounting:
    async def test_bypasses_are_told_apart(self, namespace: str) -> None:
        async def load() -> str:
            return "value"

        settings = Settings(
            broker_url="memory://", database_url="", namespace=namespace, instance_id="one", max_staleness=5
        )
        async with Client(settings) as client:
            await client.wait_ready(30)
            for reason in ("refresh", "subscription", "refresh"):
                if reason == "subscription":
                    client.instance.lost("for the test")
                await client.cache.read(reason, load, refresh=reason == "refresh")
            text = exposition(client.status())
        assert value(text, "cache_bypasses_total", reason="refresh") == 2
        assert value(text, "cache_bypasses_total", reason="subscription") == 1
        assert value(text, "cache_bypasses_total", reason="age") == 0
        assert client.cache.counters.bypasses == 3

    @pytest.mark.parametrize(("cause", "timeouts"), [(TimeoutError(), 1), (ConnectionError(), 0), (None, 0)])
    async def test_a_publish_that_failed_for_want_of_an_answer_is_a_timeout(
        self, namespace: str, cause: Exception | None, timeouts: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = Settings(broker_url="memory://", database_url="", namespace=namespace, instance_id="one")
        async with Client(settings, subscribe=False) as client:
            await client.invalidate("key")
            channel = client.publisher._channel

            async def fail(*_: object) -> None:
                raise PublishError("no") from cause

            monkeypatch.setattr(channel, "send", fail)
            with pytest.raises(PublishError):
                await client.invalidate("key")
            text = exposition(client.status())
        assert value(text, "publisher_failures_total") == 1
        assert value(text, "publisher_timeouts_total") == timeouts
        assert value(text, "publish_latency_seconds_count") == 1
        assert value(text, "publisher_confirmed_messages_total") == 1
