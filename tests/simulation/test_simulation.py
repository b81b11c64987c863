"""The rules of storing, subscribing and acknowledging in every order of events that a small world allows."""

import pytest

import cacheinval.coherence as rules

from .changing import changed
from .conftest import Exploring
from .mutants import FEW_TAGS, MUTANTS, Mutant
from .worlds import Shape, world

SHAPES = {
    "three writes, three readers": Shape(writes=3, readers=3),
    "two keys with a shared tag": Shape(keys=("a", "b"), tagged=True, by_tag=True, writes=2, readers=2),
    "the same, three writes": Shape(keys=("a", "b"), tagged=True, by_tag=True, writes=3, readers=1),
    "tagged entries, evicted by key": Shape(keys=("a", "b"), tagged=True, writes=1, readers=2),
    "two publishing channels": Shape(keys=("a", "b"), writes=2, readers=1, origins=2, drops=1),
    "a channel replaced by another": Shape(writes=3, readers=1, renewals=1, drops=1),
    "one's own channel replaced": Shape(writes=2, readers=1, renewals=1, own=True, losses=1),
    "beats": Shape(writes=2, readers=1, drops=1, beats=2),
    "duplicates and redelivery": Shape(writes=2, readers=2, duplicates=1),
    "reconnection without a surviving queue": Shape(writes=2, readers=2, losses=1),
    "the same, entries kept": Shape(writes=2, readers=1, losses=2, keeps_entries=True),
    "the same, clearing slowly": Shape(writes=2, readers=1, losses=2, slow_join=True),
    "reconnection with a surviving queue": Shape(writes=2, readers=2, losses=1, resumes=True),
    "the same, in batches": Shape(writes=2, readers=1, losses=2, resumes=True, batches=True),
    "a dropped message, noticed by the next": Shape(keys=("a", "b"), writes=3, readers=1, drops=1),
    "malformed messages": Shape(writes=1, readers=2, malformed=2),
    "a commit that becomes visible late": Shape(writes=2, readers=1, unknown_commits=2),
    "own writes": Shape(writes=2, readers=2, own=True),
}
MOST = 100_000


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SHAPES)
def test_the_rules_hold_in_every_order_of_events(exploring: Exploring, name: str) -> None:
    exploring(name, world(rules, SHAPES[name]), MOST)


@pytest.mark.timeout(600)
def test_more_tags_than_are_kept_evict_too_much_rather_than_too_little(exploring: Exploring) -> None:
    few = changed(rules, FEW_TAGS, "few tags")
    shape = Shape(keys=("a", "b"), tagged=True, by_tag=True, own_tags=True, writes=2, readers=1)
    exploring("more tags than are kept", world(few, shape), MOST)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_line_is_caught(exploring: Exploring, mutant: Mutant) -> None:
    exploring(mutant.name, world(mutant.rules(), mutant.shape, mutant.glue), MOST, caught=True)
