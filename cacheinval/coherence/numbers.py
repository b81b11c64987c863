"""The numbers that each origin gives its messages, by which it shows that one is missing."""

from collections import OrderedDict
from collections.abc import Mapping

from cacheinval.coherence.counters import Counters

__all__ = ["Numbers"]

MAX_ORIGINS = 10_000
MAX_ORIGINS_KEPT = 1_000


class Numbers:
    """The last number of each origin that has been heard of since the subscription began."""

    def __init__(self, counters: Counters) -> None:
        self.seqs: OrderedDict[str, int] = OrderedDict()
        self._counters = counters
        self._told = 0

    def start_over(self, seqs: Mapping[str, int] | None = None) -> None:
        """Nothing is known but `seqs`."""
        self.seqs.clear()
        self.seqs.update(seqs or {})

    def latest(self) -> dict[str, int]:
        """Those of the origins heard of most recently, to be kept."""
        return dict(list(self.seqs.items())[-max(MAX_ORIGINS_KEPT, self._told) :])

    def missing_before_tick(self, numbers: Mapping[str, int], *, baselined: bool) -> bool:
        """Whether a message is missing that a tick knows to be confirmed, by all the `numbers` that it tells.

        All are looked at, so that what is missing is counted once. `baselined`: an earlier tick has told every origin.
        """
        self._told = len(numbers)
        behind = [self.is_behind(*number, unknown_counts=baselined) for number in numbers.items()]
        return any(behind)

    def is_behind(self, origin: str, seq: int, *, unknown_counts: bool) -> bool:
        """Whether a confirmed message of `origin` has not arrived; from here on it counts as known to be missing."""
        last = self.seqs.get(origin)
        self._note(origin, max(seq, last or 0))
        return seq > (last or 0) and (last is not None or unknown_counts)

    def in_sequence(self, origin: str, seq: int, *, baselined: bool) -> bool:
        """Whether no message of `origin` is missing before this one, which has arrived."""
        last = self.seqs.get(origin)
        if last is not None and seq <= last:
            self._counters.duplicates += 1
            return True
        self._note(origin, seq)
        if last is None:
            # A tick has told the numbers of every channel there was: this one is new, and begins with 1.
            return seq == 1 or not baselined
        return seq == last + 1

    def _note(self, origin: str, seq: int) -> None:
        self.seqs[origin] = seq
        self.seqs.move_to_end(origin)
        # Those of the present tick are not forgotten: the next one would tell them as if they had been missed.
        if len(self.seqs) > max(MAX_ORIGINS, 2 * self._told):
            self.seqs.popitem(last=False)
