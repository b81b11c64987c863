"""Random walks through worlds far too large to be explored: drawn, and shrunk when something breaks, by Hypothesis."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from zlib import crc32

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from .explore import BrokenError, World
from .freshness import Span

__all__ = ["LARGE", "STEPS", "follow", "walk"]

STEPS = 200

KINDS = {
    "rarely": (
        "lost", "killed", "breaks", "replaced", "frozen", "dropped", "purged", "garbled", "fails", "set to",
        "another database", "the exchange",
    ),
    "writing": ("commit", "a transaction", "relay 0 looks", "relay 1 looks"),
    "time": ("a second",),
    "reading": ("read",),
    "publishing": ("w0", "w1", "the lost", "the long"),
    "relaying": ("relay",),
}  # fmt: skip
"""What the names of actions of a kind say; the first kind that fits counts."""

WEIGHTS = {"rarely": 1, "writing": 2, "time": 3, "reading": 6, "publishing": 6, "relaying": 6, "instance": 8}
"""How often each kind is drawn: were all actions alike, nothing would go well for long enough to be broken later."""

Action = tuple[str, Callable[[Any], None]]

_EVERYTHING_AT_ONCE: dict[str, Any] = {
    "until": 15, "tagged": True, "readers": 3, "hung_loads": True, "writers": 2, "own": True,
    "relays": 2, "late_ticks": True, "batches": True, "silence": 5, "writes": 8, "slow_writes": 1, "unknown_commits": 1,
    "unrecorded": 1, "kills": 1, "renewals": 1, "lost_deletes": 1, "looks": 12, "drops": 2, "purges": 1, "losses": 2,
    "deaf": 1, "malformed": 2, "failures": 2, "clock_sets": 2,
}  # fmt: skip

LARGE = {
    "a cache in the process": Span(**_EVERYTHING_AT_ONCE, clocks=(0, 2)),
    "evicted by tag": Span(
        **_EVERYTHING_AT_ONCE, by_tag=True, keys=("k", "l"), clocks=(0, 2), foreign_ticks=1
    ),
    "a cache outside the process": Span(**_EVERYTHING_AT_ONCE, durable=True, keys=("k", "l"), clocks=(0, 2)),
    "clocks that differ": Span(**_EVERYTHING_AT_ONCE, staleness=2, skew=1, clocks=(-1, 0, 1), ahead=-1),
    "no limit of staleness": Span(**{**_EVERYTHING_AT_ONCE, "looks": 0}, staleness=None, clocks=(0, 2)),
}


def follow(world: World, numbers: Sequence[int]) -> list[str]:
    """Does with `world` what each number stands for, and returns what that was.

    A number stands for the same action wherever there is that action, so that most of a walk stays as it is when steps
    before are left out. Nothing is done for a 0, to which Hypothesis shrinks what does not matter.

    Raises:
        BrokenError: an invariant does not hold; its text ends with the trace.
    """
    trace: list[str] = []
    try:
        for number in filter(None, numbers):
            actions = list(world.actions())
            if not actions:
                break
            label, act = _pick(actions, number)
            trace.append(label)
            act(world)
            world.arrive()
            world.check()
    except BrokenError as broken:
        raise BrokenError(f"{broken}, after {len(trace)} steps: {'; '.join(trace)}") from None
    return trace


def _pick(actions: list[Action], number: int) -> Action:
    kinds: dict[str, list[Action]] = {}
    for action in actions:
        kinds.setdefault(_kind(action[0]), []).append(action)
    # The smallest of numbers that are drawn from exponential distributions with these rates: as often as they say.
    kind = min(kinds, key=lambda kind: -math.log(_drawn(number, kind)) / WEIGHTS[kind])
    return min(kinds[kind], key=lambda action: _drawn(number, action[0]))


def _drawn(number: int, name: str) -> float:
    return (crc32(f"{name} {number} {name}".encode()) + 1) / 2**32


@cache
def _kind(label: str) -> str:
    for kind, words in KINDS.items():
        if any(word in label for word in words) if kind == "rarely" else label.startswith(words):
            return kind
    return "instance"


def walk(make: Callable[[], World], walks: int, first_seed: int | None = None, steps: int = STEPS) -> None:
    """Walks so often through the world that `make` makes; always the same walks, unless there is a seed.

    Raises:
        BrokenError: the shortest walk that was found to break an invariant.
    """

    @settings(
        max_examples=walks,
        derandomize=first_seed is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(st.lists(st.integers(0, 99_999), min_size=steps, max_size=steps))
    def walks_through(numbers: list[int]) -> None:
        follow(make(), numbers)

    if first_seed is not None:
        walks_through = seed(first_seed)(walks_through)
    walks_through()
