"""Entries in a cache outside the process (Redis, Memcached), through aiocache's backends.

Nothing here is deleted by pattern. Each entry bears the stamps of the epoch, of its key and of each of its tags, as they
were looked up before its load began. Evicting removes or replaces a stamp, and whatever bears the old one is served no
more, by any instance, also when it is stored late.
"""

import hashlib
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from aiocache.base import BaseCache

from cacheinval.backends.serializing import Serializer, serializer
from cacheinval.backends.servers import Borne, ProofNames, new_stamp, over, text_of
from cacheinval.coherence.marks import Marks
from cacheinval.errors import CacheError

__all__ = ["Found", "SharedEntries"]

_PLAIN = re.compile(r"[!-~]{1,170}")  # Memcached takes 250 bytes, of which the prefix may need 76
_LONGEST_TTL = (
    30 * 86_400
)  # what is more is a date to Memcached; `expires_at` in the entry says when it really ends
_EPOCH = "epoch"
_ZLIB = "+zlib"
_COMPRESSION = 1  # most of what there is to gain, at a fraction of what the rest costs
JSON = serializer("json")
_STAMP_OUTLIVES = 3600
"""Seconds for which the stamp of a key outlives the first entry that bears it: with a later one it may go too soon, which
costs a load."""


class _Envelope(msgspec.Struct, omit_defaults=True):
    epoch: str
    stamp: str
    load_started: float
    expires_at: float
    stamps: dict[str, str]
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    """JSON; anything else follows the envelope, after a line feed."""
    form: str = "json"
    """How it is written: the name of a serializer, and how it is compressed, if it is."""


class Found(NamedTuple):
    """What one look into the cache gave: the entry, if its stamps are the present ones, and these."""

    value: Any
    present: bool
    load_started: float
    expires_at: float
    tags: frozenset[str]
    epoch: str
    stamp: str
    stamps: Mapping[str, str]
    marks: Borne = ()
    """What the cache bore of this instance at the time, where it may have gone back to what it held before."""


class SharedEntries:
    """The entries of one namespace in a cache outside the process.

    Every method raises `CacheError` when the cache cannot be used within `OPERATION_TIMEOUT`.

    Args:
        serializer: how values are written; entries that another one has written count as absent. JSON if None.
        compress_above: bytes; longer values are compressed, where that makes them shorter. 0: none.
        instance_id: who evicts, and keeps its proof state here. None: somebody who does not need to prove anything.
        marks: what is known of the marks of that instance.
    """

    def __init__(
        self,
        backend: BaseCache,
        namespace: str,
        serializer: Serializer | None = None,
        compress_above: int = 0,
        instance_id: str | None = None,
        marks: Marks | None = None,
    ) -> None:
        self._serializer = serializer or JSON
        self._compress_above = compress_above
        self._prefix = f"cacheinval:{namespace}:"
        names = None if instance_id is None else self._names_of(instance_id)
        self._server = over(backend, names, marks or Marks())

    async def find(self, key: str, tags: frozenset[str], model: Any, ttl: float = 0.0) -> Found:
        """The entry of `key`, and the stamps that an entry with `tags`, kept for `ttl` seconds, would have to bear if its
        load began now."""
        named = sorted(tags)
        names = [self._entry(key), self._name(_EPOCH), self._key(key), *map(self._tag, named)]
        (raw, *texts), marks = await self._server.look(names)
        epoch, stamp, *stamps = map(text_of, texts)
        known = dict(zip(named, stamps, strict=True))
        envelope, written = self._open(raw)
        others = sorted(set(envelope.stamps) - tags) if envelope else []
        if others:
            texts, again = await self._server.look(list(map(self._tag, others)))
            known |= zip(others, map(text_of, texts), strict=True)
            marks += again
        present = (
            envelope is not None
            and (envelope.epoch, envelope.stamp) == (epoch, stamp)
            and all(known[tag] == borne for tag, borne in envelope.stamps.items())
        )
        wanted = Found(
            None,
            False,
            0.0,
            0.0,
            tags,
            epoch or await self._create(self._name(_EPOCH)),
            stamp or await self._create(self._key(key), math.ceil(ttl) + _STAMP_OUTLIVES),
            {tag: known[tag] or await self._create(self._tag(tag)) for tag in named},
        )
        if envelope is None or not present:
            return wanted
        try:
            value = self.decode(_decompressed(written, envelope.form), model)
        except CacheError:
            return wanted  # written by another version of the model: load it again
        return wanted._replace(
            value=value,
            present=True,
            load_started=envelope.load_started,
            expires_at=envelope.expires_at,
            tags=frozenset(envelope.stamps),
            marks=marks,
        )

    async def store(
        self, key: str, value: bytes, ttl: float, load_started: float, expires_at: float, found: Found
    ) -> None:
        """Keeps `value`, as read by a load that began after `found` was looked up."""
        stamps = dict(found.stamps)
        envelope = _Envelope(found.epoch, found.stamp, load_started, expires_at, stamps)
        envelope.form, written = self._compressed(value)
        if envelope.form == "json":
            envelope.value, written = msgspec.Raw(written), b""
        raw = msgspec.json.encode(envelope) + (b"\n" + written if written else b"")
        await self._server.set(self._entry(key), raw, min(max(1, math.ceil(ttl)), _LONGEST_TTL))

    def _compressed(self, value: bytes) -> tuple[str, bytes]:
        name = self._serializer.name
        if self._compress_above and len(value) > self._compress_above:
            compressed = zlib.compress(value, _COMPRESSION)
            if len(compressed) < len(value):
                return name + _ZLIB, compressed
        return name, value

    def _open(self, raw: bytes | None) -> tuple[_Envelope | None, bytes]:
        """The envelope of an entry, and what is in it. None: what is there is not ours, or written by another version or
        under another setting; the next load replaces it."""
        head, _, written = (raw or b"").partition(b"\n")
        try:
            envelope = msgspec.json.decode(head, type=_Envelope)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None, b""
        if envelope.form.removesuffix(_ZLIB) != self._serializer.name:
            return None, b""
        if envelope.form == "json":
            return (None, b"") if envelope.value is msgspec.UNSET else (envelope, bytes(envelope.value))
        return envelope, written

    async def evict(self, keys: Sequence[str], tags: Sequence[str], everything: bool) -> None:
        """Makes sure that no instance is served what was stored before; and this one not either by a cache that goes back to
        before this."""
        await self._server.change_and_mark(*self._to_change(keys, tags, everything))

    async def evict_ahead(self, keys: Sequence[str], tags: Sequence[str], everything: bool) -> None:
        """The same without the latter: the eviction that follows sees to that."""
        await self._server.change(*self._to_change(keys, tags, everything))

    def _to_change(
        self, keys: Sequence[str], tags: Sequence[str], everything: bool
    ) -> tuple[Sequence[str], Sequence[str]]:
        if everything:
            return [self._name(_EPOCH)], ()
        return list(map(self._tag, tags)), [*map(self._key, keys), *map(self._entry, keys)]

    async def keep_proof(self, write: Callable[[str], str]) -> bool:
        """See `Server.keep`."""
        return await self._server.keep(write)

    async def recall_proof(self, instance_id: str) -> tuple[str | None, list[str] | None]:
        """See `Server.recall`."""
        return await self._server.recall(self._names_of(instance_id))

    async def forget_proof(self) -> None:
        """See `Server.forget`."""
        await self._server.forget()

    def encode(self, value: Any) -> bytes:
        """See `Serializer.encode`."""
        return self._serializer.encode(value)

    def decode(self, value: bytes, model: Any) -> Any:
        """See `Serializer.decode`."""
        return self._serializer.decode(value, model)

    async def close(self) -> None:
        """Closes the connections; ends within `OPERATION_TIMEOUT`, and does not raise."""
        await self._server.close()

    async def _create(self, name: str, ttl: int | None = None) -> str:
        """Entries never bear an absent stamp: one that a full cache dropped must not look as if it had never changed."""
        stamp = new_stamp()
        if await self._server.add(name, stamp, ttl and min(ttl, _LONGEST_TTL)):
            return stamp
        (other,) = await self._server.get([name])  # somebody else was first
        return text_of(other) or stamp

    def _entry(self, key: str) -> str:
        return self._name("entry:" + key)

    def _key(self, key: str) -> str:
        return self._name("key:" + key)

    def _tag(self, tag: str) -> str:
        return self._name("tag:" + tag)

    def _names_of(self, instance_id: str) -> ProofNames:
        return ProofNames(*(self._name(f"{what}:{instance_id}") for what in ("proof", "mark", "marks")))

    def _name(self, name: str) -> str:
        if not _PLAIN.fullmatch(name):  # Memcached takes neither spaces nor, everywhere, other alphabets
            name = name.partition(":")[0] + "#:" + hashlib.sha256(name.encode()).hexdigest()
        return self._prefix + name


def _decompressed(written: bytes, form: str) -> bytes:
    if not form.endswith(_ZLIB):
        return written
    try:
        return zlib.decompress(written)
    except zlib.error as error:
        raise CacheError(f"this cannot be decompressed: {error}") from error
