"""How what is seen of a cache server is judged: decisions only, no I/O."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from cacheinval.coherence import ProofState
from cacheinval.doctor.findings import Finding, failed, ok, warning
from cacheinval.settings import mask_url

__all__ = [
    "of_commands",
    "of_hello",
    "of_latency",
    "of_memcached_memory",
    "of_proof",
    "of_redis_memory",
    "of_unreachable_cache",
]

SMALLEST_ITEM = 128 << 10
"""Bytes; the proof state of an instance that hears of a thousand origins takes half of that."""

HARMLESS = "which costs loads, and never a stale value"


# Reaching it


def of_unreachable_cache(url: str, reason: str) -> Finding:
    """Why the cache cannot be used at all, and what to do about each of the usual reasons."""
    return failed("cache", f"{mask_url(url)}: {reason}", _way_to_cache(url, reason))


def _way_to_cache(url: str, reason: str) -> str:
    if "'select'" in reason:
        return f"`ACL SETUSER {_user(url)} +select`, or name database 0, which needs no SELECT"
    if "DB index" in reason:
        return "correct the number at the end of CACHEINVAL_CACHE_URL, or raise `databases` in redis.conf"
    if "number of clients" in reason:
        return "`CONFIG SET maxclients …`, or see in `CLIENT LIST` who holds so many connections"
    if "protected mode" in reason:
        return (
            "give the server a password, and that to CACHEINVAL_CACHE_URL; see protected-mode in redis.conf"
        )
    if "unauthenticated" in reason:
        return "start memcached without -Y and -S, and let only your hosts reach it: nobody logs in to it from here"
    if re.search(
        r"(?i)already authenticated|authentication required|username-password|invalid password", reason
    ):
        return (
            "correct user and password in CACHEINVAL_CACHE_URL (redis://user:password@host:port/0, or redis://:password@… "
            f"for the user default); `ACL GETUSER {_user(url)}` on the server shows whether there is one"
        )
    ask = "`redis-cli ping`" if url.startswith("redis:") else "`echo version | nc HOST PORT`"
    return (
        f"see that the server runs ({ask}), without TLS, and that CACHEINVAL_CACHE_URL leads to it from here"
    )


def of_hello(url: str, told: Mapping[str, Any]) -> Finding:
    """`told`: what the server says of itself when it is greeted; empty where it does not know the greeting."""
    name = f"{str(told.get('server', 'redis')).capitalize()} {told.get('version', 'of an unknown version')}"
    where = mask_url(url)
    if told.get("mode") in ("cluster", "sentinel"):
        text = f"{where} is {name} in {told['mode']} mode, which is not supported"
        return failed("cache", text, "CACHEINVAL_CACHE_URL has to lead to a single primary")
    if told.get("role") in ("replica", "slave"):
        return failed(
            "cache",
            f"{where} is a replica ({name}): nothing can be stored or evicted there, or not for long",
            "CACHEINVAL_CACHE_URL has to lead to the primary, which `INFO replication` names, or a name that follows it",
        )
    return ok("cache", f"{name} at {where}")


# What it lets one do


def of_commands(url: str, prefix: str, tried: Sequence[str], refused: Mapping[str, str]) -> list[Finding]:
    """`tried`: the commands that an instance needs; `refused`: why those that failed did, each with its reason."""
    if not refused:
        return [ok("cache commands", f"all that an instance needs work: {', '.join(tried)}")]
    grant = f"`ACL SETUSER {_user(url)} ~{prefix}* {' '.join(f'+{command.lower()}' for command in tried)}`"
    found = []
    for reason in dict.fromkeys(refused.values()):
        commands = ", ".join(command for command, why in refused.items() if why == reason)
        if "no permissions to access" in reason:
            commands, remedy = f"{commands} on {prefix}*", grant
        else:
            remedy = grant if "no permissions" in reason else _way_to_write(reason)
        found.append(failed("cache commands", f"{commands}: {reason}", remedy))
    return found


def _way_to_write(reason: str) -> str:
    if "maxmemory" in reason or "out of memory" in reason:
        return (
            "let it drop what is used least (`CONFIG SET maxmemory-policy allkeys-lru`; memcached without -M), or give it "
            "more memory: until then nothing can be evicted, and instances read the database"
        )
    if "MISCONF" in reason or "persist" in reason:
        return "its disk is full, or its folder gone: see its log; a cache needs no snapshots (`CONFIG SET save ''`)"
    if "read only" in reason:
        return "CACHEINVAL_CACHE_URL has to lead to the primary"
    if "unknown command" in reason:
        return "upgrade the server, to Redis 6 or newer"
    return "see the server's log; instances are suspect, and read the database, until it works"


def _user(url: str) -> str:
    return unquote(urlsplit(url).username or "default")


# What it keeps


def of_redis_memory(info: Mapping[str, Any]) -> Finding:
    """`info`: what INFO tells."""
    limit, policy = int(info.get("maxmemory", 0)), str(info.get("maxmemory_policy", "noeviction"))
    used = _size(int(info.get("used_memory", 0)))
    if not limit:
        return ok("cache memory", f"{used} used, no limit (maxmemory 0)")
    dropped = int(info.get("evicted_keys", 0))
    text = f"{used} of {_size(limit)} used, {policy}, {dropped} keys dropped since it started"
    if policy == "noeviction":
        return warning(
            "cache memory",
            f"{text}: once it is full nothing can be evicted and no proof be kept, and instances read the database",
            "`CONFIG SET maxmemory-policy allkeys-lru`: what it drops costs loads, and never a stale value",
        )
    if policy.endswith("-random"):
        return warning(
            "cache memory",
            f"{text}: any of them may be the epoch or a proof state, which costs everybody all entries, though never a "
            "stale value",
            "`CONFIG SET maxmemory-policy allkeys-lru`, which keeps what is used all the time",
        )
    return ok("cache memory", f"{text}, {HARMLESS}" if dropped else text)


def of_memcached_memory(stats: Mapping[str, str], settings: Mapping[str, str]) -> list[Finding]:
    """`stats`, `settings`: what `stats` and `stats settings` tell."""
    used, limit = int(stats.get("bytes", 0)), int(stats.get("limit_maxbytes", 0))
    dropped = int(stats.get("evictions", 0))
    item = int(settings.get("item_size_max", 1 << 20))
    text = f"{_size(used)} of {_size(limit)} used, {dropped} items dropped since it started"
    found = []
    if settings.get("evictions") == "off":
        found.append(
            warning(
                "cache memory",
                f"{text}; it drops nothing (-M): once it is full no tag can be evicted and no proof be kept",
                f"start it without -M: what it drops then is what is used least, {HARMLESS}",
            )
        )
    if item < SMALLEST_ITEM:
        found.append(
            warning(
                "cache memory",
                f"it takes items of {_size(item)} at most: where many write, the proof of an instance is larger, and without "
                "it nothing can be acknowledged",
                "start it with -I 1m, its default, or more",
            )
        )
    return found or [ok("cache memory", f"{text}, {HARMLESS}; larger values than {_size(item)} are not kept")]


def of_latency(times: Sequence[float], limit: float) -> Finding:
    """`times`: seconds that reads took; `limit`: seconds after which an instance gives one up."""
    ordered = sorted(times)
    most = ordered[-1 - len(ordered) // 10]  # one that is late may be late by our own fault
    text = f"a read takes {ordered[len(ordered) // 2] * 1e3:.1f} ms, nine of ten no more than {most * 1e3:.1f} ms"
    remedy = "have it near its instances, on a host of its own; `redis-cli --latency`, `SLOWLOG GET` say more"
    if most > limit:
        text = f"{text}; after {limit:g} s instances give it up, read the database, and are suspect while they cannot evict"
        return failed("cache latency", text, remedy)
    if most > limit / 4:
        return warning("cache latency", f"{text}, and after {limit:g} s instances give it up", remedy)
    return ok("cache latency", text)


def of_proof(id_: str, kept: ProofState | None, now: float, source: str | None) -> Finding:
    """`kept`: what an instance with this cache would go on from; `source`: of the database that the settings name."""
    if kept is None:
        return ok("proof", f"nothing is kept for {id_}: it starts empty, as where it was never there")
    if None not in (kept.source, source) and kept.source != source:
        return warning(
            "proof",
            f"that of {id_} is of database {kept.source}, this one is {source}: it proves nothing here",
            "give each database a namespace of its own; if this one was restored, `cacheinval invalidate --all`",
        )
    if abs(kept.checked_until) == float("inf"):
        return ok(
            "proof", f"{id_} has evicted all that it heard of, from {len(kept.seqs)} origins; no tick yet"
        )
    age = max(0.0, now - kept.checked_until)
    return ok(
        "proof", f"{id_} has evicted all that was committed {age:.1f} s ago, from {len(kept.seqs)} origins"
    )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
