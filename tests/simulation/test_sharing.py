"""A cache outside the process, and two instances that fill and evict it."""

import pytest

import cacheinval.coherence as rules

from .conftest import Exploring
from .sharing import EXTENTS, SHARING_MUTANTS, SharingMutant, sharing


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", EXTENTS)
def test_no_instance_is_served_what_another_stored_too_late(exploring: Exploring, name: str) -> None:
    exploring(name, sharing(rules, EXTENTS[name]), 100_000)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", SHARING_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_line_is_caught_with_two_instances(exploring: Exploring, mutant: SharingMutant) -> None:
    exploring(mutant.name, mutant.world(), 100_000, caught=True)
