"""Explicit-state exploration: every state that a small world can reach, breadth first, with the shortest trace to a fault."""

import pickle
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol


class BrokenError(Exception):
    """An invariant does not hold."""


class World(Protocol):
    """A state. Worlds are copied by pickling; equal keys mean that nothing that follows can differ."""

    def key(self) -> Hashable: ...
    def actions(self) -> Iterator[tuple[str, Callable[[Any], None]]]: ...
    def check(self) -> None: ...


@dataclass
class Explored:
    """What an exploration saw: a trace only where an invariant broke."""

    states: int
    transitions: int
    trace: list[str] | None = None
    broken: str | None = None


def explore(world: World, most: int) -> Explored:
    """Visits every state that can be reached from `world`.

    Raises:
        AssertionError: there are more than `most` states, so the model is not the small one that it was meant to be.
    """
    seen: dict[Hashable, int] = {world.key(): 0}
    steps: list[tuple[int, str]] = [(-1, "start")]
    frontier: deque[tuple[int, bytes]] = deque([(0, pickle.dumps(world))])
    transitions = 0
    while frontier:
        number, frozen = frontier.popleft()
        for label, act in pickle.loads(frozen).actions():
            successor = pickle.loads(frozen)
            transitions += 1
            try:
                act(successor)
                successor.check()
            except BrokenError as broken:
                return Explored(len(seen), transitions, [*_trace(steps, number), label], str(broken))
            key = successor.key()
            if key not in seen:
                seen[key] = len(steps)
                frontier.append((len(steps), pickle.dumps(successor)))
                steps.append((number, label))
                assert len(seen) <= most, f"more than {most} states"
    return Explored(len(seen), transitions)


def _trace(steps: list[tuple[int, str]], number: int) -> list[str]:
    labels: list[str] = []
    while number > 0:
        number, label = steps[number]
        labels.append(label)
    return labels[::-1]
