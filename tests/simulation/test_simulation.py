"""The real rules in every order of events that a small world allows; and that the worlds notice what is wrong."""

import pytest

import cacheinval.coherence as rules
import cacheinval.outbox.ticks as ticks

from .explore import explore
from .freshness import Span, timed
from .mutants import MUTANTS, TIMED_MUTANTS, Mutant, TimedMutant, changed
from .worlds import Shape, world

SHAPES = {
    "three writes, two readers": Shape(writes=3, readers=2),
    "two writes, three readers": Shape(writes=2, readers=3),
    "two keys with a shared tag": Shape(keys=("a", "b"), tagged=True, by_tag=True, writes=1, readers=2),
    "the same, more writes": Shape(keys=("a", "b"), tagged=True, by_tag=True, writes=3, readers=1),
    "tagged entries, evicted by key": Shape(keys=("a", "b"), tagged=True, writes=1, readers=2),
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


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SHAPES)
def test_the_rules_hold_in_every_order_of_events(name: str) -> None:
    explored = explore(world(rules, SHAPES[name]), most=200_000)
    print(f"{name}: {explored.states} states, {explored.transitions} transitions")
    assert explored.broken is None, f"{explored.broken}, after: {explored.trace}"
    assert explored.states > 100


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_line_is_caught(mutant: Mutant) -> None:
    explored = explore(world(mutant.rules(), mutant.shape, mutant.glue), most=200_000)
    assert explored.broken is not None, f"the mutant survived {explored.states} states"
    print(f"{mutant.name}: {explored.broken}, after: {'; '.join(explored.trace or [])}")


SPANS = {
    "a write and a tick": Span(),
    "two ticks": Span(looks=2, until=4),
    "the first tick": Span(baselined=False, drops=1, until=4),
    "a dropped message": Span(drops=1),
    "a writer killed at any moment": Span(kills=1),
    "a lost subscription": Span(losses=1, until=4),
    "a long transaction": Span(writes=0, slow_writes=1),
    "loads that hang": Span(hung_loads=True, until=4),
    "another database's ticks": Span(foreign_ticks=1, until=4),
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", SPANS)
def test_no_hit_is_staler_than_promised(name: str) -> None:
    explored = explore(timed(rules, ticks, SPANS[name]), most=300_000)
    print(f"{name}: {explored.states} states, {explored.transitions} transitions")
    assert explored.broken is None, f"{explored.broken}, after: {explored.trace}"
    assert explored.states > 100


@pytest.mark.timeout(180)
@pytest.mark.parametrize("mutant", TIMED_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_line_is_caught_in_time(mutant: TimedMutant) -> None:
    wrong_rules = changed(rules, mutant.changes, mutant.name)
    wrong_ticks = changed(ticks, mutant.tick_changes, mutant.name + " ticks")
    explored = explore(timed(wrong_rules, wrong_ticks, mutant.span, mutant.relaying), most=300_000)
    assert explored.broken is not None, f"the mutant survived {explored.states} states"
    print(f"{mutant.name}: {explored.broken}, after: {'; '.join(explored.trace or [])}")
