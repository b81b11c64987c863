"""Private servers for a benchmark."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from cacheinval.sandbox import Sandbox

from .measuring import cpu_seconds

__all__ = ["PARTS", "Processor", "Urls", "private_servers"]

PARTS = ("client", "broker", "database")
"""Who takes processor time: this process, whoever passes messages on (Redis, too), and Postgres."""
_SERVICES = {"rabbitmq": "broker", "redis": "broker", "postgres": "database"}


class Urls(NamedTuple):
    """Where servers are, for processes of their own too."""

    rabbitmq: str
    postgres: str
    redis: str = ""

    @classmethod
    def of(cls, sandbox: Sandbox) -> "Urls":
        """Those of these servers."""
        return cls(**{server.name: server.url for server in sandbox.servers})


class Processor:
    """What this process and some of the servers take, from now on."""

    def __init__(self, sandbox: Sandbox, *services: str) -> None:
        self._parts = {"client": None} | {
            _SERVICES[server.name]: server for server in sandbox.servers if server.name in services
        }
        self._before = self._seconds()

    def _seconds(self) -> dict[str, float]:
        return {
            part: time.process_time() if server is None else cpu_seconds(server.pids[0])
            for part, server in self._parts.items()
        }

    def milliseconds(self, count: int, processes: float = 0.0) -> dict[str, float]:
        """For a thousand of `count`, by part; `processes` are seconds that further processes of the client took."""
        used = {part: now - self._before[part] for part, now in self._seconds().items()}
        used["client"] += processes
        return {part: seconds / count * 1e6 for part, seconds in used.items()}


@asynccontextmanager
async def private_servers(*services: str) -> AsyncIterator[Sandbox]:
    """A sandbox with these servers, opened and closed by an event loop of asyncio: uvloop's starts nothing as another user,
    as Postgres needs where this runs as root."""
    sandbox = Sandbox(services)
    await asyncio.to_thread(asyncio.run, sandbox.open())
    try:
        yield sandbox
    finally:
        await asyncio.to_thread(asyncio.run, sandbox.close())
