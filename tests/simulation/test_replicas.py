"""Loads from replicas in every order of events that a small world allows; and that the world notices what is wrong."""

import pytest

import cacheinval.coherence as rules

from .conftest import Exploring
from .replicas import MUTANTS, SPANS, Mutant, replicated


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SPANS)
def test_what_a_replica_gives_is_never_staler_than_what_was_evicted(exploring: Exploring, name: str) -> None:
    exploring(name, replicated(rules, SPANS[name]), 200_000)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_line_is_caught(exploring: Exploring, mutant: Mutant) -> None:
    exploring(mutant.name, replicated(mutant.rules(), mutant.span), 200_000, caught=True)
