"""aiocache's Memcached backend, without two traps of its driver (aiomcache 0.8)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiomcache
from aiocache.backends.memcached import MemcachedCache
from aiomcache.pool import Connection

__all__ = ["CarefulMemcachedCache"]

POOL_SIZE = 4  # connections; the driver opens all of them at once


class CarefulMemcachedCache(MemcachedCache):  # type: ignore[misc]  # aiocache has no types
    """Like aiocache's, but a command that is cut off takes its connection with it, and a closed one ends the command."""

    def __init__(self, endpoint: str = "127.0.0.1", port: int = 11211, **kwargs: Any) -> None:
        super().__init__(endpoint=endpoint, port=port, **kwargs)
        self.client = _Client(endpoint, port, pool_size=POOL_SIZE)


class _Client(aiomcache.Client):
    async def _execute_simple_command(self, conn: Connection, raw_command: bytes) -> bytes:
        # The original reads a closed connection again and again, without ever giving way to another task.
        with _spoiling(conn):
            conn.writer.write(raw_command)
            await conn.writer.drain()
            return (await conn.reader.readuntil(b"\r\n"))[:-2]

    async def _multi_get(self, conn: Connection, *keys: bytes, with_cas: bool = True) -> Any:
        with _spoiling(conn):
            return await super()._multi_get(conn, *keys, with_cas=with_cas)  # type: ignore[call-overload]


@contextmanager
def _spoiling(connection: Connection) -> Iterator[None]:
    # The original gives back a connection whose command was cancelled: its reply would be the next command's, an old
    # value among them.
    try:
        yield
    except BaseException:
        connection.reader.set_exception(ConnectionError("a command on this connection was cut off"))
        raise
