"""Processes for acceptance tests, ended after each test whatever came of it."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from running import Started

from cacheinval.sandbox import RabbitMQ


@pytest.fixture
def settings(rabbitmq: RabbitMQ, database_url: str, namespace: str) -> dict[str, object]:
    """Of processes that share one broker and one database."""
    return {
        "broker_url": rabbitmq.url,
        "database_url": database_url,
        "namespace": namespace,
        "http_port": 0,
    }


@pytest.fixture
async def started(tmp_path: Path) -> AsyncIterator[Started]:
    """Starts processes, and asks them over HTTP."""
    async with httpx.AsyncClient(timeout=60) as http:
        started = Started(tmp_path, http)
        try:
            yield started
        finally:
            for process in started.processes:
                process.kill()
