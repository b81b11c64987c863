"""Loads from replicas in every order of events that a small world allows; and that the world notices what is wrong."""

import pytest

import cacheinval.coherence as rules

from .explore import explore
from .replicas import MUTANTS, SPANS, Mutant, replicated


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SPANS)
def test_what_a_replica_gives_is_never_staler_than_what_was_evicted(name: str) -> None:
    explored = explore(replicated(rules, SPANS[name]), most=200_000)
    print(f"{name}: {explored.states} states, {explored.transitions} transitions")
    assert explored.broken is None, f"{explored.broken}, after: {explored.trace}"
    assert explored.states > 100


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_line_is_caught(mutant: Mutant) -> None:
    explored = explore(replicated(mutant.rules(), mutant.span), most=200_000)
    assert explored.broken is not None, f"the mutant survived {explored.states} states"
    print(f"{mutant.name}: {explored.broken}, after: {'; '.join(explored.trace or [])}")
