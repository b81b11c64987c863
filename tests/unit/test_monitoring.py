"""Health, metrics and status, over ASGI."""

import asyncio
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cacheinval.client import Client
from cacheinval.monitoring import PATHS, Monitoring, Readiness
from cacheinval.settings import Settings


@pytest.fixture
def settings(namespace: str) -> Settings:
    return Settings(broker_url="memory://", database_url="", namespace=namespace, instance_id="one")


def asking(monitoring: Monitoring) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(monitoring), base_url="http://one")


def values(text: str) -> dict[str, float]:
    """Each sample of an exposition: its name with its labels, and its value."""
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


READY = Readiness(True, "ready")


class TestPaths:
    @pytest.mark.parametrize(
        ("readiness", "status"),
        [
            (Readiness(True, "ready"), 200),
            (Readiness(True, "degraded", "no broker"), 200),
            (Readiness(False, "starting", "no database"), 503),
            (Readiness(False, "suspect", "no broker"), 503),
        ],
    )
    async def test_readyz_says_whether_to_send_work(
        self, settings: Settings, readiness: Readiness, status: int
    ) -> None:
        async with asking(Monitoring(Client(settings), lambda: readiness)) as http:
            answer = await http.get("/readyz")
            assert answer.status_code == status
            assert answer.json() == {"status": readiness.status, "reason": readiness.reason}
            assert (await http.get("/healthz")).status_code == 200
            assert (await http.get("/status")).json()["ready"] is readiness.ready

    @pytest.mark.parametrize("path", PATHS)
    async def test_head_is_get_without_its_body(self, settings: Settings, path: str) -> None:
        async with asking(Monitoring(Client(settings), lambda: READY)) as http:
            head, get = await http.head(path), await http.get(path)
            assert head.status_code == get.status_code == 200
            assert head.headers["content-type"] == get.headers["content-type"]
            assert int(head.headers["content-length"]) > 0
            assert get.headers["cache-control"] == "no-store"

    async def test_head_has_no_body_whatever_the_server_does_with_it(self, settings: Settings) -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def never() -> Any: ...

        scope = {"type": "http", "method": "HEAD", "path": "/status", "headers": []}
        await Monitoring(Client(settings), lambda: READY)(scope, never, send)
        assert [message.get("body") for message in sent] == [None, b""]

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
    async def test_other_methods_are_refused(self, settings: Settings, path: str, method: str) -> None:
        async with asking(Monitoring(Client(settings), lambda: READY)) as http:
            answer = await http.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
            assert "detail" in answer.json()

    @pytest.mark.parametrize("path", ["/", "/healthz/", "/Healthz", "/metrics/x", "/products/a"])
    async def test_other_paths_are_unknown(self, settings: Settings, path: str) -> None:
        async with asking(Monitoring(Client(settings), lambda: READY)) as http:
            answer = await http.get(path)
            assert answer.status_code == 404
            assert "/readyz" in answer.json()["detail"]

    async def test_it_speaks_nothing_but_http(self, settings: Settings) -> None:
        async def never(*_: object) -> Any: ...

        with pytest.raises(NotImplementedError, match="websocket"):
            await Monitoring(Client(settings), lambda: READY)({"type": "websocket"}, never, never)


class TestStatus:
    async def test_it_tells_of_the_client(self, settings: Settings) -> None:
        async with Client(settings) as client, asking(Monitoring(client, lambda: READY)) as http:
            await client.wait_ready(30)
            status = (await http.get("/status")).json()
            assert (status["id"], status["state"]) == ("one", "ready")
            assert status["counters"]["cache"]["hits"] == 0

    async def test_no_secret_is_in_it(self, namespace: str) -> None:
        secret = Settings(
            broker_url="amqp://user:s3cret@127.0.0.1/",
            database_url="postgresql://user:s3cret@127.0.0.1/x",
            cache_url="redis://user:s3cret@127.0.0.1/",
            instance_id="one",
            namespace=namespace,
        )
        async with asking(Monitoring(Client(secret), lambda: READY)) as http:
            for path in PATHS:
                assert "s3cret" not in (await http.get(path)).text


class TestMetrics:
    async def test_they_count_what_happened(self, settings: Settings) -> None:
        async def load() -> str:
            return "value"

        async with Client(settings) as client, asking(Monitoring(client, lambda: READY)) as http:
            await client.wait_ready(30)
            for _ in range(3):
                await client.cache.get_or_set("key", load)
            before = values((await http.get("/metrics")).text)
            await client.invalidate("key")
            after = values((await http.get("/metrics")).text)
        assert before["cacheinval_cache_misses_total"] == 1
        assert before["cacheinval_cache_hits_total"] == 2
        assert before["cacheinval_cache_entries"] == 1
        assert before["cacheinval_state[ready]"] == 1
        assert before["cacheinval_state[suspect]"] == 0
        assert after["cacheinval_cache_entries"] == 0
        assert after["cacheinval_publisher_confirmed_writes_total"] == 1

    async def test_what_an_audit_found_is_counted(self, settings: Settings) -> None:
        async def load() -> str:
            return "value"

        async with Client(settings) as client, asking(Monitoring(client, lambda: READY)) as http:
            await client.wait_ready(30)
            for key in ("truth", "lie"):
                await client.cache.get_or_set(key, load)
            client.cache._backend.look("lie").value = "lie"  # type: ignore[attr-defined]
            await client.audit()
            seen = values((await http.get("/metrics")).text)
            last = (await http.get("/status")).json()["audit"]["last"]
        assert seen["cacheinval_inconsistent_entries_total"] == last["inconsistent"] == 1
        assert seen["cacheinval_audit_checked_total"] == last["checked"] == 2
        assert seen["cacheinval_audit_consistent_total"] == last["consistent"] == 1
        assert last["examples"] == ["lie"]

    async def test_latencies_are_a_histogram_in_seconds(self, settings: Settings) -> None:
        writer = Client(settings.model_copy(update={"instance_id": "other"}), subscribe=False)
        async with Client(settings) as client, writer, asking(Monitoring(client, lambda: READY)) as http:
            await client.wait_ready(30)
            await writer.invalidate("key")
            async with asyncio.timeout(30):
                while True:
                    seen = values((await http.get("/metrics")).text)
                    if seen["cacheinval_eviction_latency_seconds_count"] == 1:
                        break
                    await asyncio.sleep(0.005)
        buckets = [
            seen[name] for name in seen if name.startswith("cacheinval_eviction_latency_seconds_bucket")
        ]
        assert buckets == sorted(buckets)
        assert buckets[-1] == 1
        assert 0 <= seen["cacheinval_eviction_latency_seconds_sum"] < 5

    async def test_openmetrics_is_given_to_who_asks(self, settings: Settings) -> None:
        async with asking(Monitoring(Client(settings), lambda: READY)) as http:
            plain = await http.get("/metrics")
            openmetrics = await http.get("/metrics", headers={"accept": "application/openmetrics-text"})
            assert plain.headers["content-type"].startswith("text/plain")
            assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
            assert openmetrics.text.endswith("# EOF\n")
