"""What one look at the database tells of a namespace; no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass

from cacheinval.coherence.registration import Registered

__all__ = ["Lapsed", "Leader", "Overview"]


@dataclass(frozen=True, slots=True)
class Leader:
    """The relay that leads, as far as the database knows it: by its session, which mostly has the name of its process.

    `session` is the pid of the server's process, `name` what the session is called; `host` and `pid` are those of the
    relay's own process, and None where the session was named otherwise. What whoever looks may not see is None: `address`
    of the client (also where it came by a local socket), `since` when it is connected, in seconds since 1970 by the
    database's clock, and `quiet`, for how many seconds it has said nothing to the database.
    """

    session: int
    name: str = ""
    host: str | None = None
    pid: int | None = None
    address: str | None = None
    since: float | None = None
    quiet: float | None = None

    def __str__(self) -> str:
        """Which process it is, in the words of a sentence."""
        if self.pid is not None:
            return f"pid {self.pid} on host {self.host}"
        return f"{self.name or 'a session without a name'}, server process {self.session}"


@dataclass(frozen=True, slots=True)
class Lapsed:
    """An instance that has ended without a word: its lease ended so many seconds ago, and nobody of its id is there."""

    id: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Overview:
    """Who is registered, who publishes the outbox, and what waits there.

    `settled` are those of `registered` that have been for so long that an answer can be expected of them. `led`: a relay
    leads, and `leader` is which. `oldest_row_age` is that of the oldest row that is due, in seconds; None where there is
    none. `offset`: seconds by which the database's clock is at least ahead of this host's, or behind if negative. `lapsed`:
    of the last hour, the latest first. Whoever has said that it stops is in none of these.
    """

    registered: Sequence[Registered] = ()
    settled: Sequence[Registered] = ()
    led: bool = True
    oldest_row_age: float | None = None
    offset: float = 0.0
    leader: Leader | None = None
    lapsed: Sequence[Lapsed] = ()
