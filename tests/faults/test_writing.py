"""A write that has been committed reaches everybody, whatever becomes of its writer, of the reply, or of the database."""

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from history import now
from proxy import Proxy
from scene import (
    EVENTUAL,
    OUTBOX,
    SET_PRICE,
    Clients,
    Eventually,
    Program,
    Programs,
    evicted,
    listening,
    price,
    through,
)
from workload import Working

from cacheinval import Client, Read
from cacheinval.sandbox import Postgres, RabbitMQ

pytest_plugins = ("scene", "workload")

DB = asyncpg.Connection
LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)

# The first thing that a publisher does is to open a channel; by then the write has been committed.
KILLED_BEFORE_PUBLISHING = """
import asyncio, os, signal
from workload import Working

from cacheinval import Client, Read
from cacheinval.bus.rabbitmq import RabbitBus

async def die(self):
    os.kill(os.getpid(), signal.SIGKILL)

RabbitBus.open_channel = die

async def main():
    async with Client(subscribe=False) as client, client.transaction() as tx:
        await tx.execute("UPDATE prices SET price = 2 WHERE id = 'a'")
        tx.invalidate("a")

asyncio.run(main())
"""


@pytest.mark.timeout(120)
async def test_the_writer_is_killed_between_commit_and_publish(
    rabbitmq: RabbitMQ,
    database_url: str,
    db: DB,
    clients: Clients,
    programs: Programs,
    eventually: Eventually,
) -> None:
    servers: dict[str, Any] = {"broker_url": rabbitmq.url, "database_url": database_url}
    readers = [await clients(**servers) for _ in range(3)]
    for reader in readers:
        await reader.wait_ready(EVENTUAL)
        assert (await price(reader, "a")).value == 1
        assert (await price(reader, "b")).value == 1

    writer = programs("-c", KILLED_BEFORE_PUBLISHING, **servers, relay="off")
    async with asyncio.timeout(EVENTUAL):
        assert await writer.ended() == -signal.SIGKILL
    assert await db.fetchval("SELECT price FROM prices WHERE id = 'a'") == 2
    assert await db.fetchval(OUTBOX) == 1
    assert [await price(reader, "a") for reader in readers] == [Read(1, "hit", False)] * 3  # nobody told them

    programs("-m", "cacheinval", "relay", **servers)
    await eventually(lambda: [evicted(reader) for reader in readers] == [1, 1, 1], EVENTUAL)
    assert [await price(reader, "a") for reader in readers] == [Read(2, "miss", True)] * 3
    assert [await price(reader, "b") for reader in readers] == [Read(1, "hit", False)] * 3
    await eventually(lambda: db.fetchval(f"SELECT ({OUTBOX}) = 0"))


async def write_in_a_transaction(writer: Client, proxy: Proxy, db: DB) -> None:
    cut = proxy.cut_reply_after(b"COMMIT")
    with pytest.raises(LOST):  # noqa: PT012 (it is raised at the end of the transaction)
        async with writer.transaction() as tx:
            await tx.execute(SET_PRICE, "a", 2)
            tx.invalidate("a", "lost-reply")
    assert cut.is_set()


async def write_in_one_statement(writer: Client, proxy: Proxy, db: DB) -> None:
    cut = proxy.cut_reply_after(b"lost-reply")
    with pytest.raises(LOST):
        await writer.execute(SET_PRICE, "a", 2, invalidate=["a", "lost-reply"])
    assert cut.is_set()


async def write_and_be_cancelled(writer: Client, proxy: Proxy, db: DB) -> None:
    async with db.transaction():
        await db.execute("SELECT FROM prices WHERE id = 'a' FOR UPDATE")
        writing = asyncio.create_task(writer.execute(SET_PRICE, "a", 2, invalidate=["a", "lost-reply"]))
        async with asyncio.timeout(EVENTUAL):
            while not await db.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
        proxy.swallow("reply")
    async with asyncio.timeout(EVENTUAL):
        while await db.fetchval("SELECT price FROM prices WHERE id = 'a'") == 1:
            await asyncio.sleep(0.01)
    writing.cancel()
    await asyncio.sleep(0)
    proxy.pass_()  # else it would wait, for some seconds, for the server to take the cancelling in
    with pytest.raises(asyncio.CancelledError):
        await writing


@pytest.mark.timeout(120)
@pytest.mark.parametrize("write", [write_in_a_transaction, write_in_one_statement, write_and_be_cancelled])
async def test_the_reply_to_a_commit_is_lost(
    write: Callable[[Client, Proxy, DB], Awaitable[None]],
    rabbitmq: RabbitMQ,
    postgres: Postgres,
    database_url: str,
    namespace: str,
    db: DB,
    clients: Clients,
    eventually: Eventually,
) -> None:
    async with (
        Proxy("127.0.0.1", postgres.port) as proxy,
        listening(rabbitmq.url, namespace) as heard,
    ):
        reader = await clients(broker_url=rabbitmq.url, database_url=database_url)
        writer = await clients(broker_url=rabbitmq.url, database_url=through(proxy, database_url))
        for client in (reader, writer):
            await client.wait_ready(EVENTUAL)
            assert (await price(client, "a")).value == 1
        await write(writer, proxy, db)
        await eventually(lambda: len(heard) == 1 and evicted(reader) == evicted(writer) == 1)
        assert await price(reader, "a") == Read(2, "miss", True)
        # The row stays, for the commit might become visible only now: what was just loaded would be the old value.
        await eventually(lambda: writer.publisher.counters.confirmed_writes == 1)
        assert await writer.publisher.flush(EVENTUAL)
        assert await db.fetchval(OUTBOX) == 1
        # Nor may the writer take its own message for old news.
        await eventually(lambda: writer.stats()["receiver"]["messages"] >= 1)
        assert writer.stats()["coherence"]["skipped_echoes"] == 0
        assert await price(writer, "a") == Read(2, "miss", True)

        await clients(broker_url=rabbitmq.url, database_url=database_url, relay="auto", subscribe=False)
        await eventually(lambda: len(heard) == 2 and evicted(reader) == evicted(writer) == 2, EVENTUAL)
        assert [message["keys"] for message in heard] == [["a", "lost-reply"]] * 2
        assert heard[0]["origin"] != heard[1]["origin"]
        assert await price(reader, "a") == await price(writer, "a") == Read(2, "miss", True)
        await eventually(lambda: db.fetchval(f"SELECT ({OUTBOX}) = 0"))
        assert len(heard) == 2


# Both watch their event loop: how much of the processor it takes between two looks, a millisecond apart. (Time by the wall
# would tell how busy the machine is.)
WATCHING = """
import asyncio, gc, json, time
from workload import Working

from cacheinval import Client, Read

held = 0.0

async def watch():
    global held
    while True:
        before = time.thread_time()
        await asyncio.sleep(0.001)
        held = max(held, time.thread_time() - before)

def say(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)
"""

NAMES = """
many = [f"key:{number}" for number in range(100_000)]
long = [f"{number:0512d}" for number in range(2048)]
"""

ALL_AT_ONCE = (
    WATCHING
    + NAMES
    + """
async def main():
    async with Client() as client:
        await client.wait_ready(30)
        for names, rows in ((many, 100), (long, 103)):
            watching = asyncio.create_task(watch())
            async with client.transaction() as tx:
                tx.invalidate(*names)
            while client.publisher.counters.deleted_rows < rows:
                await asyncio.sleep(0.01)
            watching.cancel()
        say("written", held=held)

asyncio.run(main())
"""
)

RECEIVED = (
    WATCHING
    + NAMES
    + """
async def give():
    return 1

async def main():
    async with Client() as client:
        await client.wait_ready(30)
        for key in [*many, *long, "another"]:
            await client.cache.get_or_set(key, give)
        gc.freeze()  # how long the collector's full passes take is a matter of all that a process holds
        say("filled", entries=len(client.cache))
        asyncio.create_task(watch())
        while len(client.cache) > 1:
            await asyncio.sleep(0.01)
        say("evicted all but one", held=held, hit=(await client.cache.read("another", give)).outcome)
        await asyncio.Event().wait()

asyncio.run(main())
"""
)

HELD = 0.05  # seconds


@pytest.mark.timeout(180)
async def test_a_hundred_thousand_keys_and_a_mebibyte_of_keys_in_one_transaction(
    rabbitmq: RabbitMQ,
    database_url: str,
    namespace: str,
    db: DB,
    programs: Programs,
    eventually: Eventually,
) -> None:
    servers: dict[str, Any] = {
        "broker_url": rabbitmq.url,
        "database_url": database_url,
        "cache_max_entries": 200_000,
        "relay": "off",
        "log_level": "WARNING",
    }
    reader = programs("-c", RECEIVED, **servers)
    await eventually(lambda: reader.said("filled") == [{"event": "filled", "entries": 102_049}], EVENTUAL)
    async with listening(rabbitmq.url, namespace) as heard:
        reader.signal(signal.SIGSTOP)  # so that all of it arrives at once
        writer = programs("-c", ALL_AT_ONCE, **servers)
        async with asyncio.timeout(EVENTUAL):
            assert await writer.ended() == 0
        reader.signal(signal.SIGCONT)
        await eventually(lambda: reader.said("evicted all but one"), EVENTUAL)
        await eventually(lambda: sum(len(message["keys"]) for message in heard) == 102_048)
    assert len(heard) == 103
    assert max(len(json.dumps(message)) for message in heard) < 1 << 20
    assert await db.fetchval(OUTBOX) == 0
    (evicted,) = reader.said("evicted all but one")
    (written,) = writer.said("written")
    assert evicted["hit"] == "hit"
    assert evicted["held"] < HELD, "receiving held everything else up"
    assert written["held"] < HELD, "writing held everything else up"


@pytest.mark.timeout(180)
async def test_nothing_is_stale_while_a_hundred_thousand_keys_go_by(
    rabbitmq: RabbitMQ, database_url: str, stock: DB, working: Working, eventually: Eventually
) -> None:
    work = working(stock, broker_url=rabbitmq.url, database_url=database_url)
    await work.relay()
    reader, writer = await work.reader("reader"), await work.writer()
    async with work.writing(writer):
        await work.sees("reader", "hit", now())
        work.history.fault("a hundred thousand keys")
        for _ in range(2):
            received = reader.client.stats()["receiver"]["messages"]
            async with writer.client.transaction() as tx:
                tx.invalidate(*(f"key:{number}" for number in range(100_000)))
            await eventually(
                lambda received=received: reader.client.stats()["receiver"]["messages"] > received + 100,
                EVENTUAL,
            )
        await work.sees("reader", "hit", now())
    await work.check()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_postgres_is_restarted_under_a_running_service(
    end: str,
    rabbitmq: RabbitMQ,
    own_postgres: Postgres,
    namespace: str,
    programs: Programs,
    eventually: Eventually,
) -> None:
    settings: dict[str, Any] = {
        "broker_url": rabbitmq.url,
        "database_url": own_postgres.url,
        "tick_interval": 0.2,
    }
    service = programs("-m", "cacheinval", "serve", **settings)
    await eventually(service.ready, EVENTUAL)
    await eventually(lambda: relay_is(service, "leader"))
    assert await put(service, "a", "1")
    assert await put(service, "b", "1")
    assert await get(service, "a") == (200, "cacheinval; fwd=miss; stored", "1")

    await getattr(own_postgres, end)()
    assert await get(service, "a") == (200, "cacheinval; hit", "1")  # nobody can have changed it
    assert (await get(service, "b"))[0] == 503
    assert not await put(service, "c", "1")
    await eventually(lambda: relay_is(service, "disconnected"))
    assert await service.ready()

    await own_postgres.start()
    await eventually(lambda: put(service, "c", "2"), EVENTUAL)
    await eventually(lambda: relay_is(service, "leader"), EVENTUAL)
    assert [(await get(service, product))[2] for product in "abc"] == ["1", "1", "2"]
    for product in "abc":
        await eventually(
            lambda product=product: is_hit(service, product)
        )  # the relay may repeat itself first
    # Somebody else's change, which only the relay can tell anybody.
    async with asyncio.timeout(EVENTUAL):
        psql = await asyncpg.connect(own_postgres.url)
        async with psql.transaction():
            await psql.execute("UPDATE products SET price = 4")
            keys = ["product:a", "product:b", "product:c"]
            await psql.execute("SELECT cacheinval.invalidate($1, namespace => $2)", keys, namespace)
        await psql.close()
    for product in "abc":
        await eventually(lambda product=product: has_price(service, product, "4"))


async def relay_is(service: Program, state: str) -> bool:
    return bool((await service.status())["relay"]["state"] == state)


async def put(service: Program, product: str, price: str) -> bool:
    body = {"name": "Tea", "price": price}
    answer = await service.request("PUT", f"/products/{product}", json=body)
    return answer is not None and answer.status_code in (200, 201)


async def get(service: Program, product: str) -> tuple[int, str, str]:
    """The status, the Cache-Status and the price."""
    answer = await service.request("GET", f"/products/{product}")
    assert answer is not None, "no answer"
    return answer.status_code, answer.headers["cache-status"], answer.json().get("price", "")


async def is_hit(service: Program, product: str) -> bool:
    return (await get(service, product))[1] == "cacheinval; hit"


async def has_price(service: Program, product: str, price: str) -> bool:
    return (await get(service, product))[2] == price
