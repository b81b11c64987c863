"""Private Redis and Memcached."""

import os
from collections.abc import Sequence
from typing import ClassVar

from cacheinval.sandbox.processes import LOOPBACK
from cacheinval.sandbox.server import Programs, Server

__all__ = ["Memcached", "Redis"]


class Redis(Server):
    """A Redis server that keeps nothing on disk."""

    name = "redis"
    package = "redis-server"
    programs: ClassVar[Programs] = {"redis-server": ("/usr/bin/redis-server",)}
    url_form = "redis://{host}:{port}/0"
    question = b"PING\r\n"
    answer = b"+PONG"

    def _command(self) -> Sequence[str]:
        address = ["--bind", LOOPBACK, "--port", str(self.port)]
        return [self.program("redis-server"), *address, "--save", "", "--appendonly", "no"]


class Memcached(Server):
    """A Memcached server."""

    name = "memcached"
    package = "memcached"
    programs: ClassVar[Programs] = {"memcached": ("/usr/bin/memcached",)}
    url_form = "memcached://{host}:{port}"
    question = b"version\r\n"
    answer = b"VERSION"

    def _command(self) -> Sequence[str]:
        user = ["-u", "root"] if os.geteuid() == 0 else []  # else it asks for the name of a user to become
        return [self.program("memcached"), "-l", LOOPBACK, "-p", str(self.port), "-U", "0", *user]
