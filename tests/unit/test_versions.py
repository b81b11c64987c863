"""Versions and replicas: what lags behind an eviction is not stored, and the primary is read where nothing else can tell."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.cache import InProcessCache, Read, SharedCache
from cacheinval.cache.versions import version_of
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence, Eviction, higher
from cacheinval.coherence import floors as floors_module
from cacheinval.coherence.floors import NO_FLOOR, Floors
from cacheinval.errors import CacheError
from cacheinval.messages import Invalidate, Tick

LAG = 30.0
START = 1000.0
"""When the tests begin: the subscription was made so long ago that replicas have caught up with it."""


class SetClock(Clock):
    """A clock that goes only when told."""

    def __init__(self) -> None:
        self.time = START
        self.start, self.elapsed = 0.0, lambda: self.time


class Database:
    """A primary, and a replica that applies what is committed when it is told to; both count who asks them."""

    def __init__(self) -> None:
        self.row: dict[str, Any] | None = {"version": 7, "price": 99}
        self.replicated = self.row
        self.asked: list[str] = []

    def write(self, version: int | None) -> None:
        self.row = None if version is None else {"version": version, "price": 109}

    def catch_up(self) -> None:
        self.replicated = self.row

    async def replica(self) -> Any:
        self.asked.append("replica")
        value = self.replicated
        await asyncio.sleep(0)
        return value

    async def primary(self) -> Any:
        self.asked.append("primary")
        value = self.row
        await asyncio.sleep(0)
        return value

    def take_asked(self) -> list[str]:
        asked, self.asked = self.asked, []
        return asked


def subscribed(max_staleness: float | None = None, at: float = 0.0) -> Coherence:
    coherence = Coherence(max_staleness, max_replica_lag=LAG)
    coherence.loads.compare_versions()
    coherence.evict(coherence.joined_anew(at), at)
    coherence.trust()
    return coherence


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def coherence() -> Coherence:
    return subscribed()


@pytest.fixture
def db() -> Database:
    return Database()


@pytest.fixture
def cache(coherence: Coherence, clock: SetClock) -> InProcessCache:
    return InProcessCache(BoundedMemoryCache(1000), coherence, clock, ttl=300)


Act = Callable[..., None]
Reading = Callable[..., Awaitable[Read]]


@pytest.fixture
def evict(cache: InProcessCache, coherence: Coherence, clock: SetClock) -> Act:
    def evict(*keys: str, versions: tuple[int | None, ...] = (), **more: Any) -> None:
        eviction = Eviction(keys, versions=versions, **more)
        coherence.evict(eviction, clock.now())
        cache.evict_now(eviction)

    return evict


@pytest.fixture
def read(cache: InProcessCache, db: Database) -> Reading:
    async def read(key: str = "k", **more: Any) -> Read:
        arguments = {"version": "version", "primary": db.primary, "tags": ["t"]} | more
        return await cache.read(key, db.replica, **arguments)

    return read


def tick(coherence: Coherence, as_of: float, now: float) -> None:
    """A tick arrives, and all before it has been evicted."""
    coherence.received(Tick(v=1, origin="r", seq=0, as_of=as_of, source="db"), now)
    coherence.evicted(now)


# A replica is asked, and believed as far as its versions go


async def test_a_replica_is_asked_where_nothing_was_evicted(read: Reading, db: Database) -> None:
    assert await read() == Read({"version": 7, "price": 99}, "miss", True)
    assert (await read()).outcome == "hit"
    assert db.take_asked() == ["replica"]


@pytest.mark.parametrize(
    "replicated", [{"version": 7}, None, {"version": None}], ids=["old", "absent", "unknown"]
)
async def test_what_lags_behind_is_read_from_the_primary_and_that_is_stored(
    cache: InProcessCache, read: Reading, db: Database, evict: Act, replicated: Any
) -> None:
    db.write(8)
    db.replicated = replicated
    evict("k", versions=(8,))
    assert await read() == Read({"version": 8, "price": 109}, "miss", True)
    assert db.take_asked() == ["replica", "primary"]
    assert (await read()).outcome == "hit"
    assert (cache.counters.primary_loads, cache._loads._counters.below_floor) == (1, 1)


@pytest.mark.parametrize("version", [8, 9])
async def test_what_has_caught_up_is_stored(read: Reading, db: Database, evict: Act, version: int) -> None:
    evict("k", versions=(8,))
    db.replicated = {"version": version}
    assert await read() == Read({"version": version}, "miss", True)
    assert db.take_asked() == ["replica"]


async def test_a_floor_concerns_its_key_only(read: Reading, db: Database, evict: Act) -> None:
    evict("k", "other", versions=(8, 9))
    await read("another")
    assert db.take_asked() == ["replica"]


async def test_a_floor_is_kept_for_as_long_as_a_replica_may_lag(
    read: Reading, db: Database, evict: Act, clock: SetClock
) -> None:
    evict("k", versions=(8,))
    clock.time += LAG
    await read()
    assert db.take_asked() == ["replica", "primary"]
    evict("k", versions=(8,))
    clock.time += LAG + 0.001
    await read()
    assert db.take_asked() == ["replica"]


async def test_an_eviction_is_never_skipped_for_its_version(
    cache: InProcessCache, read: Reading, db: Database, evict: Act, coherence: Coherence, clock: SetClock
) -> None:
    db.replicated = {"version": 9}
    await read()
    message = Invalidate(v=1, keys=["k"], versions=[8])
    eviction = coherence.received(message, clock.now())
    assert eviction == Eviction(["k"], [], versions=(8,))
    coherence.evict(eviction, clock.now())
    cache.evict_now(eviction)
    assert (await read()).outcome == "miss"


async def test_that_a_row_is_absent_is_stored_where_the_primary_says_so(
    read: Reading, db: Database, evict: Act
) -> None:
    db.write(None)
    evict("k", versions=(8,))
    assert await read() == Read(None, "miss", True)
    assert db.take_asked() == ["replica", "primary"]


async def test_a_row_that_starts_over_is_read_from_the_primary_and_cached(
    read: Reading, db: Database, evict: Act, clock: SetClock
) -> None:
    db.write(None)
    evict("k", versions=(8,))
    db.write(1)
    evict("k", versions=(1,))
    assert await read() == Read({"version": 1, "price": 109}, "miss", True)
    clock.time += LAG / 2
    evict("k", versions=(2,))
    clock.time += LAG / 2 + 1
    db.write(2)
    db.catch_up()
    db.take_asked()
    assert (await read()).stored
    assert db.take_asked() == ["replica"], "the old floor has passed, and the new one is reached"


@pytest.mark.parametrize("primary_asked", [False, True])
async def test_an_eviction_meanwhile_voids_it_all_the_same(
    cache: InProcessCache, db: Database, evict: Act, primary_asked: bool
) -> None:
    db.write(8)
    evict("k", versions=(8,))

    async def and_evict(read: Callable[[], Awaitable[Any]]) -> Any:
        value = await read()
        evict("k", versions=(9,))
        return value

    async def replica() -> Any:
        return await (db.replica() if primary_asked else and_evict(db.replica))

    async def primary() -> Any:
        return await (and_evict(db.primary) if primary_asked else db.primary())

    read = await cache.read("k", replica, version="version", primary=primary)
    assert read == Read({"version": 8, "price": 109}, "miss", False)
    assert len(cache) == 0


# Without a version, nothing can be compared

UNVERSIONED: dict[str, dict[str, Any]] = {
    "key": {"keys": ["k"]},
    "key, version unknown": {"keys": ["k"], "versions": (None,)},
    "tag": {"tags": ["t"]},
    "everything": {"everything": True},
}


@pytest.mark.parametrize("what", UNVERSIONED)
async def test_after_an_eviction_without_a_version_the_primary_is_read(
    cache: InProcessCache, read: Reading, db: Database, coherence: Coherence, clock: SetClock, what: str
) -> None:
    coherence.evict(Eviction(**UNVERSIONED[what]), clock.now())
    clock.time += LAG
    assert (await read()).stored
    assert db.take_asked() == ["primary"]
    coherence.evict(Eviction(**UNVERSIONED[what]), clock.now())
    cache.evict_now(Eviction(["k"]))
    clock.time += LAG + 0.001
    assert (await read()).stored
    assert db.take_asked() == ["replica"]


async def test_what_others_are_called_does_not_matter(read: Reading, db: Database, evict: Act) -> None:
    evict("other", tags=["other"])
    await read()
    assert db.take_asked() == ["replica"]


async def test_while_suspect_the_primary_is_read(read: Reading, db: Database, coherence: Coherence) -> None:
    coherence.lost("cut")
    assert (await read()).outcome == "bypass"
    assert db.take_asked() == ["primary"]


async def test_before_it_ever_subscribed_the_primary_is_read(clock: SetClock, db: Database) -> None:
    cache = InProcessCache(BoundedMemoryCache(10), Coherence(), clock, ttl=300)
    await cache.read("k", db.replica, version="version", primary=db.primary)
    assert db.take_asked() == ["primary"]


async def test_after_a_queue_was_resumed_the_primary_is_read(
    read: Reading, db: Database, coherence: Coherence, clock: SetClock
) -> None:
    coherence.lost("cut")
    coherence.resumed("m", clock.now(), coherence.proof_state())
    coherence._marker_passed = True
    coherence.evicted(clock.now())
    assert coherence.suspect is None
    clock.time += LAG
    await read()
    assert db.take_asked() == ["primary"]
    clock.time += 0.001
    await read("another")
    assert db.take_asked() == ["replica"]


async def test_a_clock_that_was_set_makes_no_floor_pass(
    cache: InProcessCache, db: Database, evict: Act, coherence: Coherence, clock: SetClock
) -> None:
    evict("k", versions=(8,))
    clock.time += 3600
    coherence.evict(coherence.clock_stepped(clock.now()), clock.now())
    assert (await cache.read("k", db.replica, version="version", primary=db.primary)).stored
    assert not (await cache.read("other", db.replica, version="version")).stored
    assert db.take_asked() == ["primary", "replica"]


async def test_a_primary_without_versions_is_read_under_any_floor(
    read: Reading, db: Database, evict: Act
) -> None:
    evict("k", versions=(8,))
    assert (await read(version=None)).stored
    assert db.take_asked() == ["replica", "primary"]


async def test_what_was_loaded_from_a_replica_is_audited_against_the_primary(
    coherence: Coherence, clock: SetClock, db: Database
) -> None:
    remembered: list[Any] = []
    cache = InProcessCache(
        BoundedMemoryCache(10), coherence, clock, 300, remember=lambda *loaded: remembered.append(loaded)
    )
    await cache.read("k", db.replica, version="version", primary=db.primary)
    await cache.read("another", db.replica, version="version")
    assert remembered == [("k", db.primary, None), ("another", db.replica, None)]


# Versions without a primary


@pytest.mark.parametrize("replicated", [{"version": 7}, None], ids=["old", "absent"])
async def test_without_a_primary_what_lags_is_given_and_not_stored(
    cache: InProcessCache, read: Reading, db: Database, evict: Act, replicated: Any
) -> None:
    db.replicated = replicated
    evict("k", versions=(8,))
    assert await read(primary=None) == Read(replicated, "miss", False)
    db.replicated = {"version": 8}
    assert await read(primary=None) == Read({"version": 8}, "miss", True)
    assert cache.counters.not_stored == 1


async def test_what_is_built_from_what_lags_is_not_stored_either(
    cache: InProcessCache, read: Reading, evict: Act
) -> None:
    evict("k", versions=(8,))

    async def whole() -> Any:
        return (await read(primary=None)).value

    assert (await cache.read("whole", whole)).stored is False
    assert len(cache) == 0


async def test_without_a_primary_evictions_without_versions_refuse_nothing(read: Reading, evict: Act) -> None:
    evict("k", tags=["t"])
    assert (await read(primary=None)).stored


async def test_loads_without_versions_ignore_floors(read: Reading, db: Database, evict: Act) -> None:
    evict("k", versions=(8,))
    assert (await read(version=None, primary=None)).stored
    assert db.take_asked() == ["replica"]


# Floors are bounded


@pytest.mark.parametrize(
    "evicted", [{"versions": (1,)}, {}, {"tags": True}], ids=["keys", "keys without versions", "tags"]
)
async def test_floors_that_are_too_many_are_forgotten_and_nothing_is_taken_for_fresh(
    read: Reading, db: Database, evict: Act, coherence: Coherence, clock: SetClock, evicted: dict[str, Any]
) -> None:
    coherence.loads.floors = Floors(LAG, most=10)
    evict("k", versions=(8,))
    clock.time += 1
    for n in range(11):
        if "tags" in evicted:
            evict(tags=[f"tag {n}"])
        else:
            evict(f"k{n}", **evicted)
    assert not (await read("another", primary=None)).stored
    assert (await read()).stored
    assert db.take_asked() == ["replica", "primary"]
    clock.time += LAG
    assert not (await read("one more", primary=None)).stored
    clock.time += 0.001
    assert (await read("one more", primary=None)).stored


def test_floors_that_have_passed_make_room() -> None:
    floors = Floors(LAG, most=10)
    for n in range(100):
        floors.note([f"k{n}", "often"], [1, n], [f"t{n}", "often"], now=n * 10.0)
    assert floors.comparable("k", [], 990.0)
    assert (len(floors._versions), len(floors._tags)) == (5, 5)


def test_an_eviction_of_very_many_is_noted_as_one() -> None:
    floors = Floors(LAG)
    floors.note([f"k{n}" for n in range(floors_module.MAX_AT_ONCE)], [], [], 0.0)
    assert floors.comparable("other", [], 0.0)
    floors.note([f"k{n}" for n in range(floors_module.MAX_AT_ONCE)], [], ["t"], 0.0)
    assert not floors.comparable("other", [], LAG)
    assert len(floors._unversioned) == 0


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        # When the version was noted, and the floor at each of these times.
        ([(0, 8)], {0: 8, 30: 8, 30.1: NO_FLOOR}),
        ([(0, 8), (10, 9)], {10: 9, 40: 9, 40.1: NO_FLOOR}),
        ([(0, 9), (10, 8)], {10: 9, 30: 9, 30.1: 8, 40: 8, 40.1: NO_FLOOR}),
        ([(0, 9), (10, 8), (20, 7)], {30: 9, 30.1: 8, 50: 8, 50.1: NO_FLOOR}),
        ([(0, 9), (10, 3), (20, 5)], {30: 9, 30.1: 5, 50: 5, 50.1: NO_FLOOR}),
        ([(0, 9), (10, 3), (35, 2)], {35: 3, 40: 3, 40.1: 2, 65: 2, 65.1: NO_FLOOR}),
        ([(0, 9), (10, 9)], {40: 9, 40.1: NO_FLOOR}),
    ],
)
def test_of_a_key_the_highest_version_counts_and_of_those_that_came_since(
    noted: list[tuple[float, int]], expected: dict[float, float]
) -> None:
    floors = Floors(LAG)
    for now, version in noted:
        floors.note(["k"], [version], [], now)
    assert {now: floors.lowest("k", now) for now in expected} == expected


def test_every_version_is_between_the_floors_that_are_none() -> None:
    assert NO_FLOOR < -(2**63) < 2**63 - 1 < math.inf


def test_no_floor_is_that_of_an_unknown_version() -> None:
    floors = Floors(LAG)
    floors.note(["k"], [8], [], 0.0)
    floors.note(["k"], [None], [], 1.0)
    assert (floors.lowest("k", 1.0), floors.comparable("k", [], 1.0)) == (8, False)
    assert floors.lowest("k", 31.0) == NO_FLOOR
    assert not floors.comparable("k", [], 31.0)


# What evictions tell


def test_merged_evictions_keep_the_highest_version_and_none_where_one_is_unknown() -> None:
    evictions = [
        Eviction(["a", "b", "c"], versions=(7, 8, 9)),
        Eviction(["a", "c"], versions=(9, None)),
        Eviction(["b"]),
        Eviction(["d"], versions=(1,)),
    ]
    merged = Eviction.merged(evictions)
    assert dict(zip(merged.keys, merged.versions, strict=True)) == {"a": 9, "b": None, "c": None, "d": 1}
    assert Eviction.merged([Eviction(["a"]), Eviction(["b"])]).versions == ()


def test_so_many_keys_that_none_is_noted_are_merged_without_their_versions() -> None:
    half = floors_module.MAX_AT_ONCE // 2
    one, other = (Eviction([f"{name}{n}" for n in range(half)], versions=[1] * half) for name in "ab")
    assert len(Eviction.merged([one, other]).versions) == 2 * half
    merged = Eviction.merged([one, other, Eviction(["c"], versions=[1])])
    assert (len(merged.keys), merged.versions) == (2 * half + 1, ())
    coherence = subscribed()
    coherence.evict(merged, START)
    assert not coherence.loads.turn_to_replica(coherence.loads.begin("another", START), START)


def test_an_unknown_version_is_not_lower_than_a_known_one() -> None:
    assert [higher(1, 2), higher(2, 1), higher(None, 1), higher(1, None)] == [2, 2, None, None]


# Proof


@pytest.fixture
def proven() -> Coherence:
    """With a maximum staleness of 5 s; ticks have come for as long as a replica may lag."""
    coherence = subscribed(5.0, at=900.0)
    tick(coherence, 900.0, 900.5)
    tick(coherence, START - 1, START)
    return coherence


async def test_what_a_replica_gives_is_as_old_as_the_watermark(
    proven: Coherence, clock: SetClock, db: Database
) -> None:
    cache = InProcessCache(BoundedMemoryCache(10), proven, clock, ttl=300)
    clock.time += 1
    read = (await cache.read("k", db.replica, version="version", primary=db.primary)).stored
    assert (read, db.take_asked()) == (True, ["replica"])
    assert cache._backend.peek("k").load_started == START - 1 - 0.1
    clock.time = START - 1 - 0.1 + 5
    assert (await cache.read("k", db.replica, version="version", primary=db.primary)).outcome == "hit"
    clock.time += 0.001
    read = await cache.read("k", db.replica, version="version", primary=db.primary)
    assert (read.outcome, db.take_asked()) == ("bypass", ["primary"])
    assert cache._backend.peek("k").load_started == clock.time


async def test_further_ticks_extend_what_a_replica_gave(
    proven: Coherence, clock: SetClock, db: Database
) -> None:
    cache = InProcessCache(BoundedMemoryCache(10), proven, clock, ttl=300)
    await cache.read("k", db.replica, version="version", primary=db.primary)
    for _ in range(100):
        clock.time += 1
        tick(proven, clock.time - 0.5, clock.time)
    assert (await cache.read("k", db.replica, version="version", primary=db.primary)).outcome == "hit"


async def test_until_replicas_have_caught_up_with_the_first_tick_the_primary_is_read(
    clock: SetClock, db: Database
) -> None:
    coherence = subscribed(5.0, at=START - 100)
    cache = InProcessCache(BoundedMemoryCache(10), coherence, clock, ttl=300)
    await cache.read("no tick", db.replica, version="version", primary=db.primary)
    tick(coherence, START - 1, START)
    clock.time = START + LAG
    tick(coherence, clock.time - 1, clock.time)
    await cache.read("lost before it", db.replica, version="version", primary=db.primary)
    assert db.take_asked() == ["primary", "primary"]
    clock.time += 0.001
    await cache.read("later", db.replica, version="version", primary=db.primary)
    assert db.take_asked() == ["replica"]


async def test_what_the_primary_gives_instead_is_as_old_as_that_load(
    proven: Coherence, clock: SetClock, db: Database
) -> None:
    cache = InProcessCache(BoundedMemoryCache(10), proven, clock, ttl=300)
    proven.evict(Eviction(["k"], versions=(8,)), clock.now())

    async def slow_replica() -> Any:
        clock.time += 2
        return await db.replica()

    db.write(8)
    assert (await cache.read("k", slow_replica, version="version", primary=db.primary)).stored
    assert cache._backend.peek("k").load_started == START + 2


async def test_nobody_joins_a_load_at_a_replica_that_is_as_old_as_a_value_may_be(
    proven: Coherence, clock: SetClock, db: Database
) -> None:
    load = proven.loads.begin("k", START)
    assert proven.loads.turn_to_replica(load, START)
    assert proven.loads.joinable("k", START + 3.8) is load
    assert proven.loads.joinable("k", START + 4) is None
    proven.loads.turn_to_primary(load, START + 4)
    assert proven.loads.joinable("k", START + 9) is load


def test_who_names_a_further_tag_does_not_join_a_load_at_a_replica(coherence: Coherence) -> None:
    load = coherence.loads.begin("k", START, frozenset("a"))
    assert coherence.loads.joinable("k", START, frozenset("b")) is load
    assert coherence.loads.turn_to_replica(load, START)
    assert coherence.loads.joinable("k", START, frozenset("ab")) is load
    assert coherence.loads.joinable("k", START, frozenset("c")) is None
    coherence.loads.turn_to_primary(load, START)
    assert coherence.loads.joinable("k", START, frozenset("c")) is load


def test_what_is_stored_for_others_is_not_a_replicas_where_it_has_to_be_proven(
    proven: Coherence, coherence: Coherence
) -> None:
    assert not proven.loads.turn_to_replica(proven.loads.begin("k", START), START, shared=True)
    assert coherence.loads.turn_to_replica(coherence.loads.begin("k", START), START, shared=True)
    assert SharedCache._shared


# Where the version is


class Record:
    """As asyncpg's: keys, and no mapping by name."""

    def keys(self) -> list[str]:
        return ["version"]

    def __getitem__(self, name: str) -> Any:
        return {"version": 8}[name]


class Row:
    version = 8
    keys = 9
    name = "x"
    sure = True


@pytest.mark.parametrize(
    ("value", "version", "expected"),
    [
        (Row(), "version", 8),
        (Row(), "keys", 9),
        ({"version": 8}, "version", 8),
        (Record(), "version", 8),
        ((1, 2), lambda pair: pair[1], 2),
        ({"version": None}, "version", None),
        (None, "version", None),
        (None, lambda row: row.version, None),
        (Row(), None, None),
    ],
)
def test_where_a_version_can_be(value: Any, version: Any, expected: int | None) -> None:
    assert version_of(value, version) == expected


@pytest.mark.parametrize(
    ("value", "version", "problem"),
    [
        (Row(), "revision", "this Row has nothing of that name"),
        ({}, "version", "this dict has nothing of that name"),
        (Record(), "revision", "this Record has nothing of that name"),
        (Row(), "name", "of a Row is 'x'; accepted: int or None"),
        (Row(), "sure", "of a Row is True; accepted: int or None"),
        (Row(), lambda row: 1.5, "is 1.5; accepted: int or None"),
    ],
)
async def test_a_version_that_is_not_there_is_said_to_everyone_who_waits(
    cache: InProcessCache, value: Any, version: Any, problem: str
) -> None:
    async def load() -> Any:
        await asyncio.sleep(0)
        return value

    readers = [cache.read("k", load, version=version) for _ in range(3)]
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert [type(result) for result in results] == [CacheError] * 3
    assert problem in str(results[0])
    assert len(cache) == 0
