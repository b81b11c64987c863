"""Random walks through worlds in which everything can happen at once; the same ones in every run."""

import re

import pytest

import cacheinval.coherence as rules
import cacheinval.outbox.ticks as ticks

from .changing import changed
from .explore import BrokenError
from .freshness import timed
from .mutants import MUTANTS
from .walks import LARGE, walk

WALKS = 300


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LARGE)
def test_nothing_breaks_on_long_walks(name: str) -> None:
    walk(lambda: timed(rules, ticks, LARGE[name]), WALKS)


@pytest.mark.timeout(600)
def test_a_walk_that_breaks_something_is_shrunk_to_a_short_one() -> None:
    removed = next(mutant for mutant in MUTANTS if mutant.name == "token check removed")
    wrong = changed(rules, removed.changes, "token check removed, walking")
    with pytest.raises(BrokenError) as broken:
        walk(lambda: timed(wrong, ticks, LARGE["a cache in the process"]), WALKS, steps=60)
    found = re.search(r"after (\d+) steps: (.*)", str(broken.value))
    assert found is not None
    assert int(found[1]) <= 30, found[2]  # fewer, where shrinking is not given up for want of time
    assert "stores and returns" in found[2]
