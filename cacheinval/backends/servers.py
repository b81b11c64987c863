"""What is asked of Redis or Memcached, through aiocache's backends, and how each of them carries it out."""

import asyncio
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from aiocache.base import BaseCache
from aiocache.serializers import NullSerializer

from cacheinval.coherence.marks import MOST_MARKS, Marks
from cacheinval.errors import CacheError, ConfigurationError
from cacheinval.settings import mask_url

__all__ = [
    "OPERATION_TIMEOUT",
    "Borne",
    "ProofNames",
    "Server",
    "connect",
    "new_stamp",
    "over",
    "said_by",
    "text_of",
]

OPERATION_TIMEOUT = 1.0
"""Seconds for one operation; a cache that is slower than the database it stands in front of is no use."""

KEPT_FOR = 25 * 3600
"""Seconds for proof states and marks; an hour longer than the queue that they belong to outlives its consumer."""

MOST_AT_ONCE = 1000
"""Names that are evicted in one step: nobody else is served meanwhile."""

_DELETES_AT_ONCE = 100
_TIDY_EACH = 100  # marks: of those before them no more are of interest than may be unanswered

Borne = tuple[str | None, ...]
"""Marks of this instance that were seen with what was looked up; none where a cache cannot go back."""


class ProofNames(NamedTuple):
    """Where the proof state of an instance is, its mark, and the marks that were there before."""

    proof: str
    mark: str
    history: str


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


def over(backend: BaseCache, names: ProofNames | None, marks: Marks) -> "Server":
    """The server behind `backend`. `names`: of the instance that evicts, or of nobody; `marks`: what is known of its marks."""
    return (_Redis if backend.NAME == "redis" else _Memcached)(backend, names, marks)


class Server:
    """What both do alike. Every method raises `CacheError` when the cache cannot be used within `OPERATION_TIMEOUT`."""

    def __init__(self, backend: BaseCache, names: ProofNames | None, marks: Marks) -> None:
        self._backend, self._names, self._marks = backend, names, marks

    async def get(self, names: Sequence[str]) -> list[bytes | None]:
        """What is there under each of them."""
        values: list[bytes | None] = await self._bounded(self._backend.multi_get(names))
        return values

    async def set(self, name: str, value: bytes | str, ttl: int | None = None) -> None:
        """Puts it there, for `ttl` seconds."""
        await self._bounded(self._backend.set(name, value, ttl=ttl))

    async def add(self, name: str, value: str, ttl: int | None) -> bool:
        """The same where nothing is there; whether it was so."""
        try:
            await self._bounded(self._backend.add(name, value, ttl=ttl))
        except CacheError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            return False
        return True

    async def look(self, names: Sequence[str]) -> tuple[list[bytes | None], Borne]:
        """What is there, and which mark is; that one is known by now if it ever will be."""
        return await self.get(names), ()

    async def change(self, replace: Sequence[str], remove: Sequence[str]) -> None:
        """Puts new stamps under the names to `replace`, and removes the others."""
        raise NotImplementedError

    async def change_and_mark(self, replace: Sequence[str], remove: Sequence[str]) -> None:
        """The same; a cache that goes back to before it is noticed from then on."""
        await self.change(replace, remove)

    async def keep(self, write: Callable[[str], str]) -> bool:
        """Keeps the proof state that `write` makes of the newest mark, unless this is not the cache any more that was evicted
        from: then False."""
        raise NotImplementedError

    async def recall(self, names: ProofNames) -> tuple[str | None, list[str] | None]:
        """What was kept, and the marks of this cache, the newest first; None where it has none, since it cannot go back."""
        raise NotImplementedError

    async def forget(self) -> None:
        """Removes the proof state and the marks, in this order."""
        raise NotImplementedError

    async def close(self) -> None:
        """Closes the connections; ends within `OPERATION_TIMEOUT`, and does not raise."""
        with suppress(CacheError):  # there is nobody left who would use them
            await self._bounded(self._backend.close())

    async def _bounded(self, operation: Any) -> Any:
        try:
            async with asyncio.timeout(OPERATION_TIMEOUT):
                return await operation
        except Exception as error:  # each driver has errors of its own
            raise CacheError(
                f"the {self._backend.NAME} cache failed: {type(error).__name__} {said_by(error)}".strip()
                + " (CACHEINVAL_CACHE_URL)"
            ) from error


class _Redis(Server):
    """Replaces the mark in one step with what is evicted: a server that goes back to before the one lacks the other, too."""

    def __init__(self, backend: BaseCache, names: ProofNames | None, marks: Marks) -> None:
        super().__init__(backend, names, marks)
        self._unanswered: dict[str, asyncio.Event] = {}
        self._put = 0

    async def look(self, names: Sequence[str]) -> tuple[list[bytes | None], Borne]:
        if self._names is None:
            return await self.get(names), ()
        *values, value = await self.get([*names, self._names.mark])
        mark = text_of(value)
        if mark is not None and mark in self._unanswered:
            await self._unanswered[mark].wait()
        return values, (mark,)

    async def change(self, replace: Sequence[str], remove: Sequence[str]) -> None:
        for evict in _portions(replace, remove):
            await self._run(evict, transaction=False)

    async def change_and_mark(self, replace: Sequence[str], remove: Sequence[str]) -> None:
        if self._names is None:
            await self.change(replace, remove)
            return
        for evict in _portions(replace, remove):
            await self._replace_mark(evict)

    async def keep(self, write: Callable[[str], str]) -> bool:
        names, marks = self._names, self._marks
        assert names is not None
        if marks.last is None:
            return False
        written = write(marks.last)
        await self._replace_mark(lambda pipeline: pipeline.set(names.proof, written, ex=KEPT_FOR))
        return not marks.lost

    async def _replace_mark(self, change: Callable[[Any], None]) -> None:
        names = self._names
        assert names is not None
        mark, answered = new_stamp(), asyncio.Event()
        self._marks.replacing(mark)
        asked, self._put = self._marks.history, self._put + 1

        def run(pipeline: Any) -> None:
            pipeline.lrange(names.history, 0, asked - 1)
            change(pipeline)
            pipeline.set(names.mark, mark, ex=KEPT_FOR)
            pipeline.lpush(names.history, mark)
            if self._put % _TIDY_EACH == 1:
                pipeline.ltrim(names.history, 0, MOST_MARKS)
                pipeline.expire(names.history, KEPT_FOR)

        self._unanswered[mark] = answered
        try:
            before, *_ = await self._run(run, transaction=True)
            self._marks.replaced(mark, [one.decode() for one in before])
        finally:
            del self._unanswered[mark]
            answered.set()

    async def _run(self, fill: Callable[[Any], None], *, transaction: bool) -> list[Any]:
        pipeline = self._backend.client.pipeline(transaction=transaction)
        fill(pipeline)
        answers: list[Any] = await self._bounded(pipeline.execute())
        return answers

    async def recall(self, names: ProofNames) -> tuple[str | None, list[str] | None]:
        (value,) = await self.get([names.proof])
        marks = await self._bounded(self._backend.raw("lrange", names.history, 0, MOST_MARKS))
        return text_of(value), [mark.decode() for mark in marks]

    async def forget(self) -> None:
        assert self._names is not None
        await self._bounded(self._backend.raw("unlink", *self._names))
        self._put = 0  # the list is made anew
        self._marks.start_over(None)


class _Memcached(Server):
    """Can only be emptied: then what was kept is not there any more."""

    def __init__(self, backend: BaseCache, names: ProofNames | None, marks: Marks) -> None:
        super().__init__(backend, names, marks)
        # More than one where it is not known which write was the last to land.
        self._kept: set[str | None] = {None}

    async def change(self, replace: Sequence[str], remove: Sequence[str]) -> None:
        for name in replace:
            await self.set(name, new_stamp())
        for at in range(0, len(remove), _DELETES_AT_ONCE):
            removing = [
                self._bounded(self._backend.delete(name)) for name in remove[at : at + _DELETES_AT_ONCE]
            ]
            for result in await asyncio.gather(*removing, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result

    async def keep(self, write: Callable[[str], str]) -> bool:
        assert self._names is not None
        (value,) = await self.get([self._names.proof])
        if text_of(value) not in self._kept:
            return False
        written = write(new_stamp())
        self._kept.add(written)
        await self.set(self._names.proof, written, KEPT_FOR)
        self._kept = {written}
        return True

    async def recall(self, names: ProofNames) -> tuple[str | None, list[str] | None]:
        (value,) = await self.get([names.proof])
        if names == self._names:
            self._kept = {text_of(value)}
        return text_of(value), None

    async def forget(self) -> None:
        assert self._names is not None
        await self._bounded(self._backend.delete(self._names.proof))
        self._kept = {None}


def _portions(replace: Sequence[str], remove: Sequence[str]) -> Iterator[Callable[[Any], None]]:
    """What fills pipelines with all that is to be done to these names."""
    for at in range(0, max(len(replace), len(remove)), MOST_AT_ONCE):
        stamped, removed = replace[at : at + MOST_AT_ONCE], remove[at : at + MOST_AT_ONCE]

        def fill(pipeline: Any, stamped: Sequence[str] = stamped, removed: Sequence[str] = removed) -> None:
            for name in stamped:
                pipeline.set(name, new_stamp())
            if removed:
                pipeline.unlink(*removed)

        yield fill


def said_by(error: Exception) -> str:
    """What the server said, without what redis-py puts around it where the command was one of a transaction."""
    text = str(error)
    said = re.match(r"Command # \d+ .* of pipeline caused error: \((['\"])(.*)\1,\)$", text)
    return said[2] if said else text


def text_of(value: bytes | None) -> str | None:
    """What is written there."""
    return None if value is None else value.decode(errors="replace")


def new_stamp() -> str:
    """Like none before it."""
    return secrets.token_hex(8)


def _database(url: str) -> int:
    number = urlsplit(url).path.strip("/")
    if number and not (number.isascii() and number.isdigit()):
        raise ConfigurationError(
            f"CACHEINVAL_CACHE_URL={mask_url(url)}: accepted: redis://…/NUMBER, the number of a database"
        )
    return int(number or 0)
