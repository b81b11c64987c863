"""Entries in a cache outside the process (Redis, Memcached), through aiocache's backends.

Nothing here is deleted by pattern. Each entry bears the stamps of the epoch, of its key and of each of its tags, as they
were looked up before its load began. Evicting removes or replaces a stamp, and whatever bears the old one is served no
more, by any instance, also when it is stored late.
"""

import asyncio
import hashlib
import math
import os
import re
import secrets
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec
from aiocache.base import BaseCache
from aiocache.serializers import NullSerializer

from cacheinval.backends.serializing import Serializer, serializer
from cacheinval.errors import CacheError, ConfigurationError
from cacheinval.settings import mask_url

__all__ = ["Found", "SharedEntries", "connect"]

OPERATION_TIMEOUT = 1.0
"""Seconds for one operation; a cache that is slower than the database it stands in front of is no use."""

_PLAIN = re.compile(r"[!-~]{1,170}")  # Memcached takes 250 bytes, of which the prefix may need 76
_LONGEST_TTL = (
    30 * 86_400
)  # what is more is a date to Memcached; `expires_at` in the entry says when it really ends
_EPOCH = "epoch"
_ZLIB = "+zlib"
_COMPRESSION = 1  # most of what there is to gain, at a fraction of what the rest costs
JSON = serializer("json")
_DELETES_AT_ONCE = 50
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


def connect(url: str) -> BaseCache:
    """The aiocache backend for `redis://[user:password@]host:port/db` or `memcached://host:port`.

    Raises:
        ConfigurationError: the driver is not installed, the number of the Redis database is none, or aiocache is
            switched off by AIOCACHE_DISABLE, which makes evictions do nothing.
    """
    if os.environ.get("AIOCACHE_DISABLE") == "1":
        raise ConfigurationError("AIOCACHE_DISABLE=1 makes aiocache's deletes do nothing; accepted: unset")
    parts = urlsplit(url)
    try:
        if parts.scheme == "memcached":
            from cacheinval.backends.memcached import CarefulMemcachedCache

            return CarefulMemcachedCache(
                serializer=NullSerializer(encoding=None),
                endpoint=parts.hostname or "",
                port=parts.port or 11211,
                timeout=None,
            )
        from aiocache.backends.redis import RedisCache
    except ImportError:
        raise ConfigurationError(
            f"CACHEINVAL_CACHE_URL={parts.scheme}://…: needs `pip install cacheinval[{parts.scheme}]`"
        ) from None
    return RedisCache(
        serializer=NullSerializer(encoding=None),
        endpoint=parts.hostname,
        port=parts.port or 6379,
        db=_database(url),
        password=unquote(parts.password) if parts.password else None,
        connection_pool_kwargs={"username": unquote(parts.username)} if parts.username else None,
        create_connection_timeout=OPERATION_TIMEOUT,
        timeout=None,
    )


class SharedEntries:
    """The entries of one namespace in a cache outside the process.

    Every method raises `CacheError` when the cache cannot be used within `OPERATION_TIMEOUT`.

    Args:
        serializer: how values are written; entries that another one has written count as absent. JSON if None.
        compress_above: bytes; longer values are compressed, where that makes them shorter. 0: none.
    """

    def __init__(
        self,
        backend: BaseCache,
        namespace: str,
        serializer: Serializer | None = None,
        compress_above: int = 0,
    ) -> None:
        self._backend = backend
        self._serializer = serializer or JSON
        self._compress_above = compress_above
        self._prefix = f"cacheinval:{namespace}:"

    async def find(self, key: str, tags: frozenset[str], model: Any, ttl: float = 0.0) -> Found:
        """The entry of `key`, and the stamps that an entry with `tags`, kept for `ttl` seconds, would have to bear if its
        load began now."""
        named = sorted(tags)
        names = [self._entry(key), self._name(_EPOCH), self._key(key), *map(self._tag, named)]
        raw, *texts = await self._get(names)
        epoch, stamp, *stamps = map(_text, texts)
        known = dict(zip(named, stamps, strict=True))
        envelope, written = self._open(raw)
        others = sorted(set(envelope.stamps) - tags) if envelope else []
        if others:
            known |= zip(others, map(_text, await self._get(list(map(self._tag, others)))), strict=True)
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
        await self._bounded(
            self._backend.set(self._entry(key), raw, ttl=min(max(1, math.ceil(ttl)), _LONGEST_TTL))
        )

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
        """Makes sure that no instance is served what was stored before."""
        if everything:
            await self._bounded(self._backend.set(self._name(_EPOCH), _stamp()))
            return
        for tag in tags:
            await self._bounded(self._backend.set(self._tag(tag), _stamp()))
        for start in range(0, len(keys), _DELETES_AT_ONCE):
            few = keys[start : start + _DELETES_AT_ONCE]
            await self._delete([*map(self._key, few), *map(self._entry, few)])

    async def look_up(self, name: str) -> str | None:
        """What `write` has put under `name`, if it is still there."""
        (raw,) = await self._get([self._name(name)])
        return _text(raw)

    async def write(self, name: str, text: str, ttl: int) -> None:
        """Puts `text` under `name`, for `ttl` seconds; `name` must not begin like those of entries, tags or the epoch."""
        await self._bounded(self._backend.set(self._name(name), text, ttl=ttl))

    async def remove(self, name: str) -> None:
        """Removes what `write` has put under `name`."""
        await self._bounded(self._backend.delete(self._name(name)))

    def encode(self, value: Any) -> bytes:
        """See `Serializer.encode`."""
        return self._serializer.encode(value)

    def decode(self, value: bytes, model: Any) -> Any:
        """See `Serializer.decode`."""
        return self._serializer.decode(value, model)

    async def close(self) -> None:
        """Closes the connections; ends within `OPERATION_TIMEOUT`, and does not raise."""
        with suppress(CacheError):  # there is nobody left who would use them
            await self._bounded(self._backend.close())

    async def _delete(self, names: list[str]) -> None:
        if self._backend.NAME == "redis":
            await self._bounded(self._backend.raw("unlink", *names))
        else:
            deleting = [self._bounded(self._backend.delete(name)) for name in names]
            for result in await asyncio.gather(*deleting, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result

    async def _get(self, names: list[str]) -> list[bytes | None]:
        values: list[bytes | None] = await self._bounded(self._backend.multi_get(names))
        return values

    async def _create(self, name: str, ttl: int | None = None) -> str:
        """Entries never bear an absent stamp: one that a full cache dropped must not look as if it had never changed."""
        stamp = _stamp()
        try:
            await self._bounded(self._backend.add(name, stamp, ttl=ttl and min(ttl, _LONGEST_TTL)))
        except CacheError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            (other,) = await self._get([name])  # somebody else was first
            return _text(other) or stamp
        return stamp

    async def _bounded(self, operation: Any) -> Any:
        try:
            async with asyncio.timeout(OPERATION_TIMEOUT):
                return await operation
        except Exception as error:  # each driver has errors of its own
            raise CacheError(
                f"the {self._backend.NAME} cache failed: {type(error).__name__} {error}".strip()
                + " (CACHEINVAL_CACHE_URL)"
            ) from error

    def _entry(self, key: str) -> str:
        return self._name("entry:" + key)

    def _key(self, key: str) -> str:
        return self._name("key:" + key)

    def _tag(self, tag: str) -> str:
        return self._name("tag:" + tag)

    def _name(self, name: str) -> str:
        if not _PLAIN.fullmatch(name):  # Memcached takes neither spaces nor, everywhere, other alphabets
            name = name.partition(":")[0] + "#:" + hashlib.sha256(name.encode()).hexdigest()
        return self._prefix + name


def _database(url: str) -> int:
    number = urlsplit(url).path.strip("/")
    if number and not (number.isascii() and number.isdigit()):
        raise ConfigurationError(
            f"CACHEINVAL_CACHE_URL={mask_url(url)}: accepted: redis://…/NUMBER, the number of a database"
        )
    return int(number or 0)


def _decompressed(written: bytes, form: str) -> bytes:
    if not form.endswith(_ZLIB):
        return written
    try:
        return zlib.decompress(written)
    except zlib.error as error:
        raise CacheError(f"this cannot be decompressed: {error}") from error


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode(errors="replace")


def _stamp() -> str:
    return secrets.token_hex(8)
