"""Writes that wait for the others: what the receipt says of whoever is cut off, frozen, silent or gone."""

import asyncio
import signal
import time
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest
from proxy import Proxy
from scene import (
    EVENTUAL,
    OUTBOX,
    SET_PRICE,
    Clients,
    Eventually,
    Programs,
    has_price,
    price,
    through,
)

from cacheinval import Client, Receipt, Settings
from cacheinval.coherence import registration
from cacheinval.sandbox import Postgres, RabbitMQ, Redis

pytest_plugins = ("scene",)

DB = asyncpg.Connection
LONG = 60.0  # nobody waits so long: the receipt is complete before
TICK = 0.2
FRESH: dict[str, Any] = {"tick_interval": TICK, "max_staleness": 2.0}


@pytest.fixture
def servers(rabbitmq: RabbitMQ, database_url: str) -> dict[str, Any]:
    return {"broker_url": rabbitmq.url, "database_url": database_url}


async def three(clients: Clients, servers: dict[str, Any], **settings: Any) -> list[Client]:
    """Instances `a`, `b` and `c`, which hold the price of `a`."""
    made = [await clients(**servers, instance_id=name, **settings) for name in "abc"]
    for one in made:
        await one.wait_ready(EVENTUAL)
        await registered(one)
        await price(one, "a")
        assert (await price(one, "a")).outcome == "hit"
    return made


async def registered(client: Client) -> None:
    async with asyncio.timeout(EVENTUAL):
        while client.status()["registration"]["state"] != "registered":
            await asyncio.sleep(0.01)


async def set_price(writer: Client, value: int, wait: float, *keys: str) -> Receipt:
    async with writer.transaction(wait=wait) as tx:
        await tx.execute(SET_PRICE, "a", value)
        tx.invalidate("a", *keys)
        assert tx.receipt is None
    assert tx.receipt is not None
    return tx.receipt


@pytest.mark.parametrize("settings", [{}, FRESH], ids=["eventual", "fresh"])
@pytest.mark.timeout(180)
async def test_after_a_complete_receipt_nobody_has_the_old_value(
    servers: dict[str, Any], db: DB, clients: Clients, settings: dict[str, Any]
) -> None:
    readers = await three(clients, servers, **settings)
    for value in range(2, 12):
        receipt = await set_price(readers[value % 3], value, LONG)
        assert receipt == Receipt(3, 3, answered=("a", "b", "c"))
        assert [(await price(one, "a")).value for one in readers] == [value] * 3
    receipt = await readers[0].invalidate("a", wait=LONG)
    assert receipt.complete
    assert receipt.answered == ("a", "b", "c")


@pytest.mark.timeout(180)
async def test_a_writer_that_is_no_instance_itself(servers: dict[str, Any], db: DB, clients: Clients) -> None:
    await three(clients, servers)
    writer = await clients(**servers, subscribe=False)
    assert (await set_price(writer, 2, LONG)).answered == ("a", "b", "c")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("recorded_by", ["trigger", "record", "function", "nobody"])
async def test_a_write_that_names_nothing_itself_is_safe_by_time_only(
    recorded_by: str, servers: dict[str, Any], db: DB, clients: Clients
) -> None:
    if recorded_by == "trigger":
        namespace = (await clients(**servers, subscribe=False)).settings.namespace
        await db.execute("SELECT cacheinval.track('prices', '{id}', namespace => $1)", namespace)
    readers = await three(clients, servers, **FRESH)  # without a relay: nothing is evicted by a message
    writer, reader = readers[:2]
    before = await db.fetchval(OUTBOX)

    async def write(value: int, wait: float) -> Receipt:
        async with writer.transaction(wait=wait) as tx:
            await tx.execute(SET_PRICE, "a", value)
            if recorded_by == "record":
                await writer.record(tx.connection, "a")
            elif recorded_by == "function":
                await tx.execute(
                    "SELECT cacheinval.invalidate(ARRAY['a'], namespace => $1)", writer.settings.namespace
                )
        assert tx.receipt is not None
        return tx.receipt

    receipt = await write(2, 1.0)
    assert (receipt.confirmed, receipt.total) == (0, 3)
    for _, why in receipt.missing:
        assert why.startswith("this write names nothing itself, so nobody is asked; safe in ")
    await price(reader, "a")
    assert (await price(reader, "a")).outcome == "hit"
    assert await write(3, LONG) == Receipt(3, 3, by_time=("a", "b", "c"))
    assert [(await price(one, "a")).value for one in readers] == [3] * 3
    recorded = await db.fetchval(OUTBOX) - before
    assert recorded == (0 if recorded_by == "nobody" else 2)


@pytest.mark.timeout(180)
async def test_a_write_that_names_nothing_and_is_rolled_back_has_no_receipt(
    servers: dict[str, Any], db: DB, clients: Clients
) -> None:
    (writer, *_) = await three(clients, servers)
    given: list[Any] = []

    async def fail() -> None:
        async with writer.transaction(wait=LONG) as tx:
            given.append(tx)
            await tx.execute(SET_PRICE, "a", 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert given[0].receipt is None
    assert not writer._asking._open


@pytest.mark.timeout(180)
async def test_an_instance_that_is_deaf_is_safe_when_its_staleness_has_passed(
    servers: dict[str, Any], db: DB, clients: Clients, rabbitmq: RabbitMQ
) -> None:
    async with Proxy("127.0.0.1", port_of(rabbitmq.url)) as proxy:
        readers = await three(clients, servers, **FRESH)
        deaf = await clients(
            **servers | {"broker_url": through(proxy, rabbitmq.url)}, instance_id="deaf", **FRESH
        )
        await deaf.wait_ready(EVENTUAL)
        await price(deaf, "a")
        assert (await price(deaf, "a")).outcome == "hit"
        proxy.swallow()

        receipt = await set_price(readers[0], 2, 1.0)
        assert (receipt.confirmed, receipt.total) == (3, 4)
        ((who, why),) = receipt.missing
        assert who == "deaf"
        assert why.startswith("no answer within 1 s; safe in ")
        assert why.endswith(" s (its max_staleness is 2 s)")

        began = time.monotonic()
        receipt = await set_price(readers[0], 3, LONG)
        assert time.monotonic() - began > 2.0
        assert receipt == Receipt(4, 4, answered=("a", "b", "c"), by_time=("deaf",))
        assert (await price(deaf, "a")).value == 3


@pytest.mark.timeout(180)
async def test_an_instance_that_the_database_has_lost_is_not_waited_for_and_serves_nothing(
    servers: dict[str, Any],
    db: DB,
    clients: Clients,
    eventually: Eventually,
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registration, "SHORTEST_LEASE", 3.0)
    monkeypatch.setattr(registration, "LEASE_IN_STALENESS", 0.0)
    fresh = {"tick_interval": TICK, "max_staleness": 30.0}
    async with Proxy("127.0.0.1", port_of(postgres.url)) as proxy:
        readers = await three(clients, servers, **fresh)
        url = through(proxy, servers["database_url"])
        lost = await clients(**servers | {"database_url": url}, instance_id="lost", **fresh)
        await lost.wait_ready(EVENTUAL)
        await price(lost, "a")
        assert (await price(lost, "a")).outcome == "hit"
        assert (await set_price(readers[0], 2, LONG)).total == 4
        await price(lost, "a")
        assert (await price(lost, "a")).outcome == "hit"

        proxy.cut()
        await eventually(lambda: lost.status()["registration"]["state"] == "unregistered", EVENTUAL)
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            await price(lost, "a")  # it is in the cache, and not too old
        await eventually(lambda: counted_is(readers[0], 3), EVENTUAL)
        assert (await set_price(readers[0], 3, LONG)).answered == ("a", "b", "c")

        proxy.pass_()
        await eventually(lambda: lost.status()["registration"]["state"] == "registered", EVENTUAL)
        await lost.wait_ready(EVENTUAL)
        assert (await price(lost, "a")).value == 3
        assert (await set_price(readers[0], 4, LONG)).answered == ("a", "b", "c", "lost")


async def counted_is(writer: Client, total: int) -> bool:
    receipt = await writer.invalidate("nothing", wait=5.0)
    return receipt.total == total


FROZEN = """
import asyncio
from cacheinval import Client

async def main():
    async with Client() as client:
        await client.wait_ready(30)
        print('{"event": "here"}', flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.timeout(240)
async def test_a_process_that_is_frozen(
    servers: dict[str, Any], db: DB, clients: Clients, programs: Programs, eventually: Eventually
) -> None:
    readers = await three(clients, servers, **FRESH)
    frozen = {
        name: programs("-c", FROZEN, **servers, relay="off", instance_id=name, **settings)
        for name, settings in (("bounded", FRESH), ("unbounded", {}))
    }
    for program in frozen.values():
        await eventually(lambda program=program: program.said("here"), EVENTUAL)
    await eventually(lambda: counted_is(readers[0], 5), EVENTUAL)
    for program in frozen.values():
        program.signal(signal.SIGSTOP)

    receipt = await set_price(readers[0], 2, 3.0)
    assert (receipt.confirmed, receipt.total, receipt.by_time) == (4, 5, ("bounded",))
    assert receipt.missing == (
        ("unbounded", "no answer within 3 s; it has no max_staleness: not safe until it answers"),
    )
    assert [(await price(one, "a")).value for one in readers] == [2] * 3

    for program in frozen.values():
        program.signal(signal.SIGCONT)
    await eventually(lambda: all_answer(readers[0], 5), EVENTUAL)


async def all_answer(writer: Client, count: int) -> bool:
    receipt = await writer.invalidate("nothing", wait=2.0)
    return len(receipt.answered) == receipt.total == count


@pytest.mark.timeout(180)
async def test_who_leaves_is_not_waited_for_and_who_is_killed_only_until_its_lease_ends(
    servers: dict[str, Any],
    db: DB,
    clients: Clients,
    programs: Programs,
    eventually: Eventually,
) -> None:
    readers = await three(clients, servers)
    process = programs("-c", FROZEN, **servers, relay="off", instance_id="killed")
    await eventually(lambda: process.said("here"), EVENTUAL)
    async with Client(readers[0].settings.model_copy(update={"instance_id": "leaving"})) as leaving:
        await leaving.wait_ready(EVENTUAL)
        await registered(leaving)
        await eventually(lambda: all_answer(readers[0], 5), EVENTUAL)
    assert (await set_price(readers[0], 2, LONG)).total == 4

    await process.kill()
    receipt = await set_price(readers[0], 3, 2.0)
    assert [who for who, _ in receipt.missing] == ["killed"]
    await db.execute(
        "UPDATE cacheinval.instances SET expires_at = now() + interval '1 second' WHERE id = 'killed'"
    )
    assert (await set_price(readers[0], 4, LONG)).answered == ("a", "b", "c")


@pytest.mark.timeout(180)
async def test_many_writes_at_once_with_and_without_waiting(
    servers: dict[str, Any], db: DB, clients: Clients, eventually: Eventually
) -> None:
    readers = await three(clients, servers)
    writer = readers[0]
    receipts = await asyncio.gather(
        *(writer.invalidate(f"k{n}", "a", wait=LONG if n % 2 else None) for n in range(60))
    )
    assert [receipt is None for receipt in receipts] == [n % 2 == 0 for n in range(60)]
    assert [receipt for receipt in receipts if receipt is not None and not receipt.complete] == []
    sent = writer.stats()["publisher"]["confirmed_messages"]
    assert sent < 60, "some went out together"
    assert not writer._asking._asked
    await eventually(lambda: db.fetchval(f"SELECT ({OUTBOX}) = 0"))


@pytest.mark.timeout(180)
async def test_10_000_keys_in_one_write(servers: dict[str, Any], db: DB, clients: Clients) -> None:
    readers = await three(clients, servers)
    keys = [f"k{n}" for n in range(9_999)]
    assert (await set_price(readers[0], 2, LONG, *keys)).complete
    assert readers[0].stats()["publisher"]["confirmed_messages"] == 10
    assert [(await price(one, "a")).value for one in readers] == [2] * 3


@pytest.mark.timeout(180)
async def test_without_the_broker_the_receipt_says_that_nothing_was_published(
    servers: dict[str, Any], db: DB, clients: Clients, rabbitmq: RabbitMQ, eventually: Eventually
) -> None:
    async with Proxy("127.0.0.1", port_of(rabbitmq.url)) as proxy:
        readers = await three(clients, servers)
        writer = await clients(
            **servers | {"broker_url": through(proxy, rabbitmq.url)}, subscribe=False, publish_timeout=1
        )
        assert (await set_price(writer, 2, LONG)).complete
        proxy.cut()
        receipt = await set_price(writer, 3, 3.0)
        assert (receipt.confirmed, receipt.total) == (0, 3)
        for _, why in receipt.missing:
            assert why.startswith("not published: ")
            assert "; the relay will send it; " in why
        assert await db.fetchval("SELECT price FROM prices WHERE id = 'a'") == 3

        proxy.pass_()
        await eventually(lambda: complete(writer), EVENTUAL)
        assert readers


async def complete(writer: Client) -> bool:
    return (await writer.invalidate("a", wait=5.0)).complete


@pytest.mark.timeout(180)
async def test_whoever_stops_waiting_has_written_all_the_same(
    servers: dict[str, Any], db: DB, clients: Clients, eventually: Eventually
) -> None:
    readers = await three(clients, servers)
    await db.execute(
        "INSERT INTO cacheinval.instances VALUES ($1, 'silent', '', NULL, now(), now() + interval '1 hour')",
        readers[0].settings.namespace,
    )
    writing = asyncio.create_task(set_price(readers[0], 2, LONG))
    await eventually(lambda: has_price(readers[1], "a", 2), EVENTUAL)
    assert not writing.done()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await db.fetchval("SELECT price FROM prices WHERE id = 'a'") == 2
    await eventually(lambda: db.fetchval(f"SELECT ({OUTBOX}) = 0"))


@pytest.mark.timeout(180)
async def test_a_commit_of_unknown_outcome_has_no_receipt(
    servers: dict[str, Any], db: DB, clients: Clients, postgres: Postgres
) -> None:
    async with Proxy("127.0.0.1", port_of(postgres.url)) as proxy:
        writer = await clients(
            **servers | {"database_url": through(proxy, servers["database_url"])}, subscribe=False
        )
        cut = proxy.cut_reply_after(b"COMMIT")
        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
            await set_price(writer, 2, LONG)
        assert cut.is_set()
        assert not writer._asking._open


@pytest.mark.timeout(180)
async def test_where_nobody_can_be_counted_the_receipt_says_so(
    servers: dict[str, Any], db: DB, clients: Clients
) -> None:
    readers = await three(clients, servers)
    await db.execute("ALTER TABLE cacheinval.instances RENAME TO elsewhere")
    receipt = await set_price(readers[0], 2, 2.0)
    assert (receipt.confirmed, receipt.total, receipt.complete) == (3, None, False)
    assert "cacheinval schema apply" in (receipt.reason or "")


@pytest.mark.timeout(180)
async def test_all_are_counted_who_registered_before_the_commit(
    servers: dict[str, Any], db: DB, clients: Clients
) -> None:
    (one, *_) = await three(clients, servers)
    async with one.transaction(wait=1.5) as tx:
        tx.invalidate("a")
        await db.execute(
            "INSERT INTO cacheinval.instances VALUES ($1, 'late', '', NULL, now(), now() + interval '1 hour')",
            one.settings.namespace,
        )
    assert tx.receipt is not None
    assert (tx.receipt.confirmed, tx.receipt.total) == (3, 4)


@pytest.mark.timeout(180)
async def test_whoever_waits_keeps_no_connection_from_others(
    servers: dict[str, Any], db: DB, clients: Clients, namespace: str
) -> None:
    await three(clients, servers)
    settings = Settings(**servers, namespace=namespace, relay="off")
    async with (
        asyncpg.create_pool(servers["database_url"], min_size=1, max_size=1) as pool,
        Client(settings, pool=pool, subscribe=False) as writer,
    ):
        assert (await set_price(writer, 2, LONG)).complete
        assert (await writer.invalidate("a", wait=LONG)).complete


@pytest.mark.timeout(180)
async def test_a_cache_that_outlives_its_process_is_taken_over_with_its_registration(
    servers: dict[str, Any], db: DB, clients: Clients, redis: Redis, namespace: str, eventually: Eventually
) -> None:
    shared: dict[str, Any] = {
        **servers,
        "namespace": namespace,
        "relay": "off",
        "cache_url": redis.url,
        "instance_id": "shared",
        "max_staleness": 60.0,
    }
    writer = await clients(**servers, subscribe=False)
    async with AsyncExitStack() as first_lives:
        first = await first_lives.enter_async_context(Client(Settings(**shared)))
        await first.wait_ready(EVENTUAL)
        # What was loaded at the very beginning may be older than the registration, by another clock.
        await eventually(lambda: is_hit(first, "a"), EVENTUAL)
        second = await clients(**shared)
        await eventually(lambda: second.status()["broker"]["consumer"] == "standby", EVENTUAL)
        assert second.status()["registration"]["reason"] == "not registered yet"
        assert (await writer.invalidate("b", wait=LONG)).answered == ("shared",)
    sessions = "SELECT array_agg(session ORDER BY session) FROM cacheinval.instances WHERE id = 'shared'"
    assert await db.fetchval(sessions) == ["", "stopped"]

    await second.wait_ready(EVENTUAL)
    await eventually(lambda: db.fetchval(f"SELECT ({sessions}) = ARRAY['']"))  # it has not stopped
    loads = second.cache.counters.loads
    assert await is_hit(second, "a")
    assert second.cache.counters.loads == loads
    assert (await writer.invalidate("a", wait=LONG)).answered == ("shared",)
    assert not await is_hit(second, "a")


async def is_hit(client: Client, key: str) -> bool:
    return (await price(client, key)).outcome == "hit"


def port_of(url: str) -> int:
    return int(url.partition("127.0.0.1:")[2].partition("/")[0])
