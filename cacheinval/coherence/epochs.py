"""What has been evicted of many entries at once, as a note of when: nobody walks over them."""

from collections.abc import Sequence

from cacheinval.coherence.standing import Standing

__all__ = ["Epochs"]

MAX_EVICTED_TAGS = 100_000


class Epochs:
    """Counts evictions of everything, by which an epoch begins, and of tags, by which a generation does.

    An entry or a load is out if it is of another epoch, or if one of its tags was evicted in a later generation than its own.

    Args:
        standing: shaken by each of them.
    """

    def __init__(self, standing: Standing) -> None:
        self.epoch = 1
        self.generation = 0
        self._standing = standing
        self._tag_evicted: dict[str, int] = {}
        self._tag_floor = 0

    def begin(self) -> None:
        """Everything is evicted."""
        self.epoch += 1
        self._standing.shake()
        self._tag_evicted.clear()

    def evict_tags(self, tags: Sequence[str]) -> None:
        """Everything with one of these is evicted."""
        self.generation += 1
        self._standing.shake()
        if len(self._tag_evicted) + len(tags) > MAX_EVICTED_TAGS:
            # Bounded memory: from here on every older entry with any tag counts as evicted.
            self._tag_evicted.clear()
            self._tag_floor = self.generation
        for tag in tags:
            self._tag_evicted[tag] = self.generation

    def tags_stand(self, tags: frozenset[str], generation: int) -> bool:
        """Whether none of `tags` was evicted since `generation`."""
        if generation == self.generation or not tags:
            return True
        evicted = self._tag_evicted
        return generation >= self._tag_floor and all(evicted.get(tag, 0) <= generation for tag in tags)
