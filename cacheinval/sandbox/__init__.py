"""Private RabbitMQ, Postgres, Redis and Memcached, for the demo, tests, benchmarks and `cacheinval sandbox`.

    async with Sandbox(("rabbitmq", "postgres")) as sandbox:
        ...  # sandbox.rabbitmq.url, sandbox.postgres.url
        await sandbox.rabbitmq.kill()
        await sandbox.rabbitmq.start()

The servers trust everybody on this host, as on any private development machine: start none where you share the host with
people whom you do not trust.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from cacheinval.errors import SandboxError
from cacheinval.sandbox.caches import Memcached, Redis
from cacheinval.sandbox.cluster import Cluster
from cacheinval.sandbox.postgres import Postgres
from cacheinval.sandbox.processes import Guard, closed_folder
from cacheinval.sandbox.rabbitmq import RabbitMQ
from cacheinval.sandbox.server import Server

__all__ = ["SERVICES", "Cluster", "Memcached", "Postgres", "RabbitMQ", "Redis", "Sandbox", "Server"]

_KINDS: dict[str, type[Server]] = {kind.name: kind for kind in (RabbitMQ, Postgres, Redis, Memcached)}
_S = TypeVar("_S", bound=Server)

SERVICES: tuple[str, ...] = tuple(_KINDS)


class Sandbox:
    """A set of private servers and the folder in which they live.

    services: names out of SERVICES, started on entry; `start` starts others later.
    folder: where the servers keep their data, which then outlives the sandbox. Without it a scratch folder is made, and
        removed at the end.
    tls: RabbitMQ has a TLS listener as well, with a certificate authority of its own.
    cluster: RabbitMQ is a cluster of three nodes, without TLS.

    When the process that owns a sandbox dies, by whatever signal, the servers end and the scratch folder is removed.
    A sandbox belongs to no event loop: it may be opened, used and closed in different ones.
    """

    def __init__(
        self,
        services: Iterable[str] = ("rabbitmq", "postgres"),
        folder: str | Path | None = None,
        *,
        tls: bool = False,
        cluster: bool = False,
    ) -> None:
        if tls and cluster:
            raise SandboxError("a cluster in a sandbox has no TLS listener: choose one of tls and cluster")
        self._services = _kinds(services)
        self._given_folder = Path(folder).absolute() if folder is not None else None
        self._tls = tls
        self._cluster = cluster
        self._servers: dict[str, Server | Cluster] = {}
        self._folder: Path | None = None
        self._guard: Guard | None = None

    @property
    def folder(self) -> Path:
        """The folder in which each server has one of its own."""
        if self._folder is None:
            raise SandboxError("the sandbox is not open: use `async with Sandbox(…) as sandbox`")
        return self._folder

    @property
    def servers(self) -> tuple[Server, ...]:
        """The servers that were started, be they running or not; of a cluster all nodes."""
        return tuple(
            server
            for one in self._servers.values()
            for server in (one.nodes if isinstance(one, Cluster) else (one,))
        )

    @property
    def rabbitmq(self) -> RabbitMQ:
        """The RabbitMQ server, where it is only one."""
        return self._server(RabbitMQ)

    @property
    def cluster(self) -> Cluster:
        """The RabbitMQ cluster."""
        cluster = self._servers.get(Cluster.name)
        if not isinstance(cluster, Cluster):
            raise SandboxError("this sandbox has no cluster: use Sandbox(…, cluster=True)")
        return cluster

    @property
    def postgres(self) -> Postgres:
        """The Postgres server."""
        return self._server(Postgres)

    @property
    def redis(self) -> Redis:
        """The Redis server."""
        return self._server(Redis)

    @property
    def memcached(self) -> Memcached:
        """The Memcached server."""
        return self._server(Memcached)

    def environment(self) -> dict[str, str]:
        """The CACHEINVAL_… variables that point at these servers, and no others."""
        variables = {
            "memcached": "CACHEINVAL_CACHE_URL",
            "redis": "CACHEINVAL_CACHE_URL",  # the later one wins where both are there
            "rabbitmq": "CACHEINVAL_BROKER_URL",
            "postgres": "CACHEINVAL_DATABASE_URL",
        }
        return {
            variable: self._servers[name].url for name, variable in variables.items() if name in self._servers
        }

    async def open(self) -> None:
        """Make the folder and start the servers.

        Raises SandboxError if a program is not installed, or if a server does not start.
        """
        for kind in self._services:
            for name in kind.programs:
                kind.program(name)
        self._folder = self._make_folder()
        self._guard = Guard(self._folder if self._given_folder is None else None)
        try:
            await self.start(*(kind.name for kind in self._services))
        except BaseException:
            await self.close()
            raise

    async def start(self, *services: str) -> None:
        """Start these servers, all at once; those that are running are left alone."""
        servers = [self._servers.get(kind.name) or self._make(kind) for kind in _kinds(services)]
        try:
            async with asyncio.TaskGroup() as group:
                for server in servers:
                    if not server.running:
                        group.create_task(server.start())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def close(self) -> None:
        """Kill the servers and remove the scratch folder."""
        if self._guard is None:
            return
        guard, self._guard = self._guard, None
        try:
            await asyncio.gather(*(server.close() for server in self._servers.values()))
            if self._given_folder is None:
                await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
        finally:
            # What is left now, because something above failed or was cancelled, is the guard's to do.
            await asyncio.to_thread(guard.close)
            self._servers.clear()
            self._folder = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _server(self, kind: type[_S]) -> _S:
        server = self._servers.get(kind.name)
        if not isinstance(server, kind):
            raise SandboxError(f"this sandbox has no {kind.name}: name it in Sandbox(services=…)")
        return server

    def _make(self, kind: type[Server]) -> Server | Cluster:
        folder = self.folder / kind.name
        folder.mkdir(exist_ok=True)
        assert self._guard is not None
        server: Server | Cluster
        if kind is not RabbitMQ:
            server = kind(folder, self._guard)
        elif self._cluster:
            server = Cluster(folder, self._guard)
        else:
            server = RabbitMQ(folder, self._guard, tls=self._tls)
        self._servers[kind.name] = server
        return server

    def _make_folder(self) -> Path:
        if self._given_folder is not None:
            self._given_folder.mkdir(parents=True, exist_ok=True)
            return self._given_folder
        root = os.geteuid() == 0
        place = Path(tempfile.gettempdir())
        if root and closed_folder(place):
            place = Path("/var/tmp")  # noqa: S108 (mkdtemp chooses the name)
        folder = Path(tempfile.mkdtemp(prefix="cacheinval-", dir=place))
        folder.chmod(0o711 if root else 0o700)  # root's Postgres is another user, who has to get through
        return folder


def _kinds(services: Iterable[str]) -> list[type[Server]]:
    names = list(dict.fromkeys(services))
    if unknown := [name for name in names if name not in _KINDS]:
        raise SandboxError(f"unknown service {unknown[0]!r}: there are {', '.join(SERVICES)}")
    return [_KINDS[name] for name in names]
