"""A TCP proxy that does to connections what networks do: cut them, swallow bytes, delay them, lose one reply."""

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Literal, Self

Direction = Literal["request", "reply", "both"]

_KEEP = 64  # how much of what went by is kept, to find a pattern that comes in two pieces


class Proxy:
    """`async with Proxy("127.0.0.1", port) as proxy:` listens on 127.0.0.1:`proxy.port` and passes bytes both ways.

    "request" is the direction from the client to the server, "reply" the other one.
    """

    def __init__(self, host: str, port: int) -> None:
        self.connections = 0  # accepted so far, refused ones included
        self._target = (host, port)
        self._port = 0
        self._listener: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._swallowed: set[Direction] = set()
        self._delay = 0.0
        self._refusing = False
        self._pattern: bytes | None = None
        self._cut_by_pattern = asyncio.Event()

    @property
    def port(self) -> int:
        """Where clients connect."""
        return self._port

    @property
    def open_links(self) -> int:
        """How many connections are open now."""
        return len(self._links)

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._listener is not None
        self._listener.close()
        self.cut()
        tasks = [link.task for link in self._links]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset all connections, and every new one as soon as it is accepted, until `pass_`."""
        self._refusing = True
        self.cut_open()

    def cut_open(self) -> None:
        """Reset the connections that are open now; new ones are welcome."""
        for link in list(self._links):
            link.abort()

    def swallow(self, direction: Direction = "both") -> None:
        """Keep connections open, accept new ones, and drop what comes this way, until `pass_`."""
        self._swallowed |= {"request", "reply"} if direction == "both" else {direction}

    def delay(self, seconds: float) -> None:
        """Hand on each piece this much later, in both directions."""
        self._delay = seconds

    def pass_(self) -> None:
        """Pass everything again. What was swallowed is lost: a connection that missed a part is reset."""
        if self._swallowed:
            for link in list(self._links):
                if link.has_lost:
                    link.abort()
        self._refusing = False
        self._swallowed = set()
        self._delay = 0.0

    def cut_reply_after(self, pattern: bytes) -> asyncio.Event:
        """Let the next request that contains `pattern` reach the server, drop its reply and reset that connection.

        The event that is returned is set once that has been done: the server has acted by then. Happens once. A pattern
        for a statement with arguments should be in an argument: the text alone is sent, and answered, before them.
        """
        assert 0 < len(pattern) <= _KEEP
        self._pattern = pattern
        self._cut_by_pattern = asyncio.Event()
        return self._cut_by_pattern

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refusing:
            writer.transport.abort()
            return
        try:
            async with asyncio.timeout(10):
                far_reader, far_writer = await asyncio.open_connection(*self._target)
        except (OSError, TimeoutError):
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        link = _Link(writer, far_writer, task)
        self._links.add(link)
        if self._refusing:  # cut while we connected
            link.abort()
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(link, reader, far_writer, "request"))
                pumps.create_task(self._pump(link, far_reader, writer, "reply"))
        finally:
            link.abort()
            self._links.discard(link)

    async def _pump(
        self,
        link: "_Link",
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: Literal["request", "reply"],
    ) -> None:
        seen = b""
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self._delay:
                    await asyncio.sleep(self._delay)
                if direction == "reply" and link.reply_is_lost:
                    link.abort()
                    self._cut_by_pattern.set()
                    return
                if direction in self._swallowed:
                    link.has_lost = True
                    continue
                if direction == "request" and self._pattern is not None:
                    seen = seen[-_KEEP:] + data
                    if self._pattern in seen:
                        self._pattern = None
                        link.reply_is_lost = True
                writer.write(data)
                await writer.drain()
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()


class _Link:
    """One connection through the proxy."""

    def __init__(
        self, near: asyncio.StreamWriter, far: asyncio.StreamWriter, task: "asyncio.Task[None]"
    ) -> None:
        self.task = task
        self.has_lost = False
        self.reply_is_lost = False
        self._writers = (near, far)

    def abort(self) -> None:
        for writer in self._writers:
            if not writer.transport.is_closing():
                # With a linger time of 0 the peer gets a reset, not an orderly end.
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
            writer.transport.abort()
