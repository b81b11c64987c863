"""The client in one process without any server: `memory://`, and no database."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiocache import SimpleMemoryCache
from waiting import Eventually

from cacheinval import (
    Client,
    ConfigurationError,
    InvalidKeyError,
    NoDatabaseError,
    PublishError,
    Settings,
    tasks,
)
from cacheinval.bus import Delivery
from cacheinval.bus.memory import EventBus, EventChannel
from cacheinval.cache import Read
from cacheinval.coherence import Eviction
from cacheinval.errors import CacheinvalError


def settings(namespace: str, **others: Any) -> Settings:
    return Settings(**{"broker_url": "memory://", "database_url": "", "namespace": namespace, **others})


class Source:
    """The source of truth; `loads` counts how often it was asked."""

    def __init__(self, value: Any = "old") -> None:
        self.value = value
        self.loads = 0

    async def __call__(self) -> Any:
        self.loads += 1
        return self.value


@pytest.fixture
async def client(namespace: str) -> AsyncIterator[Client]:
    async with Client(settings(namespace)) as client:
        await client.wait_ready(30)
        yield client


@pytest.fixture
async def other(namespace: str, client: Client) -> AsyncIterator[Client]:
    """Another client of the same namespace."""
    async with Client(settings(namespace)) as other:
        await other.wait_ready(30)
        yield other


def test_a_client_can_be_made_and_used_to_decorate_before_there_is_an_event_loop(namespace: str) -> None:
    client = Client(settings(namespace))
    source = Source()

    @client.cached("k:{number}")
    async def read(number: int) -> Any:
        return await source()

    async def main() -> None:
        async with client:
            await client.wait_ready(30)
            assert await read(1) == await read(1) == "old"
            await client.invalidate("k:1")
            source.value = "new"
            assert await read(1) == "new"

    asyncio.run(main())


@pytest.mark.parametrize(
    "names", [{"keys": ["k"]}, {"tags": ["t"]}, {"everything": True}], ids=["key", "tag", "everything"]
)
async def test_an_invalidation_reaches_every_client(
    client: Client, other: Client, eventually: Eventually, names: dict[str, Any]
) -> None:
    source = Source()
    for one in (client, other):
        assert await one.cache.read("k", source, tags=["t"]) == Read("old", "miss", True)
        assert await one.cache.read("k", source, tags=["t"]) == Read("old", "hit", False)
    source.value = "new"
    await client.invalidate(*names.pop("keys", []), **names)
    assert await client.cache.get_or_set("k", source, tags=["t"]) == "new", "evicted here before it returns"

    async def there() -> bool:
        return await other.cache.get_or_set("k", source, tags=["t"]) == "new"

    await eventually(there)
    assert source.loads == 4
    assert client.stats()["coherence"]["skipped_echoes"] == 1
    assert other.stats()["receiver"]["evictions"] == 2  # that of joining is one


async def test_other_namespaces_are_left_alone(client: Client, namespace: str) -> None:
    async with Client(settings(namespace + "2")) as stranger:
        await stranger.wait_ready(30)
        source = Source()
        await stranger.cache.get_or_set("k", source)
        await client.invalidate("k", everything=True)
        await asyncio.sleep(0)
        assert (await stranger.cache.read("k", source)).outcome == "hit"
        assert stranger.stats()["receiver"]["messages"] == 0


async def test_nothing_to_invalidate_is_refused(client: Client) -> None:
    with pytest.raises(InvalidKeyError, match="nothing to invalidate"):
        await client.invalidate()
    with pytest.raises(InvalidKeyError, match="is empty"):
        await client.invalidate("")
    with pytest.raises(InvalidKeyError, match="must be a list of strings"):
        await client.invalidate("k", tags="products")


async def test_without_a_database_an_unconfirmed_invalidation_is_an_error(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: EventChannel, body: bytes) -> None:
        raise PublishError("no broker there")

    monkeypatch.setattr(EventChannel, "send", fail)
    await client.cache.get_or_set("k", Source())
    with pytest.raises(PublishError, match="no broker there"):
        await client.invalidate("k")
    assert (await client.cache.read("k", Source())).outcome == "miss", "evicted here all the same"


async def test_what_needs_a_database_says_so(client: Client) -> None:
    with pytest.raises(NoDatabaseError, match="CACHEINVAL_DATABASE_URL"):
        await client.execute("SELECT 1", invalidate=["k"])
    with pytest.raises(NoDatabaseError):
        async with client.transaction():
            pytest.fail("entered")
    with pytest.raises(NoDatabaseError):
        await client.apply_schema()


async def test_5000_keys_at_once(client: Client, other: Client, eventually: Eventually) -> None:
    for n in range(5_000):
        await other.cache.get_or_set(f"k{n}", Source())
    await client.invalidate(*[f"k{n}" for n in range(5_000)])
    await eventually(lambda: len(other.cache) == 0)  # type: ignore[arg-type]
    assert other.stats()["receiver"]["messages"] == 5


# Life


async def test_states(namespace: str, eventually: Eventually) -> None:
    client = Client(settings(namespace))
    assert (client.state, client.ready, client.reason) == ("starting", False, "not subscribed yet")
    async with client:
        await client.wait_ready(30)
        assert (client.state, client.ready, client.reason) == ("ready", True, None)
        client.instance.lost("cut")
        assert (client.state, client.ready, client.reason) == ("suspect", False, "cut")
        with pytest.raises(TimeoutError):
            await client.wait_ready(0.01)
    assert client.state == "suspect"
    assert client.cache.__len__() == 0  # type: ignore[attr-defined]


async def test_a_client_is_entered_once(client: Client) -> None:
    with pytest.raises(CacheinvalError, match="once"):
        async with client:
            pytest.fail("entered")


async def test_after_the_end_nothing_is_left_running(namespace: str) -> None:
    before = asyncio.all_tasks()
    async with Client(settings(namespace)) as client:
        await client.wait_ready(30)
        await client.invalidate("k")
        assert len(asyncio.all_tasks()) > len(before)
    assert asyncio.all_tasks() == before


async def test_a_client_that_does_not_subscribe_invalidates_others_and_collects_nothing(
    other: Client, namespace: str, eventually: Eventually
) -> None:
    async with Client(settings(namespace), subscribe=False) as writer:
        await other.cache.get_or_set("k", Source())
        for _ in range(10):
            await writer.invalidate("k")
        await eventually(lambda: len(other.cache) == 0)  # type: ignore[arg-type]
        assert writer.state == "starting"
        assert not writer._coherence._echoes


async def test_a_part_that_fails_is_started_again(
    namespace: str, monkeypatch: pytest.MonkeyPatch, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "RESTART_PAUSE", 0.01)
    async with Client(settings(namespace)) as client:
        await client.wait_ready(30)
        await client.cache.get_or_set("k", Source())
        evict = client.cache.evict

        async def fail(eviction: Eviction) -> None:
            monkeypatch.setattr(client.cache, "evict", evict)
            raise RuntimeError("a defect")

        monkeypatch.setattr(client.cache, "evict", fail)
        await client.publisher._open_channel()
        channel = await client.bus.open_channel()
        await channel.send(b"not JSON: a gap")
        await eventually(lambda: not client.ready)
        await eventually(lambda: client.ready)
        assert len(client.cache) == 0  # type: ignore[arg-type]


async def test_an_epoch_put_off_that_fails_does_not_leave_it_suspect_for_ever(
    namespace: str, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr(tasks, "RESTART_PAUSE", 0.01)
    async with Client(settings(namespace)) as client:
        await client.wait_ready(30)
        channel = await client.bus.open_channel()
        await channel.send(b"not JSON: a gap")
        await eventually(lambda: client.stats()["receiver"]["malformed"] == 1)
        evict, failed = client.cache.evict, asyncio.Event()

        async def fail(eviction: Eviction) -> None:
            monkeypatch.setattr(client.cache, "evict", evict)
            failed.set()
            raise RuntimeError("a defect")

        await channel.send(b"not JSON: a gap, put off")
        await eventually(lambda: client.stats()["receiver"]["malformed"] == 2)
        monkeypatch.setattr(client.cache, "evict", fail)
        await asyncio.wait_for(failed.wait(), 5)
        await eventually(lambda: client.ready)


# Status


async def test_status_is_json_without_secrets(namespace: str) -> None:
    client = Client(
        settings(
            namespace,
            broker_url="amqp://user:s3cr3t@127.0.0.1:1/",
            database_url="postgresql://user:s3cr3t@127.0.0.1:1/db",
            cache_url="redis://user:s3cr3t@127.0.0.1:1/0",
            instance_id="one",
        )
    )
    shown = json.dumps(client.status())
    assert "s3cr3t" not in shown
    status = json.loads(shown)
    assert (status["id"], status["namespace"], status["state"]) == ("one", namespace, "starting")
    assert status["cache"]["url"] == "redis://user:***@127.0.0.1:1/0"
    assert status["counters"]["cache"]["hits"] == 0


async def test_instances_answer_with_their_status(client: Client, other: Client) -> None:
    instances = await client.ask_instances(0.2)
    ids = sorted([client.settings.instance_id, other.settings.instance_id])
    assert [instance["id"] for instance in instances] == ids
    assert {instance["state"] for instance in instances} == {"ready"}


async def test_answers_that_are_no_status_are_left_out(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(body: bytes, wait: float) -> list[bytes]:
        odd = [b"nonsense", b"[]", b"\xff", b'{"state":"ready"}', b'{"id":"c"}']
        return [*odd, b'{"id":"b","state":"ready"}', b'{"id":"a","state":"odd"}']

    monkeypatch.setattr(client.bus, "ask", ask)
    assert [instance["id"] for instance in await client.ask_instances(0)] == ["a", "b"]


# Attached caches


async def test_an_attached_cache_is_evicted_too(
    client: Client, other: Client, eventually: Eventually
) -> None:
    attached = SimpleMemoryCache()
    other.attach(attached)
    await attached.set("k", 1)
    await attached.set("kept", 1)
    await client.invalidate("k")

    async def gone() -> bool:
        return not await attached.exists("k")

    await eventually(gone)
    assert await attached.exists("kept")
    await client.invalidate(everything=True)

    async def all_gone() -> bool:
        return not await attached.exists("kept")

    await eventually(all_gone)


async def test_an_own_write_evicts_attached_caches_before_it_returns(client: Client) -> None:
    attached = SimpleMemoryCache()
    client.attach(attached)
    await attached.set("k", 1)
    await client.invalidate("k")
    assert not await attached.exists("k")


async def test_an_own_message_is_not_skipped_where_an_attached_cache_could_not_be_evicted(
    client: Client, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    attached = SimpleMemoryCache()
    client.attach(attached)
    await attached.set("k", 1)
    delete, failures = attached._delete, 0

    async def fail_at_first(key: str, _conn: Any = None) -> Any:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise OSError("the cache is down")
        return await delete(key)

    monkeypatch.setattr(attached, "_delete", fail_at_first)
    await client.invalidate("k")

    async def gone() -> bool:
        return not await attached.exists("k")

    await eventually(gone)
    assert failures == 3
    await eventually(lambda: client.ready)


async def test_attach_refuses_while_aiocache_is_switched_off(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOCACHE_DISABLE", "1")
    with pytest.raises(ConfigurationError, match="AIOCACHE_DISABLE=1"):
        client.attach(SimpleMemoryCache())


async def test_losing_the_bus_is_told_and_made_good(
    client: Client, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """A queue that overflows is a gap: suspect, then a new subscription and an empty cache."""
    await client.cache.get_or_set("k", Source())
    epoch = client.status()["cache"]["epoch"]
    bus = client.bus
    assert isinstance(bus, EventBus)
    with caplog.at_level(logging.INFO, "cacheinval"):
        for _ in range(10_001):  # more than may wait, without giving way once
            bus.publish(Delivery(b'{"v":1,"kind":"invalidate","keys":["x"]}'))
        await eventually(lambda: not client.ready)
        await eventually(lambda: client.ready)
    assert client.status()["cache"]["epoch"] > epoch
    assert len(client.cache) == 0  # type: ignore[arg-type]
    assert caplog.text.count("suspect") == 1


def test_a_pool_with_one_connection_is_refused() -> None:
    class Pool:
        def get_max_size(self) -> int:
            return 1

    with pytest.raises(ConfigurationError, match="at least 2, or CACHEINVAL_RELAY=off"):
        Client(Settings(broker_url="memory://"), pool=Pool())  # type: ignore[arg-type]
    Client(Settings(broker_url="memory://", relay="off"), pool=Pool())  # type: ignore[arg-type]


async def test_as_many_loaders_run_at_a_time_as_the_setting_says(
    namespace: str, eventually: Eventually
) -> None:
    async with Client(settings(namespace, max_concurrent_loads=2)) as client:
        release, running = asyncio.Event(), set[str]()

        async def load(key: str) -> None:
            running.add(key)
            await release.wait()

        reads = [asyncio.create_task(client.cache.get_or_set(k, lambda k=k: load(k))) for k in "abc"]
        await eventually(lambda: client.cache.counters.queued_loads == 1)
        assert running == {"a", "b"}
        release.set()
        await asyncio.gather(*reads)
        assert running == {"a", "b", "c"}


async def test_replicas_lag_for_as_long_as_the_setting_says(namespace: str, eventually: Eventually) -> None:
    async with Client(settings(namespace, max_replica_lag=0.001)) as client:
        await client.wait_ready(30)
        replica, primary = Source(), Source()

        async def a_replica_was_asked() -> bool:  # soon after the subscription, not half a minute later
            await client.invalidate("k")
            await asyncio.sleep(0.002)
            await client.cache.get_or_set("k", replica, version=lambda value: 1, primary=primary)
            return replica.loads > 0

        await eventually(a_replica_was_asked)


async def test_waiting_without_a_database_lists_who_answered(client: Client, other: Client) -> None:
    receipt = await client.invalidate("k", wait=0.5)
    assert receipt.answered == tuple(sorted(one.settings.instance_id for one in (client, other)))
    assert (receipt.confirmed, receipt.total, receipt.complete) == (2, None, False)
    assert receipt.reason == "there is no database"
    assert await client.invalidate("k") is None


@pytest.mark.parametrize("wait", [0, -1.0, float("inf"), float("nan")])
async def test_nothing_is_invalidated_where_nobody_can_wait_so_long(client: Client, wait: float) -> None:
    await client.cache.get_or_set("k", Source())
    with pytest.raises(ValueError, match="accepted: seconds, more than 0 and finite"):
        await client.invalidate("k", wait=wait)
    assert (await client.cache.read("k", Source())).outcome == "hit"
