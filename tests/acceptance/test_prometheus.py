"""A real Prometheus with the rules of `config/` asks a real worker, and says when something is wrong with it."""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest
import yaml
from running import Started
from waiting import Eventually

from cacheinval.sandbox import RabbitMQ
from cacheinval.sandbox.processes import Guard
from cacheinval.sandbox.server import Programs, Server

CONFIG = Path(__file__).parents[2] / "config"


class Prometheus(Server):
    """A Prometheus with data of its own that asks and judges twice a second; `target` is whom it asks, as host:port."""

    name = "prometheus"
    package = "prometheus"
    programs: ClassVar[Programs] = {"prometheus": ()}
    url_form = "http://{host}:{port}"
    question = b"GET /-/ready HTTP/1.0\r\n\r\n"
    answer = b" 200 OK"

    def __init__(self, folder: Path, guard: Guard, target: str) -> None:
        super().__init__(folder, guard)
        self._target = target

    async def _prepare(self) -> None:
        settings = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
        settings["global"] = dict.fromkeys(settings["global"], "500ms")
        (ours,) = (job for job in settings["scrape_configs"] if job["job_name"] == "cacheinval")
        ours["static_configs"] = [{"targets": [self._target]}]
        settings["scrape_configs"] = [ours]
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        rules = yaml.safe_load((CONFIG / "alerts.yml").read_text())
        for rule in rules["groups"][0]["rules"]:
            rule["for"] = "1s"
        (self.folder / "alerts.yml").write_text(yaml.safe_dump(rules))

    def _command(self) -> list[str]:
        address = urlsplit(self.url).netloc
        options = (
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=data",
            f"--web.listen-address={address}",
        )
        return [self.program("prometheus"), *options]


Asking = Callable[[str], Awaitable[Prometheus]]


@pytest.fixture
async def asking(tmp_path: Path) -> AsyncIterator[Asking]:
    """Starts a Prometheus that asks the given host:port; ended after the test."""
    guard = Guard(None)
    servers: list[Prometheus] = []

    async def start(target: str) -> Prometheus:
        folder = tmp_path / "prometheus"
        folder.mkdir()
        server = Prometheus(folder, guard, target)
        servers.append(server)
        await server.start()
        return server

    try:
        yield start
    finally:
        for server in servers:
            await server.close()
        guard.close()


async def test_a_worker_without_its_broker_is_told_of_and_one_that_is_gone(
    started: Started,
    own_rabbitmq: RabbitMQ,
    namespace: str,
    asking: Asking,
    eventually: Eventually,
) -> None:
    settings = {"broker_url": own_rabbitmq.url, "database_url": "", "namespace": namespace}
    worker = await started.start_http("worker", **settings)
    await started.until(worker, "ready")
    server = await asking(urlsplit(worker.url).netloc)

    async def ask(path: str, **query: str) -> Any:
        answer = (await started.http.get(f"{server.url}/api/v1/{path}", params=query)).json()
        assert answer["status"] == "success"
        return answer["data"]

    async def firing() -> set[str]:
        alerts = (await ask("alerts"))["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    async def scraped() -> bool:
        query = 'cacheinval_state{state="ready"} == 1'
        return bool((await ask("query", query=query))["result"])

    await eventually(scraped)
    (found,) = (await ask("targets"))["activeTargets"]
    assert (found["health"], found["lastError"]) == ("up", "")
    (group,) = (await ask("rules"))["groups"]
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
    assert await firing() == set()

    await own_rabbitmq.kill()
    await eventually(lambda: _includes(firing, "CacheinvalSuspect"), 20)
    worker.signal(signal.SIGKILL)
    await eventually(lambda: _includes(firing, "CacheinvalInstanceDown"), 20)
    assert "CacheinvalSuspect" not in await firing()  # of who is gone nothing else is known


async def _includes(firing: Any, alert: str) -> bool:
    return alert in await firing()
