"""A cache outside the process, without the process: what `SharedCache` is put over where no server is needed."""

import asyncio
import itertools
import pickle
from typing import Any

from cacheinval.backends.shared import Found


class Shelf:
    """Entries that bear stamps, and are there as long as each of these is the present one."""

    def __init__(self) -> None:
        self._new = map(str, itertools.count(1))
        self._stamps: dict[str, str] = {}
        self._entries: dict[str, tuple[bytes, float, float, Found]] = {}

    def _stamp(self, name: str) -> str:
        return self._stamps.get(name) or self._stamps.setdefault(name, next(self._new))

    async def find(self, key: str, tags: frozenset[str], model: Any, ttl: float) -> Found:
        await asyncio.sleep(0)
        borne = {tag: self._stamp(f"tag {tag}") for tag in tags}
        epoch, stamp = self._stamp("epoch"), self._stamp(f"key {key}")
        absent = Found(None, False, 0.0, 0.0, tags, epoch, stamp, borne)
        value, load_started, expires_at, found = self._entries.get(key, (b"", 0.0, 0.0, absent))
        present = value and (found.epoch, found.stamp) == (epoch, stamp)
        if not present or any(self._stamp(f"tag {tag}") != of_tag for tag, of_tag in found.stamps.items()):
            return absent
        return Found(
            self.decode(value, model),
            True,
            load_started,
            expires_at,
            frozenset(found.stamps),
            epoch,
            stamp,
            borne,
        )

    async def store(
        self, key: str, value: bytes, ttl: float, load_started: float, expires_at: float, found: Found
    ) -> None:
        await asyncio.sleep(0)
        self._entries[key] = (value, load_started, expires_at, found)

    async def evict(self, keys: Any, tags: Any, everything: bool) -> None:
        await asyncio.sleep(0)
        for name in [
            *(f"key {key}" for key in keys),
            *(f"tag {tag}" for tag in tags),
            *["epoch"] * everything,
        ]:
            self._stamps.pop(name, None)

    evict_ahead = evict

    async def close(self) -> None: ...

    def encode(self, value: Any) -> bytes:
        return pickle.dumps(value)

    def decode(self, value: bytes, model: Any) -> Any:
        return pickle.loads(value)
