"""The rules by which a cache stays honest (PROTOCOL.md, "The rules"), as plain objects.

No I/O, no clock, no tasks: this package is told what happened and at what time, and answers what may be served, joined
and stored, what is to be evicted, and what a write still owes. Nothing here suspends, so a question and the act that
follows its answer are one step as long as the caller awaits nothing in between.
"""

import math

from cacheinval.coherence.counters import Counters, Gap, GapReason
from cacheinval.coherence.entries import NO_TAGS, Entry, Moment
from cacheinval.coherence.epochs import Epochs
from cacheinval.coherence.evictions import INVALIDATED, Eviction, higher
from cacheinval.coherence.loads import Load, Loads
from cacheinval.coherence.marks import Marks
from cacheinval.coherence.numbers import Numbers
from cacheinval.coherence.outcomes import Owed, WriteOutcome, outcome_of_error, owed_after
from cacheinval.coherence.position import Position
from cacheinval.coherence.proof import ProofState
from cacheinval.coherence.registration import Registration
from cacheinval.coherence.serving import Serving
from cacheinval.coherence.trust import SUSPECT_AGE, Matter, Trust
from cacheinval.messages import Beat, Invalidate, Message, Probe, Tick, Unknown

__all__ = [
    "INVALIDATED",
    "NO_TAGS",
    "SUSPECT_AGE",
    "Coherence",
    "Entry",
    "Eviction",
    "GapReason",
    "Load",
    "Matter",
    "Moment",
    "Owed",
    "ProofState",
    "WriteOutcome",
    "higher",
    "outcome_of_error",
    "owed_after",
]

GAP_INTERVAL = 1.0
"""Seconds between two epochs begun for gaps: a flood of them costs one reset a second."""


class Coherence:
    """Decides for the caches of one instance. Times are seconds of one clock (see `cacheinval.clock`).

    Args:
        max_staleness: seconds; how old a served value may be. None: eventual consistency.
        max_clock_skew: seconds by which clocks of hosts and database may differ.
        gap_interval: seconds between two epochs begun for gaps, one second if None. 0 for a cache outside the process:
            a gap that was put off is forgotten when the process ends, and such a cache outlives it.
        max_replica_lag: seconds by which a replica that loaders read may lag behind the primary.
        registration: under which alone anything is served, if it is required; None: nothing depends on any.
        in_front: entries are kept in this process, too, in front of a cache outside it.
    """

    def __init__(
        self,
        max_staleness: float | None = None,
        max_clock_skew: float = 0.1,
        gap_interval: float | None = None,
        max_replica_lag: float = 30.0,
        registration: Registration | None = None,
        in_front: bool = False,
    ) -> None:
        self._in_front = in_front
        self._gap_interval = gap_interval
        self.registration = registration or Registration()
        self.standing = self.registration.standing
        self.counters = Counters()
        self._trust = Trust(max_staleness, max_clock_skew, self.registration)
        self.proof = self._trust.proof
        self._epochs = Epochs(self.standing)
        self.loads = Loads(self._trust, self._epochs, self.counters, max_replica_lag)
        self.marks = Marks()
        self.serving = Serving(self._trust, self._epochs, self.marks, max_clock_skew)

        self._numbers = Numbers(self.counters)
        self._echoes: set[tuple[str, int]] = set()
        self.position = Position()
        self._subscribed = False
        self._lost: str | None = None
        self._marker: str | None = None
        self._marker_passed = False
        self._tick_passed: Tick | None = None
        self._heard_at = -math.inf
        self.last_gap: Gap | None = None
        """For status: the last one, be it that the subscription was lost and a new one made."""
        self._last_gap = -math.inf
        self._gap_due: str | None = None

    # Evicting

    @property
    def epoch(self) -> int:
        """How many epochs have begun: entries of an earlier one are not served."""
        return self._epochs.epoch

    def evict(self, eviction: Eviction, now: float) -> None:
        """Voids the loads that `eviction` concerns, and forgets what it may not serve; the cache then drops entries."""
        self.loads.floors.note(eviction.keys, eviction.versions, eviction.tags, now)
        if eviction.everything:
            self.loads.floors.note_everything(now)
            self._begin_epoch()
            return
        self.loads.void(eviction.keys)
        if eviction.tags:
            self._epochs.evict_tags(eviction.tags)

    def _begin_epoch(self) -> None:
        self._epochs.begin()
        self.counters.epochs += 1
        self.loads.void_all()

    # Trust in the subscription

    @property
    def suspect(self) -> str | None:
        """Why this instance may have missed something, or None."""
        return self._trust.suspect

    def doubt(self, about: Matter, reason: str) -> None:
        """From now on this instance is suspect, until `settle` is called for the same matter."""
        self._trust.doubt(about, reason)

    def settle(self, about: Matter) -> None:
        """The doubt about this matter is over."""
        self._trust.settle(about)

    def lost(self, reason: str) -> None:
        """The subscription is lost: connection, channel, consumer or queue."""
        self._subscribed = False
        self._lost = self._lost or reason  # what follows from the first one explains nothing
        self._marker, self._marker_passed = None, False
        self._tick_passed = None
        self.position.leave()
        self.doubt("subscription", self._lost)

    def joined_anew(self, now: float) -> Eviction:
        """A new queue receives from now on; what was published before may have been missed. Evict, then `trust`."""
        if self._lost is not None:
            self.last_gap, self._lost = Gap(now, f"new subscription: {self._lost}"), None
        self._subscribed = True
        self._heard_at = now
        self._begin_to_count()
        self.position.forget()
        self.position.begin()
        self.doubt("subscription", "new subscription: not cleared yet")
        return Eviction(everything=True, reason="new subscription")

    def _begin_to_count(self) -> None:
        self._numbers.start_over()
        self._echoes.clear()
        self.proof.start_over()

    def resumed(self, marker: str, now: float, state: ProofState | None) -> Eviction | None:
        """The queue was still there; the instance is behind until it has processed `marker`, a probe of its own.

        Without the `state` that was kept with the cache, messages may have been missed before: everything has to go. What
        this process holds in front of that cache is refused in any case, as are its loads: another process of the same
        name may have had the queue meanwhile, and has evicted outside, but not here.
        """
        self._subscribed, self._lost = True, None
        if self._in_front:
            self._begin_epoch()
        self._heard_at = now
        self._marker, self._marker_passed = marker, False
        self.loads.floors.note_everything(now)  # what was evicted before this process began is not known
        self.doubt("subscription", "catching up with the queue")
        if state is None:
            self._numbers.start_over()
            self.proof.start_over()
            return self.gap("nothing kept with the cache", now)
        self._numbers.start_over(state.seqs)
        self.proof.restore(state)
        return None

    def continued(self, marker: str, now: float) -> None:
        """The stream is read again from `position`; the instance is behind until it has processed `marker`, a probe of its own.

        Nothing has to go: the first message has to be the one that was read there, or it is a gap, and those that came
        since follow it. What this process knows of numbers and ticks holds, as if it had not been away.
        """
        self._subscribed, self._lost = True, None
        self._heard_at = now
        self._marker, self._marker_passed = marker, False
        self.position.begin()
        self.doubt("subscription", "catching up with the stream")

    def proof_state(self) -> ProofState:
        """What to keep with a cache outside the process, before that is acknowledged which led to it."""
        proof = self.proof
        return ProofState(
            self._numbers.latest(), proof.checked_until, proof.extends, proof.source, proof.schema
        )

    @property
    def subscribed(self) -> bool:
        """Whether a queue of this instance receives what is published."""
        return self._subscribed

    @property
    def marker(self) -> str | None:
        """The probe that is waited for, if any."""
        return self._marker

    def trust(self) -> None:
        """What `joined_anew` asked for is evicted: the subscription can be relied on, unless it was lost meanwhile."""
        if self._subscribed:
            self.settle("subscription")

    def evicted(self, now: float) -> None:
        """All that `received` has answered so far is evicted, in every cache. Acknowledge after this, never before."""
        self.position.evicted()
        if self._marker_passed:
            self._marker, self._marker_passed = None, False
            self.trust()
        tick, self._tick_passed = self._tick_passed, None
        if tick is None:
            return
        self.proof.checked(tick)
        if self.suspect is None:
            self.proof.advance(tick, now)

    # What arrives

    def received(
        self, message: Message | Unknown | None, now: float, offset: int | None = None
    ) -> Eviction | None:
        """What has to go because `message` arrived at `now`; None where nothing has to.

        Args:
            message: None if it cannot be understood: it may have been an invalidation of anything.
            offset: its place in a stream; None where it came by a queue.
        """
        self._heard_at = now
        if offset is None:
            return self._received(message, now)
        if self.position.recognises(offset, message):
            return None
        missing = self.position.passes(offset, message)
        if missing is None:
            return self._received(message, now)
        self._begin_to_count()  # or each origin of which something is missing would be a gap of its own
        self._tick_passed = None  # it told the numbers from which nothing is counted any more
        gap = self.gap(missing, now)
        asked = self._received(message, now)  # in any case, since it may be the marker, or tell a number
        return gap or asked

    def _received(self, message: Message | Unknown | None, now: float) -> Eviction | None:
        if message is None:
            return self.gap("malformed message", now)
        if isinstance(message, Invalidate):
            return self._received_invalidate(message, now)
        if isinstance(message, Probe):
            # The marker counts only once what came before it is evicted: see `evicted`.
            self._marker_passed = self._marker_passed or message.id == self._marker
        elif isinstance(message, Tick):
            return self._received_tick(message, now)
        elif isinstance(message, Beat):
            if self._numbers.is_behind(message.origin, message.seq, unknown_counts=False):
                return self.gap("messages missing before a beat", now)
        elif isinstance(message, Unknown):
            self.counters.unknown_messages += 1
        return None

    def _received_invalidate(self, message: Invalidate, now: float) -> Eviction | None:
        if message.origin is not None and message.seq is not None:
            own = (message.origin, message.seq) in self._echoes
            self._echoes.discard((message.origin, message.seq))  # expected once, whatever comes of it
            if not self._numbers.in_sequence(message.origin, message.seq, baselined=self.proof.baselined):
                gap = self.gap("missing messages", now)
                return gap or _asked_by(message)
            if own:
                self.counters.skipped_echoes += 1
                return None
        return _asked_by(message)

    def _received_tick(self, tick: Tick, now: float) -> Eviction | None:
        self.counters.ticks += 1
        if not self.proof.believes(tick, now):
            self.counters.refused_ticks += 1
            return None
        numbers = {**tick.seqs, tick.origin: tick.seq}
        # Before the watermark may move.
        missing = self._numbers.missing_before_tick(numbers, baselined=self.proof.baselined)
        break_ = self.proof.breaks_off(tick)
        self.proof.heard(tick)
        if break_ is not None:
            self.proof.start_over()
            self._tick_passed = tick  # the first one of what begins with this gap
            return self.gap(break_, now)
        if missing:
            return self.gap("messages missing before a tick", now)
        self._tick_passed = tick
        return None

    def expect_echo(self, origin: str, seq: int) -> None:
        """This message is about to be published, and all it names has been evicted here, after its commit."""
        if self._subscribed:  # else it may never come, and what is expected would only grow
            self._echoes.add((origin, seq))

    def forget_echoes(self, origin: str) -> None:
        """The channel of `origin` is closed: whatever of it still arrives is treated as anybody's."""
        self._echoes = {echo for echo in self._echoes if echo[0] != origin}

    # Gaps

    def heard(self, now: float) -> None:
        """Something has arrived, so the subscription is alive; it waits, and nothing that it says is done yet."""
        self._heard_at = now

    def silent(self, now: float, limit: float) -> bool:
        """Whether nothing has arrived for `limit` seconds, although the subscription stands: anything may be missing."""
        return self._subscribed and now - self._heard_at > limit

    def gap(self, reason: GapReason, now: float) -> Eviction | None:
        """Messages may have been missed: everything has to go; None where it is put off (see `gap_due_at`)."""
        self._note_gap(reason, now)
        if now - self._last_gap < self._between_gaps:
            self.put_off_gap(reason)
            return None
        self._last_gap = now
        return Eviction(everything=True, reason=reason)

    def clock_stepped(self, now: float) -> Eviction:
        """The clock by which everything here was judged was set to `now`: nothing that was judged by it counts any more."""
        self._note_gap("clock stepped", now)
        self._last_gap = self._heard_at = -math.inf
        self.serving.forget_ages()
        self._tick_passed = None
        self.proof.start_over()
        self.loads.floors.forget(now)
        self.registration.forget()
        return Eviction(everything=True, reason="clock stepped")

    def _note_gap(self, reason: GapReason, now: float) -> None:
        self.counters.gaps += 1
        self.counters.gap_reasons[reason] = self.counters.gap_reasons.get(reason, 0) + 1
        self.last_gap = Gap(now, reason)

    def put_off_gap(self, reason: str) -> None:
        """An epoch has yet to begin for this gap; suspect until then."""
        self._gap_due = reason
        self.doubt("gap", reason)

    @property
    def _between_gaps(self) -> float:
        return GAP_INTERVAL if self._gap_interval is None else self._gap_interval

    @property
    def gap_due_at(self) -> float | None:
        """When an epoch that was put off is to begin, by `take_due_gap`."""
        return None if self._gap_due is None else self._last_gap + self._between_gaps

    def take_due_gap(self, now: float) -> Eviction | None:
        """The eviction that was put off, if its time has come; `gap_done` when it is done."""
        if self._gap_due is None or now < self._last_gap + self._between_gaps:
            return None
        reason, self._gap_due, self._last_gap = self._gap_due, None, now
        return Eviction(everything=True, reason=reason)

    def gap_done(self) -> None:
        """What `take_due_gap` answered is evicted."""
        if self._gap_due is None:
            self.settle("gap")


def _asked_by(message: Invalidate) -> Eviction:
    return Eviction(message.keys, message.tags, message.all, versions=tuple(message.versions))
