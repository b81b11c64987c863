"""Private servers for a benchmark."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from cacheinval.sandbox import Sandbox

__all__ = ["Urls", "private_servers"]


class Urls(NamedTuple):
    """Where servers are, for processes of their own too."""

    rabbitmq: str
    postgres: str
    redis: str = ""

    @classmethod
    def of(cls, sandbox: Sandbox) -> "Urls":
        """Those of these servers."""
        return cls(**{server.name: server.url for server in sandbox.servers})


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
