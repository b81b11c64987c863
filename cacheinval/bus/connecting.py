"""Where the broker is, how it is reached and left, and what its errors mean in one line."""

import asyncio
import logging
import random
import re
import ssl
import time
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from aio_pika.connection import make_url
from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity
from yarl import URL

from cacheinval.bus.wire import Arrive, Connection
from cacheinval.errors import ConfigurationError
from cacheinval.settings import Settings, addresses, mask_url

# Without a logging configuration Python prints warnings of any library on stderr, and aiormq warns of each call that is cut
# short by leaving. Where logging is configured nothing changes.
for _library in ("aiormq", "aio_pika"):
    logging.getLogger(_library).addHandler(logging.NullHandler())

__all__ = [
    "ANSWER_WITHIN",
    "LEAVE_WITHIN",
    "Broker",
    "Counts",
    "explain",
    "is_away",
    "is_blocked",
    "place",
    "within",
]

HEARTBEAT = 5  # seconds; aiormq gives a silent connection up after 3 x (heartbeat + 1)
CONNECT_WITHIN = 10.0  # seconds for TCP, TLS and the AMQP handshake together
CONNECT_TO_EACH_WITHIN = 5.0  # the same where there are other nodes to turn to
AVOID_FOR = 30.0  # seconds for which a node that could not be reached is tried after the others
ANSWER_WITHIN = 5.0  # seconds for one answer of a broker that is connected
LEAVE_WITHIN = 2.0  # seconds that closing something may hold anybody up

SILENT = "no sign of life from the broker"

T = TypeVar("T")


async def within(seconds: float, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled and left to itself after `seconds`.

    Unlike `asyncio.timeout` this returns in time also where `work` does not end when it is cancelled: an aiormq
    call that is cancelled first waits for room to write, which a dead connection never has.

    Raises:
        TimeoutError: it took longer.
        ConnectionError: aiormq cancelled it, as it does with calls on a connection that it found dead.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        finished = task.done()
        if not finished:
            task.cancel()
        task.add_done_callback(_retrieve)
    if not finished:
        raise TimeoutError(f"no answer from the broker within {seconds:g} s")
    if task.cancelled():
        raise ConnectionError(SILENT)
    return task.result()


def _retrieve(task: "asyncio.Future[Any]") -> None:
    """Asyncio complains about exceptions that nobody looked at; of what was given up, nobody does."""
    if not task.cancelled():
        task.exception()


def explain(error: BaseException | None) -> str:
    """What went wrong, in the words of the broker or the system, on one line."""
    if error is None:
        return "closed"
    if isinstance(
        error, asyncio.CancelledError
    ):  # what aiormq closes a connection with after missed heartbeats
        return SILENT
    words = [str(word) for word in error.args if word not in (None, "")]
    text = words[-1] if isinstance(error, AMQPError) and words else str(error)
    if "Connection.OpenOk" in text:  # what aiormq expected, where the broker said why in what it got instead
        return "the broker refuses the vhost: it is missing, or this user may not use it"
    text = re.sub(r"\s+", " ", re.sub(r"^\[Errno -?\d+\] ", "", text)).strip()
    return mask_url(text) if "://" in text else text or type(error).__name__


@dataclass(slots=True)
class Counts:
    """What one bus has done since it was made."""

    sessions: int = 0  # subscriptions that stood
    deliveries: int = 0
    rejected: int = 0  # not understood: dead-lettered, or left in the stream
    confirmed: int = 0
    unrouted: int = 0  # confirmed, while nobody was there to receive it


class Broker:
    """How to reach the broker, and the names of what is used there (PROTOCOL.md, "RabbitMQ").

    Raises:
        ConfigurationError: a file of `broker_ca_file`, `broker_cert_file` or `broker_key_file` cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.url = mask_url(settings.broker_url)
        self.exchange = f"cacheinval.{settings.namespace}"
        self.dead_letters = f"{self.exchange}.dead"
        self.stream = f"{self.exchange}.stream"
        self._name = f"cacheinval {settings.namespace} {settings.instance_id}"
        if settings.broker_url.startswith("amqps:") and settings.broker_ca_file is not None:
            _check_ca_file(settings.broker_ca_file)
        if settings.broker_url.startswith("amqps:") and settings.broker_cert_file is not None:
            _check_certificate(settings.broker_cert_file, settings.broker_key_file)
        self._nodes = [_complete(make_url(url), settings) for url in addresses(settings.broker_url)]
        self._failed_at: dict[URL, float] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def connect(
        self, purpose: str, arrive: Arrive | None = None, *, offsets: bool = False
    ) -> Connection:
        """A new connection; `purpose` tells it from others in the broker's list, the others are as in `Wire`.

        Of a cluster it is with any node. A different one each time: what is wrong with a node may be that it accepts
        connections, and hears nothing of what is published at the others.

        Raises:
            TimeoutError, OSError, AMQPError: there is none to be had.
        """
        seconds = CONNECT_WITHIN if len(self._nodes) == 1 else CONNECT_TO_EACH_WITHIN
        errors: dict[URL, Exception] = {}
        for node in self._in_order():
            try:
                connection = await self._connect_to(node, seconds, purpose, arrive, offsets=offsets)
            except Exception as error:
                errors[node] = error
                self._failed_at[node] = time.monotonic()
            else:
                self._failed_at.pop(node, None)
                return connection
        if len(errors) == 1:
            raise errors.popitem()[1]
        # In the order of the settings, so that what happens again is told in the same words.
        told = [f"{place(node)}: {explain(errors[node])}" for node in self._nodes if node in errors]
        raise ConnectionError("; ".join(told))

    async def unreachable(self, purpose: str) -> dict[str, str]:
        """Which nodes of a cluster there is no connection to, by host and port, and why."""

        async def look(node: URL) -> str | None:
            try:
                self.discard(await self._connect_to(node, CONNECT_TO_EACH_WITHIN, purpose))
            except Exception as error:
                return explain(error)
            return None

        nodes = self._nodes if len(self._nodes) > 1 else []
        reasons = await asyncio.gather(*map(look, nodes))
        return {
            place(node): reason for node, reason in zip(nodes, reasons, strict=True) if reason is not None
        }

    def _in_order(self) -> list[URL]:
        """All nodes in random order, behind the others those that could not be reached lately."""
        lately = time.monotonic() - AVOID_FOR
        shuffled = random.sample(self._nodes, len(self._nodes))
        return sorted(shuffled, key=lambda node: self._failed_at.get(node, lately) > lately)

    async def _connect_to(
        self,
        node: URL,
        seconds: float,
        purpose: str,
        arrive: Arrive | None = None,
        *,
        offsets: bool = False,
    ) -> Connection:
        connection = Connection(node, f"{self._name} {purpose}", arrive, offsets=offsets)
        attempt = asyncio.create_task(_open(connection))
        try:
            return await within(seconds, attempt)
        except BaseException:
            attempt.add_done_callback(self._leave_late)
            raise

    def _leave_late(self, attempt: "asyncio.Task[Any]") -> None:
        if not attempt.cancelled() and attempt.exception() is None:  # made in the very moment of giving it up
            self._begin_to_leave(attempt.result())

    async def leave(self, connection: Connection) -> None:
        """Closes `connection`; one that does not answer is closed in the background. Never raises."""
        await asyncio.wait({self._begin_to_leave(connection)}, timeout=LEAVE_WITHIN)

    def discard(self, connection: Connection) -> None:
        """Closes `connection` in the background."""
        self._begin_to_leave(connection)

    def _begin_to_leave(self, connection: Connection) -> "asyncio.Task[None]":
        task = asyncio.create_task(_close(connection))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return task

    async def close(self) -> None:
        """Waits, for a little, for connections that are being closed."""
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=LEAVE_WITHIN)


def is_away(error: ChannelNotFoundEntity) -> bool:
    """Whether what is not found is there, but on a node of the cluster that is down."""
    return "home node" in str(error)


def is_blocked(connection: Connection) -> bool:
    """Whether the broker blocks what is published on this connection, as it has said."""
    if connection.transport is None:
        return False
    # There is no other question than whether this would wait.
    waiting = cast("Coroutine[Any, Any, None]", connection.transport.ready())
    try:
        waiting.send(None)
    except StopIteration:
        return False
    finally:
        waiting.close()
    return True


def place(node: URL) -> str:
    """The host and port of a node, without anything secret."""
    return f"{node.host}:{node.port}" if node.port else str(node.host)


def _complete(url: URL, settings: Settings) -> URL:
    if "heartbeat" not in url.query:
        url = url.update_query(heartbeat=HEARTBEAT)
    if url.scheme == "amqps" and settings.broker_ca_file is not None:
        url = url.update_query(cafile=settings.broker_ca_file)
    if url.scheme == "amqps" and settings.broker_cert_file is not None:
        key_file = settings.broker_key_file or settings.broker_cert_file
        url = url.update_query(certfile=settings.broker_cert_file, keyfile=key_file)
    return url


async def _open(connection: Connection) -> Connection:
    await connection.connect()
    return connection


async def _close(connection: Connection) -> None:
    closing = asyncio.ensure_future(connection.close())
    closing.add_done_callback(_retrieve)  # nothing depends on a connection that is given up
    try:
        await asyncio.wait({closing}, timeout=LEAVE_WITHIN / 2)
    finally:
        connection.wire.abort()  # aiormq waits until all is written, which a broker that hangs never reads
    await asyncio.wait({closing}, timeout=LEAVE_WITHIN / 2)


def _check_ca_file(path: str) -> None:
    try:
        ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"CACHEINVAL_BROKER_CA_FILE={path}: accepted: a readable PEM file of certificates ({explain(error)})"
        ) from error


def _check_certificate(cert_file: str, key_file: str | None) -> None:
    try:
        # Without a password asyncio would wait for one to be typed.
        ssl.create_default_context().load_cert_chain(cert_file, key_file, password="")
    except (OSError, ssl.SSLError) as error:
        files = f"CACHEINVAL_BROKER_CERT_FILE={cert_file}"
        if key_file is not None:
            files += f", CACHEINVAL_BROKER_KEY_FILE={key_file}"
        raise ConfigurationError(
            f"{files}: accepted: readable PEM files of a certificate and its key, without a passphrase ({explain(error)})"
        ) from error
