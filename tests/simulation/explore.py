"""Explicit-state exploration: every state that a small world can reach, breadth first, with the shortest trace to a fault."""

import gc
import marshal
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from .copying import copied


class BrokenError(Exception):
    """An invariant does not hold."""


class World(Protocol):
    """A state. Worlds are copied by `copying.copied`; equal keys mean that nothing that follows can differ."""

    def key(self) -> Hashable: ...
    def actions(self) -> Iterator[tuple[str, Callable[[Any], None]]]: ...

    def arrive(self) -> None:
        """Ends each action: what depends on the way to this state, too, is asked here, and noted for the next one."""

    def check(self) -> None:
        """Asks what must hold in a state; once for each of them, so it changes nothing and looks at what the key tells."""


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
    seen = {_digest(world.key())}
    steps: list[tuple[int, str]] = [(-1, "start")]
    frontier: deque[tuple[int, World]] = deque([(0, world)])
    transitions = 0
    with _without_collecting():
        while frontier:
            number, state = frontier.popleft()
            actions = list(state.actions())
            for left, (label, act) in enumerate(actions, 1 - len(actions)):
                successor = copied(state) if left else state  # nobody needs it after its last action
                transitions += 1
                try:
                    act(successor)
                    successor.arrive()
                    key = _digest(successor.key())
                    if key in seen:
                        continue
                    successor.check()
                except BrokenError as broken:
                    return Explored(len(seen), transitions, [*_trace(steps, number), label], str(broken))
                seen.add(key)
                frontier.append((len(steps), successor))
                steps.append((number, label))
                assert len(seen) <= most, f"more than {most} states"
    return Explored(len(seen), transitions)


def _digest(key: Hashable) -> Hashable:
    """A key has kilobytes, and there are hundreds of thousands of them: 16 bytes stand for it."""
    try:
        return blake2b(marshal.dumps(key, 2), digest_size=16).digest()
    except ValueError:  # holds what `marshal` does not know
        return key


@contextmanager
def _without_collecting() -> Iterator[None]:
    """What an exploration keeps is no garbage, and looking through it again and again takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _trace(steps: list[tuple[int, str]], number: int) -> list[str]:
    labels: list[str] = []
    while number > 0:
        number, label = steps[number]
        labels.append(label)
    return labels[::-1]
