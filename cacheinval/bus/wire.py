"""The short way in and out of a connection: what is delivered and published, without objects and tasks of each frame."""

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import aio_pika
import aiormq
from aiormq.exceptions import AMQPConnectionError
from pamqp.base import Frame as Method
from pamqp.body import ContentBody
from pamqp.frame import marshal
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat
from yarl import URL

from cacheinval.bus import Delivery
from cacheinval.tracing import contexts_of, names_context

__all__ = ["Arrive", "Connection", "Frame", "Splitter", "Wire"]

Arrive = Callable[[list[tuple[int, Delivery]]], None]
Frame = Method | ContentHeader | ContentBody

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8  # the types of frames there are
FRAME = struct.Struct(">BHI")  # type, channel, size; so many bytes follow, and then the end
END = 0xCE
BASIC_DELIVER = bytes((0, 60, 0, 60))
CONTENT = struct.Struct(">4xQH")  # of a header: the size of the body, and which properties there are
ANSWERABLE = 0x0600  # reply_to or correlation_id among them
CONTENT_TYPE, CONTENT_ENCODING, HEADERS = 0x8000, 0x4000, 0x2000  # in this order
ONLY_OFFSET = (
    b"\x00\x00\x00\x19\x0fx-stream-offsetl"  # a table of 25 bytes: a name, a type, and 8 bytes that follow
)

SIGN_OF_LIFE = 1.0  # seconds


class Wire(aiormq.TransportFactory):
    """One connection's way to the broker, past aiormq's queues and tasks where a message goes in or out.

    Args:
        arrive: called with deliveries as they arrive, each with its tag, where the connection has a consumer. Whatever
            else the broker says is aiormq's to read.
        offsets: they come from a stream, and their offsets are wanted.
    """

    def __init__(self, arrive: Arrive | None = None, *, offsets: bool = False) -> None:
        self._arrive = arrive
        self._offsets = offsets
        self._writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """See `aiormq.TransportFactory`."""
        provider = kwargs.pop("ssl_context_provider")
        context = await provider.get_context() if url.scheme == "amqps" else None
        loop = asyncio.get_running_loop()
        reader = (
            asyncio.StreamReader(loop=loop)
            if self._arrive is None
            else _Reader(Splitter(self._arrive, offsets=self._offsets), loop)
        )
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        try:
            transport, _ = await loop.create_connection(
                lambda: protocol, url.host or "", url.port or 0, ssl=context, **kwargs
            )
        except OSError as error:
            raise AMQPConnectionError(*error.args) from error
        self._writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        return reader, self._writer

    def write(self, channel: int, *frames: Frame) -> None:
        """Sends these frames of `channel` now, in one piece: behind all that was written, before all that waits to be.

        Raises:
            ConnectionError: the connection is closed.
        """
        if self._writer is None or self._writer.is_closing():
            raise ConnectionError("the connection was closed")
        self._writer.write(b"".join([marshal(frame, channel) for frame in frames]))

    def abort(self) -> None:
        """Ends the connection, if there is one, whatever has not been written yet."""
        if self._writer is not None:
            self._writer.transport.abort()


class Connection(aio_pika.Connection):
    """A connection of aio-pika, and its wire."""

    def __init__(self, url: URL, name: str, arrive: Arrive | None = None, *, offsets: bool = False) -> None:
        super().__init__(url, client_properties={"connection_name": name})
        self.wire = Wire(arrive, offsets=offsets)
        self.kwargs["transport_factory"] = self.wire  # goes on to aiormq, as all of these do


class _Reader(asyncio.StreamReader):
    """Gives aiormq to read what is no delivery."""

    _SIGN = marshal(Heartbeat(), 0)

    def __init__(self, splitter: "Splitter", loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._splitter = splitter
        self._now = loop.time
        self._gave_at = loop.time()

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        rest = self._splitter.split(data)
        now = self._now()
        if not rest and self._splitter.delivers and now - self._gave_at > SIGN_OF_LIFE:
            rest = self._SIGN  # a broker that delivers sends no heartbeats, and aiormq would take it for dead
        if rest:
            self._gave_at = now
            super().feed_data(rest)


class Splitter:
    """Tells deliveries from all else in the bytes of one connection, which has one consumer."""

    def __init__(self, arrive: Arrive, *, offsets: bool = False) -> None:
        self._arrive = arrive
        self._offsets = offsets
        self._begun = b""  # a frame of which the end has not come yet
        self._understood = True
        self._complete: list[tuple[int, Delivery]] = []
        self._channel = -1  # of the delivery whose content is expected
        self._tag = 0
        self._redelivered = False
        self._properties: Any = None
        self._contexts: tuple[str, ...] = ()
        self._offset: int | None = None
        self._size = 0
        self._body = b""

    @property
    def delivers(self) -> bool:
        """Whether a delivery has begun; until then the bytes may be those of the handshake, which knows no heartbeats."""
        return self._tag > 0

    def split(self, data: bytes) -> bytes:
        """Calls `arrive` with the deliveries that `data` completes, and returns all frames that it completes besides."""
        if not self._understood:
            return data
        others = self._split(data)
        if self._complete:
            complete, self._complete = self._complete, []
            self._arrive(complete)
        return others

    def _split(self, data: bytes) -> bytes:
        if self._begun:
            data = self._begun + data
        others: list[bytes] = []
        start, length = 0, len(data)
        while length - start >= FRAME.size:
            kind, channel, size = FRAME.unpack_from(data, start)
            payload = start + FRAME.size
            end = payload + size
            if kind not in (METHOD, HEADER, BODY, HEARTBEAT) or (end < length and data[end] != END):
                self._understood = False  # no AMQP: aiormq says so better
                others.append(data[start:])
                start = length
                break
            if end >= length:
                break
            if not self._take(kind, channel, data, payload, end):
                others.append(data[start : end + 1])
            start = end + 1
        self._begun = data[start:]
        return b"".join(others)

    def _take(self, kind: int, channel: int, data: bytes, payload: int, end: int) -> bool:
        """Whether this frame is part of a delivery."""
        if kind == METHOD and data.startswith(BASIC_DELIVER, payload):
            number = payload + 5 + data[payload + 4]  # behind the name of the consumer
            self._channel = channel
            self._tag = int.from_bytes(data[number : number + 8])
            self._redelivered = bool(data[number + 8] & 1)
            return True
        if channel != self._channel:
            return False
        if kind == HEADER:
            self._size, flags = CONTENT.unpack_from(data, payload)
            self._properties = _answerable(data[payload:end]) if flags & ANSWERABLE else None
            self._contexts = _contexts(data[payload:end]) if flags & HEADERS else ()
            self._offset = _offset(data[payload:end], flags) if self._offsets and flags & HEADERS else None
            self._body = b""
        elif kind == BODY:
            self._body += data[payload:end]
        else:
            self._channel = -1
            return False
        if len(self._body) >= self._size:
            self._deliver()
        return True

    def _deliver(self) -> None:
        self._channel = -1
        properties = self._properties
        if properties is None:
            delivery = Delivery(self._body, None, None, self._redelivered, self._contexts, self._offset)
        else:
            delivery = Delivery(
                self._body,
                properties.reply_to,
                properties.correlation_id,
                self._redelivered,
                self._contexts,
                self._offset,
            )
        self._complete.append((self._tag, delivery))


def _offset(payload: bytes, flags: int) -> int | None:
    """That of the header `x-stream-offset`; without making objects of it, if it is the only one."""
    at = CONTENT.size
    for present in (CONTENT_TYPE, CONTENT_ENCODING):
        if flags & present:
            at += 1 + payload[at]
    if payload.startswith(ONLY_OFFSET, at):
        at += len(ONLY_OFFSET)
        return int.from_bytes(payload[at : at + 8])
    try:
        offset = _properties(payload).headers.get("x-stream-offset")
    except Exception:  # what somebody else put beside it cannot be read
        _, named, rest = payload.rpartition(ONLY_OFFSET[4:])
        return int.from_bytes(rest[:8]) if named else None
    return offset if isinstance(offset, int) else None


def _answerable(payload: bytes) -> Any:
    try:
        return _properties(payload)
    except Exception:  # nobody can be answered then; the message counts all the same
        return None


def _properties(payload: bytes) -> Any:
    header = ContentHeader()
    header.unmarshal(payload)
    return header.properties


def _contexts(payload: bytes) -> tuple[str, ...]:
    if not names_context(payload):
        return ()
    try:
        return contexts_of(_properties(payload).headers)
    except Exception:  # headers that cannot be read are not what a message says
        return ()
