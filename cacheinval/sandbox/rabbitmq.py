"""A private RabbitMQ node, alone or in a cluster."""

import os
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cacheinval.errors import SandboxError
from cacheinval.sandbox.processes import LOOPBACK, Guard, find
from cacheinval.sandbox.server import Programs, Server

__all__ = ["Epmd", "Membership", "RabbitMQ"]


class Epmd(Server):
    """Where the Erlang nodes of a host find each other; one that no other node knows of."""

    name = "epmd"
    package = "rabbitmq-server"
    programs: ClassVar[Programs] = {"epmd": ("/usr/lib*/erlang/bin/epmd",)}
    url_form = "{host}:{port}"
    question = b"\x00\x01n"  # asks for all names; the answer begins with the port, in four bytes
    answer = b"\x00\x00"

    def _command(self) -> Sequence[str]:
        return [self.program("epmd"), "-address", LOOPBACK, "-port", str(self.port)]


@dataclass(frozen=True)
class Membership:
    """What makes a RabbitMQ node one of a cluster.

    node: its own name, one of `nodes`, all that there are.
    epmd: where they find each other, started before them.
    cookie: the secret that they share, where they have none from an earlier start.
    """

    node: str
    nodes: Sequence[str]
    epmd: Epmd
    cookie: str


class RabbitMQ(Server):
    """A RabbitMQ node with data of its own.

    tls: it has a TLS listener too.
    membership: of a cluster; without it the node is alone, and has an epmd and a cookie of its own.
    """

    name = "rabbitmq"
    package = "rabbitmq-server"
    programs: ClassVar[Programs] = {
        "rabbitmq-server": (
            "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server",
            "/usr/lib/rabbitmq/bin/rabbitmq-server",
        ),
        **Epmd.programs,
    }
    url_form = "amqp://guest:guest@{host}:{port}/"
    port_names = ("main", "tls", "distribution")
    boot_timeout = 60.0
    tools: ClassVar[Sequence[str]] = ("rabbitmqctl", "rabbitmq-diagnostics", "rabbitmq-streams")

    # All that a client says before it may open a channel, in one go: the protocol's header, then StartOk, TuneOk (one
    # channel, frames of 128 KiB, no heartbeat) and Open, each a method frame. Ready is who answers OpenOk.
    question = b"AMQP\x00\x00\x09\x01" + b"".join(
        b"\x01\x00\x00" + len(method).to_bytes(4, "big") + method + b"\xce"
        for method in (
            b"\x00\x0a\x00\x0b\x00\x00\x00\x00\x05PLAIN\x00\x00\x00\x0c\x00guest\x00guest\x05en_US",
            b"\x00\x0a\x00\x1f\x00\x01\x00\x02\x00\x00\x00\x00",
            b"\x00\x0a\x00\x28\x01/\x00\x00",
        )
    )
    answer = b"\x00\x0a\x00\x29"

    def __init__(
        self, folder: Path, guard: Guard, *, tls: bool = False, membership: Membership | None = None
    ) -> None:
        super().__init__(folder, guard)
        self._tls = tls
        self._membership = membership
        self._epmd = membership.epmd if membership is not None else Epmd(folder / "epmd", guard)

    @property
    def node(self) -> str:
        """Its name among Erlang's nodes."""
        return self._membership.node if self._membership is not None else "cacheinval@localhost"

    @classmethod
    def program(cls, name: str) -> str:
        """As for any server; but on Debian the PATH has a wrapper that switches user: take what it calls."""
        path = Path(super().program(name))
        if path.resolve().name == "rabbitmq-script-wrapper":
            path = path.resolve().with_name(name)
        return str(path)

    @property
    def tls_url(self) -> str:
        """The address of the TLS listener, whose certificate is signed by `ca_file`."""
        self._need_tls()
        return f"amqps://guest:guest@localhost:{self._port('tls')}/"

    @property
    def ca_file(self) -> Path:
        """The certificate of the authority that signed the server's (PEM)."""
        self._need_tls()
        return self.folder / "ca.pem"

    @property
    def rabbitmqctl(self) -> Path:
        """A script that is rabbitmqctl for this node, from any shell of its owner; beside it are the other `tools`."""
        return self.folder / "bin" / "rabbitmqctl"

    async def ctl(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run rabbitmqctl with these arguments on this node and return its stdout.

        Raises SandboxError, with what it said, if it fails or takes longer than `timeout` seconds.
        """
        return await self._run([str(self.rabbitmqctl), "--quiet", *arguments], timeout)

    async def close(self) -> None:
        """Kill the server, and the epmd that is its own, for good and give the ports back."""
        try:
            await super().close()
        finally:
            if self._membership is None:
                await self._epmd.close()

    async def _prepare(self) -> None:
        if self._membership is None and not self._epmd.running:
            # Erlang would start one by itself: a daemon that outlives it, on all interfaces.
            self._epmd.folder.mkdir(exist_ok=True)
            await self._epmd.start()
        cookie = self.folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.touch(mode=0o600)
            shared = self._membership.cookie if self._membership is not None else None
            cookie.write_text(shared or secrets.token_hex(16))
        if self._tls and not self.ca_file.exists():
            await self._make_certificates()
        self._write_tools()
        (self.folder / "enabled_plugins").write_text("[].\n")
        (self.folder / "rabbitmq.conf").write_text("\n".join(self._settings()) + "\n")

    def _write_tools(self) -> None:
        """Scripts that know name, cookie and ports: a tool by itself would look for another node, of the host."""
        self.rabbitmqctl.parent.mkdir(exist_ok=True)
        variables = [f"{name}={value}" for name, value in self._whole_environment().items()]
        for name in self.tools:
            program = Path(self.program("rabbitmq-server")).with_name(name)
            command = shlex.join(["/usr/bin/env", "-i", *variables, str(program)])
            script = self.rabbitmqctl.with_name(name)
            script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            script.chmod(0o700)

    def _settings(self) -> list[str]:
        settings = [
            f"listeners.tcp.1 = {LOOPBACK}:{self.port}",
            "loopback_users = none",
            "disk_free_limit.absolute = 10MB",
            "log.console = true",
            "log.file = false",
        ]
        if self._tls:
            settings += [
                f"listeners.ssl.1 = {LOOPBACK}:{self._port('tls')}",
                f"ssl_options.cacertfile = {self.ca_file}",
                f"ssl_options.certfile = {self.folder / 'server.pem'}",
                f"ssl_options.keyfile = {self.folder / 'server.key'}",
                "ssl_options.verify = verify_none",
            ]
        if self._membership is not None:
            settings += [
                "cluster_partition_handling = pause_minority",
                "cluster_formation.peer_discovery_backend = classic_config",
            ]
            for number, node in enumerate(self._membership.nodes, 1):
                settings.append(f"cluster_formation.classic_config.nodes.{number} = {node}")
        return settings

    def _command(self) -> Sequence[str]:
        return [self.program("rabbitmq-server")]

    def _environment(self) -> dict[str, str]:
        loopback = f"-kernel inet_dist_use_interface {{{LOOPBACK.replace('.', ',')}}}"
        return {
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": LOOPBACK,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._port("distribution")),
            "ERL_EPMD_PORT": str(self._epmd.port),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "rabbitmq.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": loopback,
            "RABBITMQ_CTL_ERL_ARGS": loopback,
            # Any port (0), for rabbitmqctl would take one of ten fixed ones.
            "RABBITMQ_CTL_DIST_PORT_MIN": "0",
            "RABBITMQ_CTL_DIST_PORT_MAX": "0",
            # The default, none, sends Erlang's schedulers to sleep so eagerly that booting takes twice as long.
            "RABBITMQ_SCHEDULER_BUSY_WAIT_THRESHOLD": "short",
        }

    async def _make_certificates(self) -> None:
        openssl = str(find("openssl", "openssl"))
        new = [openssl, "req", "-x509", "-nodes", "-days", "30", "-newkey", "rsa:2048"]
        authority = ["-subj", "/CN=cacheinval sandbox", "-keyout", "ca.key", "-out", "ca.pem"]
        names = [
            "-addext",
            f"subjectAltName=DNS:localhost,IP:{LOOPBACK}",
            "-addext",
            "basicConstraints=CA:FALSE",
        ]
        server = ["-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.pem"]
        await self._run([*new, *authority])
        await self._run([*new, *server, *names, "-CA", "ca.pem", "-CAkey", "ca.key"])

    def _need_tls(self) -> None:
        if not self._tls:
            raise SandboxError("this RabbitMQ has no TLS listener: use Sandbox(…, tls=True)")
