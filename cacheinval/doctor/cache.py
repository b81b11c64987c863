"""What can be seen of the cache outside the process, as the user that the settings name."""

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cacheinval.backends.proof import KeptProof
from cacheinval.backends.servers import OPERATION_TIMEOUT, connect, said_by
from cacheinval.backends.shared import SharedEntries
from cacheinval.coherence.registration import Registered
from cacheinval.doctor.cache_findings import (
    of_commands,
    of_hello,
    of_latency,
    of_memcached_memory,
    of_proof,
    of_redis_memory,
    of_unreachable_cache,
)
from cacheinval.doctor.checking import Checks
from cacheinval.doctor.findings import Finding, failed, ok, warning
from cacheinval.errors import CacheError, ConfigurationError
from cacheinval.settings import Settings, mask_url

__all__ = ["CacheSeen"]

ANSWER_WITHIN = (
    5.0  # seconds; slower than what an instance bears, so that a slow server is told from one that is away
)
TRIED_FOR = 10  # seconds that what is written would stay if it could not be removed
READS = 20
READ_FOR = 2.0  # seconds
NEEDED_OF_REDIS = (
    "SET", "SETEX", "MGET", "UNLINK", "MULTI", "EXEC", "LPUSH", "LRANGE", "LTRIM", "EXPIRE",
)  # fmt: skip
NEEDED_OF_MEMCACHED = ("add", "set", "get", "delete")
DEPENDENT = ("cache commands", "cache memory", "cache latency", "proof")

Tries = Mapping[str, Callable[[str], Awaitable[Any]]]


class CacheSeen:
    """The checks of Redis or Memcached; `checks` is told what they find."""

    def __init__(self, settings: Settings, checks: Checks) -> None:
        self._settings = settings
        self._checks = checks
        self._url = settings.cache_url
        self._is_redis = self._url.startswith("redis:")
        self._prefix = f"cacheinval:{settings.namespace}:"
        self._backend: Any = None
        self._entries: SharedEntries | None = None
        self._works = False

    async def examine(self) -> None:
        """Runs the checks, of which each needs the first one."""
        if not await self._checks.run("cache", 2 * ANSWER_WITHIN, self._reach):
            self._not_checked("the cache cannot be used")
            return
        self._works = await self._checks.run("cache commands", ANSWER_WITHIN, self._commands)
        await self._checks.run("cache memory", ANSWER_WITHIN, self._memory)
        if self._works:
            await self._checks.run("cache latency", ANSWER_WITHIN, self._latency)
        else:
            self._not_checked("not every command works", 2)

    def _not_checked(self, why: str, start: int = 0) -> None:
        self._checks.not_checked(DEPENDENT[start:], ("cache", "cache commands"), why)

    async def look_for_proofs(self, registered: Sequence[Registered], source: str | None) -> None:
        """What is kept for this instance, and for those of `registered` whose cache is outside too."""
        if not self._works:
            return
        others = {one.id for one in registered if not one.session}

        ids = sorted({self._settings.instance_id, *others})
        await self._checks.run("proof", ANSWER_WITHIN, lambda: self._proofs(ids, source))

    async def close(self) -> None:
        """Closes the connections."""
        if self._entries is not None:
            await self._entries.close()

    async def _reach(self) -> Finding:
        try:
            self._backend = connect(self._url)
        except ConfigurationError as error:
            return failed("cache", str(error), "put that right: no instance starts here before")
        self._entries = SharedEntries(self._backend, self._settings.namespace)
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                if not self._is_redis:
                    version = (await self._backend.client.version()).decode()
                    return ok("cache", f"Memcached {version} at {mask_url(self._url)}")
                return of_hello(self._url, await self._greeting())
        except TimeoutError as error:
            return of_unreachable_cache(self._url, str(error) or f"no answer within {ANSWER_WITHIN:g} s")
        except Exception as error:  # each driver has errors of its own
            return of_unreachable_cache(self._url, _explain(error))

    async def _greeting(self) -> dict[str, str]:
        """What the server says of itself to anybody, whatever they may do; nothing where it is too old for that."""
        try:
            told = await self._backend.client.execute_command("HELLO")
        except Exception as error:
            if "unknown command" in str(error):
                return {}
            raise
        pairs = told.items() if isinstance(told, dict) else zip(told[::2], told[1::2], strict=False)
        return {_text(name): _text(value) for name, value in pairs}

    async def _commands(self) -> list[Finding]:
        """Tries each on a key of its own, which is removed, or else expires."""
        name = f"{self._prefix}doctor:{secrets.token_hex(8)}"
        refused = {}
        for commands, attempt in self._tries().items():
            try:
                await attempt(name)
            except Exception as error:  # each driver has errors of its own
                refused[commands] = _explain(error)
        needed = NEEDED_OF_REDIS if self._is_redis else NEEDED_OF_MEMCACHED
        return of_commands(self._url, self._prefix, needed, refused)

    def _tries(self) -> Tries:
        """All that `SharedEntries` asks of a server, by the commands that its backend makes of it."""
        add = lambda name: self._backend.add(name, "", ttl=TRIED_FOR)  # noqa: E731
        store = lambda name: self._backend.set(name, "", ttl=TRIED_FOR)  # noqa: E731
        look = lambda name: self._backend.multi_get([name])  # noqa: E731
        unlink = lambda name: self._backend.raw("unlink", name)  # noqa: E731
        if self._is_redis:
            return {
                "SET": add,
                "SETEX": store,
                "MGET": look,
                "UNLINK": unlink,
                "MULTI … EXEC": self._transact,
            }
        return {"add": add, "set": store, "get": look, "delete": self._backend.delete}

    async def _transact(self, name: str) -> None:
        """As an eviction does; all of it, or nothing."""
        client, name = self._backend.client, f"{name}:list"
        transaction = client.pipeline(transaction=True)
        transaction.lpush(name, "")
        transaction.expire(name, TRIED_FOR)
        transaction.lrange(name, 0, 0)
        transaction.ltrim(name, 0, 0)
        transaction.unlink(name)
        try:
            await transaction.execute()
        except Exception as error:
            await client.connection_pool.disconnect()  # it may have begun and not be allowed to end
            if "EXEC without MULTI" in str(error):
                raise CacheError("this user has no permissions to run the 'multi' command") from None
            raise

    async def _memory(self) -> Finding | list[Finding]:
        client = self._backend.client
        if not self._is_redis:
            stats, settings = await client.stats(), await client.stats(b"settings")
            return of_memcached_memory(_texts(stats), _texts(settings))
        try:
            info = await client.info()
        except Exception as error:
            remedy = "`ACL SETUSER … +info`, if you want to know: instances do not need it"
            return warning("not checked", f"cache memory: {_explain(error)}", remedy)
        return of_redis_memory(info)

    async def _latency(self) -> Finding:
        times: list[float] = []
        began = time.monotonic()
        while len(times) < READS and time.monotonic() - began < READ_FOR:
            before = time.monotonic()
            await self._backend.multi_get([self._prefix + "epoch"])
            times.append(time.monotonic() - before)
        return of_latency(times, OPERATION_TIMEOUT)

    async def _proofs(self, ids: Sequence[str], source: str | None) -> list[Finding]:
        assert self._entries is not None
        try:
            kept = {id_: await KeptProof(self._entries, id_).look() for id_ in ids}
        except CacheError as error:
            return [warning("proof", str(error), "see cache and cache commands")]
        return [of_proof(id_, state, time.time(), source) for id_, state in kept.items()]


def _explain(error: Exception) -> str:
    text = " ".join(said_by(error).split()) or type(error).__name__
    replied = re.search(r"b'(.*)'$", text)  # so Memcached's driver tells what the server said
    return replied[1] if replied else text


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _texts(told: Mapping[bytes, Any]) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in told.items() if value is not None}
