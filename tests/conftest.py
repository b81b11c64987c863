"""Fixtures for all tests: private servers, each started when the first test asks for it."""

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import asyncpg
import pytest
from simulation.reporting import PROPERTY, lines
from waiting import Eventually, until

from cacheinval.sandbox import Memcached, Postgres, RabbitMQ, Redis, Sandbox

_T = TypeVar("_T")
_numbers = itertools.count(1)


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run it in an event loop and thread of its own, whatever loop the test that asks is going to use."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, work).result(timeout=120)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the simulation saw: here, since pytest reads no other conftest where tests run in several processes."""
    passed = terminalreporter.stats.get("passed", ())
    seen = [value for report in passed for name, value in report.user_properties if name == PROPERTY]
    if seen:
        terminalreporter.section("simulation")
        for line in lines(seen, full=terminalreporter.verbosity >= 0):
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """What a test configures, for example by running a command in this process, is undone."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, ("cacheinval", "aio_pika", "aiormq", "aiocache"))]
    handlers, levels = root.handlers[:], [logger.level for logger in loggers]
    yield
    root.handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """The session's sandbox, with nothing started: the fixtures below start what they hand out."""
    sandbox = Sandbox((), tls=True)
    _run(sandbox.open())
    try:
        yield sandbox
    finally:
        _run(sandbox.close())


@pytest.fixture(scope="session")
def rabbitmq(sandbox: Sandbox) -> RabbitMQ:
    """The shared RabbitMQ, with a TLS listener. A test that stops or kills a broker takes `own_rabbitmq`."""
    _run(sandbox.start("rabbitmq"))
    return sandbox.rabbitmq


@pytest.fixture(scope="session")
def postgres(sandbox: Sandbox) -> Postgres:
    """The shared Postgres; take `database_url` for a database of your own."""
    _run(sandbox.start("postgres"))
    return sandbox.postgres


@pytest.fixture(scope="session")
def redis(sandbox: Sandbox) -> Redis:
    """The shared Redis."""
    _run(sandbox.start("redis"))
    return sandbox.redis


@pytest.fixture(scope="session")
def memcached(sandbox: Sandbox) -> Memcached:
    """The shared Memcached."""
    _run(sandbox.start("memcached"))
    return sandbox.memcached


@pytest.fixture(scope="module")
def _own_rabbitmq() -> Iterator[RabbitMQ]:
    sandbox = Sandbox(("rabbitmq",))
    _run(sandbox.open())
    try:
        yield sandbox.rabbitmq
    finally:
        _run(sandbox.close())


@pytest.fixture
def own_rabbitmq(_own_rabbitmq: RabbitMQ) -> RabbitMQ:
    """A RabbitMQ of this module's own, to kill, stop and pause; it runs at the start of each test."""
    _own_rabbitmq.resume()
    if not _own_rabbitmq.running:
        _run(_own_rabbitmq.start())
    return _own_rabbitmq


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    """A Redis of this test's own, to kill, stop and pause."""
    sandbox = Sandbox(("redis",))
    _run(sandbox.open())
    try:
        yield sandbox.redis
    finally:
        _run(sandbox.close())


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A Postgres of this test's own, to kill, stop and pause."""
    sandbox = Sandbox(("postgres",))
    _run(sandbox.open())
    try:
        yield sandbox.postgres
    finally:
        _run(sandbox.close())


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"t{os.getpid():x}n{next(_numbers)}"


@pytest.fixture
async def database_url(postgres: Postgres) -> AsyncIterator[str]:
    """The address of a new, empty database, dropped after the test with whatever is connected to it."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    await _administer(postgres, f"CREATE DATABASE {name}")
    try:
        yield postgres.url.rsplit("/", 1)[0] + f"/{name}"
    finally:
        await _administer(postgres, f"DROP DATABASE {name} WITH (FORCE)")


async def _administer(postgres: Postgres, statement: str) -> None:
    async with asyncio.timeout(20):
        connection = await asyncpg.connect(postgres.url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@pytest.fixture
def eventually() -> Eventually:
    """Wait for a state: `await eventually(lambda: cache.size == 0)`.

    The predicate, a function or coroutine function, is called until what it returns is true, and that is returned. A
    predicate that raises AssertionError is not true yet. After `timeout` seconds the test fails with what it saw last.
    """
    return until
