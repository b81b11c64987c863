"""What is kept of an instance in the cache that it is about."""

import math
from typing import Any

import pytest

from cacheinval.backends.proof import KeptProof
from cacheinval.coherence import ProofState


class Entries:
    """A cache outside the process that holds names only."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}

    async def look_up(self, name: str) -> str | None:
        return self.held.get(name)

    async def write(self, name: str, value: str, ttl: float) -> None:
        self.held[name] = value

    async def remove(self, name: str) -> None:
        self.held.pop(name, None)


@pytest.mark.parametrize(
    "state",
    [ProofState({"a": 1}, 98.5, 90.0, "db", "16385"), ProofState({}, -math.inf, math.inf, None, None)],
    ids=["proven", "no tick yet"],
)
async def test_what_is_kept_is_what_the_next_process_begins_with(state: ProofState) -> None:
    entries: Any = Entries()
    kept = KeptProof(entries, "one")
    assert await kept.restore() is None
    assert await kept.keep(state)
    assert await KeptProof(entries, "one").restore() == state


async def test_what_a_version_kept_that_knew_no_schemas_is_restored() -> None:
    entries: Any = Entries()
    entries.held["proof:one"] = (
        '{"mark": "m", "seqs": {"a": 1}, "checked_until": 98.5, "extends": 90, "source": "db"}'
    )
    assert await KeptProof(entries, "one").restore() == ProofState({"a": 1}, 98.5, 90.0, "db", None)
