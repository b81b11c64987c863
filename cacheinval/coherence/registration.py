"""Whether the writers that wait for the others know of this instance, and until when (PROTOCOL.md, "Waiting for the others").

A writer waits for the instances that it finds in `cacheinval.instances`; nobody waits for one that is not there. So one that
promises freshness serves from its cache only while it surely is there, and only what was loaded since. No I/O, no clock.
"""

import math
from dataclasses import dataclass

from cacheinval.coherence.standing import Standing

__all__ = ["NOT_YET", "SHORTEST_LEASE", "Registered", "Registration"]

SHORTEST_LEASE = 10.0
"""Seconds."""

LEASE_IN_STALENESS = 2.0
"""An instance whose database is away loses its registration no sooner than what it holds could be proven anyway: a
renewal is at most a third of the lease old, and two thirds of twice Δ are more than Δ and the skew of any sane setting."""


NOT_YET = "not registered yet"


@dataclass(frozen=True, slots=True)
class Registered:
    """One instance, as a writer finds it in the table.

    `session` is random for each process whose cache ends with it, and empty for a cache that outlives its process.
    """

    id: str
    session: str
    max_staleness: float | None


class Registration:
    """What an instance knows of its row, by its own clock.

    Args:
        max_staleness: seconds, or None; the lease follows from it alone, so that all processes of one id agree on it.
        max_clock_skew: seconds by which clocks of hosts and database may differ. For a cache that ends with the process
            it is enough that they differ by the same within a lease.
        required: nothing is served but under the registration. Not required: it only makes writers count this instance.
        outlives: the cache outlives the process, and holds what earlier processes, and other hosts, have loaded.
    """

    def __init__(
        self,
        max_staleness: float | None = None,
        max_clock_skew: float = 0.1,
        *,
        required: bool = False,
        outlives: bool = False,
    ) -> None:
        self.standing = Standing()
        self.lease = max(SHORTEST_LEASE, LEASE_IN_STALENESS * (max_staleness or 0.0))
        self.required = required
        self.until = -math.inf if required else math.inf
        """Reads that begin from then on are not served from the cache."""
        self.since = math.inf if required else -math.inf
        """Nor is what was loaded by a load that began by then."""
        self._max_clock_skew = max_clock_skew
        self._outlives = outlives
        self._problem = NOT_YET
        self._counted_until = -math.inf
        self._hole = -math.inf
        """When a writer may last have looked and not found the row, as far as this process knows."""
        self._sent: float | None = None
        self._next = -math.inf

    def problem(self, now: float) -> str | None:
        """Why a writer that looks now may not find this instance; None: it does."""
        return None if now < self._counted_until else self._problem

    def due(self, now: float) -> bool:
        """Whether the row should be renewed."""
        return now >= self._next

    def sending(self, now: float) -> None:
        """The statement that makes or renews the row is about to be sent."""
        self._sent = now

    def failed(self, problem: str, now: float, pause: float) -> None:
        """It was not answered; the row stands as long as it stood. Try again after `pause` seconds."""
        self._sent, self._next, self._problem = None, now + pause, problem

    def answered(self, told: float, since: float, now: float) -> None:
        """It was answered at `now`; by the database's clock it was executed at `told`, and the row stands since `since`.

        `since` is infinite until a second statement has found the row there: when the first one was committed, and so
        began to be seen, it cannot say itself.
        """
        sent, self._sent = self._sent, None
        if sent is None:
            return  # the clock was set in between: `sent` and `now` cannot be compared
        # Where the cache ends with the process, its own clock alone says when a load began, and how much time has passed.
        if self._outlives and not sent - self._max_clock_skew <= told <= now + self._max_clock_skew:
            self.forget()
            apart = max(sent - told, told - now)
            self.failed(f"this clock and the database's differ by {apart:.3f} s", now, self.lease / 3)
            return
        if now >= self._good_until(sent):
            # There may have been a hole, in which a writer did not find this instance, and did not wait for it.
            self._hole = now
        # Elapsed time, by two clocks that each may be off by the skew.
        self._counted_until = sent + self.lease - 2 * self._max_clock_skew
        self._next = sent + self.lease / 3
        self._problem = "the registration was not renewed in time"
        counted_since = self._hole
        if self._outlives:
            # What is in there was loaded by others' clocks, in part before this process began.
            counted_since = max(self._hole, since) + self._max_clock_skew
            self._next = now if since == math.inf else self._next
        if self.required:
            # `since` is later than before only where `until` has passed, and with it whatever was judged by both.
            self.until, self.since = self._counted_until, counted_since

    def _good_until(self, sent: float) -> float:
        """Until when the row that was there before was surely seen, so that an answer by then leaves no hole."""
        if self._counted_until > -math.inf:
            return self._counted_until
        # Another process's row keeps its `since` only where half the lease was left (see `outbox/instances.py`).
        return sent + self.lease / 2 - 2 * self._max_clock_skew if self._outlives else -math.inf

    def forget(self) -> None:
        """The clock was set, or the instance leaves: nothing stands until it is registered again."""
        self._sent, self._next = None, -math.inf
        self._counted_until = -math.inf
        self._problem = "not registered any more"
        if self.required:
            self.until, self.since = -math.inf, math.inf
            self.standing.shake()

    def covers(self, load_started: float, now: float) -> bool:
        """Whether a read that begins at `now` may be given what was read by a load that began then."""
        return now < self.until and load_started > self.since
