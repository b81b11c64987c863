"""What ticks prove: how fresh the caches of this instance are (PROTOCOL.md, "Ticks and watermark")."""

import math
from dataclasses import dataclass
from typing import Literal

from cacheinval.coherence.standing import Standing
from cacheinval.messages import Tick

__all__ = ["NUMBERS_TOLD_FOR", "Break", "Proof", "ProofState"]

NUMBERS_TOLD_FOR = 1800.0
"""Seconds between two ticks after which the later one may leave out what was confirmed in between: the relay forgets
channels that were silent for an hour."""

Break = Literal[
    "no tick for too long", "ticks of another database than before", "the schema cacheinval was made anew"
]
"""Why a tick tells nothing of what was missed since the one before it."""


@dataclass(frozen=True, slots=True)
class ProofState:
    """What must be known of a cache outside the process when its queue is resumed; kept in that cache itself.

    `seqs` are the last numbers of the origins heard of most recently, `checked_until` is the tick by which they were
    last checked (-inf: none yet), `extends` since when loads may be extended, `source` whose ticks these were, and `schema`
    of which schema there.
    """

    seqs: dict[str, int]
    checked_until: float
    extends: float
    source: str | None
    schema: str | None = None


class Proof:
    """What ticks prove: all that was committed before the watermark has been evicted here (PROTOCOL.md, "Ticks and watermark").

    Args:
        max_staleness: seconds; None: nothing needs proof.
        max_clock_skew: seconds by which clocks of hosts and database may differ.
        standing: shaken when less is proven than before.
    """

    def __init__(self, max_staleness: float | None, max_clock_skew: float, standing: Standing) -> None:
        self._standing = standing
        self.watermark = -math.inf
        self.source: str | None = None
        self.refused: str | None = None
        """Why the last tick was not believed."""
        self.until = -math.inf
        """Reads that begin until then may be served what was loaded since `extends`, however long ago that was."""
        self.extends = math.inf
        self.checked_until = -math.inf
        """The newest tick by whose numbers it was seen that nothing is missing."""
        self._source_before: str | None = None
        self.schema: str | None = None
        """Of which schema `cacheinval` the last tick was that said so: also of a subscription before this one."""
        self._awaits_source = False
        self._max_staleness = -math.inf if max_staleness is None else max_staleness
        self._max_clock_skew = max_clock_skew

    @property
    def fresh_as_of(self) -> float:
        """All that was committed before this has been evicted here, by whatever clock it was committed."""
        return self.watermark - self._max_clock_skew

    @property
    def baselined(self) -> bool:
        """Whether a tick of this subscription has told the numbers from which gaps are counted."""
        return self.extends < math.inf

    def start_over(self) -> None:
        """A new subscription: its first tick tells numbers, and proves nothing of what was loaded before it."""
        self.watermark = self.until = self.checked_until = -math.inf
        self.extends = math.inf
        self._source_before = None
        self._standing.shake()

    def restore(self, state: ProofState) -> None:
        """Another process, or this one before, had come so far with the same queue and cache.

        The next tick goes on from there. Until then nothing is extended: the clock may have been set meanwhile.
        """
        self.start_over()
        self.checked_until, self.extends = state.checked_until, state.extends
        self._source_before = state.source
        self.schema = state.schema

    def breaks_off(self, tick: Tick) -> Break | None:
        """Why nothing can be told from `tick` about what was missed since the tick before it; None where it can."""
        if self._source_before not in (None, tick.source):
            return "ticks of another database than before"
        if tick.schema is not None and self.schema not in (None, tick.schema):
            return "the schema cacheinval was made anew"  # and what waited in it was told to nobody
        if self.baselined and tick.as_of - self.checked_until > NUMBERS_TOLD_FOR:
            return "no tick for too long"
        return None

    def heard(self, tick: Tick) -> None:
        """`breaks_off` has been asked about `tick`: the next one is compared to it, also where both came in one batch."""
        self.schema = tick.schema or self.schema

    def await_source(self) -> None:
        """The instance has a database of its own, and does not know yet which one: until `trust_only` nothing proves."""
        self._awaits_source = True

    def trust_only(self, source: str) -> None:
        """The source of truth of this instance is known: ticks of any other database prove nothing."""
        self._awaits_source = False
        if self.source not in (None, source):
            self.start_over()
        self.source = source

    def believes(self, tick: Tick, now: float) -> bool:
        """Whether `tick` comes from the one source and from no future."""
        if self._awaits_source:
            return False
        self.source = self.source or tick.source
        if tick.source != self.source:
            self.refused = f"a tick of another database: {tick.source}, not {self.source}"
            self.watermark = self.until = -math.inf  # who speaks for which is for a person to find out
            self._standing.shake()
            return False
        if tick.as_of > now + self._max_clock_skew:
            self.refused = f"a tick from the future, by {tick.as_of - now:.3f} s: the clocks differ"
            return False
        self.refused = None
        return True

    def checked(self, tick: Tick) -> None:
        """All that came before `tick` has been evicted here, as far as is known."""
        self.checked_until = max(self.checked_until, tick.as_of)
        self._source_before = tick.source

    def advance(self, tick: Tick, now: float) -> None:
        """All that came before `tick` has been evicted, and no number was missing."""
        if not self.baselined:
            self.extends = now
        self.watermark = max(self.watermark, tick.as_of)
        self.until = self.fresh_as_of + self._max_staleness

    def covers(self, load_started: float, now: float) -> bool:
        """Whether a read that begins at `now` may be given what was read by a load that began then."""
        return now <= self.until and load_started > self.extends
