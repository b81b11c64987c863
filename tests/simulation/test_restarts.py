"""What must outlive a process together with its cache, with the process killed at any moment."""

import pytest

import cacheinval.coherence as rules

from .conftest import Exploring
from .restarts import LIVES, RESTART_MUTANTS, RestartMutant, restarting


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LIVES)
def test_nothing_old_is_served_whenever_the_process_ends(exploring: Exploring, name: str) -> None:
    exploring(name, restarting(rules, LIVES[name]), 100_000)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", RESTART_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_line_is_caught_over_restarts(exploring: Exploring, mutant: RestartMutant) -> None:
    exploring(mutant.name, mutant.world(), 100_000, caught=True)
