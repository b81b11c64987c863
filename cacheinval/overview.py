"""What one look at the database tells of a namespace; no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass

from cacheinval.coherence.registration import Registered

__all__ = ["Lapsed", "Overview"]


@dataclass(frozen=True, slots=True)
class Lapsed:
    """An instance that has ended without a word: its lease ended so many seconds ago, and nobody of its id is there."""

    id: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Overview:
    """Who is registered, who publishes the outbox, and what waits there.

    `settled` are those of `registered` that have been for so long that an answer can be expected of them. `led`: a relay
    leads. `oldest_row_age` is that of the oldest row that is due, in seconds; None where there is none. `offset`: seconds
    by which the database's clock is at least ahead of this host's, or behind if negative. `lapsed`: of the last hour, the
    latest first. Whoever has said that it stops is in none of these.
    """

    registered: Sequence[Registered] = ()
    settled: Sequence[Registered] = ()
    led: bool = True
    oldest_row_age: float | None = None
    offset: float = 0.0
    lapsed: Sequence[Lapsed] = ()
