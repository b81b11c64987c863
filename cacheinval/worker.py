"""Running as a process: `serve`, `worker` and `relay`, from the first line of the log to the exit code."""

import asyncio
import logging
import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from cacheinval import logs, outbox
from cacheinval.client import Client
from cacheinval.errors import CacheinvalError, ConfigurationError, DatabaseError
from cacheinval.monitoring import Monitoring, Readiness
from cacheinval.outbox.pool import connect
from cacheinval.outbox.session import LOST
from cacheinval.page import Page
from cacheinval.products import (
    MemoryProductRepository,
    ProductCache,
    ProductRepository,
    ProductService,
)
from cacheinval.products import repository as products
from cacheinval.settings import Settings, refuse_memory

try:
    import uvicorn
except ImportError as error:
    raise ConfigurationError(
        "serve, worker and relay answer HTTP: `pip install 'cacheinval[http]'`"
    ) from error

__all__ = ["relay", "serve", "signals", "worker"]

log = logging.getLogger("cacheinval.worker")

SHUTDOWN_TIMEOUT = 9.5
HTTP_SHUTDOWN_TIMEOUT = 2
CANCEL_TIMEOUT = 1.0
CONNECT_TIMEOUT = 5.0
SCHEMA_TIMEOUT = 30.0  # others may be making it
BACKOFF_FIRST, BACKOFF_MOST = 0.2, 5.0

App = Callable[..., Awaitable[None]]


def serve(settings: Settings) -> int:
    """Runs the product service with its cache, over HTTP, until SIGTERM or SIGINT; returns the exit code.

    Raises:
        CacheinvalError: it could not start, or could not go on.
    """
    return _run(_serve, settings)


def worker(settings: Settings) -> int:
    """Keeps the cache of `CACHE_URL` honest until SIGTERM or SIGINT; returns the exit code.

    Raises:
        CacheinvalError: it could not start, or could not go on.
    """
    return _run(_worker, settings)


def relay(settings: Settings) -> int:
    """Publishes what is left in the outbox until SIGTERM or SIGINT; returns the exit code.

    Raises:
        ConfigurationError: there is no database, or no broker outside this process.
        CacheinvalError: it could not start, or could not go on.
    """
    if not settings.database_url:
        raise ConfigurationError(
            "CACHEINVAL_DATABASE_URL=: accepted: postgresql://… (the outbox is in a database)"
        )
    refuse_memory(settings)
    return _run(_relay, settings)


def _run(process: Callable[[Settings, asyncio.Event], Coroutine[Any, Any, None]], settings: Settings) -> int:
    logs.configure(settings.log_level, settings.log_format)

    async def until_signalled() -> None:
        with signals() as stop:
            await process(settings, stop)
            logs.event(log, logging.INFO, "stopped")

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(until_signalled())
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


@contextmanager
def signals() -> Iterator[asyncio.Event]:
    """An event that the first SIGTERM or SIGINT sets; a second one, or a shutdown that hangs, ends the process at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def begin_to_stop(name: str) -> None:
        logs.event(log, logging.INFO, "stopping", signal=name)
        stop.set()
        loop.call_later(SHUTDOWN_TIMEOUT, give_up)

    def give_up() -> None:
        logs.event(log, logging.ERROR, "stopping took too long", seconds=SHUTDOWN_TIMEOUT)
        os._exit(1)

    def on_signal(number: int, _: object) -> None:
        # Not the loop's own handlers: these run also while something keeps the loop busy.
        if stopping:
            os._exit(128 + number)
        stopping.append(number)
        loop.call_soon_threadsafe(begin_to_stop, signal.Signals(number).name)

    stopping: list[int] = []
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _serve(settings: Settings, stop: asyncio.Event) -> None:
    try:
        from cacheinval.products.http import create_app
    except ImportError as error:
        raise CacheinvalError(f"serve needs {error.name}: pip install 'cacheinval[http]'") from None
    listener = _listen(settings.http_host, settings.http_port)
    client = Client(settings)
    repository = ProductRepository(client) if settings.database_url else MemoryProductRepository(client)
    preparation = _Preparation(settings.database_url)
    monitoring = Monitoring(client, partial(preparation.readiness, client), _page(client))
    app = create_app(
        ProductCache(client.cache, repository), ProductService(repository), monitoring, monitoring.paths
    )
    async with _http(app, listener, monitoring) as http, _background(preparation.run()) as preparing:
        logs.event(log, logging.INFO, "serving", url=_url(listener), instance=settings.instance_id)
        await _first_of(stop, preparation.tried)  # the relay complains where its table is missing
        async with client:
            await _until(stop, http.task, preparing)
            await http.stop()  # before the client, which its answers need


async def _worker(settings: Settings, stop: asyncio.Event) -> None:
    if settings.broker_url.startswith("memory:"):
        logs.event(log, logging.WARNING, "memory:// brings nothing from other processes", broker="memory://")
    if settings.cache_url.startswith("memory:"):
        line = "nobody reads what a worker keeps in its own memory: set CACHEINVAL_CACHE_URL"
        logs.event(log, logging.WARNING, line, cache="memory://")
    listener = _listen_if_possible(settings)
    client = Client(settings)
    monitoring = Monitoring(client, partial(_readiness_of_worker, client), _page(client))
    async with client, _http(monitoring, listener, monitoring) as http:
        logs.event(log, logging.INFO, "working", url=_url(listener), instance=settings.instance_id)
        await _until(stop, http.task)


async def _relay(settings: Settings, stop: asyncio.Event) -> None:
    listener = _listen_if_possible(settings)
    client = Client(settings.model_copy(update={"relay": "auto"}), subscribe=False)
    monitoring = Monitoring(client, partial(_readiness_of_relay, client), _page(client))
    async with client, _http(monitoring, listener, monitoring) as http:
        logs.event(log, logging.INFO, "relaying", url=_url(listener), instance=settings.instance_id)
        await _until(stop, http.task)


def _page(client: Client) -> Page | None:
    return Page(client.outlook) if client.settings.page == "on" else None


class _Preparation:
    """Makes what is missing in the database, however long it takes the database to come.

    Args:
        database_url: empty where there is nothing to make.
    """

    def __init__(self, database_url: str) -> None:
        self.pending: str | None = "the database has not answered yet" if database_url else None
        self._database_url = database_url
        self.tried = asyncio.Event()
        """The first attempt has ended, whether it succeeded or not."""

    async def run(self) -> None:
        """Tries until it has succeeded; logs each reason why reads cannot be answered yet once."""
        try:
            await self._try_until_done()
        finally:
            self.tried.set()

    async def _try_until_done(self) -> None:
        pause, told = BACKOFF_FIRST, None
        while self.pending is not None:
            try:
                await self._apply()
            except (DatabaseError, *LOST) as error:
                self.pending = str(error) or "no answer in time"
                if self.pending != told:
                    told = self.pending
                    logs.event(log, logging.WARNING, "the database is not ready, retrying", reason=told)
                self.tried.set()
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, BACKOFF_MOST)
            else:
                self.pending = None

    async def _apply(self) -> None:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            connection = await connect(self._database_url, timeout=CONNECT_TIMEOUT)
        # Ended from outside, since a rollback, too, would wait for a server that has stopped answering.
        deadline = asyncio.get_running_loop().call_later(SCHEMA_TIMEOUT, connection.terminate)
        try:
            await outbox.apply_schema(connection)
            await products.apply_schema(connection)
        finally:
            deadline.cancel()
            connection.terminate()

    def readiness(self, client: Client) -> Readiness:
        """Reads go to the database while the broker is down: its outage must not become the service's."""
        if self.pending is not None:
            return Readiness(False, "starting", self.pending)
        if client.state != "ready":
            return Readiness(True, "degraded", client.status()["reason"])
        return Readiness(True, "ready")


def _readiness_of_worker(client: Client) -> Readiness:
    if client.state != "ready":
        return Readiness(False, client.state, client.status()["reason"])
    return Readiness(True, "ready")


def _readiness_of_relay(client: Client) -> Readiness:
    state = client.status()["relay"]
    if state["state"] in ("leader", "standby"):
        return Readiness(True, "ready")
    return Readiness(False, state["state"], state["reason"])


async def _first_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


async def _until(stop: asyncio.Event, *tasks: "asyncio.Task[None]") -> None:
    """Returns when `stop` is set; raises what one of the tasks raises before that."""
    stopping = asyncio.create_task(stop.wait())
    waiting: set[asyncio.Task[Any]] = {stopping, *tasks}
    try:
        while not stopping.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        stopping.cancel()


@asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_TIMEOUT)


# HTTP


class _Http(uvicorn.Server):
    """uvicorn in a task of its own, and without signal handlers of its own."""

    def __init__(self, app: App, listener: socket.socket, monitoring: Monitoring) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=HTTP_SHUTDOWN_TIMEOUT,
            )
        )
        self._monitoring = monitoring
        self.task = asyncio.create_task(self.serve([listener]))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See `uvicorn.Server`."""
        yield

    async def stop(self) -> None:
        """Takes no more requests, and answers those under way if that does not take long."""
        self.should_exit = True
        await self._monitoring.close()  # else it would wait for those who look
        await asyncio.wait({self.task}, timeout=HTTP_SHUTDOWN_TIMEOUT + 1)
        self.task.cancel()


@asynccontextmanager
async def _http(app: App, listener: socket.socket, monitoring: Monitoring) -> AsyncIterator[_Http]:
    http = _Http(app, listener, monitoring)
    try:
        yield http
    finally:
        await http.stop()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise CacheinvalError(
            f"cannot listen on CACHEINVAL_HTTP_HOST={host}, CACHEINVAL_HTTP_PORT={port}: {error.strerror}"
        ) from None


def _listen_if_possible(settings: Settings) -> socket.socket:
    """For health and metrics alone: another port will do, and is in the log."""
    port = settings.http_port if "http_port" in settings.model_fields_set else 0
    try:
        return _listen(settings.http_host, port)
    except CacheinvalError as error:
        logs.event(log, logging.WARNING, "listening on another port", reason=error)
        return _listen(settings.http_host, 0)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
