"""What one look at the database tells of a namespace; no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass

from cacheinval.coherence.registration import Registered

__all__ = ["Overview"]


@dataclass(frozen=True, slots=True)
class Overview:
    """Who is registered, who publishes the outbox, and what waits there.

    `settled` are those of `registered` that have been for so long that an answer can be expected of them. `led`: a relay
    leads. `oldest_row_age` is that of the oldest row that is due, in seconds; None where there is none. `offset`: seconds
    by which the database's clock is at least ahead of this host's, or behind if negative.
    """

    registered: Sequence[Registered] = ()
    settled: Sequence[Registered] = ()
    led: bool = True
    oldest_row_age: float | None = None
    offset: float = 0.0
