"""A cache outside the process, on a real Redis and Memcached, as two instances see it."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
import pytest
from clocks import SetClock
from proxy import Proxy
from waiting import Eventually

from cacheinval.backends import servers
from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.backends.serializing import serializer
from cacheinval.backends.servers import connect
from cacheinval.backends.shared import SharedEntries
from cacheinval.cache import PastCache, Read, SharedCache, TwoLevels
from cacheinval.coherence import Coherence, Eviction
from cacheinval.coherence.marks import Marks
from cacheinval.errors import CacheError, ConfigurationError
from cacheinval.sandbox import Memcached, Redis

SerializerName = Literal["json", "msgpack", "pickle"]

LONG = "k" * 512
STRANGE_KEYS = [
    "with spaces",
    "line\nfeed\tand\x01control",
    "Ünïcode 漢字 😀",
    "*?[a-z]^\\",
    "cacheinval:x:epoch",
    "epoch",
    "tag:t",
    "#",
    LONG,
    "k" * 174,
    "k" * 175,
    "😀" * 128,
]


EVICTIONS = [Eviction(["k"]), Eviction(tags=["t"]), Eviction(everything=True)]
each_eviction = pytest.mark.parametrize("what", EVICTIONS, ids=["key", "tag", "everything"])


@dataclass
class Instance:
    """The shared cache as one instance uses it."""

    coherence: Coherence
    clock: SetClock
    entries: SharedEntries
    cache: SharedCache

    async def evict(self, *keys: str, tags: Sequence[str] = (), everything: bool = False) -> None:
        await self.apply(Eviction(keys, tags, everything))

    async def apply(self, eviction: Eviction) -> None:
        self.coherence.evict(eviction, self.clock.now())
        await self.cache.evict(eviction)

    async def close(self) -> None:
        await self.cache.close()


def instance(url: str, namespace: str, name: SerializerName = "json", compress_above: int = 0) -> Instance:
    coherence, clock = Coherence(), SetClock()
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    entries = SharedEntries(connect(url), namespace, serializer(name), compress_above)
    return Instance(coherence, clock, entries, SharedCache(entries, coherence, clock, ttl=300))


@pytest.fixture(params=["redis", "memcached"])
def url(request: pytest.FixtureRequest) -> str:
    server: Redis | Memcached = request.getfixturevalue(request.param)
    return server.url


@pytest.fixture
async def one(url: str, namespace: str) -> AsyncIterator[Instance]:
    one = instance(url, namespace)
    yield one
    await one.close()


@pytest.fixture
async def two(url: str, namespace: str) -> AsyncIterator[Instance]:
    two = instance(url, namespace)
    yield two
    await two.close()


def value_of(value: Any) -> Callable[[], Any]:
    async def load() -> Any:
        return value

    return load


async def refuse() -> Any:
    pytest.fail("loaded although it was cached")


class Loader:
    """A factory that waits to be released; `started` is set when it has read its value."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.started, self.release = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> Any:
        self.started.set()
        await self.release.wait()
        return self.value


# One fills, the other finds


async def test_what_one_stores_the_other_serves(one: Instance, two: Instance) -> None:
    assert await one.cache.read("k", value_of({"a": [1, None]}), tags=["t"]) == Read(
        {"a": [1, None]}, "miss", True
    )
    assert await two.cache.read("k", refuse, tags=["t"]) == Read({"a": [1, None]}, "hit", False)
    assert await two.cache.read("k", refuse) == Read({"a": [1, None]}, "hit", False)


@pytest.mark.parametrize("value", [None, 0, "", False, [], {}])
async def test_values_that_are_false_are_cached(one: Instance, value: Any) -> None:
    await one.cache.get_or_set("k", value_of(value))
    assert await one.cache.read("k", refuse) == Read(value, "hit", False)


@each_eviction
async def test_what_one_evicts_is_gone_for_the_other(one: Instance, two: Instance, what: Eviction) -> None:
    await one.cache.get_or_set("k", value_of("old"), tags=["t", "u"])
    await one.cache.get_or_set("other", value_of("kept"), tags=["u"])
    await two.apply(what)
    assert (await one.cache.read("other", value_of("kept"))).outcome == ("miss" if what.everything else "hit")
    assert await one.cache.read("k", value_of("new"), tags=["t", "u"]) == Read("new", "miss", True)
    assert await two.cache.read("k", refuse) == Read("new", "hit", False)


async def test_a_refresh_replaces_what_is_there_for_all(one: Instance, two: Instance) -> None:
    await one.cache.read("k", value_of("old"), tags=["t"])
    assert await two.cache.read("k", value_of("new"), tags=["t"], refresh=True) == Read("new", "bypass", True)
    assert await one.cache.read("k", refuse, tags=["t"]) == Read("new", "hit", False)


@each_eviction
async def test_an_eviction_voids_a_refresh(one: Instance, two: Instance, what: Eviction) -> None:
    await one.cache.read("k", value_of("older"), tags=["t"])

    async def load() -> str:
        await two.apply(what)
        return "old"

    await one.cache.read("k", load, tags=["t"], refresh=True)
    assert (await two.cache.read("k", value_of("new"), tags=["t"])).value == "new"


async def test_what_is_withheld_is_not_stored_and_drops_what_was_if_asked_to(
    one: Instance, two: Instance
) -> None:
    async def load() -> None:
        await one.cache.withhold(drop=True)

    assert await one.cache.read("k", load) == Read(None, "miss", False)
    await two.cache.read("k", value_of("old"))
    assert await one.cache.read("k", load, refresh=True) == Read(None, "bypass", False)
    assert await two.cache.read("k", value_of("new")) == Read("new", "miss", True)


async def test_a_tag_that_a_reader_does_not_name_counts_as_well(one: Instance, two: Instance) -> None:
    await one.cache.get_or_set("k", value_of("old"), tags=["t"])
    await two.evict(tags=("t",))
    assert await one.cache.get_or_set("k", value_of("new")) == "new"


async def test_namespaces_do_not_touch_each_other(url: str, one: Instance, namespace: str) -> None:
    other = instance(url, namespace + "x")
    try:
        await one.cache.get_or_set("k", value_of(1), tags=["t"])
        assert await other.cache.get_or_set("k", value_of(2), tags=["t"]) == 2
        await other.evict("k", tags=("t",), everything=True)
        await other.evict("k", tags=("t",))
        assert await one.cache.get_or_set("k", refuse) == 1
    finally:
        await other.close()


@pytest.mark.parametrize("namespace", ["n" * 64])
async def test_keys_of_every_kind(one: Instance, two: Instance, namespace: str) -> None:
    await one.evict(everything=True)
    for key in STRANGE_KEYS:
        stored = await one.cache.read(key, value_of(key), tags=[key, "t"])
        assert stored == Read(key, "miss", True), key
    for key in STRANGE_KEYS:
        assert await two.cache.read(key, refuse) == Read(key, "hit", False)
    for key in STRANGE_KEYS[::2]:
        await two.evict(key)
    for key in STRANGE_KEYS[1::2]:
        await two.evict(tags=(key,))
    for key in STRANGE_KEYS:
        assert await one.cache.read(key, value_of("new")) == Read("new", "miss", True), key


async def test_many_keys_at_once(one: Instance) -> None:
    keys = [f"k{n}" for n in range(1_000)]
    for key in keys[:20]:
        await one.cache.get_or_set(key, value_of(1))
    await one.evict(*keys)
    assert [(await one.cache.read(key, value_of(2))).outcome for key in keys[:20]] == ["miss"] * 20


# For who observes


async def test_what_would_be_served_is_what_a_read_is_served(one: Instance, two: Instance) -> None:
    assert await one.cache.would_serve("k") is None
    await one.cache.get_or_set("k", value_of({"a": 1}), tags=["t"])
    for who in (one, two):
        entry = await who.cache.would_serve("k")
        assert entry is not None
        assert (entry.value, entry.tags) == ({"a": 1}, {"t"})
        assert who.cache.counters.hits == 0
    one.clock.ahead = 301
    assert await one.cache.would_serve("k") is None, "its ttl has passed"
    await two.evict(tags=("t",))
    assert await two.cache.would_serve("k") is None


async def test_only_loads_that_are_stored_are_remembered(one: Instance) -> None:
    remembered: list[str] = []
    one.cache._remember = lambda key, *_: remembered.append(key)

    async def evicted_meanwhile() -> str:
        await one.evict("voided")
        return "old"

    for _ in range(2):
        await one.cache.get_or_set("k", value_of(1))
    await one.cache.get_or_set("voided", evicted_meanwhile)
    assert remembered == ["k"]


# Types


class Product(msgspec.Struct, frozen=True):
    id: str
    price: Decimal


async def test_a_model_comes_back_as_it_was(one: Instance, two: Instance) -> None:
    product = Product("abc-123", Decimal("109.990"))
    first = await one.cache.read("k", value_of(product), model=Product)
    second = await two.cache.read("k", refuse, model=Product)
    assert first.value == second.value == product
    assert str(second.value.price) == "109.990"
    assert await one.cache.get_or_set("k", refuse) == {"id": "abc-123", "price": "109.990"}


async def test_a_miss_gives_the_same_type_as_a_hit_and_as_a_transaction(one: Instance) -> None:
    load = value_of({"pair": (1, 2)})
    miss = await one.cache.get_or_set("k", load)
    hit = await one.cache.get_or_set("k", load)
    with PastCache():
        bypass = await one.cache.read("k", load)
    assert miss == hit == bypass.value == {"pair": [1, 2]}
    assert bypass.outcome == "bypass"


async def test_an_entry_of_another_version_of_the_model_is_loaded_again(one: Instance) -> None:
    await one.cache.get_or_set("k", value_of({"title": "old model"}))
    product = Product("a", Decimal(1))
    assert await one.cache.read("k", value_of(product), model=Product) == Read(product, "miss", True)


WRITTEN: list[tuple[SerializerName, int]] = [
    ("json", 0), ("json", 100), ("msgpack", 0), ("msgpack", 100), ("pickle", 0), ("pickle", 100)
]  # fmt: skip


@pytest.mark.parametrize("value", ["", "b\n" * 1000, {"a": [1, None]}], ids=["empty", "long", "structured"])
@pytest.mark.parametrize(("name", "above"), WRITTEN)
async def test_every_way_to_write_a_value(
    url: str, namespace: str, name: SerializerName, above: int, value: Any
) -> None:
    one, two = (instance(url, namespace, name, above) for _ in range(2))
    assert await one.cache.read("k", value_of(value), tags=["t"]) == Read(value, "miss", True)
    (raw,) = await one.entries._server.get([one.entries._entry("k")])
    assert raw is not None
    assert (b"+zlib" in raw) == (len(raw) < 1000 < len(str(value))) == bool(above and len(str(value)) > 1000)
    assert await two.cache.read("k", refuse) == Read(value, "hit", False)
    await two.evict("k")
    assert await one.cache.read("k", value_of("new")) == Read("new", "miss", True)
    for each in (one, two):
        await each.close()


@pytest.mark.parametrize("value", ["long" * 100, 49], ids=["text", "in MessagePack what 1 is in JSON"])
@pytest.mark.parametrize(("name", "above"), WRITTEN)
async def test_what_another_setting_has_written_counts_as_absent(
    url: str, namespace: str, name: SerializerName, above: int, value: Any
) -> None:
    """As while a service is deployed with another one: nobody fails, and nobody reads what it did not ask for."""
    before = instance(url, namespace, name, above)
    for other, threshold in WRITTEN:
        after = instance(url, namespace, other, threshold)
        await before.cache.get_or_set("k", value_of(value))
        read = await after.cache.read("k", value_of(value))
        assert read == Read(value, "hit" if other == name else "miss", other != name), (other, threshold)
        await after.evict("k")
        await after.close()
    await before.close()


async def test_what_zlib_makes_longer_is_not_compressed(url: str, namespace: str) -> None:
    one = instance(url, namespace, "msgpack", 10)
    await one.cache.get_or_set("k", value_of(random.randbytes(200)))
    (raw,) = await one.entries._server.get([one.entries._entry("k")])
    assert raw is not None
    assert b"+zlib" not in raw
    await one.close()


async def test_what_cannot_be_decompressed_counts_as_absent(url: str, namespace: str) -> None:
    one = instance(url, namespace, "json", 10)
    await one.cache.get_or_set("k", value_of("long" * 100))
    (raw,) = await one.entries._server.get([one.entries._entry("k")])
    assert raw is not None
    await one.entries._server.set(one.entries._entry("k"), raw[:-10])
    assert await one.cache.read("k", value_of("new")) == Read("new", "miss", True)
    await one.close()


async def test_a_value_without_a_json_form_is_refused_with_a_reason(one: Instance) -> None:
    with pytest.raises(CacheError, match="keeps JSON; this value has no such form"):
        await one.cache.get_or_set("k", value_of(object()))
    assert await one.cache.get_or_set("k", value_of(1)) == 1


async def test_what_others_left_under_our_names_is_replaced(one: Instance, url: str) -> None:
    backend = connect(url)
    stamped = await one.entries.find("k", frozenset(), None)
    without_value = {
        "epoch": stamped.epoch, "stamp": stamped.stamp, "stamps": {}, "load_started": 0, "expires_at": 1e12
    }  # fmt: skip
    for junk in ("nonsense", "{}", json.dumps({"epoch": 1}), json.dumps(without_value)):
        await backend.set(one.entries._entry("k"), junk)
        assert await one.cache.read("k", value_of(1)) == Read(1, "miss", True)
        await one.evict("k")
    await backend.close()


async def test_bytes_that_are_no_text_are_replaced(redis: Redis, namespace: str) -> None:
    one = instance(redis.url, namespace)
    await one.entries._server._backend.client.set(one.entries._entry("k"), b"\xff\xfe")
    assert (await one.cache.read("k", value_of(1))).value == 1
    await one.close()


# Age


async def test_an_entry_ends_with_its_ttl_by_the_clock_too(one: Instance, two: Instance) -> None:
    await one.cache.get_or_set("k", value_of(1), ttl=10)
    two.clock.ahead = 9.5
    assert (await two.cache.read("k", refuse)).outcome == "hit"
    two.clock.ahead = 10.5
    assert (await two.cache.read("k", value_of(2), ttl=10)).outcome == "miss"


@pytest.mark.parametrize("ttl", [0.2, 1.4, 86_400 * 31, 86_400 * 3650])
async def test_ttls_of_any_length(one: Instance, ttl: float) -> None:
    await one.cache.get_or_set("k", value_of(1), ttl=ttl)
    assert (await one.cache.read("k", refuse)).outcome == "hit"
    one.clock.ahead = ttl
    assert (await one.cache.read("k", value_of(2))).outcome == "miss"


async def test_a_suspect_instance_serves_what_is_at_most_a_second_old(one: Instance, two: Instance) -> None:
    await one.cache.get_or_set("k", value_of(1))
    two.coherence.lost("cut")
    assert (await two.cache.read("k", refuse)).outcome == "hit"
    two.clock.ahead = 1.5
    assert await two.cache.read("k", value_of(2)) == Read(2, "bypass", True)
    assert (await two.cache.read("k", refuse)).outcome == "hit"  # its own load is young again


@each_eviction
@pytest.mark.parametrize("knows", [True, False], ids=["suspect", "deaf without knowing"])
async def test_what_is_stored_by_who_does_not_hear_is_served_by_nobody(
    one: Instance, two: Instance, what: Eviction, knows: bool
) -> None:
    """Nothing voids the load of a deaf instance, but its stamps were looked up before another one evicted."""

    async def meanwhile() -> str:
        if knows:
            two.coherence.lost("cut")
        await one.apply(what)
        return "old"

    assert (await two.cache.read("k", meanwhile, tags=["t"])).value == "old"
    assert await one.cache.read("k", value_of("new"), tags=["t"]) == Read("new", "miss", True)
    assert (await two.cache.read("k", refuse, tags=["t"])).value == "new"


async def test_what_is_dated_by_a_clock_that_is_ahead_is_not_taken_for_young(
    one: Instance, two: Instance
) -> None:
    two.clock.ahead = 3600
    assert (await two.cache.read("k", value_of("old"))).stored
    assert (await two.cache.read("k", refuse)).outcome == "hit"
    assert await one.cache.read("k", value_of("new")) == Read("new", "miss", True)


async def test_a_value_inherits_the_age_of_its_parts(one: Instance, two: Instance) -> None:
    await one.cache.get_or_set("part", value_of(1), tags=["t"])
    two.clock.ahead = 50

    async def whole() -> Any:
        return await two.cache.get_or_set("part", refuse) + 1

    assert await two.cache.get_or_set("untagged", whole) == 2
    assert (await two.cache.read("untagged", value_of(3))).outcome == "miss", (
        "stored without the tag of its part"
    )
    assert await two.cache.get_or_set("whole", whole, tags=["t"]) == 2
    two.coherence.lost("cut")
    assert (await two.cache.read("whole", value_of(3), tags=["t"])).outcome == "bypass"


# Late loads


@each_eviction
async def test_a_load_that_was_overtaken_by_an_eviction_here_is_not_stored(
    one: Instance, two: Instance, what: Eviction, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, stores = Loader("old"), []
    reader = asyncio.create_task(one.cache.read("k", loader, tags=["t"]))
    await loader.started.wait()
    await one.apply(what)
    with monkeypatch.context() as patch:
        patch.setattr(one.entries, "store", stores.append)
        loader.release.set()
        assert await reader == Read("old", "miss", False)
    assert stores == [], "stored for a moment, and removed again"
    assert (await two.cache.read("k", value_of("new"))).value == "new"


@pytest.mark.parametrize("what", EVICTIONS[1:], ids=["tag", "everything"])
async def test_what_is_evicted_during_the_look_is_not_taken_for_what_came_after(
    one: Instance, what: Eviction, monkeypatch: pytest.MonkeyPatch
) -> None:
    await one.cache.get_or_set("k", value_of("old"), tags=["t"])
    find = one.entries.find

    async def find_then_evict(*args: Any) -> Any:
        found = await find(*args)
        await one.apply(what)
        return found

    monkeypatch.setattr(one.entries, "find", find_then_evict)
    assert (await one.cache.read("k", value_of("new"), tags=["t"])).value == "new"


@pytest.mark.parametrize("what", EVICTIONS[1:], ids=["tag", "everything"])
async def test_a_load_that_was_overtaken_by_an_eviction_elsewhere_is_served_to_nobody(
    one: Instance, two: Instance, what: Eviction
) -> None:
    loader = Loader("old")
    reader = asyncio.create_task(one.cache.read("k", loader, tags=["t"]))
    await loader.started.wait()
    await two.apply(what)
    loader.release.set()
    await reader
    for other in (two, one):
        assert (await other.cache.read("k", value_of("new"), tags=["t"])).value == "new"


async def test_a_value_that_is_evicted_while_it_is_being_stored_is_removed(
    one: Instance, two: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = one.entries.store

    async def evict_then_store(*args: Any) -> None:
        await one.evict("k")
        await store(*args)

    monkeypatch.setattr(one.entries, "store", evict_then_store)
    assert await one.cache.read("k", value_of("old")) == Read("old", "miss", False)
    assert (await two.cache.read("k", value_of("new"))).value == "new"


async def test_a_load_that_races_invalidations_leaves_nothing_stale_behind(one: Instance) -> None:
    database, stale = 0, 0

    async def load() -> int:
        value = database
        await asyncio.sleep(0)
        return value

    for run in range(100):
        reader = asyncio.create_task(one.cache.get_or_set("k", load))
        for _ in range(run % 12):
            await asyncio.sleep(0)
        database = run + 1
        await one.evict("k")
        await reader
        stale += await one.cache.get_or_set("k", load) != database
    assert stale == 0


# A cache that is down


@asynccontextmanager
async def through_proxy(url: str, namespace: str) -> AsyncIterator[tuple[Proxy, Instance]]:
    parts = urlsplit(url)
    async with Proxy("127.0.0.1", parts.port or 0) as proxy:
        one = instance(f"{parts.scheme}://127.0.0.1:{proxy.port}{parts.path}", namespace)
        try:
            yield proxy, one
        finally:
            await one.close()


async def test_a_cache_that_is_down_costs_a_load_and_no_error(url: str, namespace: str) -> None:
    async with through_proxy(url, namespace) as (proxy, one):
        await one.cache.get_or_set("k", value_of("old"))
        proxy.cut()
        assert await one.cache.read("k", value_of("new")) == Read("new", "miss", False)
        with pytest.raises(CacheError, match="cache failed"):
            await one.evict("k")
        proxy.pass_()
        assert (await one.cache.read("k", value_of("newer"))).value == "newer"


async def test_a_cache_that_hangs_costs_its_deadline(
    url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "OPERATION_TIMEOUT", 0.1)
    async with through_proxy(url, namespace) as (proxy, one):
        await one.cache.get_or_set("k", value_of("old"))
        proxy.swallow()
        async with asyncio.timeout(60):
            assert await one.cache.read("k", value_of("new")) == Read("new", "miss", False)
            with pytest.raises(CacheError, match="cache failed: TimeoutError"):
                await one.evict("k")
        proxy.pass_()
        assert (await one.cache.read("k", value_of("newer"))).value == "newer"


@each_eviction
async def test_what_could_not_be_evicted_is_not_served(
    url: str, namespace: str, two: Instance, what: Eviction
) -> None:
    async with through_proxy(url, namespace) as (proxy, one):
        await one.cache.get_or_set("k", value_of("old"), tags=["t"])
        proxy.cut()
        with pytest.raises(CacheError):
            await one.apply(what)
        proxy.pass_()
        assert (await two.cache.read("k", value_of("older"), tags=["t"])).outcome == "hit", (
            "it is still there"
        )
        assert await one.cache.read("k", value_of("new"), tags=["t"]) == Read("new", "miss", True)
        assert await two.cache.get_or_set("k", refuse, tags=["t"]) == "new"


async def test_a_tag_that_could_not_be_evicted_concerns_readers_that_do_not_name_it(
    url: str, namespace: str
) -> None:
    async with through_proxy(url, namespace) as (proxy, one):
        await one.cache.get_or_set("k", value_of("old"), tags=["t"])
        proxy.cut()
        with pytest.raises(CacheError):
            await one.evict(tags=("t",))
        proxy.pass_()
        assert await one.cache.get_or_set("k", value_of("new")) == "new"


async def test_an_eviction_is_owed_until_the_last_one_is_done(
    one: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that began earlier may have passed before somebody stored again, so its success settles nothing later."""
    await one.cache.get_or_set("k", value_of("old"))
    evict, gate, began = one.entries.evict, asyncio.Event(), asyncio.Event()

    async def slow(*args: Any) -> None:
        await evict(*args)
        began.set()
        await gate.wait()

    async def fail(*args: Any) -> None:
        raise CacheError("down")

    monkeypatch.setattr(one.entries, "evict", slow)
    first = asyncio.create_task(one.evict("k"))
    await began.wait()
    monkeypatch.setattr(one.entries, "evict", evict)
    await one.cache.get_or_set("k", value_of("stored in between"))
    await one.cache.get_or_set("k", refuse)
    monkeypatch.setattr(one.entries, "evict", fail)
    with pytest.raises(CacheError):
        await one.evict("k")
    gate.set()
    await first
    monkeypatch.setattr(one.entries, "evict", evict)
    assert await one.cache.get_or_set("k", value_of("new")) == "new"


@each_eviction
async def test_a_store_that_timed_out_and_lands_after_an_eviction_is_served_by_nobody(
    one: Instance, two: Instance, monkeypatch: pytest.MonkeyPatch, what: Eviction
) -> None:
    store, late = one.entries.store, []

    async def time_out(*args: Any) -> None:
        late.append(args)
        raise CacheError("timed out")

    monkeypatch.setattr(one.entries, "store", time_out)
    assert await one.cache.read("k", value_of("old"), tags=["t"]) == Read("old", "miss", False)
    monkeypatch.setattr(one.entries, "store", store)
    await two.apply(what)
    await store(*late[0])
    for instance in (one, two):
        assert await instance.cache.get_or_set("k", value_of("new"), tags=["t"]) == "new"


async def test_much_that_could_not_be_evicted_is_as_good_as_everything(
    one: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the cache is away every write adds to it, and every read looks at it."""
    monkeypatch.setattr("cacheinval.cache.shared.MOST_OWED", 10)
    await one.cache.get_or_set("k", value_of("old"))

    async def fail(*args: Any) -> None:
        raise CacheError("away")

    away = pytest.MonkeyPatch()
    for evict in ("evict", "evict_ahead"):
        away.setattr(one.entries, evict, fail)
    with pytest.raises(CacheError):
        await one.cache.evict(Eviction([f"another{n}" for n in range(11)]))
    assert len(one.cache._owed.keys) == 0
    assert await one.cache.read("k", value_of("bypass")) == Read("bypass", "miss", False)
    away.undo()
    assert await one.cache.get_or_set("k", value_of("new")) == "new"
    assert not one.cache._owed


@pytest.mark.parametrize("eviction", [Eviction(["k"]), Eviction(everything=True)], ids=["key", "everything"])
async def test_a_reply_that_comes_late_is_not_taken_for_that_of_a_later_question(
    url: str, namespace: str, two: Instance, monkeypatch: pytest.MonkeyPatch, eviction: Eviction
) -> None:
    """A read that is given up leaves its reply, the old value, on the way; the next read on that connection must not
    be answered with it."""
    async with through_proxy(url, namespace) as (proxy, one):
        await asyncio.gather(*(one.cache.get_or_set(f"warm{n}", value_of(n)) for n in range(3)))
        await one.cache.get_or_set("k", value_of("old"))
        proxy.delay(0.3)
        monkeypatch.setattr(servers, "OPERATION_TIMEOUT", 0.1)
        for _ in range(12):
            assert await one.cache.get_or_set("k", value_of("bypass")) == "bypass"
        monkeypatch.setattr(servers, "OPERATION_TIMEOUT", 5.0)
        proxy.delay(0)
        await two.cache.evict(eviction)
        one.coherence.evict(eviction, one.clock.now())
        assert (await one.cache.read("k", value_of("new"))).value == "new"


async def test_a_server_that_hangs_up_on_a_command_does_not_stop_the_world(namespace: str) -> None:
    """aiomcache reads a connection that has ended over and over, without ever letting another task run."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    one = instance(f"memcached://127.0.0.1:{port}", namespace)
    async with asyncio.timeout(60):
        with pytest.raises(CacheError, match="the memcached cache failed"):
            await one.evict("k", "l")
        with pytest.raises(CacheError, match="the memcached cache failed"):
            await one.evict(everything=True)
        assert await one.cache.get_or_set("k", value_of(1)) == 1
    await one.close()
    server.close()


async def test_the_cache_may_forget_its_marks(one: Instance, two: Instance, url: str) -> None:
    """A full cache drops what it likes, stamps and the epoch as well; what bore them is not served afterwards."""
    await one.cache.get_or_set("k", value_of("old"), tags=["t"])
    await one.entries._server._backend.delete(one.entries._tag("t"))
    assert (await two.cache.read("k", value_of("new"), tags=["t"])).value == "new"
    await one.entries._server._backend.delete(one.entries._name("epoch"))
    assert (await two.cache.read("k", value_of("newer"), tags=["t"])).value == "newer"


# The marks of an instance on a Redis, which can go back


@pytest.fixture
async def marked(own_redis: Redis, namespace: str) -> AsyncIterator[tuple[SharedEntries, Marks]]:
    marks = Marks()
    entries = SharedEntries(connect(own_redis.url), namespace, instance_id="one", marks=marks)
    await entries.evict([], [], everything=True)
    yield entries, marks
    await entries.close()


async def test_a_redis_that_is_slow_has_not_gone_back(
    marked: tuple[SharedEntries, Marks], own_redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was told while it was frozen it does in the end, and nobody hears of it."""
    entries, marks = marked
    monkeypatch.setattr(servers, "OPERATION_TIMEOUT", 0.1)
    own_redis.pause()
    for _ in range(3):
        with pytest.raises(CacheError, match="TimeoutError"):
            await entries.evict(["k"], [], everything=False)
    own_redis.resume()
    monkeypatch.setattr(servers, "OPERATION_TIMEOUT", 5.0)
    await entries.evict(["k"], [], everything=False)
    assert not marks.lost
    assert await entries.keep_proof(lambda after: after)


async def test_whoever_looks_while_others_evict_finds_what_is_there(
    marked: tuple[SharedEntries, Marks],
) -> None:
    entries, marks = marked
    await entries.store("k", b"1", 60, 0.0, 2e9, await entries.find("k", frozenset(), None))

    async def evict(evict: Callable[..., Any], number: int) -> None:
        for _ in range(20):
            await evict([f"another {number}"], ["t"], everything=False)

    ahead = [evict(entries.evict_ahead, number) for number in range(5)]
    evicting = asyncio.gather(evict(entries.evict, 5), *ahead)
    looks = 0
    while not evicting.done():
        since = marks.at
        found = await entries.find("k", frozenset(), None)
        assert marks.stand(found.marks, since)
        looks += 1
    await evicting
    assert looks > 10
    assert not marks.lost


async def test_the_mark_is_replaced_in_one_step_with_the_eviction(
    marked: tuple[SharedEntries, Marks], own_redis: Redis
) -> None:
    """Where no message follows it is not: whoever evicts ahead may be another process of this name."""
    entries, marks = marked
    admin = connect(own_redis.url)

    async def transactions() -> int:
        stats = await admin.client.info("commandstats")
        return int(stats["cmdstat_multi"]["calls"])

    before, last = await transactions(), marks.last
    await entries.evict_ahead(["k"], ["t"], everything=False)
    assert (await transactions(), marks.last) == (before, last)
    await entries.evict(["k"], ["t"], everything=False)
    await entries.keep_proof(lambda after: after)
    assert await transactions() == before + 2
    assert marks.last != last
    await admin.close()


async def test_a_read_that_evicts_what_is_owed_leaves_the_mark_alone(
    marked: tuple[SharedEntries, Marks],
) -> None:
    """As does what a process drops of its own accord, in front of the cache outside or without anything there."""
    entries, marks = marked
    coherence, clock = Coherence(), SetClock()
    cache = SharedCache(entries, coherence, clock, ttl=300)
    both = TwoLevels(BoundedMemoryCache(10), cache, coherence, clock, ttl=300)
    last = marks.last
    cache.evict_now(Eviction(["k"]))
    assert await cache.get_or_set("k", value_of("new")) == "new"
    assert not cache._owed
    await both.evict_ahead(Eviction(["k"]))
    assert marks.last == last
    await both.evict(Eviction(["k"]))
    assert marks.last != last


async def test_a_look_that_takes_two_steps_sees_the_mark_in_both(
    marked: tuple[SharedEntries, Marks],
) -> None:
    entries, marks = marked
    found = await entries.find("k", frozenset(["t"]), None)
    await entries.store("k", b"1", 60, 0.0, 2e9, found)
    assert (await entries.find("k", frozenset(["t"]), None)).marks == (marks.last,)
    assert (await entries.find("k", frozenset(), None)).marks == (marks.last, marks.last)


async def test_what_is_kept_for_an_instance_is_bounded_and_expires(
    marked: tuple[SharedEntries, Marks], own_redis: Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, _ = marked
    monkeypatch.setattr(servers, "MOST_MARKS", 50)
    for _ in range(250):
        await entries.evict(["k"], [], everything=False)
    admin = connect(own_redis.url)
    names = [f"cacheinval:{namespace}:{what}:one" for what in ("mark", "marks")]
    assert await admin.raw("llen", names[1]) <= 50 + 100
    for name in names:
        assert await admin.raw("ttl", name) > 24 * 3600
    for _ in range(2):  # and also when all begins anew
        await entries.forget_proof()
        await entries.evict(["k"], [], everything=False)
        assert await admin.raw("ttl", names[1]) > 24 * 3600
    await admin.close()


# Addresses


async def test_redis_with_a_password_and_a_database(own_redis: Redis, namespace: str) -> None:
    admin = connect(own_redis.url)
    await admin.raw("config_set", "requirepass", "p@ss word")
    port = urlsplit(own_redis.url).port
    one = instance(f"redis://:p%40ss%20word@127.0.0.1:{port}/3", namespace)
    assert await one.cache.read("k", value_of(1)) == Read(1, "miss", True)
    await admin.raw("execute_command", "AUTH", "p@ss word")
    sizes = await admin.raw("info", "keyspace")
    assert list(sizes) == ["db3"]
    wrong = instance(f"redis://:s3cr3t@127.0.0.1:{port}/3", namespace)
    with pytest.raises(CacheError) as caught:
        await wrong.evict("k")
    assert "s3cr3t" not in str(caught.value)
    for each in (one, wrong):
        await each.close()
    await admin.close()


def test_it_refuses_to_work_while_aiocache_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOCACHE_DISABLE", "1")
    for address in ("redis://127.0.0.1", "memcached://127.0.0.1"):
        with pytest.raises(ConfigurationError, match="AIOCACHE_DISABLE=1"):
            connect(address)


@pytest.mark.parametrize("scheme", ["redis", "memcached"])
def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    for module in ("aiocache.backends.redis", "cacheinval.backends.memcached"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigurationError, match=rf"pip install cacheinval\[{scheme}\]"):
        connect(f"{scheme}://127.0.0.1")


async def test_the_server_comes_back(own_redis: Redis, namespace: str, eventually: Eventually) -> None:
    one = instance(own_redis.url, namespace)
    await one.cache.get_or_set("k", value_of("old"))
    await own_redis.kill()
    assert await one.cache.read("k", value_of("new")) == Read("new", "miss", False)
    await own_redis.start()

    async def cached() -> bool:
        return (await one.cache.read("k", value_of("new"))).outcome == "hit"

    await eventually(cached)
    await one.close()
