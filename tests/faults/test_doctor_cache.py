"""What an operator meets who has a cache outside the process: each fault of its server is found, with what to do."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import redis.asyncio
from proxy import Proxy
from scene import EVENTUAL, through

from cacheinval import Settings
from cacheinval.backends import servers
from cacheinval.backends.proof import KeptProof
from cacheinval.backends.servers import connect
from cacheinval.backends.shared import SharedEntries
from cacheinval.coherence import ProofState
from cacheinval.coherence.marks import Marks
from cacheinval.doctor import Finding, cache, examine
from cacheinval.sandbox import Memcached, Redis, Server
from cacheinval.sandbox.processes import Guard

_S = TypeVar("_S", bound=Server)

NEEDED = cache.NEEDED_OF_REDIS
ME = "shop-1"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is well may answer late where others are busy."""
    monkeypatch.setattr(servers, "OPERATION_TIMEOUT", EVENTUAL)
    monkeypatch.setattr(cache, "ANSWER_WITHIN", EVENTUAL)


Found = Callable[..., Awaitable[dict[str, list[Finding]]]]


@pytest.fixture
def found(namespace: str) -> Found:
    """What the doctor finds of the cache at this address, by check; what is not ok has a remedy, and nothing tells secrets."""

    async def find(url: str) -> dict[str, list[Finding]]:
        settings = Settings(
            broker_url="memory://", database_url="", cache_url=url, namespace=namespace, instance_id=ME
        )
        checks: dict[str, list[Finding]] = {}
        for finding in await examine(settings):
            if finding.check != "settings":
                checks.setdefault(finding.check, []).append(finding)
            follows = finding.text.endswith((" see cache first", " see cache commands first"))
            assert (finding.level == "ok" or follows) == (finding.remedy is None), finding
            assert "opensesame" not in f"{finding.text} {finding.remedy}"
        return checks

    return find


def only(checks: dict[str, list[Finding]], name: str) -> Finding:
    (finding,) = checks[name]
    return finding


def levels(checks: dict[str, list[Finding]]) -> dict[str, list[str]]:
    """But for the latency, of which nobody can tell what it is where others are busy."""
    return {
        name: [one.level for one in findings] for name, findings in checks.items() if name != "cache latency"
    }


@asynccontextmanager
async def administering(url: str) -> AsyncIterator["redis.asyncio.Redis"]:
    connection = redis.asyncio.Redis.from_url(url, socket_timeout=EVENTUAL)
    try:
        yield connection
    finally:
        await connection.aclose()


@pytest.fixture
def guard() -> Iterator[Guard]:
    guard = Guard(None)
    yield guard
    guard.close()


@asynccontextmanager
async def started(kind: type[_S], folder: Path, guard: Guard, *options: str) -> AsyncIterator[_S]:
    """A server of this kind, with more options on its command line."""

    class WithOptions(kind):  # type: ignore[valid-type, misc]
        def _command(self) -> list[str]:
            return [*super()._command(), *options]

    server: _S = WithOptions(folder, guard)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def use_all(url: str, namespace: str) -> None:
    """All that an instance asks of its cache."""
    marks = Marks()
    entries = SharedEntries(connect(url), namespace, instance_id="x", marks=marks)
    try:
        found = await entries.find("k", frozenset(["t"]), None, 5)
        await entries.store("k", b"1", 5, 0.0, 2e9, found)
        assert (await entries.find("k", frozenset(["t"]), None, 5)).present
        await entries.evict(["k"], ["t"], everything=False)
        await entries.evict([], [], everything=True)
        kept, state = KeptProof(entries, "x", marks), ProofState({}, 0.0, 0.0, None)
        assert await kept.keep(state)
        assert await kept.restore() == state
        await kept.forget()
    finally:
        await entries.close()


# Where nothing is wrong


async def test_a_redis_that_is_well(redis: Redis, namespace: str, found: Found) -> None:
    async with administering(redis.url) as admin:
        before = set(await admin.keys())
        checks = await found(redis.url)
        assert set(await admin.keys()) == before, "nothing that was written stays"
    assert set(checks) == {
        "cache",
        "cache commands",
        "cache memory",
        "cache latency",
        "proof",
    }
    assert {level for found in levels(checks).values() for level in found} == {"ok"}, checks
    assert re.fullmatch(r"Redis [\d.]+ at redis://127\.0\.0\.1:\d+/0", only(checks, "cache").text)
    assert only(checks, "cache commands").text.endswith(f": {', '.join(NEEDED)}")
    assert (
        only(checks, "proof").text
        == f"nothing is kept for {ME}: it starts empty, as where it was never there"
    )


async def test_a_memcached_that_is_well(memcached: Memcached, found: Found) -> None:
    client = connect(memcached.url).client
    before = (await client.stats())[b"curr_items"]
    checks = await found(memcached.url)
    assert (await client.stats())[b"curr_items"] == before, "nothing that was written stays"
    await client.close()
    assert set(checks) == {"cache", "cache commands", "cache memory", "cache latency", "proof"}
    assert {level for found in levels(checks).values() for level in found} == {"ok"}, checks
    assert re.fullmatch(r"Memcached [\d.]+ at memcached://127\.0\.0\.1:\d+", only(checks, "cache").text)
    assert "larger values than 1.0 MB are not kept" in only(checks, "cache memory").text


async def test_a_cache_in_the_process_has_no_server(namespace: str) -> None:
    settings = Settings(broker_url="memory://", database_url="", namespace=namespace)
    assert {one.check for one in await examine(settings)} == {"settings"}


# Who may not log in, or may not do everything


@pytest.fixture
async def user(redis: Redis, namespace: str) -> AsyncIterator[str]:
    """The address of the shared Redis for a user who may do nothing yet."""
    async with administering(redis.url) as admin:
        await admin.execute_command("ACL", "SETUSER", namespace, "on", ">opensesame")
        try:
            yield redis.url.replace("redis://", f"redis://{namespace}:opensesame@")
        finally:
            await admin.execute_command("ACL", "DELUSER", namespace)


async def test_a_password_is_wrong_or_missing(
    user: str, own_redis: Redis, namespace: str, found: Found
) -> None:
    checks = await found(user.replace("opensesame", "opensesame-not"))
    finding = only(checks, "cache")
    assert (finding.level, "invalid username-password pair" in finding.text) == ("failed", True)
    assert f"{namespace}:***@" in finding.text
    assert f"`ACL GETUSER {namespace}`" in str(finding.remedy)
    assert levels(checks) == {"cache": ["failed"], "not checked": ["warning"]}

    async with administering(own_redis.url) as admin:
        await admin.config_set("requirepass", "opensesame")
    finding = only(await found(own_redis.url), "cache")
    assert (finding.level, "already authenticated" in finding.text) == ("failed", True)
    assert "redis://user:password@host:port/0" in str(finding.remedy)


async def test_a_command_that_instances_need_is_not_permitted(
    user: str, redis: Redis, namespace: str, found: Found
) -> None:
    async with administering(redis.url) as admin:

        async def allow(*rules: str) -> None:
            await admin.execute_command("ACL", "SETUSER", namespace, "resetkeys", "-@all", *rules)

        for lacking in NEEDED:
            others = [f"+{name.lower()}" for name in NEEDED if name != lacking]
            await allow(f"~cacheinval:{namespace}:*", *others)
            finding = only(checks := await found(user), "cache commands")
            assert finding.level == "failed"
            assert "cache latency, proof" in checks["not checked"][-1].text
            assert f"no permissions to run the '{lacking.lower()}' command" in finding.text

        for left in await admin.keys(f"cacheinval:{namespace}:*"):  # of whoever lacked UNLINK
            await admin.delete(left)
        for writes in ("+set", "+setex"):
            for left in await admin.keys(f"cacheinval:{namespace}:*"):
                await admin.delete(left)
            await allow(f"~cacheinval:{namespace}:*", writes, "+mget")
            await found(user)
            (left,) = await admin.keys(f"cacheinval:{namespace}:*")
            assert await admin.ttl(left) > 0, "what cannot be removed expires"

        await allow("~another:*", *[f"+{name.lower()}" for name in NEEDED])
        finding = only(await found(user), "cache commands")
        assert "no permissions to access one of the keys" in finding.text

        # As the remedy says, and no more: that is all that an instance needs.
        said = re.fullmatch(r"`(ACL SETUSER .+)`", str(finding.remedy))
        assert said, finding
        await allow()
        await admin.execute_command(*said[1].split())
        checks = await found(user)
        assert levels(checks) == {
            "cache": ["ok"], "cache commands": ["ok"], "not checked": ["warning"], "proof": ["ok"]
        }  # fmt: skip
        assert "+info" in str(only(checks, "not checked").remedy), "which only the doctor wants"
        await use_all(user, namespace)

        finding = only(await found(user.replace("/0", "/3")), "cache")
        assert f"`ACL SETUSER {namespace} +select`" in str(finding.remedy)


# The server is away, or is another one


async def test_the_server_is_frozen_and_then_killed(
    own_redis: Redis, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_redis.pause()
    with monkeypatch.context() as hasty:
        hasty.setattr(cache, "ANSWER_WITHIN", 0.2)
        checks = await found(own_redis.url)
    own_redis.resume()
    assert only(checks, "cache").text == f"{own_redis.url}: no answer within 0.2 s"
    assert levels(checks) == {"cache": ["failed"], "not checked": ["warning"]}
    await own_redis.kill()
    finding = only(await found(own_redis.url), "cache")
    assert (finding.level, "Connect call failed" in finding.text) == ("failed", True)
    assert "redis-cli ping" in str(finding.remedy)


async def test_a_memcached_is_frozen_and_then_killed(
    tmp_path: Path, guard: Guard, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(Memcached, tmp_path, guard) as server:
        server.pause()
        with monkeypatch.context() as hasty:
            hasty.setattr(cache, "ANSWER_WITHIN", 0.2)
            checks = await found(server.url)
        server.resume()
        assert only(checks, "cache").text == f"{server.url}: no answer within 0.2 s"
        await server.kill()
        finding = only(await found(server.url), "cache")
        assert (finding.level, "Connect call failed" in finding.text) == ("failed", True)


@pytest.mark.parametrize("read_only", ["yes", "no"])
async def test_the_server_is_a_replica(own_redis: Redis, found: Found, read_only: str) -> None:
    async with administering(own_redis.url) as admin:
        await admin.config_set("replica-read-only", read_only)
        await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    finding = only(await found(own_redis.url), "cache")
    assert (finding.level, "is a replica" in finding.text) == ("failed", True)
    assert "lead to the primary" in str(finding.remedy)


async def test_the_server_is_too_old_for_the_driver(tmp_path: Path, guard: Guard, found: Found) -> None:
    async with started(Redis, tmp_path, guard, "--rename-command", "HELLO", "") as server:
        checks = await found(server.url)
    assert "of an unknown version" in only(checks, "cache").text
    assert "upgrade the server" in str(only(checks, "cache commands").remedy)


async def test_the_server_is_of_a_redis_cluster(tmp_path: Path, guard: Guard, found: Found) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # by itself it takes one 10,000 above the other, which there may not be
    async with started(
        Redis, tmp_path, guard, "--cluster-enabled", "yes", "--cluster-port", str(port)
    ) as server:
        async with administering(server.url) as admin:
            await admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        assert "in cluster mode" in only(await found(server.url), "cache").text


async def test_a_memcached_wants_a_password(tmp_path: Path, guard: Guard, found: Found) -> None:
    (tmp_path / "users").write_text("shop:opensesame\n")

    class Closed(Memcached):
        answer = b"unauthenticated"

    async with started(Closed, tmp_path, guard, "-Y", str(tmp_path / "users")) as server:
        finding = only(await found(server.url), "cache")
        assert (finding.level, "unauthenticated" in finding.text) == ("failed", True)
        assert "without -Y" in str(finding.remedy)


# It drops what it should keep, or keeps what it should drop


async def test_a_redis_is_full(own_redis: Redis, found: Found, namespace: str) -> None:
    async with administering(own_redis.url) as admin:
        limit = (await admin.info("memory"))["used_memory"] + 2_000_000
        await admin.config_set("maxmemory", limit)
        finding = only(await found(own_redis.url), "cache memory")
        assert (finding.level, "nothing can be evicted" in finding.text) == ("warning", True)
        assert "`CONFIG SET maxmemory-policy allkeys-lru`" in str(finding.remedy)

        await admin.config_set("maxmemory", 1)
        finding = only(await found(own_redis.url), "cache commands")
        assert finding.level == "failed"
        assert finding.text == "SET, SETEX, MULTI … EXEC: command not allowed when used memory > 'maxmemory'."
        assert "allkeys-lru" in str(finding.remedy)

        await admin.config_set("maxmemory", limit)
        await admin.config_set("maxmemory-policy", "allkeys-lru")
        while not (await admin.info("stats"))["evicted_keys"]:
            await admin.mset({f"other:{number}": "x" * 10_000 for number in range(100)})
        finding = only(await found(own_redis.url), "cache memory")
        assert finding.level == "ok"
        assert re.search(
            r"allkeys-lru, \d+ keys dropped .*, which costs loads, and never a stale value", finding.text
        )
        await use_all(own_redis.url, namespace)

        await admin.config_set("maxmemory-policy", "allkeys-random")
        finding = only(await found(own_redis.url), "cache memory")
        assert (finding.level, "the epoch or a proof state" in finding.text) == ("warning", True)


async def test_a_memcached_that_drops_nothing_is_full(tmp_path: Path, guard: Guard, found: Found) -> None:
    async with started(Memcached, tmp_path, guard, "-M", "-m", "2") as server:
        finding = only(await found(server.url), "cache memory")
        assert (finding.level, "drops nothing (-M)" in finding.text) == ("warning", True)
        await fill(server)
        finding = only(await found(server.url), "cache commands")
        assert (finding.level, finding.text) == (
            "failed",
            "add, set: SERVER_ERROR out of memory storing object",
        )
        assert "without -M" in str(finding.remedy)


async def fill(server: Memcached) -> None:
    """With items as small as the one that the doctor tries: only a place of that size has to be missing."""
    items = b"".join(
        b"set cacheinval:other:doctor:%016d 0 0 1 noreply\r\nx\r\n" % number for number in range(40_000)
    )
    async with asyncio.timeout(EVENTUAL):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(items + b"version\r\n")
        assert (await reader.readline()).startswith(b"VERSION")
        writer.close()


async def test_a_redis_that_is_far_away(redis: Redis, found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "OPERATION_TIMEOUT", 0.1)
    async with Proxy("127.0.0.1", redis.port) as proxy:
        proxy.delay(0.02)
        finding = only(await found(through(proxy, redis.url)), "cache latency")
    assert finding.level in ("warning", "failed"), "failed, where this process was held up"
    assert "instances give it up" in finding.text


async def test_what_is_no_cache_here_is_said_as_an_instance_would(found: Found) -> None:
    finding = only(await found("redis://shop:opensesame@127.0.0.1/prices"), "cache")
    assert finding.text == (
        "CACHEINVAL_CACHE_URL=redis://shop:***@127.0.0.1/prices: accepted: redis://…/NUMBER, the number of a database"
    )
