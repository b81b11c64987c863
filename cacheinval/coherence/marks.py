"""Whether a cache outside the process is the one that was evicted from, or has gone back to what it held before."""

from collections.abc import Iterable, Sequence

__all__ = ["MOST_MARKS", "Marks"]

MOST_MARKS = 100
"""Marks that may follow one that was not answered before it is forgotten."""

SPARE = 8  # marks that the cache is asked to tell besides those that are not answered


class Marks:
    """The marks that such a cache bears of this instance: one at a time, replaced in one step with each eviction there.

    A server that dies and takes up a snapshot, or a replica that was behind and takes its place, bears a mark that had been
    replaced, for it lacks what was done in the same step. Each mark is like no other, and the cache tells which ones it
    replaced: so it is known of each whether all that was evicted before is still evicted, also after some of which nobody
    knows whether they were put in place.
    """

    def __init__(self) -> None:
        self.last: str | None = None
        """The newest of which that is known; None while there is none."""
        self.at = 0
        """How many have been known, so that a look can say later since when it began."""
        self.lost = False
        """The cache went back, or was emptied: nothing in it stands until `start_over`."""
        self._evicting = False  # or has ever been
        self._issued: dict[str, int] = {}  # and after how many
        self._known: dict[str, int] = {}

    @property
    def history(self) -> int:
        """How many of the marks before the present one the cache has to tell."""
        return len(self._issued) + SPARE

    def start_over(self, mark: str | None) -> None:
        """The cache bears `mark`, and what this instance knows of it begins there."""
        self.lose()
        self.lost = False
        if mark is not None:
            self._know(mark)

    def resumes(self, after: str, history: Sequence[str]) -> bool:
        """Whether what was kept in the cache when `after` was the newest is of the history that it has, the newest first, and
        which is the one that this process knows of, if it does; then this instance goes on from there."""
        if self.lost or after not in history or (self.last is not None and self.last not in history):
            return False
        self.start_over(history[0])
        return True

    def lose(self) -> None:
        """The cache is not what it was."""
        self.last, self.lost = None, True
        self._known.clear()

    def replacing(self, mark: str) -> None:
        """`mark` is about to be put in the place of whatever is there. Without `replaced` nobody knows whether it was."""
        self._evicting = True
        self._issued[mark] = self.at
        oldest = next(iter(self._issued))
        if self._issued[oldest] < self.at - MOST_MARKS or len(self._issued) > MOST_MARKS:
            del self._issued[oldest]

    def replaced(self, mark: str, history: Iterable[str]) -> None:
        """`mark` is in place; `history`: those that were there before, the newest first, as many as are asked for."""
        self._issued.pop(mark, None)
        if self.lost or mark in self._known:
            return
        passed = []
        for earlier in (*history, None):
            if earlier == self.last:
                break
            if earlier is None or (earlier not in self._issued and earlier != mark):
                self.lose()
                return
            passed.append(earlier)
        for one in (*reversed(passed), mark):
            self._know(one)

    def _know(self, mark: str) -> None:
        self._issued.pop(mark, None)
        self.at += 1
        self.last, self._known[mark] = mark, self.at
        if len(self._known) > MOST_MARKS:
            del self._known[next(iter(self._known))]

    def stand(self, seen: Iterable[str | None], since: int) -> bool:
        """Whether a look that saw these marks saw a cache which lacks nothing that had been evicted when the look began.

        Of a process that has evicted nothing yet it lacks nothing.

        Args:
            since: `at` as it was then.
        """
        if self.last is None and not self._evicting:
            return True
        return all(mark is not None and self._known.get(mark, -1) >= since for mark in seen)
