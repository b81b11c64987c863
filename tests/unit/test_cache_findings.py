"""How `cacheinval doctor` judges what it sees of a cache server."""

from typing import Any

import pytest

from cacheinval.coherence import ProofState
from cacheinval.doctor import cache_findings as findings

URL = "redis://shop:secret@cache:6379/0"
GIGABYTE = 10**9


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("invalid username-password pair or user is disabled.", "`ACL GETUSER shop`"),
        ("HELLO must be called with the client already authenticated", "redis://user:password@host:port/0"),
        ("this user has no permissions to run the 'select' command", "`ACL SETUSER shop +select`"),
        ("DB index is out of range", "raise `databases` in redis.conf"),
        ("max number of clients reached", "CONFIG SET maxclients"),
        ("DENIED Redis is running in protected mode because …", "protected-mode in redis.conf"),
        ("Error 111 connecting to cache:6379. Connect call failed", "`redis-cli ping`"),
        ("no answer within 5 s", "leads to it from here"),
    ],
)
def test_each_reason_why_the_cache_cannot_be_reached_has_its_way(reason: str, remedy: str) -> None:
    found = findings.of_unreachable_cache(URL, reason)
    assert (found.level, found.text) == ("failed", f"redis://shop:***@cache:6379/0: {reason}")
    assert remedy in str(found.remedy)
    assert "secret" not in str(found)


def test_a_memcached_that_cannot_be_reached() -> None:
    assert "echo version" in str(findings.of_unreachable_cache("memcached://cache", "refused").remedy)


@pytest.mark.parametrize(
    ("told", "level", "said"),
    [
        (
            {"server": "redis", "version": "7.0.15", "mode": "standalone", "role": "master"},
            "ok",
            "Redis 7.0.15 at ",
        ),
        ({"server": "valkey", "version": "8.0.1", "role": "master"}, "ok", "Valkey 8.0.1 at "),
        ({}, "ok", "Redis of an unknown version at "),
        ({"role": "replica"}, "failed", "is a replica"),
        ({"mode": "cluster", "role": "master"}, "failed", "in cluster mode"),
        ({"mode": "sentinel"}, "failed", "in sentinel mode"),
    ],
)
def test_what_a_server_says_of_itself(told: dict[str, str], level: str, said: str) -> None:
    found = findings.of_hello(URL, told)
    assert (found.level, said in found.text, "secret" in str(found)) == (level, True, False)


NEEDED = ("SET", "MGET")


@pytest.mark.parametrize(
    ("reason", "said", "remedy"),
    [
        (
            "this user has no permissions to run the 'set' command",
            "SET: ",
            "`ACL SETUSER shop ~ns:* +set +mget`",
        ),
        ("no permissions to access one of the keys", "SET on ns:*: ", "`ACL SETUSER shop ~ns:* +set +mget`"),
        ("command not allowed when used memory > 'maxmemory'.", "SET: ", "allkeys-lru"),
        ("SERVER_ERROR out of memory storing object", "SET: ", "without -M"),
        ("MISCONF Redis is configured to save RDB snapshots, but …", "SET: ", "`CONFIG SET save ''`"),
        ("You can't write against a read only replica.", "SET: ", "lead to the primary"),
        ("MOVED 1 other:1", "SET: ", "see the server's log"),
    ],
)
def test_each_reason_why_a_command_fails_has_its_way(reason: str, said: str, remedy: str) -> None:
    (found,) = findings.of_commands(URL, "ns:", NEEDED, {"SET": reason})
    assert (found.level, found.text) == ("failed", f"{said}{reason}")
    assert remedy in str(found.remedy)


def test_commands_that_fail_for_one_reason_are_named_together() -> None:
    found = findings.of_commands(URL, "ns:", ("a", "b", "c"), {"a": "x", "b": "y", "c": "x"})
    assert [one.text for one in found] == ["a, c: x", "b: y"]
    (found_,) = findings.of_commands(URL, "ns:", NEEDED, {})
    assert (found_.level, found_.text) == ("ok", "all that an instance needs work: SET, MGET")


@pytest.mark.parametrize(
    ("info", "level", "said"),
    [
        ({}, "ok", "no limit"),
        ({"maxmemory": GIGABYTE, "maxmemory_policy": "noeviction"}, "warning", "nothing can be evicted"),
        ({"maxmemory": GIGABYTE, "maxmemory_policy": "allkeys-lru"}, "ok", "0 keys dropped since it started"),
        (
            {"maxmemory": GIGABYTE, "maxmemory_policy": "volatile-ttl", "evicted_keys": 7},
            "ok",
            "never a stale value",
        ),
        ({"maxmemory": GIGABYTE, "maxmemory_policy": "volatile-random"}, "warning", "a proof state"),
        ({"maxmemory": GIGABYTE, "maxmemory_policy": "allkeys-random"}, "warning", "the epoch"),
    ],
)
def test_what_a_redis_drops(info: dict[str, Any], level: str, said: str) -> None:
    found = findings.of_redis_memory({"used_memory": 1_500_000, **info})
    assert (found.level, said in found.text) == (level, True), found
    assert found.text.startswith("1.5 MB ")


def test_what_a_memcached_drops() -> None:
    stats = {"bytes": "500", "limit_maxbytes": "67108864", "evictions": "3"}
    (found,) = findings.of_memcached_memory(stats, {"item_size_max": "1048576", "evictions": "on"})
    assert (found.level, "3 items dropped since it started, which costs loads" in found.text) == ("ok", True)
    assert found.text.startswith("0.5 kB of 67.1 MB used")
    found_ = findings.of_memcached_memory(stats, {"item_size_max": "1024", "evictions": "off"})
    assert [one.level for one in found_] == ["warning", "warning"]


@pytest.mark.parametrize(
    ("times", "level"),
    [
        ([0.001] * 20, "ok"),
        ([0.001] * 18 + [3.0] * 2, "ok"),
        ([0.001] * 17 + [3.0] * 3, "failed"),
        ([0.001] * 17 + [0.3] * 3, "warning"),
        ([0.3], "warning"),
        ([1.1], "failed"),
    ],
)
def test_how_long_reads_take(times: list[float], level: str) -> None:
    assert findings.of_latency(times, 1.0).level == level


NEVER = float("inf")


@pytest.mark.parametrize(
    ("kept", "level", "said"),
    [
        (None, "ok", "nothing is kept for shop-1"),
        (ProofState({"a": 1}, -NEVER, NEVER, None), "ok", "from 1 origins; no tick yet"),
        (ProofState({"a": 1, "b": 2}, 98.5, 90.0, "db"), "ok", "committed 1.5 s ago, from 2 origins"),
        (ProofState({}, 98.5, 90.0, "other"), "warning", "of database other, this one is db"),
    ],
)
def test_what_is_kept_of_an_instance(kept: ProofState | None, level: str, said: str) -> None:
    found = findings.of_proof("shop-1", kept, 100.0, "db")
    assert (found.level, said in found.text) == (level, True), found
    if kept is not None:
        assert findings.of_proof("shop-1", kept, 100.0, None).level == "ok", "where no database is asked"
