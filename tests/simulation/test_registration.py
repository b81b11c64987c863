"""After a complete receipt nobody serves the old value, in every order of events; and what is wrong is noticed."""

from dataclasses import dataclass, replace

import pytest

import cacheinval.coherence as rules

from .changing import changed
from .conftest import Exploring
from .registration import Waiting, registering

LATE = Waiting(registrations=1, lease=3, until=4)
LAPSES = Waiting(starts_registered=True, registrations=1, loads=1, lease=3, until=6)
HUNG = Waiting(hung_loads=True, registrations=1, lease=3, until=3, staleness=1)
LEAVES = Waiting(starts_registered=True, leaves=1, registrations=1, loads=1, lease=3, until=4)
TAKEN_OVER = Waiting(starts_registered=True, restarts=1, registrations=2, loads=1, until=5)
BEHIND = replace(LATE, apart=-100)
AHEAD = replace(LAPSES, apart=100)
TAKEN_OVER_BEHIND = replace(TAKEN_OVER, apart=-100)

SPANS = {
    "an instance that registers late": LATE,
    "a lease that ends, for whoever is cut off or frozen": LAPSES,
    "loads that hang": HUNG,
    "an instance that leaves": LEAVES,
    "a cache that outlives its process": TAKEN_OVER,
    "a database whose clock is behind": BEHIND,
    "a database whose clock is ahead": AHEAD,
    "a cache that outlives its process, and a database whose clock is behind": TAKEN_OVER_BEHIND,
}


@dataclass(frozen=True)
class Mutant:
    """A fault, where it shows, and how it is made: a changed line of the rules, or a fault of the span's."""

    name: str
    span: Waiting
    line: str = ""
    instead: str = ""


MUTANTS = [
    Mutant(
        "entries from before the registration are served",
        LATE,
        "return now < self.until and load_started > self.since",
        "return now < self.until",
    ),
    Mutant(
        "served after the lease lapsed",
        LAPSES,
        "return now < self.until and load_started > self.since",
        "return load_started > self.since",
    ),
    Mutant(
        "an entry served without asking for the registration",
        LATE,
        "if self._registers and not self._trust.registration.covers(entry.load_started, now):",
        "if False:",
    ),
    Mutant(
        "m read before the commit",
        Waiting(registrations=1, lease=3, until=4, counts_before_commit=True),
    ),
    Mutant(
        "the lease counted from the answer",
        LAPSES,
        "self._counted_until = sent + self.lease",
        "self._counted_until = now + self.lease",
    ),
    Mutant(
        "a hole forgotten where the answer came late",
        LAPSES,
        "            return self._counted_until\n        # Another",
        "            return math.inf\n        # Another",
    ),
    Mutant(
        "a load from before the registration shared with late readers",
        HUNG,
        "return all(one.started > now or covers(one.started, now) for one in load.whole())",
        "return True",
    ),
    Mutant(
        "safe by time a second too early",
        LAPSES,
        "self.committed_at + one.max_staleness",
        "self.committed_at + one.max_staleness - 1",
    ),
    Mutant(
        "served after leaving",
        LEAVES,
        "            self.until, self.since = -math.inf, math.inf\n            self.standing.shake()\n\n    def covers",
        "            pass\n\n    def covers",
    ),
    Mutant(
        "the lease counted by the database's clock",
        AHEAD,
        "self._counted_until = sent + self.lease",
        "self._counted_until = told + self.lease",
    ),
    Mutant(
        "a cache in the process that counts since when the database says",
        BEHIND,
        "counted_since = self._hole",
        "counted_since = min(self._hole, told)",
    ),
    Mutant(
        "a row taken over by a clock that cannot be compared with the database's",
        replace(TAKEN_OVER_BEHIND, until=4),
        "if self._outlives and not sent",
        "if False and not sent",
    ),
    Mutant(
        "a row taken over although its last renewal may have left a hole",
        Waiting(
            starts_registered=True,
            restarts=1,
            registrations=2,
            loads=1,
            until=5,
            keeps_since_to_the_end=True,
        ),
    ),
    Mutant(
        "a row taken over by an answer that came late",
        TAKEN_OVER,
        "return sent + self.lease / 2 - 2 * self._max_clock_skew if self._outlives",
        "return math.inf if self._outlives",
    ),
    Mutant(
        "a row that stands since it was executed, not since it was seen",
        Waiting(restarts=1, registrations=1, lease=4, until=4, loads=1, since_when_executed=True),
    ),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SPANS)
def test_nobody_serves_the_old_value_after_a_complete_receipt(exploring: Exploring, name: str) -> None:
    exploring(name, registering(rules, SPANS[name]), 200_000)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_line_is_caught(exploring: Exploring, mutant: Mutant) -> None:
    change = ((mutant.line, mutant.instead),) if mutant.line else ()
    wrong = changed(rules, change, f"waiting: {mutant.name}")
    exploring(mutant.name, registering(wrong, mutant.span), 200_000, caught=True)
