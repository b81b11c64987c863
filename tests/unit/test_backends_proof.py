"""What is kept of an instance in the cache that it is about."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest

from cacheinval.backends.proof import KeptProof
from cacheinval.coherence import ProofState
from cacheinval.coherence.marks import Marks


class Entries:
    """A cache outside the process that holds one proof, and bears marks."""

    def __init__(self, marks: Marks) -> None:
        self._marks, self._numbers = marks, itertools.count()
        self.held: str | None = None
        self.borne: list[str] = []

    async def change(self) -> bool:
        mark, before = f"m{next(self._numbers)}", list(self.borne)
        self._marks.replacing(mark)
        self.borne.insert(0, mark)
        self._marks.replaced(mark, before)
        return not self._marks.lost

    async def keep_proof(self, write: Callable[[str], str]) -> bool:
        assert self._marks.last
        self.held = write(self._marks.last)
        return await self.change()

    async def recall_proof(self, instance_id: str) -> tuple[str | None, list[str]]:
        return self.held, self.borne

    async def forget_proof(self) -> None:
        self.held, self.borne = None, []
        self._marks.start_over(None)


@pytest.mark.parametrize(
    "state",
    [ProofState({"a": 1}, 98.5, 90.0, "db", "16385"), ProofState({}, -math.inf, math.inf, None, None)],
    ids=["proven", "no tick yet"],
)
async def test_what_is_kept_is_what_the_next_process_begins_with(state: ProofState) -> None:
    marks = Marks()
    entries: Any = Entries(marks)
    kept = KeptProof(entries, "one", marks)
    assert await kept.restore() is None
    await entries.change()
    assert await kept.keep(state)
    assert await KeptProof(entries, "one").restore() == state


async def test_what_another_version_kept_counts_as_nothing_and_is_forgotten() -> None:
    marks = Marks()
    entries: Any = Entries(marks)
    await entries.change()
    entries.held = '{"mark": "m", "seqs": {"a": 1}, "checked_until": 98.5, "extends": 90, "source": "db"}'
    assert await KeptProof(entries, "one", marks).restore() is None
    assert entries.held is None


async def test_what_a_version_kept_that_knew_no_schemas_is_restored() -> None:
    marks = Marks()
    entries: Any = Entries(marks)
    await entries.change()
    entries.held = '{"after": "m0", "seqs": {"a": 1}, "checked_until": 98.5, "extends": 90, "source": "db"}'
    assert await KeptProof(entries, "one", marks).restore() == ProofState({"a": 1}, 98.5, 90.0, "db", None)


async def test_a_cache_that_went_back_is_given_up() -> None:
    marks = Marks()
    entries: Any = Entries(marks)
    kept, state = KeptProof(entries, "one", marks), ProofState({}, 98.5, 90.0, "db")
    await entries.change()
    before = list(entries.borne)
    await entries.change()
    entries.borne = before
    assert not await kept.keep(state)
    assert entries.held is None, "though it was written before it was known"
