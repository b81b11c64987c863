"""Rows of the outbox put together as messages: decisions only, no I/O."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import msgspec

from cacheinval.coherence import higher
from cacheinval.errors import InvalidKeyError
from cacheinval.messages import Invalidate, check_names, split
from cacheinval.tracing import together

__all__ = ["Batch", "batches", "stamped"]

NAMES = 1_000  # in one message


@dataclass(slots=True)
class Batch:
    """Rows that can be deleted once all of `messages` have been confirmed.

    `oldest` is when the oldest of them was recorded, in seconds since 1970; `contexts` are those of the writes that were
    traced; `bad` says what is wrong with those that no message can express, in whose place everything is invalidated.
    """

    ids: list[UUID] = field(default_factory=list)
    keys: dict[str, int | None] = field(default_factory=dict)
    tags: dict[str, None] = field(default_factory=dict)
    everything: bool = False
    oldest: float = float("inf")
    contexts: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    @property
    def messages(self) -> list[Invalidate]:
        """What is to be published; versions are worth telling even where everything goes."""
        first = list(split(everything=True)) if self.everything else []
        return first + list(split(list(self.keys), list(self.tags), list(self.keys.values())))

    def has_room_for(self, names: int) -> bool:
        return not self.ids or len(self.keys) + len(self.tags) + names <= NAMES

    def add(
        self, keys: Sequence[str], versions: Sequence[int | None], tags: Sequence[str], everything: bool
    ) -> None:
        """Adds names; of two versions of a key the higher one counts, and none where one is unknown."""
        for key, version in zip(keys, versions, strict=True):
            self.keys[key] = higher(self.keys.get(key, version), version)
        self.tags.update(dict.fromkeys(tags))
        self.everything |= everything


def batches(rows: Iterable[Mapping[str, Any]]) -> Generator[Batch, None, None]:
    """The rows in as few batches as keep a message's size; equal names within a batch are said once."""
    batch = Batch()
    for row in rows:
        problem = _problem(row)
        keys, tags = (row["keys"], row["tags"]) if problem is None else ([], [])
        if not batch.has_room_for(len(keys) + len(tags)):
            yield batch
            batch = Batch()
        batch.ids.append(row["id"])
        batch.oldest = min(batch.oldest, row["recorded_at"])
        if row["context"]:
            batch.contexts = together([*batch.contexts, row["context"]])
        if problem is None:
            batch.add(keys, row["versions"] or [None] * len(keys), tags, row["everything"])
        else:
            batch.everything = True
            batch.bad.append(f"row {row['id']}: {problem}")
    if batch.ids:
        yield batch


def stamped(message: Invalidate, *, origin: str, seq: int, at: float, committed_at: float) -> Invalidate:
    """The message as it is sent."""
    return msgspec.structs.replace(message, origin=origin, seq=seq, at=at, committed_at=committed_at)


def _problem(row: Mapping[str, Any]) -> str | None:
    keys, versions, tags = row["keys"], row["versions"], row["tags"]
    if keys is None or tags is None:
        return "its names cannot be read"
    try:
        check_names(keys)
        check_names(tags, "tag")
    except InvalidKeyError as error:
        return str(error)
    if not (keys or tags or row["everything"]):
        return "it has neither keys nor tags"
    if versions is not None and (
        len(versions) != len(keys)
        or not all(version is None or isinstance(version, int) for version in versions)
    ):
        return f"its versions are not one for each of {len(keys)} keys"
    return None
