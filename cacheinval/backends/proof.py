"""The proof state of an instance, kept in the cache outside the process that it is about."""

import secrets

import msgspec

from cacheinval.backends.shared import SharedEntries
from cacheinval.coherence import ProofState

__all__ = ["KeptProof"]

KEPT_FOR = 25 * 3600
"""Seconds; an hour longer than the queue that it belongs to outlives its consumer."""


class _Kept(msgspec.Struct):
    mark: str
    seqs: dict[str, int]
    checked_until: float | None  # JSON has no infinity: None stands for "not yet"
    extends: float | None
    source: str | None
    schema: str | None = None


class KeptProof:
    """Kept under the name of the instance; its mark changes each time, so that a cache which was emptied, or went back to
    what it held before, is noticed.

    Nobody else writes there: who has not got the instance's queue for itself keeps nothing. Should a process that was
    frozen write late, the other one sees a strange mark, which is a gap.
    """

    def __init__(self, entries: SharedEntries, instance_id: str) -> None:
        self._entries = entries
        self._name = f"proof:{instance_id}"
        # More than one where it is not known which write was the last to land.
        self._marks: set[str | None] = {None}

    async def restore(self) -> ProofState | None:
        """What was kept last, if it is still there.

        Raises:
            CacheError: the cache cannot be used.
        """
        kept = await self._read()
        self._marks = {None if kept is None else kept.mark}
        if kept is None:
            return None
        before, after = -float("inf"), float("inf")
        return ProofState(
            kept.seqs,
            before if kept.checked_until is None else kept.checked_until,
            after if kept.extends is None else kept.extends,
            kept.source,
            kept.schema,
        )

    async def keep(self, state: ProofState) -> bool:
        """Keeps `state`; False if what was kept last is not there any more, and then nothing is kept.

        Raises:
            CacheError: the cache cannot be used; `state` may have been kept.
        """
        kept = await self._read()
        if (None if kept is None else kept.mark) not in self._marks:
            await self.forget()
            return False
        mark = secrets.token_hex(8)
        self._marks.add(mark)
        times = _finite(state.checked_until), _finite(state.extends)
        known = _Kept(mark, state.seqs, *times, state.source, state.schema)
        await self._entries.write(self._name, msgspec.json.encode(known).decode(), KEPT_FOR)
        self._marks = {mark}
        return True

    async def forget(self) -> None:
        """From now on nothing is kept.

        Raises:
            CacheError: the cache cannot be used.
        """
        await self._entries.remove(self._name)
        self._marks = {None}

    async def _read(self) -> _Kept | None:
        text = await self._entries.look_up(self._name)
        try:
            return None if text is None else msgspec.json.decode(text, type=_Kept)
        except msgspec.DecodeError:
            return None  # of another version: as good as nothing


def _finite(time: float) -> float | None:
    return time if abs(time) < float("inf") else None
