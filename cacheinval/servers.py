"""The private servers that a sandbox can have, each in a folder of its own and on free ports of 127.0.0.1."""

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cacheinval.errors import SandboxError
from cacheinval.processes import (
    LOOPBACK,
    Guard,
    check_passable,
    claim_port,
    family,
    find,
    identity,
    living,
    send,
)

__all__ = ["Epmd", "Memcached", "Membership", "Postgres", "RabbitMQ", "Redis", "Server"]

Programs = Mapping[str, Sequence[str]]

_POLL = 0.02
_ATTEMPTS = 3
_PORT_TAKEN = re.compile(r"address already in use|eaddrinuse", re.IGNORECASE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Server:
    """One private server: started, killed, paused, and started again on the same port with the same data.

    folder: its own, existing folder.
    guard: is told of every process.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    programs: ClassVar[Programs]  # what it needs, and where else than on the PATH
    url_form: ClassVar[str]
    port_names: ClassVar[Sequence[str]] = ("main",)
    question: ClassVar[bytes]  # what a client sends, and what the answer of a server that is ready contains
    answer: ClassVar[bytes]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    boot_timeout: ClassVar[float] = 30.0

    def __init__(self, folder: Path, guard: Guard) -> None:
        self.folder = folder
        self.log = folder / "server.log"
        self.boot_seconds = 0.0
        self._guard = guard
        self._process: subprocess.Popen[bytes] | None = None
        self._claims: dict[str, socket.socket] = {}
        self._known = False  # whether clients may know its ports

    @classmethod
    def program(cls, name: str) -> str:
        """The path of a program that this server needs; raises SandboxError if it is not installed."""
        return str(find(name, cls.package, *cls.programs[name]))

    @property
    def port(self) -> int:
        """The port that clients use; it stays when the server is killed and started again."""
        return self._port("main")

    @property
    def url(self) -> str:
        """The address that clients use."""
        return self.url_form.format(host=LOOPBACK, port=self.port)

    @property
    def running(self) -> bool:
        """Whether the server lives, be it paused."""
        return self._process is not None and self._process.poll() is None

    @property
    def pids(self) -> list[int]:
        """The server's processes."""
        # A number that has been reaped may be somebody else's by now.
        return family(self._process.pid) if self._process is not None and self.running else []

    async def start(self) -> None:
        """Start the server, or start it again; returns when it answers like one that is ready.

        Raises SandboxError, with the end of the server's log, if it ends or does not answer in time.
        """
        if self.running:
            raise SandboxError(f"{self.name} is running already")
        began = time.monotonic()
        for attempt in range(_ATTEMPTS):
            try:
                await self._boot()
                break
            except SandboxError as error:
                if self._known or attempt == _ATTEMPTS - 1 or not _PORT_TAKEN.search(str(error)):
                    raise
        self._known = True
        self.boot_seconds = time.monotonic() - began

    async def stop(self, timeout: float = 30.0) -> None:
        """End the server as its operator would; after `timeout` seconds kill it."""
        if self._process is None or not self.running:
            return
        self.resume()
        members = self.pids
        send(self.stop_signal, [self._process.pid])
        try:
            await self._until_gone(members, timeout)
        except SandboxError:
            send(signal.SIGKILL, members)
            await self._until_gone(members, 15.0)

    async def kill(self) -> None:
        """SIGKILL the server and all its processes; returns when they are gone."""
        members = self._freeze()  # who is stopped has no children that could escape
        send(signal.SIGKILL, members)
        await self._until_gone(members, 15.0)

    def pause(self) -> None:
        """SIGSTOP all processes of the server: connections stay open, and nothing answers."""
        # A stopped Postgres cannot end its children, which are in sessions of their own.
        self._guard.watch(*self._freeze())

    def resume(self) -> None:
        """SIGCONT all processes of the server."""
        members = self.pids
        send(signal.SIGCONT, members)
        self._guard.forget(*members[1:])

    async def close(self) -> None:
        """Kill the server for good and give its ports back."""
        try:
            await self.kill()
        finally:
            self._release_ports()

    # What each kind of server does in its own way

    async def _prepare(self) -> None:
        """Make what must be there before the server starts; runs before every start."""

    def _command(self) -> Sequence[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return {}

    def _user(self) -> str | None:
        return None

    # Starting and ending

    async def _boot(self) -> None:
        if not self._known:
            self._release_ports()
            self._claims = {name: claim_port() for name in self.port_names}
        await self._prepare()
        self._process = self._spawn(self._command(), self.log)
        try:
            await self._until_ready(self._process)
        except BaseException:
            await self.kill()
            raise

    async def _until_ready(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + self.boot_timeout
        while not await self._answers():
            if (code := process.poll()) is not None:
                raise SandboxError(
                    f"{self.name} ended with code {code} while it started:\n{self._last_lines()}"
                )
            if time.monotonic() > end:
                raise SandboxError(
                    f"{self.name} was not ready in {self.boot_timeout:g} s:\n{self._last_lines()}"
                )
            await asyncio.sleep(_POLL)

    async def _answers(self) -> bool:
        seen = b""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
                try:
                    writer.write(self.question)
                    while self.answer not in seen and (data := await reader.read(4096)):
                        seen += data
                finally:
                    writer.close()
        return self.answer in seen

    def _freeze(self) -> list[int]:
        stopped: list[int] = []
        while born := [pid for pid in self.pids if pid not in stopped]:
            send(signal.SIGSTOP, born)
            stopped += born
        return stopped

    async def _until_gone(self, members: Sequence[int], timeout: float) -> None:
        if self._process is None:
            return
        end = time.monotonic() + timeout
        while self._process.poll() is None or not living().keys().isdisjoint(members):
            if time.monotonic() > end:
                raise SandboxError(f"{self.name} did not end within {timeout:g} s")
            await asyncio.sleep(_POLL)
        self._guard.forget(self._process.pid, *members)
        self._process = None

    def _last_lines(self) -> str:
        lines = _COLOUR.sub("", self.log.read_text(errors="replace")).splitlines()
        return "\n".join(lines[-15:])

    def _port(self, name: str) -> int:
        if name not in self._claims:
            raise SandboxError(f"{self.name} has not been started")
        port: int = self._claims[name].getsockname()[1]
        return port

    def _release_ports(self) -> None:
        for claim in self._claims.values():
            claim.close()
        self._claims = {}

    # Processes: each in a session of its own, since Ctrl-C in the terminal is for their owner

    def _spawn(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        user, group, groups = identity(self._user())
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 (a command of ours, and no shell)
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self._whole_environment(),
                start_new_session=True,
                user=user,
                group=group,
                extra_groups=groups,
            )
        self._guard.watch(process.pid)
        return process

    async def _run(self, command: Sequence[str], timeout: float = 60.0) -> str:
        """Run a program to its end and return its stdout; raises SandboxError if it fails or takes too long."""
        user, group, groups = identity(self._user())
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            env=self._whole_environment(),
            start_new_session=True,
            user=user,
            group=group,
            extra_groups=groups,
        )
        line = " ".join(command)
        self._guard.watch(process.pid)
        try:
            async with asyncio.timeout(timeout):
                output, errors = await process.communicate()
        except TimeoutError:
            raise SandboxError(f"`{line}` did not end in {timeout:g} s") from None
        finally:
            send(signal.SIGKILL, family(process.pid) if process.returncode is None else [])
            await process.wait()
            self._guard.forget(process.pid)
        if process.returncode != 0:
            text = (errors or output).decode(errors="replace").strip()
            raise SandboxError(f"`{line}` ended with code {process.returncode}: {text}")
        return output.decode()

    def _whole_environment(self) -> dict[str, str]:
        # Nothing else is inherited: the caller's RABBITMQ_… and PG… variables are about other servers.
        path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "HOME": str(self.folder), "LANG": "C.UTF-8", **self._environment()}


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

    async def ctl(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run rabbitmqctl with these arguments on this node and return its stdout.

        Raises SandboxError, with what it said, if it fails or takes longer than `timeout` seconds.
        """
        program = Path(self.program("rabbitmq-server")).with_name("rabbitmqctl")
        return await self._run([str(program), "--quiet", *arguments], timeout)

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
        (self.folder / "enabled_plugins").write_text("[].\n")
        (self.folder / "rabbitmq.conf").write_text("\n".join(self._settings()) + "\n")

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


class Postgres(Server):
    """A Postgres cluster with the superuser `postgres`, who needs no password; fsync stays on."""

    name = "postgres"
    package = "postgresql"
    programs: ClassVar[Programs] = {
        "initdb": ("/usr/lib/postgresql/*/bin/initdb", "/usr/pgsql-*/bin/initdb"),
        "postgres": ("/usr/lib/postgresql/*/bin/postgres", "/usr/pgsql-*/bin/postgres"),
    }
    url_form = "postgresql://postgres@{host}:{port}/postgres"
    stop_signal = signal.SIGINT

    # A startup packet of 41 bytes, protocol 3.0; ready is who answers ReadyForQuery, idle.
    question = b"\x00\x00\x00\x29\x00\x03\x00\x00user\x00postgres\x00database\x00postgres\x00\x00"
    answer = b"Z\x00\x00\x00\x05I"

    def _user(self) -> str | None:
        return "postgres" if os.geteuid() == 0 else None  # it refuses to run as root

    async def _prepare(self) -> None:
        data = self.folder / "data"
        if user := self._user():
            check_passable(self.folder.parent, user)
            shutil.chown(self.folder, user)
        if not (data / "PG_VERSION").exists():
            shutil.rmtree(data, ignore_errors=True)
            options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
            await self._run([self.program("initdb"), "--pgdata", str(data), *options])
        # No process of ours is left, and its number may be somebody else's by now.
        (data / "postmaster.pid").unlink(missing_ok=True)

    def _command(self) -> Sequence[str]:
        settings = {
            "listen_addresses": LOOPBACK,
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [self.program("postgres"), "-D", str(self.folder / "data"), *options]


class Redis(Server):
    """A Redis server that keeps nothing on disk."""

    name = "redis"
    package = "redis-server"
    programs: ClassVar[Programs] = {"redis-server": ("/usr/bin/redis-server",)}
    url_form = "redis://{host}:{port}/0"
    question = b"PING\r\n"
    answer = b"+PONG"

    def _command(self) -> Sequence[str]:
        address = ["--bind", LOOPBACK, "--port", str(self.port)]
        return [self.program("redis-server"), *address, "--save", "", "--appendonly", "no"]


class Memcached(Server):
    """A Memcached server."""

    name = "memcached"
    package = "memcached"
    programs: ClassVar[Programs] = {"memcached": ("/usr/bin/memcached",)}
    url_form = "memcached://{host}:{port}"
    question = b"version\r\n"
    answer = b"VERSION"

    def _command(self) -> Sequence[str]:
        user = ["-u", "root"] if os.geteuid() == 0 else []  # else it asks for the name of a user to become
        return [self.program("memcached"), "-l", LOOPBACK, "-p", str(self.port), "-U", "0", *user]
