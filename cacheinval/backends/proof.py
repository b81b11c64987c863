"""The proof state of an instance, kept in the cache outside the process that it is about."""

import msgspec

from cacheinval.backends.shared import SharedEntries
from cacheinval.coherence import ProofState
from cacheinval.coherence.marks import Marks

__all__ = ["KeptProof"]


class _Kept(msgspec.Struct):
    after: str
    """The newest mark that the instance knew of when this was written."""
    seqs: dict[str, int]
    checked_until: float | None  # JSON has no infinity: None stands for "not yet"
    extends: float | None
    source: str | None
    schema: str | None = None


class KeptProof:
    """Kept under the name of the instance, with the marks by which a cache that was emptied, or went back to what it held
    before, is noticed.

    Nobody else writes there: who has not got the instance's queue for itself keeps nothing. Should a process that was
    frozen write late, the other one sees a strange mark, which is a gap.

    Args:
        entries: the cache.
        instance_id: whose state this is.
        marks: what is known of its marks.
    """

    def __init__(self, entries: SharedEntries, instance_id: str, marks: Marks | None = None) -> None:
        self._entries, self._instance_id, self._marks = entries, instance_id, marks or Marks()

    async def restore(self) -> ProofState | None:
        """What was kept last, if it is still there, and the cache has not gone back since to what it held before; else
        nothing is kept from now on.

        Raises:
            CacheError: the cache cannot be used.
        """
        state = await self.look()
        if state is None:
            await self.forget()
        return state

    async def look(self) -> ProofState | None:
        """The same, and leaves everything as it is.

        Raises:
            CacheError: the cache cannot be used.
        """
        text, history = await self._entries.recall_proof(self._instance_id)
        try:
            kept = None if text is None else msgspec.json.decode(text, type=_Kept)
        except msgspec.DecodeError:
            kept = None  # of another version: as good as nothing
        if kept is None or not (history is None or self._marks.resumes(kept.after, history)):
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
        """Keeps `state`; False if the cache was emptied or went back, and then nothing is kept.

        Raises:
            CacheError: the cache cannot be used; `state` may have been kept.
        """

        def write(after: str) -> str:
            times = _finite(state.checked_until), _finite(state.extends)
            return msgspec.json.encode(_Kept(after, state.seqs, *times, state.source, state.schema)).decode()

        if await self._entries.keep_proof(write):
            return True
        await self.forget()
        return False

    async def forget(self) -> None:
        """From now on nothing is kept.

        Raises:
            CacheError: the cache cannot be used.
        """
        await self._entries.forget_proof()


def _finite(time: float) -> float | None:
    return time if abs(time) < float("inf") else None
