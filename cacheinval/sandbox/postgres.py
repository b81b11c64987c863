"""A private Postgres."""

import os
import shutil
import signal
from collections.abc import Sequence
from typing import ClassVar

from cacheinval.sandbox.processes import LOOPBACK, check_passable
from cacheinval.sandbox.server import Programs, Server

__all__ = ["Postgres"]


class Postgres(Server):
    """A Postgres cluster with the superuser `postgres`, who needs no password; fsync stays on."""

    name = "postgres"
    package = "postgresql"
    programs: ClassVar[Programs] = {
        "initdb": ("/usr/lib/postgresql/*/bin/initdb", "/usr/pgsql-*/bin/initdb"),
        "postgres": ("/usr/lib/postgresql/*/bin/postgres", "/usr/pgsql-*/bin/postgres"),
    }
    url_form = "postgresql://postgres@{host}:{port}/postgres"
    stop_signal = signal.SIGINT

    # A startup packet of 41 bytes, protocol 3.0; ready is who answers ReadyForQuery, idle.
    question = b"\x00\x00\x00\x29\x00\x03\x00\x00user\x00postgres\x00database\x00postgres\x00\x00"
    answer = b"Z\x00\x00\x00\x05I"

    def _user(self) -> str | None:
        return "postgres" if os.geteuid() == 0 else None  # it refuses to run as root

    async def _prepare(self) -> None:
        data = self.folder / "data"
        if user := self._user():
            check_passable(self.folder.parent, user)
            shutil.chown(self.folder, user)
        if not (data / "PG_VERSION").exists():
            shutil.rmtree(data, ignore_errors=True)
            options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
            await self._run([self.program("initdb"), "--pgdata", str(data), *options])
        # No process of ours is left, and its number may be somebody else's by now.
        (data / "postmaster.pid").unlink(missing_ok=True)

    def _command(self) -> Sequence[str]:
        settings = {
            "listen_addresses": LOOPBACK,
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [self.program("postgres"), "-D", str(self.folder / "data"), *options]
