"""What the explorations saw, told at the end of the run: totals after `make test`, everything after `make simulation`."""

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["PROPERTY", "lines"]

PROPERTY = "simulation"
"""The name under which a test records what it saw; properties travel from the processes that run tests."""

Seen = dict[str, Any]


def lines(seen: Sequence[Seen], full: bool) -> Iterator[str]:
    """The summary, `full` with a row for each world and the trace that caught each mutant."""
    worlds = [one for one in seen if one["caught"] is None]
    mutants = [one for one in seen if one["caught"] is not None]
    if full:
        yield from _worlds(worlds)
        yield from _mutants(mutants)
    if worlds:
        states, transitions = (sum(one[what] for one in worlds) for what in ("states", "transitions"))
        seconds = sum(one["seconds"] for one in seen)
        yield f"{len(worlds)} worlds: {states:,} states, {transitions:,} transitions; {seconds:.0f} s of processor with the mutants"
    if mutants:
        longest = max(len(one["trace"]) for one in mutants)
        yield f"{len(mutants)} mutants caught, by traces of at most {longest} steps"


def _worlds(worlds: Sequence[Seen]) -> Iterator[str]:
    width = max((len(one["name"]) for one in worlds), default=0)
    if worlds:
        yield f"{'world':{width}}  {'states':>9}  {'transitions':>11}  {'seconds':>7}"
    for one in worlds:
        yield f"{one['name']:{width}}  {one['states']:9,}  {one['transitions']:11,}  {one['seconds']:7.1f}"
    if worlds:
        yield ""


def _mutants(mutants: Sequence[Seen]) -> Iterator[str]:
    for one in mutants:
        yield f"{one['name']}: {one['caught']}"
        yield f"    after {len(one['trace'])} steps: {'; '.join(one['trace'])}"
    if mutants:
        yield ""
