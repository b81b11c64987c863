"""Readers and writers at work while something is broken, and a history of what they saw.

A plugin of the test modules beside it, as `scene` is: PYTEST_DONT_REWRITE
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import pytest
from actors import FRESH, KEYS, Observed, Writer, make_stock
from history import Checked, History, Promised, Read, State, from_wall, now
from scene import EVENTUAL, OUTBOX, Clients, Program, Programs
from waiting import until

from cacheinval import Client


@pytest.fixture
async def stock(database_url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection to the test's database, which has the schema and a table of versions."""
    connection = await asyncpg.connect(database_url, timeout=30, command_timeout=30)
    try:
        await make_stock(connection)
        yield connection
    finally:
        connection.terminate()


UNFINISHED = "SELECT count(*) FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()"


class Work:
    """Everybody who reads and writes in one test, and the history of it.

    Args:
        truth: a connection to the database behind it all, which no fault concerns.
    """

    def __init__(
        self,
        clients: Clients,
        programs: Programs,
        folder: Path,
        truth: "asyncpg.Connection[asyncpg.Record]",
        settings: dict[str, Any],
        keys: Sequence[str] = KEYS,
    ) -> None:
        self.history = History()
        self.settings = settings
        self.truth = truth
        self.keys = keys
        self.instances: dict[str, Observed | Program] = {}
        self.settled: Promised | None = None
        self._clients = clients
        self._programs = programs
        self._folder = folder
        self._notes: dict[str, Path] = {}
        self._tasks: list[asyncio.Task[None]] = []

    # Who takes part

    async def reader(self, name: str, **settings: Any) -> Observed:
        """An instance in this process, ready, that reads from now on."""
        observed = self.observe(name, await self._clients(**self.settings | settings))
        await observed.client.wait_ready(EVENTUAL)
        return observed

    def observe(self, name: str, client: Client) -> Observed:
        """The same with a client that is there already, ready or not."""
        observed = self.instances[name] = Observed(name, client, self.history, self.keys)
        self.start(observed.keep_telling())
        self.start(observed.keep_reading())
        return observed

    async def process(self, name: str, *, blocked: float = 2.0, **settings: Any) -> Program:
        """An instance in a process of its own that reads from now on; ready when this returns."""
        notes = self._notes[name] = self._folder / f"{name}.jsonl"
        notes.touch()
        program = self._programs(
            str(Path(__file__).with_name("reader.py")),
            name,
            str(notes),
            str(blocked),
            *self.keys,
            **{"relay": "off", **self.settings, **settings},
        )
        self.instances[name] = program
        await until(lambda: self.state(name) is not None and self.state(name).ready, EVENTUAL)
        return program

    async def writer(self, name: str = "writer", **settings: Any) -> Writer:
        """A client in this process that only writes; nothing is written yet."""
        client = await self._clients(subscribe=False, **self.settings | settings)
        return Writer(name, client, self.history, self.keys)

    async def relay(self, **settings: Any) -> Client:
        """A client in this process that only relays, and leads when this returns."""
        client = await self._clients(subscribe=False, relay="auto", **self.settings | settings)
        await until(lambda: client.relay is not None and client.relay.leads, EVENTUAL)
        return client

    def start(self, work: Any) -> "asyncio.Task[None]":
        """Something that goes on until the end."""
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    @asynccontextmanager
    async def writing(self, *writers: Writer, **options: Any) -> AsyncIterator[None]:
        """Within this block all of `writers` write."""
        tasks = [asyncio.create_task(writer.keep_writing(**options)) for writer in writers]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            assert isinstance(result, asyncio.CancelledError), repr(result)

    # What they say, and saw

    def look(self) -> None:
        """Takes in what processes have noted."""
        for notes in self._notes.values():
            self.history.follow(notes)

    def state(self, name: str) -> State | None:
        """What an instance said of itself last."""
        self.look()
        return self.history.latest.get(name)

    def says(self, name: str) -> State:
        """The same, of one that has said something."""
        state = self.state(name)
        assert state is not None, f"{name} has said nothing"
        return state

    def reads(self, name: str, since: float) -> list[Read]:
        """The reads of an instance that began after `since`."""
        self.look()
        return [read for read in self.history.reads if read.instance == name and read.begun > since]

    async def sees(self, name: str, outcome: str, since: float, timeout: float = EVENTUAL) -> None:
        """Waits until an instance has read with this outcome."""
        await until(lambda: any(read.outcome == outcome for read in self.reads(name, since)), timeout)

    async def settle(self, *names: str, timeout: float = EVENTUAL) -> Promised:
        """Waits until all is quiet and every key is a hit again at each of these instances (at all of them if none).

        Nobody may be writing any more.
        """
        who = names or tuple(self.instances)
        # A writer that has given up may have left a transaction behind that is still to commit.
        await until(lambda: self.truth.fetchval(f"SELECT ({UNFINISHED}) = 0 AND ({OUTBOX}) = 0"), timeout)
        last = from_wall(await self.truth.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8"))

        def is_quiet(name: str) -> bool:
            state = self.says(name)
            return state.ready and (state.watermark or 0.0) > last

        for name in who:
            await until(
                lambda name=name: is_quiet(name), timeout, describe=lambda name=name: self.state(name)
            )
        settled_at = now()
        rows = await self.truth.fetch("SELECT id, version FROM stock")
        truth = {row["id"]: row["version"] for row in rows if row["id"] in self.keys}
        promised = Promised(self.settings.get("max_staleness"), settled_at, truth, who)
        await until(
            lambda: (
                {(read.instance, read.key) for read in self._settled_hits(settled_at)}
                >= {(name, key) for name in who for key in truth}
            ),
            timeout,
        )
        return promised

    def _settled_hits(self, since: float) -> list[Read]:
        self.look()
        return [read for read in self.history.reads if read.begun > since and read.outcome == "hit"]

    async def check(self, *names: str, timeout: float = EVENTUAL) -> Checked:
        """Settles, and holds the whole history against what is promised; it is kept where that fails."""
        try:
            promised = await self.settle(*names, timeout=timeout)
            checked = self.history.check(promised)
            assert not checked.breaches, "\n".join(
                [f"{len(checked.breaches)} breaches", *checked.breaches[:20]]
            )
            assert checked.hits > 0
            assert checked.writes > 0
        except BaseException:
            print(f"the history is kept: {self.history.keep(self._folder / 'history.jsonl')}")
            raise
        self.settled = promised
        return checked

    async def close(self) -> None:
        """Ends what was started here."""
        unfinished = set(self._tasks)
        # Once may not be enough: asyncio.wait_for of Python 3.11, which the libraries use, can swallow a cancellation.
        for _ in range(30):
            for task in unfinished:
                task.cancel()
            if unfinished:
                _, unfinished = await asyncio.wait(unfinished, timeout=1)
        assert not unfinished, unfinished
        failures = [task.exception() for task in self._tasks if not task.cancelled() and task.exception()]
        assert not failures, failures


class Working(Protocol):
    """The fixture `working`: begins the work of a test; keyword arguments are settings of everybody."""

    def __call__(
        self, truth: "asyncpg.Connection[asyncpg.Record]", *, keys: Sequence[str] = KEYS, **settings: Any
    ) -> Work: ...


@pytest.fixture
async def working(clients: Clients, programs: Programs, tmp_path: Path) -> AsyncIterator[Working]:
    """Makes a `Work`, which ends with the test, before its clients do."""
    async with AsyncExitStack() as stack:

        def begin(
            truth: "asyncpg.Connection[asyncpg.Record]", *, keys: Sequence[str] = KEYS, **settings: Any
        ) -> Work:
            work = Work(clients, programs, tmp_path, truth, {**FRESH, **settings}, keys)
            stack.push_async_callback(work.close)
            return work

        yield begin
