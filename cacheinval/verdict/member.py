"""One instance as its answers show it: how far it is proven to be fresh, what it has evicted; no I/O, no clock."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from math import inf

from cacheinval.latencies import BUCKETS
from cacheinval.recent import Evicted, Recent
from cacheinval.verdict.reports import Identity, Report

__all__ = ["Lag", "Member"]

LATE_TICKS, LATE = 3, 2.0
"""Ticks and seconds beyond which nobody proves freshness any more."""

SAME_TICK = 0.001
"""Seconds by which what two tell of one tick may differ: an age is a difference of large numbers."""

CLOCK_SET = 5.0
"""Seconds that an answer is older than the one before it only where a clock was set back: answers may overtake others."""

WINDOW, SAMPLE_EVERY = 60.0, 5.0
NUMBER_OF_BUCKETS = len(BUCKETS) + 1


class Lag:
    """How long evictions took, from their commits, within the last minute: counts by the buckets of the metrics."""

    def __init__(self, counts: Sequence[int] = (0,) * NUMBER_OF_BUCKETS, seconds: float = 0.0) -> None:
        self.counts = tuple(counts)
        self.seconds = seconds
        """For how long was counted."""

    @property
    def total(self) -> int:
        """How many evictions were counted."""
        return sum(self.counts)

    def below(self, part: float) -> float | None:
        """The upper bound, in seconds, of the bucket that holds this quantile; infinite for the last; None of nothing."""
        if not self.total:
            return None
        at = bisect_left(list(accumulate(self.counts)), part * self.total)
        return BUCKETS[at] if at < len(BUCKETS) else inf

    def __add__(self, other: "Lag") -> "Lag":
        counts = [one + two for one, two in zip(self.counts, other.counts, strict=True)]
        return Lag(counts, max(self.seconds, other.seconds))


def _before(counts: Sequence[int], recent: Recent, now: float) -> tuple[float, list[int]]:
    """When the evictions began that an instance tells of, and what it had counted by then."""
    before = list(counts)
    for evicted in recent.told:
        if evicted.committed_at is not None and not evicted.own:
            bucket = bisect_left(BUCKETS, evicted.at - evicted.committed_at)
            before[bucket] = max(0, before[bucket] - 1)
    return now - (recent.until - recent.since), before


class Member:
    """One instance.

    Args:
        session: as it is registered; None if it does not tell.
    """

    def __init__(self, identity: Identity, session: str | None, now: float) -> None:
        self.identity = identity
        self.id = identity[0]
        self.session = session
        self.seen_at = now
        """When it was heard of first."""
        self.heard_at: float | None = None
        self.registered = False
        self.succeeded = False
        """Whether another process has begun to answer in its place."""
        self.report: Report | None = None
        self.dropped_at = -inf
        """By its clock: when it dropped everything, last."""
        self._told_since: float | None = None
        self._told_until = -inf  # by its clock: between these it has told what it evicted
        self._untold_from = self._untold_until = -inf  # but between these it may have evicted more
        self.behind = False
        """Whether it had not heard a tick of which others had told already when it answered the time before."""
        self._to_hear = -inf
        self.row_age_before = 0.0
        """The `row_age` of the answer before."""
        self._samples: deque[tuple[float, list[int]]] = deque()

    def heard(self, report: Report, now: float, told: float = -inf) -> None:
        """It has answered; `told` is the newest tick of which anybody has."""
        self.row_age_before = self.row_age
        self.report, self.heard_at = report, now
        self.behind = self._to_hear > self.reached
        self._to_hear = told
        counts = report.counters.receiver.latencies
        if len(counts) == NUMBER_OF_BUCKETS:
            if not self._samples and report.evictions is not None:
                self._samples.append(_before(counts, report.evictions, now))
            self._sample(counts, now)

    def _sample(self, counts: list[int], now: float) -> None:
        if self._samples and any(new < old for new, old in zip(counts, self._samples[-1][1], strict=True)):
            self._samples.clear()  # it has started anew
        while len(self._samples) > 1 and self._samples[1][0] <= now - WINDOW:
            self._samples.popleft()
        if len(self._samples) > 1 and self._samples[-1][0] - self._samples[-2][0] < SAMPLE_EVERY:
            self._samples.pop()
        self._samples.append((now, counts))

    def told(self, recent: Recent) -> list[Evicted]:
        """It has told these evictions; those that it had not told before."""
        if recent.until < self._told_until - CLOCK_SET:
            self._told_until = recent.since
        new = [
            evicted
            for evicted in recent.told
            if evicted.at > self._told_until or self._untold_from < evicted.at < self._untold_until
        ]
        self.dropped_at = max([self.dropped_at, *(evicted.at for evicted in new if evicted.all)])
        if self._told_since is None:
            self._told_since = recent.since
        elif recent.since > self._told_until:
            if self._untold_until == -inf:
                self._untold_from = self._told_until
            self._untold_until = recent.since
        elif recent.since < self._untold_until:
            # One that has slept answers what it was asked meanwhile, the narrowest question first.
            self._untold_until = recent.since if recent.since > self._untold_from else -inf
        self._told_until = max(self._told_until, recent.until)
        return new

    def could_tell(self, at: float) -> bool:
        """Whether it was there at that moment, and has told all that it evicted since."""
        if self.report is None or self._told_since is None or (self.report.started_at or 0.0) > at:
            return False
        return at > max(self._told_since, self._untold_until)

    @property
    def lag(self) -> Lag:
        """Of its evictions within the last minute, or as many of them as it told of when it was heard first."""
        if not self._samples:
            return Lag()
        (began, before), (ended, after) = self._samples[0], self._samples[-1]
        return Lag([new - old for new, old in zip(after, before, strict=True)], ended - began)

    @property
    def ahead(self) -> float:
        """Seconds by which its clock is at least ahead of the one here."""
        now = None if self.report is None else self.report.now
        return max(0.0, now - self.heard_at) if now is not None and self.heard_at is not None else 0.0

    def proven_age(self, now: float) -> float | None:
        """Seconds since the moment up to which it is proven to have evicted everything."""
        if self.report is None or self.heard_at is None or self.report.watermark_age is None:
            return None
        return self.report.watermark_age + now - self.heard_at

    @property
    def row_age(self) -> float:
        """Seconds for which its relay has seen a row wait; 0 where it tells of none."""
        relay = None if self.report is None else self.report.relay
        return 0.0 if relay is None else relay.oldest_row_age or 0.0

    @property
    def tick(self) -> float | None:
        """The newest tick that it had heard, by the clock of the database: its age and its time are by one clock."""
        report = self.report
        if report is None or report.watermark_age is None or self.heard_at is None:
            return None
        return (self.heard_at if report.now is None else report.now) - report.watermark_age

    @property
    def reached(self) -> float:
        """No later tick had reached it when it answered; where none has, since it subscribed."""
        if self.tick is not None:
            return self.tick + SAME_TICK
        since = None if self.report is None else self.report.since
        return inf if self.report is None or since is None else since + self.report.settings.max_clock_skew

    @property
    def awaits_ticks(self) -> bool:
        """Whether its freshness is to be proven: without a database nothing need ever be."""
        report = self.report
        return report is not None and (
            report.watermark_age is not None or report.relay is not None or report.registration is not None
        )

    @property
    def unproven_for(self) -> float:
        """Seconds for which nobody had proven its freshness when it answered."""
        report = self.report
        if report is None or not self.awaits_ticks:
            return 0.0
        if report.watermark_age is not None:
            return report.watermark_age
        return 0.0 if report.since is None else (self.heard_at or 0.0) - report.since

    def late(self, *, by_clock_here: bool = False) -> bool:
        """Whether that is longer than a few ticks take: by its clock, or by both where its own is ahead of the one here."""
        interval = 0.0 if self.report is None else self.report.settings.tick_interval
        return self.unproven_for - (self.ahead if by_clock_here else 0.0) > LATE_TICKS * interval + LATE
