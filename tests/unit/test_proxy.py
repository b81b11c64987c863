"""The tests' own proxy must do what the fault tests believe it does."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
from proxy import Proxy
from waiting import Eventually


@pytest.fixture
def heard() -> bytearray:
    """All that the server behind the proxy has received."""
    return bytearray()


@pytest.fixture
async def proxy(heard: bytearray) -> AsyncIterator[Proxy]:
    """A proxy before a server that echoes."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(100):
                heard.extend(data)
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, Proxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        yield proxy


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    async with asyncio.timeout(30):
        return await reader.readexactly(len(data))


async def test_passes_both_ways_and_the_end_too(proxy: Proxy, eventually: Eventually) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await _ask(reader, writer, b"hello") == b"hello"
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    await eventually(lambda: proxy.open_links == 0)


async def test_cut_resets_what_is_open_and_refuses_new_ones_until_pass(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    await _ask(reader, writer, b"hello")
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await _ask(reader, writer, b"hello")
    proxy.pass_()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await _ask(reader, writer, b"again") == b"again"
    writer.close()


async def test_swallow_keeps_the_connection_and_loses_the_bytes(
    proxy: Proxy, heard: bytearray, eventually: Eventually
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    await _ask(reader, writer, b"hello")
    proxy.swallow("reply")
    writer.write(b"lost")
    await eventually(lambda: bytes(heard) == b"hellolost")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await reader.read(1)
    proxy.pass_()
    with pytest.raises(ConnectionResetError):
        await reader.read(1)


async def test_swallowed_requests_do_not_arrive(proxy: Proxy, heard: bytearray) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    proxy.swallow("request")
    writer.write(b"lost")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await reader.read(1)
    assert not heard
    writer.close()


async def test_delay(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    proxy.delay(0.1)
    began = time.monotonic()
    assert await _ask(reader, writer, b"hello") == b"hello"
    assert time.monotonic() - began >= 0.2
    writer.close()


async def test_one_reply_is_lost_after_the_server_has_acted(proxy: Proxy, heard: bytearray) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    other_reader, other_writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    lost = proxy.cut_reply_after(b"COMMIT")
    assert await _ask(reader, writer, b"BEGIN;") == b"BEGIN;"
    assert await _ask(reader, writer, b"...COM") == b"...COM"
    writer.write(b"MIT;")
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
    assert lost.is_set()
    assert heard.endswith(b"COMMIT;")
    assert await _ask(other_reader, other_writer, b"COMMIT") == b"COMMIT"
    other_writer.close()
