"""The command `cacheinval` as a process, and what it said."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT = 60.0  # ten at once, on a machine that is busy with other things
LOG_TIMEOUT = 60.0


def environment(**settings: object) -> dict[str, str]:
    """This process's environment with these settings, and no other, in the names of `Settings`."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("CACHEINVAL_")}
    others["PYTHONUNBUFFERED"] = "1"  # what it prints is read while it runs
    return others | {f"CACHEINVAL_{name.upper()}": str(value) for name, value in settings.items()}


class Process:
    """One `cacheinval` command that runs, or another module; the log of `cacheinval` is JSON."""

    def __init__(
        self,
        folder: Path,
        *command: str,
        module: str = "cacheinval",
        cwd: Path | None = None,
        **settings: object,
    ) -> None:
        self._out, self._log = folder / "out", folder / "log"
        self._url = ""
        with self._out.open("wb") as out, self._log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module, *command],
                env=environment(log_format="json", **settings),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
            )

    @property
    def said(self) -> str:
        """All that it has written so far, on stdout and stderr."""
        return self._out.read_text() + self._log.read_text()

    @property
    def log(self) -> list[dict[str, Any]]:
        """Its log so far; a line that is none, or not complete yet, is left out."""
        lines = []
        for line in self._log.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return lines

    def logged(self, text: str) -> list[dict[str, Any]]:
        """The lines of its log that tell of the event `text`."""
        return [line for line in self.log if line["event"] == text]

    async def eventually_logged(self, text: str, **fields: object) -> dict[str, Any]:
        """The first line of its log that tells of the event `text` with these fields, as soon as there is one."""
        end = time.monotonic() + LOG_TIMEOUT
        while True:
            for line in self.logged(text):
                if line | fields == line:
                    return line
            assert time.monotonic() < end, f"no {text!r} {fields} after {LOG_TIMEOUT:g} s:\n{self.said}"
            await asyncio.sleep(0.01)

    @property
    def url(self) -> str:
        """Where it serves HTTP; empty until it has said so."""
        if not self._url:
            self._url = next((line["url"] for line in self.log if line.get("url", "").startswith("http")), "")
        return self._url

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self.popen.send_signal(number)

    async def ended(self, timeout: float) -> int:
        """Its exit code, once it has ended; fails if that takes longer than `timeout` seconds."""
        end = time.monotonic() + timeout
        while (code := self.popen.poll()) is None:
            assert time.monotonic() < end, f"still running after {timeout:g} s:\n{self.said}"
            await asyncio.sleep(0.01)
        return code

    def kill(self) -> None:
        """Ends it by force, if it has not ended."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(10)


class Started:
    """Starts processes, and asks them over HTTP."""

    def __init__(self, folder: Path, http: httpx.AsyncClient) -> None:
        self.http = http
        self.processes: list[Process] = []
        self._folder = folder

    def start(self, *command: str, **settings: object) -> Process:
        """Starts a command, and does not wait for anything."""
        folder = self._folder / str(len(self.processes))
        folder.mkdir()
        process = Process(folder, *command, **settings)
        self.processes.append(process)
        return process

    async def start_http(self, *command: str, **settings: object) -> Process:
        """Starts a command, and waits until it serves HTTP."""
        process = self.start(*command, **settings)
        end = time.monotonic() + START_TIMEOUT
        while not process.url:
            assert process.popen.poll() is None, process.said
            assert time.monotonic() < end, f"no HTTP after {START_TIMEOUT:g} s:\n{process.said}"
            await asyncio.sleep(0.02)
        return process

    async def get(self, process: Process, path: str) -> httpx.Response:
        """GET, from that process."""
        return await self.http.get(process.url + path)

    async def until(self, process: Process, status: str) -> None:
        """Waits until its `/readyz` says this."""
        end = time.monotonic() + START_TIMEOUT
        while (said := (await self.get(process, "/readyz")).json())["status"] != status:
            assert time.monotonic() < end, f"{said} after {START_TIMEOUT:g} s:\n{process.said}"
            await asyncio.sleep(0.02)

    async def put(self, process: Process, product_id: str, price: str) -> httpx.Response:
        """Makes or changes a product there."""
        body = {"name": "Kettle", "price": price}
        return await self.http.put(f"{process.url}/products/{product_id}", json=body)

    async def read(self, process: Process, product_id: str) -> tuple[str | None, str]:
        """The price that it gives for a product, and its `Cache-Status`."""
        answer = await self.get(process, f"/products/{product_id}")
        return answer.json().get("price"), answer.headers.get("cache-status", "")


async def run(*command: str, timeout: float = 60, **settings: object) -> tuple[int, str, str]:
    """Runs a command to its end: exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cacheinval", *command),
        env=environment(**settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout):
            out, err = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
