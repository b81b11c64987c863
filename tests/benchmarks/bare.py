"""AMQP 0-9-1 as one `asyncio.Protocol`: the floor for whatever speaks to RabbitMQ in Python.

For measuring only. It does what nothing can do without (frames, acknowledgements, confirms) and nothing that costs: no task
and no object for a message, one acknowledgement for all that a read of the socket has brought, one write for all that is
published in a turn of the loop. It knows no heartbeat, no returned message, no flow control, and no body of two frames.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from pamqp import commands, frame

__all__ = ["BareConnection"]

ANSWER_WITHIN = 10.0

METHOD, HEADER, BODY, END = 1, 2, 3, 0xCE
DELIVER, ACK = b"\x00\x3c\x00\x3c", b"\x00\x3c\x00\x50"

_frame = struct.Struct(">BHI")  # what it is, channel, size
_long = struct.Struct(">Q")
_ack = struct.Struct(">BHI4sQBB")
_header = struct.Struct(">BHIHHQHB")


class BareConnection(asyncio.Protocol):
    """A connection with one channel.

    Args:
        arrived: called with the body of each message that is consumed; it is acknowledged when this has returned.
    """

    def __init__(self, arrived: Callable[[bytes], None] = lambda body: None) -> None:
        self._arrived = arrived
        self._left = b""  # the beginning of a frame
        self._delivered = self._done = (
            0  # delivery tags: of the message that comes in, and of the last one taken
        )
        self._answer: asyncio.Future[Any] | None = None
        self._published = self._confirmed = 0
        self._unconfirmed: dict[int, asyncio.Future[None]] = {}
        self._out: list[bytes] = []
        self._transport: asyncio.Transport

    @classmethod
    async def connect(cls, url: str, arrived: Callable[[bytes], None] = lambda body: None) -> Self:
        """Connects, and opens the channel."""
        to = urlsplit(url)
        loop = asyncio.get_running_loop()
        _, self = await loop.create_connection(lambda: cls(arrived), to.hostname, to.port)
        await self._ask(b"AMQP\x00\x00\x09\x01")
        login = f"\0{unquote(to.username or '')}\0{unquote(to.password or '')}"
        tune = await self.ask(commands.Connection.StartOk({}, "PLAIN", login, "en_US"), 0)
        self._write(commands.Connection.TuneOk(1, tune.frame_max, 0), 0)
        await self.ask(commands.Connection.Open(unquote(to.path[1:]) or "/"), 0)
        await self.ask(commands.Channel.Open())
        return self

    async def close(self) -> None:
        """Says so, and hangs up."""
        await self.ask(commands.Connection.Close(200, "", 0, 0), 0)
        self._transport.close()

    async def ask(self, command: Any, channel: int = 1) -> Any:
        """The broker's answer to a method."""
        return await self._ask(frame.marshal(command, channel))

    async def _ask(self, data: bytes) -> Any:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        async with asyncio.timeout(ANSWER_WITHIN):
            return await self._answer

    def _write(self, command: Any, channel: int = 1) -> None:
        self._transport.write(frame.marshal(command, channel))

    async def consume(self, exchange: str, prefetch: int) -> None:
        """Gets what `exchange` gets, through an exclusive queue."""
        await self.ask(commands.Basic.Qos(0, prefetch))
        queue = (await self.ask(commands.Queue.Declare(exclusive=True))).queue
        await self.ask(commands.Queue.Bind(queue=queue, exchange=exchange))
        await self.ask(commands.Basic.Consume(queue=queue))

    async def publish_to(self, exchange: str) -> None:
        """Makes ready to publish to a fanout of this name, with confirms."""
        await self.ask(commands.Exchange.Declare(exchange=exchange, exchange_type="fanout"))
        await self.ask(commands.Confirm.Select())
        self._publish = frame.marshal(commands.Basic.Publish(exchange=exchange), 1)

    def publish(self, body: bytes) -> asyncio.Future[None]:
        """Publishes, together with all that is published in this turn of the loop; the future waits for the confirm."""
        loop = asyncio.get_running_loop()
        if not self._out:
            loop.call_soon(self._flush)
        header = _header.pack(HEADER, 1, 14, 60, 0, len(body), 0, END)
        self._out += (self._publish, header, _frame.pack(BODY, 1, len(body)), body, b"\xce")
        self._published += 1
        confirmed = self._unconfirmed[self._published] = loop.create_future()
        return confirmed

    def _flush(self) -> None:
        self._transport.write(b"".join(self._out))
        self._out.clear()

    # What asyncio calls

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        for waiting in (self._answer, *self._unconfirmed.values()):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error or ConnectionResetError())

    def data_received(self, data: bytes) -> None:
        data = self._left + data
        at, end = 0, len(data)
        while end - at >= 8:
            kind, _, size = _frame.unpack_from(data, at)
            after = at + 8 + size
            if after > end:
                break
            if kind == BODY:
                self._arrived(data[at + 7 : after - 1])
                self._done = self._delivered
            elif kind == METHOD:
                self._take(data, at, after)
            at = after
        self._left = data[at:]
        if self._done:
            self._transport.write(_ack.pack(METHOD, 1, 13, ACK, self._done, True, END))
            self._done = 0

    def _take(self, data: bytes, at: int, after: int) -> None:
        method = data[at + 7 : at + 11]
        if method == DELIVER:
            (self._delivered,) = _long.unpack_from(data, at + 12 + data[at + 11])
        elif method == ACK:
            (last,) = _long.unpack_from(data, at + 11)
            self._confirm(last, multiple=bool(data[at + 19]))
        elif self._answer is not None and not self._answer.done():
            _, _, answer = frame.unmarshal(data[at:after])
            if answer.name in ("Channel.Close", "Connection.Close"):
                self._answer.set_exception(ConnectionError(answer.reply_text))
            else:
                self._answer.set_result(answer)
        else:
            self._transport.abort()  # it was closed from there, or a message was refused

    def _confirm(self, last: int, *, multiple: bool) -> None:
        for number in range(self._confirmed + 1 if multiple else last, last + 1):
            waiting = self._unconfirmed.pop(number, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
        if multiple:
            self._confirmed = last
