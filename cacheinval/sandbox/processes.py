"""Finding, starting, stopping and outliving the processes of private servers."""

import contextlib
import glob
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from cacheinval.errors import SandboxError

__all__ = [
    "LOOPBACK",
    "Guard",
    "check_passable",
    "claim_port",
    "closed_folder",
    "family",
    "find",
    "identity",
    "living",
    "send",
]

LOOPBACK = "127.0.0.1"


class Guard:
    """A small process that ends servers, and removes their folder, when their owner is gone.

    It reads from a pipe of which only the owner has the other end: the pipe ends when the owner does, however it dies.
    Each line is the whole set of process groups to end.

    folder: what to remove at the end, or None.
    """

    # SIGQUIT first: it makes Postgres end its children too, which are in sessions of their own.
    _SCRIPT = """
        trap '' HUP INT QUIT TERM
        groups=
        while read -r line; do groups=$line; done
        all() { for group in $groups; do kill -s "$1" -- "-$group" 2>/dev/null && left=yes; done; }
        all CONT; all QUIT
        turn=0
        while [ $turn -lt 10 ]; do
            left=; all 0; [ -z "$left" ] && break
            turn=$((turn + 1)); sleep 0.1
        done
        all KILL
        [ -z "$1" ] || rm -rf -- "$1" || { sleep 1; rm -rf -- "$1"; }
    """

    def __init__(self, folder: Path | None) -> None:
        self._groups: set[int] = set()
        self._process = subprocess.Popen(  # noqa: S603 (a script of ours; the folder is an argument, not code)
            ["/bin/sh", "-c", self._SCRIPT, "cacheinval-sandbox-guard", str(folder or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def watch(self, *groups: int) -> None:
        """End these process groups too."""
        self._tell(self._groups.union(groups))

    def forget(self, *groups: int) -> None:
        """Leave these process groups alone: they are gone, and their numbers may become somebody else's."""
        self._tell(self._groups.difference(groups))

    def close(self) -> None:
        """Let it do what is left to do, and wait for its end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, groups: set[int]) -> None:
        self._groups = groups
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(" ".join(map(str, groups)).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise SandboxError("the process that guards the sandbox is gone") from error


def claim_port() -> socket.socket:
    """A socket bound to a free port, to be kept as long as a server is to have that port, running or not.

    On Linux a server that sets SO_REUSEADDR (all of ours do) can listen on a port that is only bound here, while
    nobody else is given it. Otherwise a client that keeps connecting to a dead server would one day be given the
    server's port as its own, be connected to itself, and keep the server from coming back.
    """
    claim = socket.socket()
    claim.bind((LOOPBACK, 0))
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return claim


def find(program: str, package: str, *places: str) -> Path:
    """An installed program: the first on the PATH, else the newest in `places` (glob patterns).

    Raises SandboxError, naming Debian's `package`, if there is none.
    """
    if found := shutil.which(program):
        return Path(found)
    candidates = [path for place in places for path in glob.glob(place) if os.access(path, os.X_OK)]
    if not candidates:
        raise SandboxError(
            f"{program} was not found: `apt-get install {package}`, or use docker/compose.yaml"
        )
    return Path(max(candidates, key=lambda path: [int(number) for number in re.findall(r"\d+", path)]))


def identity(user: str | None) -> tuple[int | None, int | None, list[int] | None]:
    """User, group and further groups, as subprocess takes them; None is whoever we are."""
    if user is None:
        return None, None, None
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise SandboxError(
            f"the user {user} does not exist on this host, and Postgres refuses to run as root"
        ) from None
    return entry.pw_uid, entry.pw_gid, os.getgrouplist(user, entry.pw_gid)


def closed_folder(folder: Path) -> Path | None:
    """The first of this folder and its parents that other users cannot pass."""
    return next((path for path in [folder, *folder.parents] if not path.stat().st_mode & 0o001), None)


def check_passable(folder: Path, user: str) -> None:
    """Raise SandboxError if `user` cannot get into this folder."""
    if closed := closed_folder(folder):
        raise SandboxError(
            f"the user {user} cannot pass {closed}: choose another folder, or `chmod o+x {closed}`"
        )


def living() -> dict[int, int]:
    """All processes that are not dead, each with its parent."""
    return dict(_linux_processes() if sys.platform == "linux" else _other_processes())


def family(pid: int) -> list[int]:
    """A process and all that descend from it, parents first; empty if it is dead."""
    parents = living()
    members = [pid] if pid in parents else []
    for member in members:
        members += [child for child, parent in parents.items() if parent == member]
    return members


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to each of these processes that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _linux_processes() -> Iterator[tuple[int, int]]:
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
            # The second field, a name in parentheses, may hold anything.
            fields = file.read().rpartition(")")[2].split()
            state, parent, threads = fields[0], fields[1], fields[17]
            # A process whose first thread is a zombie lives, and listens, until its last thread has ended.
            if state not in "ZX" or int(threads) > 1:
                yield int(path.split("/")[2]), int(parent)


def _other_processes() -> Iterator[tuple[int, int]]:
    command = ["/bin/ps", "-A", "-o", "pid=,ppid=,state="]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603 (ours)
    for line in done.stdout.splitlines():
        pid, parent, state = line.split()
        if not state.startswith("Z"):
            yield int(pid), int(parent)
