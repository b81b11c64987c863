"""What must outlive a process together with its cache, with the process killed at any moment."""

import pytest

import cacheinval.coherence as rules

from .explore import explore
from .restarts import LIVES, RESTART_MUTANTS, RestartMutant, restarting


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", LIVES)
def test_nothing_old_is_served_whenever_the_process_ends(name: str) -> None:
    explored = explore(restarting(rules, LIVES[name]), most=100_000)
    print(f"{name}: {explored.states} states, {explored.transitions} transitions")
    assert explored.broken is None, f"{explored.broken}, after: {explored.trace}"
    assert explored.states > 100


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mutant", RESTART_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_line_is_caught_over_restarts(mutant: RestartMutant) -> None:
    explored = explore(mutant.world(), most=100_000)
    assert explored.broken is not None, f"the mutant survived {explored.states} states"
    print(f"{mutant.name}: {explored.broken}, after: {'; '.join(explored.trace or [])}")
