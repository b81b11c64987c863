"""`cacheinval sandbox`: a command that runs against private servers, or a shell that is told where they are."""

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence

from cacheinval.sandbox import RabbitMQ, Sandbox

__all__ = ["run"]


async def run(
    command: Sequence[str], services: Iterable[str] = ("rabbitmq", "postgres"), *, cluster: bool = False
) -> int:
    """Run a command with CACHEINVAL_… pointing at private servers, and return its exit code.

    Without a command: print `export` lines for a shell, and wait for SIGINT or SIGTERM. What happens is told on stderr.
    Raises SandboxError if the servers do not start. A command that does not exist is 127, as in a shell.
    """
    if command and shutil.which(command[0]) is None:
        print(f"cacheinval sandbox: {command[0]}: command not found", file=sys.stderr)
        return 127
    session = _Session(command, Sandbox(services, cluster=cluster))
    work = asyncio.create_task(session.work())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, session.on_signal, number, work)
    try:
        return await work
    except asyncio.CancelledError:
        if session.signal is None:
            raise
        return 128 + session.signal if command else 0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class _Session:
    """One `cacheinval sandbox`: servers, and the command that runs against them."""

    def __init__(self, command: Sequence[str], sandbox: Sandbox) -> None:
        self.signal: signal.Signals | None = None
        self._command = command
        self._sandbox = sandbox
        self._process: asyncio.subprocess.Process | None = None

    async def work(self) -> int:
        try:
            async with _progress("starting the servers …"):
                await self._sandbox.open()
            for server in self._sandbox.servers:
                print(f"{server.name:9}  {server.boot_seconds:4.1f} s  {server.url}", file=sys.stderr)
                if isinstance(server, RabbitMQ):
                    print(f"{'':19}{shlex.quote(str(server.rabbitmqctl))} list_queues", file=sys.stderr)
            if self._command:
                return await self._run_command()
            for name, value in self._sandbox.environment().items():
                print(f"export {name}={shlex.quote(value)}", flush=True)
            print("until Ctrl-C", file=sys.stderr)
            await asyncio.Event().wait()
            return 0
        finally:
            await self._sandbox.close()

    async def _run_command(self) -> int:
        environment = {**os.environ, **self._sandbox.environment()}
        self._process = await asyncio.create_subprocess_exec(*self._command, env=environment)
        try:
            code = await self._process.wait()
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
        return code if code >= 0 else 128 - code

    def on_signal(self, number: signal.Signals, work: "asyncio.Task[int]") -> None:
        self.signal = number
        if self._process is None:
            work.cancel()
        elif self._process.returncode is None and not (number == signal.SIGINT and _in_foreground()):
            self._process.send_signal(number)


def _in_foreground() -> bool:
    """Whether a Ctrl-C was typed for us and our command alike: what comes from the terminal need not be passed on."""
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


@contextlib.asynccontextmanager
async def _progress(text: str) -> AsyncIterator[None]:
    """Say on a terminal what takes longer than 2 s, and for how long."""
    began = time.monotonic()

    async def tell() -> None:
        await asyncio.sleep(2)
        while True:
            print(f"\r{text} {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(1)

    teller = asyncio.create_task(tell()) if sys.stderr.isatty() else None
    try:
        yield
    finally:
        if teller is not None:
            teller.cancel()
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
