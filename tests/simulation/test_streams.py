"""Reading on in a stream where one has left it, whatever happens to the stream and to the connection."""

import pytest

import cacheinval.coherence as rules

from .conftest import Exploring
from .streams import COURSES, STREAM_MUTANTS, StreamMutant, reading


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", COURSES)
def test_nothing_old_is_served_after_reading_on(exploring: Exploring, name: str) -> None:
    exploring(name, reading(rules, COURSES[name]), 100_000)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mutant", STREAM_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_changed_line_is_caught_in_streams(exploring: Exploring, mutant: StreamMutant) -> None:
    exploring(mutant.name, mutant.world(), 100_000, caught=True)
