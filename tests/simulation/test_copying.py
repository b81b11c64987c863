"""An exploration is worth what its copies are: that each is like the original, and shares nothing with it that may change."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

import cacheinval.coherence as rules
import cacheinval.outbox.ticks as ticks

from .copying import SHARED, attributes, copied
from .explore import World
from .freshness import timed
from .registration import registering
from .replicas import SPANS as REPLICAS
from .replicas import replicated
from .restarts import LIVES, restarting
from .sharing import EXTENTS, sharing
from .test_freshness import SPANS
from .test_registration import SPANS as WAITING
from .test_simulation import SHAPES
from .worlds import world

WALKS, STEPS = 3, 40
MAKING: dict[str, list[Callable[[], World]]] = {
    "storing and subscribing": [partial(world, rules, shape) for shape in SHAPES.values()],
    "freshness": [partial(timed, rules, ticks, span) for span in SPANS.values()],
    "sharing": [partial(sharing, rules, extent) for extent in EXTENTS.values()],
    "replicas": [partial(replicated, rules, span) for span in REPLICAS.values()],
    "restarts": [partial(restarting, rules, life) for life in LIVES.values()],
    "waiting": [partial(registering, rules, span) for span in WAITING.values()],
}


@pytest.mark.parametrize("kind", MAKING)
def test_a_copy_is_like_the_original_and_shares_nothing_that_may_change(kind: str) -> None:
    states = 0
    for state in _walked(kind):
        of_original: dict[int, int] = {}
        of_copy: dict[int, int] = {}
        copy = copied(state)
        assert _described(copy, of_copy) == _described(state, of_original)
        assert of_original.keys().isdisjoint(of_copy)
        states += 1
    assert states > 100


@pytest.mark.parametrize("kind", MAKING)
def test_asking_whether_a_state_is_right_changes_nothing(kind: str) -> None:
    for state in _walked(kind):
        key = state.key()
        state.check()
        assert state.key() == key


def _walked(kind: str) -> Iterator[Any]:
    chance = random.Random(kind)
    for make in MAKING[kind]:
        for _ in range(WALKS):
            state = make()
            for _ in range(STEPS):
                actions = list(state.actions())
                if not actions:
                    break
                _, act = chance.choice(actions)
                act(state)
                state.arrive()
                yield state


def _described(value: Any, met: dict[int, int]) -> Any:
    """All that can be reached from `value`, where what may change is numbered in the order in which it is met."""
    if type(value) in SHARED or isinstance(value, tuple):
        return id(value)
    if id(value) in met:
        assert not isinstance(value, dict | list | set), "held in two places"
        return "the same as", met[id(value)]
    met[id(value)] = len(met)
    if type(value).__name__ == "Eviction":
        return repr(value)  # of what was published once several may hold the same names, which nobody changes
    if isinstance(value, set):
        return frozenset(value)
    if isinstance(value, dict):
        return [(name, _described(held, met)) for name, held in value.items()]
    if isinstance(value, list):
        return [_described(held, met) for held in value]
    return type(value), [(name, _described(getattr(value, name), met)) for name in attributes(value)]
