"""One `cacheinval serve` as a process of its own, and what its log and its HTTP say."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cacheinval.demo.waiting import until
from cacheinval.errors import CacheinvalError
from cacheinval.sandbox.processes import LOOPBACK, Guard

__all__ = ["Process"]

START_PATIENCE = 30.0
STOP_PATIENCE = 12.0  # it promises to be gone within 10 s
HTTP_TIMEOUT = 10.0


class Process:
    """A product service with its cache, in a process and session of its own.

    Args:
        name: its instance id.
        folder: where its log goes, as `<name>.log`.
        environment: CACHEINVAL_… variables; it gets no others from the environment of this process.
        guard: ends it if this process dies.
    """

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str], guard: Guard) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.port = 0
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.upper().startswith("CACHEINVAL_")},
            **environment,
            "CACHEINVAL_INSTANCE_ID": name,
            "CACHEINVAL_HTTP_HOST": LOOPBACK,
            "CACHEINVAL_HTTP_PORT": "0",
            "CACHEINVAL_LOG_LEVEL": "INFO",
            "CACHEINVAL_LOG_FORMAT": "json",
        }
        self._guard = guard
        self._process: subprocess.Popen[bytes] | None = None
        self._events: list[dict[str, Any]] = []
        self._read = 0

    async def start(self) -> None:
        """Starts it; returns when it is ready, its subscription included.

        Raises:
            CacheinvalError: it ended, or was not ready in time; with the end of its log.
        """
        self._process = self._spawn()
        try:
            await until(self._is_ready, f"{self.name} is ready", START_PATIENCE)
        except CacheinvalError as error:
            last = self.log.read_text(errors="replace").splitlines()[-5:]
            raise CacheinvalError("\n".join([f"{error}; its log ends so:", *last])) from None

    async def stop(self) -> None:
        """Ends it by SIGTERM, and by SIGKILL where that takes too long."""
        process, self._process = self._process, None
        if process is None:
            return

        async def ended() -> bool:
            return process.poll() is not None

        try:
            process.terminate()
            with suppress(CacheinvalError):
                await until(ended, f"{self.name} has ended", STOP_PATIENCE)
        finally:
            process.kill()
            process.wait()
            self._guard.forget(process.pid)

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        """The JSON that it answers with.

        Raises:
            CacheinvalError: it answers with an error, or not in time.
        """
        content = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{method} {path} HTTP/1.1",
            f"Host: {LOOPBACK}",
            "Connection: close",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
        ]
        try:
            async with asyncio.timeout(HTTP_TIMEOUT):
                reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
                try:
                    writer.write("\r\n".join([*head, "", ""]).encode() + content)
                    answer_head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
                finally:
                    writer.close()
            status, said = answer_head[9:12], json.loads(answer)
        except (OSError, TimeoutError, ValueError) as error:
            reason = str(error) or "no answer in time"
            raise CacheinvalError(f"{self.name}: {method} {path}: {reason}") from error
        if not status.startswith(b"2"):
            raise CacheinvalError(f"{self.name}: {method} {path}: {status.decode()}: {said}")
        return said

    def events(self) -> list[dict[str, Any]]:
        """What its log says so far, a dictionary for each line."""
        with self.log.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._read += len(complete)
        self._events += [json.loads(line) for line in complete.splitlines() if line.startswith(b"{")]
        return self._events

    async def trusts(self) -> bool:
        """Whether it answers, and what it has cached can be relied on."""
        try:
            status = await self.ask("GET", "/status")
        except CacheinvalError:
            return False
        return bool(status["ready"]) and status["state"] == "ready"

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cacheinval", "serve"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for this process, which ends the others in their turn
            )
        self._guard.watch(process.pid)
        return process

    async def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise CacheinvalError(f"{self.name} ended while it started")
        if not self.port:
            urls = [event["url"] for event in self.events() if event["event"] == "serving"]
            self.port = urlsplit(urls[0]).port or 0 if urls else 0
        return self.port > 0 and await self.trusts()
