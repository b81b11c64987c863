"""Imports, the command line, and processes from their start until they are ready, and from SIGTERM until they are gone."""

import asyncio
import compileall
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Self
from urllib.error import HTTPError
from urllib.request import urlopen

import cacheinval
from cacheinval.sandbox import Sandbox

from .measuring import Figures, take_turns
from .reporting import Report

PATIENCE = 30.0  # seconds that a process has to become ready, or to end
POLL = 0.002  # seconds between two looks

CLIENT = "from cacheinval import Client, Settings"
DEPENDENCIES = "what these two rest on, by itself"
IMPORTED_BY_CLIENT = "import asyncio, aio_pika, aiocache, asyncpg, cachebox, msgspec, pydantic_settings"
IMPORTS = {
    "python -c pass": "pass",
    "import asyncio": "import asyncio",
    "import cacheinval": "import cacheinval",
    CLIENT: CLIENT,
    DEPENDENCIES: IMPORTED_BY_CLIENT,
    "import aio_pika": "import aio_pika",
    "import aiocache": "import aiocache",
    "import cashews": "import cashews",
    "import pydantic_settings": "import pydantic_settings",
    "import faststream.rabbit": "import faststream.rabbit",
}
COMMANDS = {
    "cacheinval --help": ("cacheinval", "--help"),
    "faststream --help": ("faststream", "--help"),
}

CONSUMER = """
import asyncio, sys
import aio_pika
async def main():
    connection = await aio_pika.connect(sys.argv[1])
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=500)
    exchange = await channel.declare_exchange("aio-pika", "fanout")
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange)
    await queue.consume(lambda message: message.ack())
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
FASTSTREAM = """
import asyncio, sys
from faststream import FastStream
from faststream.rabbit import ExchangeType, RabbitBroker, RabbitExchange, RabbitQueue
broker = RabbitBroker(sys.argv[1], logger=None)
app = FastStream(broker, logger=None)
@broker.subscriber(RabbitQueue("", exclusive=True), RabbitExchange("faststream", type=ExchangeType.FANOUT))
async def evict(body: bytes) -> None: ...
@app.after_startup
async def ready() -> None:
    print("ready", flush=True)
asyncio.run(app.run())
"""
PEERS = {"a consumer with aio-pika": CONSUMER, "the same with FastStream": FASTSTREAM}


async def run(report: Report, rounds: int) -> None:
    # As an installed package has its byte code; a work tree need not.
    compileall.compile_dir(Path(cacheinval.__file__).parent, quiet=2)
    with report.part("imports"):
        await _import(report, rounds)
    sandbox = Sandbox(("rabbitmq", "postgres", "redis"))
    # By a loop of asyncio: uvloop's starts no process as another user, which Postgres has to be.
    await asyncio.to_thread(asyncio.run, sandbox.open())
    try:
        with report.part("processes"):
            await _start(report, rounds, sandbox)
    finally:
        await asyncio.to_thread(asyncio.run, sandbox.close())


async def _import(report: Report, rounds: int) -> None:
    programs = {what: ("-c", code) for what, code in IMPORTS.items()}
    programs |= {what: ("-m", *command) for what, command in COMMANDS.items()}
    found = await take_turns(
        {what: partial(_run_to_end, *program) for what, program in programs.items()}, rounds, report.progress
    )
    python, whole = found["python -c pass"]["took"], {what: each["took"] for what, each in found.items()}
    report.table(
        "A process from its start to its end",
        ["ms", "more than python alone, ms"],
        {what: [took, None if what == "python -c pass" else took - python] for what, took in whole.items()},
    )
    report.at_most("import cacheinval", whole["import cacheinval"], 250, "ms")
    report.at_most("cacheinval --help", whole["cacheinval --help"], 400, "ms")
    beside = (whole[CLIENT] - python) / (whole[DEPENDENCIES] - python)
    report.at_most("importing Client and Settings, beside what they rest on", beside, 1.5)


async def _run_to_end(*program: str, **settings: str) -> dict[str, float]:
    environment = _environment(settings)
    began = time.perf_counter()
    ended = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True)
    took = time.perf_counter() - began
    if ended.returncode != 0 or (program[0] == "-m" and not ended.stdout):
        raise AssertionError(f"{program}: exit code {ended.returncode}, {ended.stderr[-500:]}")
    return {"took": took * 1e3}


async def _start(report: Report, rounds: int, sandbox: Sandbox) -> None:
    servers = sandbox.environment()
    await _run_to_end("-m", "cacheinval", "schema", "apply", **servers)
    memory = {**servers, "CACHEINVAL_CACHE_URL": "memory://"}
    fast = {"CACHEINVAL_MAX_STALENESS": "5"}
    variants = {
        "cacheinval worker, a cache in Redis": partial(_until_ready, "worker", servers),
        "the same with MAX_STALENESS": partial(_until_ready, "worker", {**servers, **fast}),
        "cacheinval relay": partial(_until_ready, "relay", memory),
        "cacheinval serve": partial(_until_ready, "serve", memory),
        **{name: partial(_until_printed, code, sandbox.rabbitmq.url) for name, code in PEERS.items()},
    }
    found = await take_turns(variants, rounds, report.progress)
    report.table(
        "A process with its servers up",
        ["from start until ready, ms", "from SIGTERM until gone, ms"],
        {what: [each["ready"], each["gone"]] for what, each in found.items()},
        "Ready: `/readyz` answers 200, `ready`; a peer says so itself as soon as it consumes.",
    )
    _targets(report, found)


def _targets(report: Report, found: Figures) -> None:
    worker = found["cacheinval worker, a cache in Redis"]
    report.at_most("a worker until it is ready", worker["ready"], 1000, "ms")
    report.at_most("a worker until it is gone", worker["gone"], 1000, "ms")


async def _until_ready(command: str, settings: Mapping[str, str]) -> dict[str, float]:
    """`instance_id` is a new one each time, and so is a queue that lives as long as the cache."""
    here = {"CACHEINVAL_INSTANCE_ID": f"bench-{token_hex(4)}", "CACHEINVAL_HTTP_PORT": "0"}
    with _Started("-m", "cacheinval", command, **settings, **here) as process:
        await process.until(lambda: _is_ready(process.said))
        return process.end(accepted=(0,))


async def _until_printed(code: str, url: str) -> dict[str, float]:
    with _Started("-c", code, url) as process:
        await process.until(lambda: "ready" in process.said)
        return process.end(accepted=(0, -signal.SIGTERM))


def _is_ready(said: str) -> bool:
    url = re.search(r"http://[0-9.:]+", said)
    if url is None:
        return False
    try:
        with urlopen(f"{url[0]}/readyz", timeout=1) as answer:
            return bool(json.load(answer)["status"] == "ready")
    except HTTPError:  # 503
        return False


class _Started:
    """A Python process, and what it says; killed if it is still there in the end."""

    def __init__(self, *program: str, **settings: str) -> None:
        descriptor, self._log = tempfile.mkstemp()
        self._program = program
        self._began = time.perf_counter()
        with open(descriptor, "wb") as out:
            self._popen = subprocess.Popen(
                [sys.executable, *program], env=_environment(settings), stdout=out, stderr=out
            )
        self._ready = 0.0

    @property
    def said(self) -> str:
        return Path(self._log).read_text()

    async def until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            if self._popen.poll() is not None or time.perf_counter() - self._began > PATIENCE:
                raise AssertionError(
                    f"{self._program}: not ready; exit code {self._popen.poll()}\n{self.said}"
                )
            await asyncio.sleep(POLL)
        self._ready = time.perf_counter() - self._began

    def end(self, accepted: Collection[int]) -> dict[str, float]:
        """Ends it by SIGTERM; what it took to start and to end, in ms."""
        began = time.perf_counter()
        self._popen.terminate()
        while (code := self._popen.poll()) is None:  # `wait` with a time limit looks every 50 ms
            if time.perf_counter() - began > PATIENCE:
                raise AssertionError(f"{self._program}: still there\n{self.said}")
            time.sleep(POLL)
        gone = time.perf_counter() - began
        if code not in accepted:
            raise AssertionError(f"{self._program}: exit code {code}\n{self.said}")
        return {"ready": self._ready * 1e3, "gone": gone * 1e3}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        os.unlink(self._log)


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("CACHEINVAL_")}
    return others | settings
