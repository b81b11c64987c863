"""For explorations: telling what they saw, and how long they may take."""

import time
from collections.abc import Callable

import pytest

from .explore import Explored, World, explore
from .reporting import PROPERTY

Exploring = Callable[..., Explored]


@pytest.fixture
def exploring(record_property: Callable[[str, object], None]) -> Exploring:
    """Explores a world and records, under a name, what was seen; where `caught` is asked for, a fault has to be found."""

    def exploring(name: str, world: World, most: int, *, caught: bool = False) -> Explored:
        began = time.process_time()
        explored = explore(world, most)
        if caught:
            assert explored.broken is not None, f"the mutant survived {explored.states} states"
        else:
            assert explored.broken is None, f"{explored.broken}, after: {explored.trace}"
            assert explored.states > 100
        record_property(
            PROPERTY,
            {
                "name": name,
                "states": explored.states,
                "transitions": explored.transitions,
                "seconds": time.process_time() - began,
                "caught": explored.broken,
                "trace": explored.trace or [],
            },
        )
        return explored

    return exploring
