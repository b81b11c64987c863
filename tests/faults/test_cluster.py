"""RabbitMQ is a cluster: a node is lost, or cut off from the others, and comes back."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from actors import DELTA, Observed
from history import now
from scene import EVENTUAL, Clients, Eventually
from workload import Work, Working

from cacheinval import Settings, receiver
from cacheinval.bus import streaming
from cacheinval.doctor import Finding, examine
from cacheinval.sandbox import Cluster, RabbitMQ, Redis, Sandbox

pytest_plugins = ("scene", "workload")

DB = asyncpg.Connection
IN_TIME = 90.0  # seconds for what takes a node's start, or the time after which silence is noticed, and some attempts


@pytest.fixture(scope="module")
def _cluster() -> Iterator[Cluster]:
    with asyncio.Runner() as runner:
        sandbox = Sandbox(("rabbitmq",), cluster=True)
        runner.run(sandbox.open())
        try:
            assert sandbox.environment() == {"CACHEINVAL_BROKER_URL": sandbox.cluster.url}
            assert sandbox.servers == sandbox.cluster.nodes
            yield sandbox.cluster
        finally:
            runner.run(sandbox.close())


@pytest.fixture
async def cluster(_cluster: Cluster) -> Cluster:
    """Three nodes, all of them running at the start of each test."""
    await _cluster.start()
    return _cluster


@asynccontextmanager
async def without(node: RabbitMQ, cluster: Cluster, fault: str) -> AsyncIterator[None]:
    """Within this block `node` is dead, or answers nobody, or is cut off from the others only; afterwards it is not."""
    if fault == "lost":
        await node.kill()
        yield
        await node.start()
    elif fault == "silent":
        await cluster.notice_silence_after(12)
        node.pause()
        try:
            yield
        finally:
            # Not resumed: RabbitMQ does not recover by itself from a node that does not know that it was given up.
            await node.kill()
        await node.start()
        await cluster.notice_silence_after(60)
    else:
        await cluster.part(node)
        try:
            yield
        finally:
            await cluster.heal(node)


def node_of(reader: Observed) -> str | None:
    """Where its subscription stands, as host and port; None while there is none."""
    node: str | None = reader.client.status()["broker"]["node"]
    return node


def reason(reader: Observed) -> str:
    """Why there is none."""
    return str(reader.client.status()["broker"]["reason"])


def is_at(reader: Observed, node: RabbitMQ) -> bool:
    return node_of(reader) == f"127.0.0.1:{node.port}"


async def tells_of(lost: RabbitMQ, settings: Settings) -> None:
    """What `cacheinval doctor` says of the node, and of what is on it."""
    found = {(one.level, one.check): one for one in await examine(settings)}
    assert found["ok", "broker"]
    assert f"no connection to 127.0.0.1:{lost.port}: " in found["warning", "broker"].text
    assert lost.node in found["warning", "dead letters"].text
    assert "start that node" in (found["warning", "dead letters"].remedy or "")


async def readers_at_each(work: Work, cluster: Cluster) -> dict[RabbitMQ, Observed]:
    """An instance at each node, though each may be at any: as many are begun as that takes."""
    found: dict[RabbitMQ, Observed] = {}
    while len(found) < len(cluster.nodes):
        reader = await work.reader(f"reader{len(work.instances)}")
        found |= {node: reader for node in cluster.nodes if is_at(reader, node)}
    return found


async def test_the_nodes_find_each_other(cluster: Cluster) -> None:
    assert await cluster.running_nodes(cluster.nodes[0]) == {node.node for node in cluster.nodes}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", ["lost", "cut off", pytest.param("silent", marks=pytest.mark.long)])
async def test_without_one_node_all_goes_on_at_the_others(
    fault: str,
    cluster: Cluster,
    redis: Redis,
    database_url: str,
    stock: DB,
    working: Working,
    eventually: Eventually,
) -> None:
    work = working(stock, broker_url=cluster.url, database_url=database_url)
    # The first who subscribes: so its node has the dead letters' queue too, which nobody may have to wait for.
    outside = await work.reader("outside", cache_url=redis.url, instance_id="outside")
    victim = next(node for node in cluster.nodes if is_at(outside, node))
    moved = (await readers_at_each(work, cluster))[victim]
    await work.relay()
    writer = await work.writer()

    async with work.writing(writer):
        for name in work.instances:
            await work.sees(name, "hit", 0)
        before = work.says("outside").epoch
        outside.free.clear()
        await eventually(
            lambda: outside.held, IN_TIME
        )  # so there is something in the queue that will be there again
        work.history.fault(fault)
        async with without(victim, cluster, fault):
            outside.free.set()
            await eventually(lambda: moved.client.ready and not is_at(moved, victim), IN_TIME)
            await work.sees(moved.name, "hit", now())
            # Its queue is where nobody can be reached, and it trusts nothing meanwhile.
            await eventually(
                lambda: "home node" in reason(outside), IN_TIME, describe=lambda: reason(outside)
            )
            assert not outside.client.ready
            if fault == "lost":
                await tells_of(victim, outside.client.settings)
            written = writer.done
            await eventually(lambda: writer.done > written + 20, IN_TIME)
        work.history.fault("over")
        await eventually(lambda: work.says("outside").ready, IN_TIME, describe=lambda: reason(outside))
    # What was published meanwhile never came into its queue, which is there again with what it held before.
    assert work.says("outside").epoch > before
    await work.check(timeout=IN_TIME)


# One stream, of which each node has a copy


async def leader_of(stream: str, cluster: Cluster, eventually: Eventually) -> RabbitMQ:
    """The node through which everything gets into the stream, once each of the others has a copy."""

    async def led_by() -> str | None:
        listed = await cluster.nodes[0].ctl("list_queues", "--formatter=json", "name", "leader", "online")
        (row,) = [row for row in json.loads(listed) if row["name"] == stream]
        # One that has just come back needs a moment.
        return row["leader"] if set(row["online"]) == {node.node for node in cluster.nodes} else None

    leader = await eventually(led_by, IN_TIME)
    return next(node for node in cluster.nodes if node.node == leader)


def kept(reader: Observed) -> tuple[int, dict[str, int]]:
    """In which epoch it is, and for what it has begun a new one."""
    epoch = int(reader.client.status()["cache"]["epoch"])
    return epoch, dict(reader.client.stats()["coherence"]["gap_reasons"])


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("fault", "victim"),
    [
        ("lost", "leader"),
        pytest.param("lost", "another", marks=pytest.mark.long),
        pytest.param("cut off", "leader", marks=pytest.mark.long),
        pytest.param("cut off", "another", marks=pytest.mark.long),
        pytest.param("silent", "leader", marks=pytest.mark.long),
        pytest.param("silent", "another", marks=pytest.mark.long),
    ],
)
async def test_without_one_node_a_stream_is_read_on_at_the_others(
    fault: str,
    victim: str,
    cluster: Cluster,
    database_url: str,
    namespace: str,
    stock: DB,
    working: Working,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nobody clears anything, for all that was confirmed is in the copies."""
    # Both tell of a stream that is not the same; nodes that are busy may take longer to choose another leader.
    monkeypatch.setattr(streaming, "FOUND_WITHIN", EVENTUAL)
    monkeypatch.setattr(receiver, "PROBE_TIMEOUT", EVENTUAL)
    work = working(stock, bus="stream", broker_url=cluster.url, database_url=database_url)
    at_each = await readers_at_each(work, cluster)
    readers = [one for one in work.instances.values() if isinstance(one, Observed)]
    await work.relay()
    writer = await work.writer()
    leader = await leader_of(f"cacheinval.{namespace}.stream", cluster, eventually)
    lost = next(node for node in cluster.nodes if (node is leader) == (victim == "leader"))
    moved = at_each[lost]

    async def all_hit() -> None:
        since = now()
        for one in readers:
            await eventually(lambda one=one: one.client.ready, IN_TIME, describe=lambda one=one: reason(one))
            await work.sees(one.name, "hit", since)

    async with work.writing(writer):
        await all_hit()
        for one in readers:
            await eventually(lambda one=one: one.client.instance.position is not None, EVENTUAL)
        before = [kept(one) for one in readers]
        work.history.fault(f"{victim} {fault}")
        async with without(lost, cluster, fault):
            await eventually(lambda: moved.client.ready and not is_at(moved, lost), IN_TIME)
            await all_hit()
            written = writer.done
            await eventually(lambda: writer.done > written + 20, IN_TIME)
        work.history.fault("over")
        await all_hit()
    await work.check(timeout=IN_TIME)
    assert [kept(one) for one in readers] == before


async def change_copies(how: str, stream: str, leader: RabbitMQ, node: RabbitMQ) -> None:
    """What `rabbitmq-streams add_replica`, or `delete_replica`, does."""
    await leader.ctl("eval", f'rabbit_stream_queue:{how}_replica(<<"/">>, <<"{stream}">>, \'{node.node}\').')


async def told_of_the_stream(settings: Settings) -> Finding:
    (finding,) = [one for one in await examine(settings) if one.check == "stream"]
    return finding


async def test_at_a_node_without_a_copy_of_the_stream_nobody_can_read_it_and_the_doctor_says_so(
    cluster: Cluster, namespace: str, clients: Clients, eventually: Eventually
) -> None:
    """As at one that joined the cluster after the stream was made."""
    settings: dict[str, Any] = {
        "bus": "stream",
        "namespace": namespace,
        "database_url": "",
        "tick_interval": 0.1,
    }
    await (await clients(**settings, broker_url=cluster.url)).wait_ready(EVENTUAL)
    stream = f"cacheinval.{namespace}.stream"
    leader = await leader_of(stream, cluster, eventually)
    newcomer = next(node for node in cluster.nodes if node is not leader)
    there = Settings(**settings, broker_url=newcomer.url)

    await change_copies("delete", stream, leader, newcomer)
    client = await clients(**settings, broker_url=newcomer.url)
    await eventually(lambda: "does not have a replica" in str(client.status()["broker"]["reason"]), EVENTUAL)
    found = await told_of_the_stream(there)
    assert (found.level, "does not have a replica on the local node" in found.text) == ("failed", True)
    assert f"`rabbitmq-streams add_replica --vhost / {stream} NODE`" in str(found.remedy)

    await change_copies("add", stream, leader, newcomer)
    await client.wait_ready(EVENTUAL)
    assert (await told_of_the_stream(there)).text == f"{stream} is there, and can be read"


@pytest.mark.long
@pytest.mark.timeout(240)
async def test_while_most_copies_of_a_stream_are_away_nothing_is_confirmed_and_nothing_is_trusted(
    cluster: Cluster, database_url: str, namespace: str, stock: DB, working: Working, eventually: Eventually
) -> None:
    work = working(stock, broker_url=cluster.url, database_url=database_url)
    reader = await work.reader("of the stream", bus="stream")
    await work.reader("with a queue")
    await work.relay()
    writer = await work.writer()
    stream = f"cacheinval.{namespace}.stream"
    leader = await leader_of(stream, cluster, eventually)
    without_copy, other = [node for node in cluster.nodes if node is not leader]
    await change_copies("delete", stream, leader, without_copy)

    async with work.writing(writer):
        for name in work.instances:
            await work.sees(name, "hit", 0)
        work.history.fault("one of two copies is away")
        async with without(leader, cluster, "lost"):
            lost_at = now()
            await eventually(lambda: not reader.client.ready, IN_TIME)
            for name in work.instances:
                await work.sees(name, "bypass", lost_at + DELTA)
            settings = reader.client.settings.model_copy(update={"broker_url": other.url})
            found = await told_of_the_stream(settings)
            assert (found.level, "start the nodes that are down" in str(found.remedy)) == ("failed", True), (
                found
            )
            written = writer.done
            await eventually(lambda: writer.done > written + 20, IN_TIME)
            assert not reader.client.ready
        work.history.fault("over")
        await eventually(lambda: reader.client.ready, IN_TIME, describe=lambda: reason(reader))
    await work.check(timeout=IN_TIME)


# What a cluster does that has no `pause_minority`


@pytest.fixture
async def divided(cluster: Cluster) -> AsyncIterator[Cluster]:
    """A cluster whose first node goes on when it is cut off, as the others do."""
    await cluster.set_partition_handling("ignore")
    yield cluster
    await cluster.set_partition_handling("pause_minority")


def here(cluster: Cluster) -> dict[str, Any]:
    """The settings of who is at the first node, whatever becomes of it."""
    return {"broker_url": cluster.nodes[0].url}


def there(cluster: Cluster) -> dict[str, Any]:
    """The settings of who is at the others."""
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in cluster.nodes[1:])
    return {"broker_url": f"amqp://guest:guest@{hosts}/"}


async def rejoin(cluster: Cluster) -> None:
    """What an operator has to do: that the nodes reach each other again heals nothing."""
    node = cluster.nodes[0]
    assert await cluster.running_nodes(node) == {node.node}
    await node.kill()
    await node.start()
    assert len(await cluster.running_nodes(node)) == len(cluster.nodes)


@pytest.mark.long
@pytest.mark.timeout(240)
async def test_where_both_sides_go_on_what_has_no_delta_is_stale_and_what_has_reads_the_database(
    divided: Cluster,
    database_url: str,
    stock: DB,
    working: Working,
    clients: Clients,
    eventually: Eventually,
) -> None:
    work = working(stock, database_url=database_url)
    await work.relay(**there(divided))
    writer = await work.writer(**there(divided))
    deaf, hearing = await work.reader("deaf", **here(divided)), await work.reader("hearing", **there(divided))
    eventual = await clients(**here(divided), database_url=database_url)
    await eventual.wait_ready(EVENTUAL)

    async def version() -> int:
        load = lambda: eventual.pool.fetchval("SELECT version FROM stock WHERE id = 'k0'")  # noqa: E731
        return await eventual.cache.get_or_set("k0", load)

    async with work.writing(writer):
        for name in work.instances:
            await work.sees(name, "hit", 0)
        work.history.fault("cut off, and nobody pauses")
        async with without(divided.nodes[0], divided, "cut off"):
            old, parted, written = await version(), now(), writer.done
            await work.sees("deaf", "bypass", parted + DELTA)
            await eventually(lambda: writer.done > written + 100, EVENTUAL)
            await work.sees("hearing", "hit", now())
            # Its own probes come back to it, so it has no reason for doubt but that it can prove nothing.
            assert is_at(deaf, divided.nodes[0])
            assert deaf.client.ready
            assert eventual.state == "ready"
            assert await version() == old < await stock.fetchval("SELECT version FROM stock WHERE id = 'k0'")
        await rejoin(divided)
        work.history.fault("over")
        await eventually(lambda: deaf.client.ready and hearing.client.ready, IN_TIME)
    await work.check(timeout=IN_TIME)


@pytest.mark.long
@pytest.mark.timeout(240)
async def test_where_both_sides_go_on_a_tick_from_this_side_tells_what_was_confirmed_at_the_other(
    divided: Cluster, database_url: str, stock: DB, working: Working, eventually: Eventually
) -> None:
    """The outbox is empty for this relay, and yet it must not seem to prove anything."""
    work = working(stock, database_url=database_url)
    await work.relay(**here(divided))
    writer = await work.writer(**there(divided))
    deaf = await work.reader("deaf", **here(divided))

    def gaps() -> int:
        return deaf.client.stats()["coherence"]["gaps"]

    async with work.writing(writer, ways=("transaction", "statement")):
        await work.sees("deaf", "hit", 0)
        work.history.fault("cut off, and nobody pauses")
        async with without(divided.nodes[0], divided, "cut off"):
            before, written = gaps(), writer.done
            await eventually(lambda: gaps() > before + 2, EVENTUAL, describe=deaf.client.stats)
            await eventually(lambda: writer.done > written + 100, EVENTUAL)
        await rejoin(divided)
        work.history.fault("over")
        await eventually(lambda: deaf.client.ready, IN_TIME)
    await work.check(timeout=IN_TIME)
