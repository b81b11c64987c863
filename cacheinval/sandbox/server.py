"""What all private servers have in common: each lives in a folder of its own, on free ports of 127.0.0.1."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from cacheinval.errors import SandboxError
from cacheinval.sandbox.processes import (
    LOOPBACK,
    Guard,
    claim_port,
    family,
    find,
    identity,
    living,
    send,
)

__all__ = ["Programs", "Server"]

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
