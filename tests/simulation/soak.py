"""For minutes or hours: larger products explored, and walks that nobody has walked before.

    python -m simulation.soak --minutes 30 [--seed 1]       (from tests/)

Prints a line a minute; ends with 1, and with the trace, when something breaks.
"""

import argparse
import itertools
import random
import sys
import threading
import time
from collections.abc import Iterator

import cacheinval.coherence as rules
import cacheinval.outbox.ticks as ticks

from .explore import BrokenError, explore
from .freshness import Span, timed
from .walks import LARGE, walk
from .worlds import Shape, world

STATES = 400_000
"""For one product: with more, what was seen is told, and the next is begun."""

WALKS_AT_ONCE = 500

SHAPES = {
    "four writes, three readers": Shape(writes=4, readers=3),
    "two tagged keys, three writes, two readers": Shape(
        keys=("a", "b"), tagged=True, by_tag=True, writes=3, readers=2
    ),
    "two channels, replaced, messages dropped": Shape(
        keys=("a", "b"), writes=3, readers=1, origins=2, renewals=1, drops=1
    ),
    "a surviving queue, lost twice, late commits": Shape(
        writes=2, readers=2, losses=2, resumes=True, batches=True, unknown_commits=1
    ),
}
SPANS = {
    "two writes, two readers, ticks": Span(
        staleness=0, until=3, writes=2, readers=2, hung_loads=True, grace=True
    ),
    "two writers, channels replaced, drops": Span(
        staleness=0, until=3, writers=2, writes=2, renewals=1, drops=1, grace=True
    ),
    "two relays, zombies, ambiguous commits": Span(
        staleness=0, until=3, relays=2, looks=2, late_ticks=True, writes=0, unknown_commits=1, drops=1
    ),
    "a queue that survives, lost twice, failing evictions": Span(
        staleness=0, until=3, durable=True, losses=2, batches=True, failures=1
    ),
    "clocks set, gaps put off": Span(
        staleness=0,
        until=4,
        ahead=1,
        clocks=(0, 1),
        clock_sets=2,
        malformed=1,
        drops=1,
        looks=2,
        batches=True,
    ),
}


def main() -> int:
    """Runs until the time is over, or something breaks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    try:
        _soak(seed, time.monotonic() + 60 * options.minutes)
    except BrokenError as broken:
        print(f"broken: {broken}", flush=True)
        return 1
    return 0


class Seen:
    """How far it has come; tells it each minute, also while a product is explored."""

    def __init__(self) -> None:
        self.states = self.walks = 0
        threading.Thread(target=self._tell, daemon=True).start()

    def _tell(self) -> None:
        for minute in itertools.count(1):
            time.sleep(60)
            print(f"{minute} min: {self.states:,} states explored, {self.walks:,} walks", flush=True)


def _soak(seed: int, until: float) -> None:
    products, seen = _products(), Seen()
    while (now := time.monotonic()) < until:
        # Walks take half of the time, and all of it once the products are through.
        product = next(products, None)
        if product is not None:
            seen.states += product
        share = time.monotonic() + (time.monotonic() - now)
        while True:
            name = list(LARGE)[seed % len(LARGE)]
            walk(lambda name=name: timed(rules, ticks, LARGE[name]), WALKS_AT_ONCE, seed)  # type: ignore[misc]
            seen.walks += WALKS_AT_ONCE
            seed += 1
            if time.monotonic() >= min(share, until):
                break


def _products() -> Iterator[int]:
    worlds = [(name, world(rules, shape)) for name, shape in SHAPES.items()]
    timed_worlds = [(name, timed(rules, ticks, span)) for name, span in SPANS.items()]
    for name, start in [*worlds, *timed_worlds]:
        try:
            explored = explore(start, STATES)
        except AssertionError:
            print(f"{name}: more than {STATES:,} states, nothing broken so far", flush=True)
            yield STATES
            continue
        if explored.broken is not None:
            raise BrokenError(f"{name}: {explored.broken}, after: {'; '.join(explored.trace or [])}")
        print(f"{name}: {explored.states:,} states, {explored.transitions:,} transitions", flush=True)
        yield explored.states


if __name__ == "__main__":
    sys.exit(main())
