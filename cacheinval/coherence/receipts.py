"""Who has evicted what a write made stale, and who has not: decisions only, no I/O (PROTOCOL.md, "Waiting for the others")."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from cacheinval.coherence.registration import Registered

__all__ = ["Question", "Receipt", "check_wait"]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a write until its caller stopped waiting: *n of m* instances serve nothing of what it replaced.

    The write is committed, whatever stands here.

    >>> receipt = await client.invalidate("rate:EUR", wait=5.0)
    >>> receipt.confirmed, receipt.total, receipt.missing
    (1, 1, ())
    """

    confirmed: int
    """How many instances have evicted, or serve the old value no more because enough time has passed."""
    total: int | None
    """How many there are; None where nobody can say."""
    missing: tuple[tuple[str, str], ...] = ()
    """The id of each of the others, and the reason."""
    answered: tuple[str, ...] = ()
    """The ids of those that have said that they have evicted."""
    by_time: tuple[str, ...] = ()
    """The ids of those that did not answer, and whose `max_staleness` has passed."""
    reason: str | None = None
    """Why `total` is unknown."""

    @property
    def complete(self) -> bool:
        """Whether nobody is missing: then no registered instance serves the old value, if all have `max_staleness`.

        >>> receipt = await client.invalidate("rate:EUR", wait=5.0)
        >>> receipt.complete
        True
        """
        return self.total is not None and self.confirmed == self.total


def check_wait(wait: float) -> float:
    """`wait`, if anybody can wait that long.

    Raises:
        ValueError: it is not more than 0, or not finite.
    """
    if not 0 < wait < math.inf:
        raise ValueError(f"wait={wait!r}: accepted: seconds, more than 0 and finite")
    return wait


class Question:
    """What one write asks the others: have you evicted it?

    All times are seconds of one steady clock of the writer's.

    Args:
        wait: seconds that the caller is ready to wait; only named in reasons.
        max_clock_skew: seconds by which clocks of hosts may differ.
    """

    def __init__(self, wait: float, max_clock_skew: float) -> None:
        self.wait = wait
        self.committed_at: float | None = None
        self._names_something = True
        self._max_clock_skew = max_clock_skew
        self.messages: frozenset[str] = frozenset()
        """What it was sent in; empty as long as it was not."""
        self._left: str | None = None
        self._registered: dict[tuple[str, str], Registered] | None = None
        self._uncounted = "nobody has been counted yet"
        self._answers: dict[tuple[str, str], set[str]] = {}
        self._evicted: set[tuple[str, str]] = set()

    # What happens

    def committed(self, now: float, *, names_something: bool = True) -> None:
        """The write is known to be committed.

        One that names nothing itself may still have made something stale, which a trigger has recorded, or the caller
        past `Transaction.invalidate`: the relay sends that, and asks nobody. It is safe by time only.
        """
        self.committed_at = now
        self._names_something = names_something

    def sent(self, messages: Collection[str]) -> None:
        """These messages together say what is stale: whoever has answered each of them has evicted all of it."""
        self.messages = frozenset(messages)

    def left(self, reason: str) -> None:
        """The broker has not confirmed them; what the relay sends later asks for no answer."""
        self._left = reason

    def answered(self, who: tuple[str, str], message: str) -> None:
        """The instance with this id and session has evicted what `message` says."""
        if message in self.messages:
            answers = self._answers.setdefault(who, set())
            answers.add(message)
            if len(answers) == len(self.messages):
                self._evicted.add(who)

    def evicted(self, who: tuple[str, str]) -> None:
        """This instance is known to have evicted after the commit, in each of its caches."""
        self._evicted.add(who)

    def counted(self, registered: Iterable[Registered]) -> None:
        """Who was registered in a snapshot taken after the commit.

        Whoever came later began with nothing older than the write, and whoever has left, or whose lease has ended, serves
        nothing any more: those count who are in every snapshot.
        """
        found = {(one.id, one.session): one for one in registered}
        if self._registered is not None:
            found = {who: one for who, one in self._registered.items() if who in found}
        self._registered = found

    def uncounted(self, reason: str) -> None:
        """Nobody could say who is registered."""
        self._uncounted = reason

    # What follows

    def complete(self, now: float) -> bool:
        """Whether nobody is missing any more."""
        return self._registered is not None and all(
            self._is_safe(who, one, now) for who, one in self._registered.items()
        )

    def next_change(self, now: float) -> float:
        """When, if nobody answers, the next one is safe by time; infinity: nobody will be."""
        registered = (self._registered or {}).items()
        later = (self._safe_at(one) for who, one in registered if not self._is_safe(who, one, now))
        return min(later, default=math.inf)

    def receipt(self, now: float) -> Receipt:
        """How it stands."""
        if self._registered is None:
            who_answered = tuple(sorted(one for one, _ in self._evicted))
            return Receipt(len(who_answered), None, answered=who_answered, reason=self._uncounted)
        answered, by_time, missing = [], [], []
        for who, one in sorted(self._registered.items()):
            if who in self._evicted:
                answered.append(one.id)
            elif self._is_safe(who, one, now):
                by_time.append(one.id)
            else:
                missing.append((one.id, self._why(who, one, now)))
        return Receipt(
            len(answered) + len(by_time),
            len(self._registered),
            tuple(missing),
            tuple(answered),
            tuple(by_time),
        )

    def _is_safe(self, who: tuple[str, str], one: Registered, now: float) -> bool:
        return who in self._evicted or now > self._safe_at(one)

    def _safe_at(self, one: Registered) -> float:
        if one.max_staleness is None or self.committed_at is None:
            return math.inf
        return self.committed_at + one.max_staleness + self._max_clock_skew

    def _why(self, who: tuple[str, str], one: Registered, now: float) -> str:
        answers, asked = len(self._answers.get(who, ())), len(self.messages)
        if not self._names_something:
            said = "this write names nothing itself, so nobody is asked"
        elif self._left is not None:
            said = f"not published: {self._left}; the relay will send it"
        elif not asked:
            said = f"not published within {self.wait:g} s"
        elif answers:
            said = f"{answers} of {asked} answers within {self.wait:g} s"
        else:
            said = f"no answer within {self.wait:g} s"
        if one.max_staleness is None:
            until = "not safe until it answers" if self._names_something else "nothing says when it is safe"
            return f"{said}; it has no max_staleness: {until}"
        left = self._safe_at(one) - now
        return f"{said}; safe in {left:.1f} s (its max_staleness is {one.max_staleness:g} s)"
