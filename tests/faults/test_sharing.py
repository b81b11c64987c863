"""Two instances fill and evict one cache outside the process, and one of them is deaf, frozen or slow."""

import asyncio
import itertools
import signal

import asyncpg
import pytest
from actors import DELTA, KEYS, SELECT, Observed
from history import now
from proxy import Proxy
from scene import EVENTUAL, Eventually, looking_into, through
from workload import Work, Working

from cacheinval import Read
from cacheinval.sandbox import RabbitMQ, Redis

pytest_plugins = ("scene", "workload")

DB = asyncpg.Connection
LONG = 2.5 * DELTA  # seconds that a fault lasts


@pytest.fixture
def local_entries() -> int:
    return 0


@pytest.fixture
def work(
    working: Working, stock: DB, rabbitmq: RabbitMQ, redis: Redis, database_url: str, local_entries: int
) -> Work:
    return working(
        stock,
        broker_url=rabbitmq.url,
        database_url=database_url,
        cache_url=redis.url,
        cache_local_entries=local_entries,
    )


# Of the keys that are read, half have to be looked up again and again.
with_and_without_a_first_level = pytest.mark.parametrize("local_entries", [0, len(KEYS) // 2])


async def instance(work: Work, name: str, **settings: object) -> Observed:
    """An instance in this process, ready, that reads when it is told to."""
    client = await work._clients(**work.settings | {"instance_id": name} | settings)
    await client.wait_ready(EVENTUAL)
    return Observed(name, client, work.history, work.keys)


async def gives(observed: Observed, key: str) -> tuple[int, str]:
    """The version that a read gives now, and how it came by it."""
    read = await observed.read(key)
    return read.version, read.outcome


def stored(observed: Observed) -> int:
    """How many of its loads an instance has stored."""
    counters = observed.client.cache.counters
    return counters.loads - counters.not_stored


@pytest.mark.timeout(120)
async def test_what_is_stored_after_another_has_evicted_it_is_served_to_nobody(
    work: Work, redis: Redis, namespace: str, eventually: Eventually
) -> None:
    await work.relay()
    one, two = await instance(work, "one"), await instance(work, "two")
    writer = await work.writer()
    has_read, may_go_on = asyncio.Event(), asyncio.Event()

    async def load_slowly() -> int:
        version: int = await two.client.pool.fetchval(SELECT, "k0")
        has_read.set()
        await may_go_on.wait()
        return version

    loading = asyncio.create_task(two.client.cache.read("k0", load_slowly))
    async with asyncio.timeout(EVENTUAL), looking_into(redis.url, namespace) as shared:
        await has_read.wait()
        two.free.clear()
        await eventually(lambda: two.held > 0, EVENTUAL)
        assert await writer.write("k0")
        await eventually(lambda: any(e.instance == "one" for e in work.history.evictions), EVENTUAL)
        may_go_on.set()
        assert await loading == Read(1, "miss", True)  # nothing has told it that this is old
        assert await shared.has("k0")

        assert await gives(one, "k0") == (2, "miss")
        assert await gives(one, "k0") == (2, "hit")
        two.free.set()
        await eventually(lambda: any(e.instance == "two" for e in work.history.evictions), EVENTUAL)
        assert (await gives(two, "k0"))[0] == 2


@pytest.mark.timeout(180)
@with_and_without_a_first_level
async def test_one_of_two_is_half_open(work: Work, rabbitmq: RabbitMQ, eventually: Eventually) -> None:
    await work.relay()
    await work.reader("two", instance_id="two")
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        one = await work.reader("one", instance_id="one", broker_url=through(proxy, rabbitmq.url))
        async with work.writing(await work.writer()):
            await work.sees("one", "hit", now())
            work.history.fault("swallowed")
            proxy.swallow("both")
            await eventually(lambda: not work.says("one").ready, EVENTUAL)
            suspect, before = now(), stored(one)
            await asyncio.sleep(LONG)
            # Nobody tells it anything, and what it stores is what `two` reads as well.
            await work.sees("one", "bypass", suspect)
            await eventually(lambda: stored(one) > before + 1, EVENTUAL)  # one load may be under way
            ended = work.history.fault("passed again")
            proxy.pass_()
            await eventually(lambda: work.says("one").ready, EVENTUAL)
            await work.sees("one", "hit", ended)
        await work.check()


@pytest.mark.timeout(180)
@with_and_without_a_first_level
async def test_one_of_two_is_stopped(work: Work) -> None:
    await work.relay()
    await work.reader("one", instance_id="one")
    two = await work.process("two", instance_id="two")
    async with work.writing(await work.writer()):
        for name in work.instances:
            await work.sees(name, "hit", now())
        began = work.history.fault("SIGSTOP")
        two.signal(signal.SIGSTOP)
        await asyncio.sleep(LONG)
        ended = work.history.fault("SIGCONT")
        two.signal(signal.SIGCONT)
        for name in work.instances:
            await work.sees(name, "hit", ended)
    times = [read.begun for read in work.reads("two", began - 1)]
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) > DELTA
    await work.check()


@pytest.mark.timeout(120)
async def test_a_suspect_instance_loads_a_key_no_more_often_than_it_has_to(
    work: Work, rabbitmq: RabbitMQ, eventually: Eventually
) -> None:
    await work.relay()
    async with Proxy("127.0.0.1", rabbitmq.port) as proxy:
        one = await instance(work, "one", broker_url=through(proxy, rabbitmq.url))
        proxy.swallow("both")
        await eventually(lambda: not one.client.ready, EVENTUAL)
        began = now()
        for number in range(1000):
            await one.read(f"k{number % 3}")
        assert not one.client.ready
        took = now() - began
        for key in ("k0", "k1", "k2"):
            assert 1 <= len(one.loads[key]) <= took / DELTA + 1, f"in {took:.1f} s"
