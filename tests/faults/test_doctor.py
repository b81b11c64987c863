"""What `cacheinval doctor` finds; faults that `status` and the page show, too, are in test_seen_by_operators.py."""

import asyncio
import json
import os
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aio_pika import ExchangeType
from aio_pika.abc import AbstractIncomingMessage
from scene import EVENTUAL, Clients, Eventually, SharedCacheView, looking_into, operating

from cacheinval import Client, Settings
from cacheinval.backends import servers
from cacheinval.bus.rabbitmq import RabbitBus
from cacheinval.doctor import Finding, broker, examine
from cacheinval.outbox import apply_schema
from cacheinval.outbox.grants import grants
from cacheinval.sandbox import RabbitMQ, Redis

pytest_plugins = ("scene",)

pytestmark = pytest.mark.timeout(180)  # of which nearly all is for a broker to start where others are busy

DB = asyncpg.Connection
ROOT = Path(__file__).parents[2]
TICK = 0.2


@pytest.fixture(autouse=True)
def expected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many instances are up, put in by whoever starts them: so many answers are waited for, and no longer."""
    expected: list[int] = []

    class Bus(RabbitBus):
        async def ask(self, body: bytes, wait: float, enough: Any = None) -> list[bytes]:
            if not expected:
                return await super().ask(body, 0.1, enough)
            return await super().ask(
                body, EVENTUAL, lambda bodies: enough(bodies) or len(bodies) == expected[0]
            )

    monkeypatch.setattr(broker, "RabbitBus", Bus)
    monkeypatch.setattr(broker, "ANSWERS_WITHIN", EVENTUAL)  # for the deadline of the check
    return expected


@pytest.fixture
async def settings(rabbitmq: RabbitMQ, database_url: str, namespace: str) -> dict[str, Any]:
    connection = await asyncpg.connect(database_url)
    try:
        await apply_schema(connection)
    finally:
        await connection.close()
    return {
        "broker_url": rabbitmq.url,
        "database_url": database_url,
        "namespace": namespace,
        "tick_interval": TICK,
    }


@pytest.fixture
async def db(settings: dict[str, Any]) -> AsyncIterator[DB]:
    connection = await asyncpg.connect(settings["database_url"], timeout=30, command_timeout=30)
    yield connection
    connection.terminate()


async def found(settings: dict[str, Any]) -> dict[str, list[Finding]]:
    """What the doctor finds, by check; what is not ok has a remedy, or names what has."""
    findings = await examine(Settings(**settings))
    checks: dict[str, list[Finding]] = {}
    for finding in findings:
        checks.setdefault(finding.check, []).append(finding)
        follows = re.search("; see (.*) first$", finding.text)
        assert (finding.level == "ok" or follows is not None) == (finding.remedy is None), finding
        assert follows is None or checks[follows[1]], finding
    for finding in checks.get("not checked", []):
        assert checks.keys().isdisjoint(finding.text.partition(";")[0].split(", ")), checks
    return checks


def failures(checks: dict[str, list[Finding]]) -> list[str]:
    return [name for name, findings in checks.items() for one in findings if one.level == "failed"]


def only(checks: dict[str, list[Finding]], name: str) -> Finding:
    (finding,) = checks[name]
    return finding


async def command(*words: str, **settings: Any) -> tuple[int, str]:
    """Runs `cacheinval` as a process: its exit code, and what it printed."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("CACHEINVAL_")}
    ours = {f"CACHEINVAL_{name.upper()}": str(value) for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cacheinval", *words),
        env=others | ours,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(30):
        out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


Healthy = Callable[..., Awaitable[Client]]


@pytest.fixture
def healthy(
    clients: Clients, settings: dict[str, Any], eventually: Eventually, expected: list[int]
) -> Healthy:
    """Makes an instance that is ready, and whose relay leads and ticks; keyword arguments are further settings."""

    async def make(**more: Any) -> Client:
        client = await clients(**{**settings, "relay": "auto", **more})
        await client.wait_ready(EVENTUAL)
        await eventually(lambda: client.watermark_age is not None, EVENTUAL)
        expected.append(1)
        return client

    return make


async def test_where_nothing_is_wrong_everything_is_ok(settings: dict[str, Any], healthy: Healthy) -> None:
    client = await healthy()
    checks = await found(settings)
    assert {one.level for findings in checks.values() for one in findings} == {"ok"}, checks
    process = f"pid {os.getpid()} on host {socket.gethostname()}"
    assert only(checks, "leader").text.startswith(f"a relay leads: {process}, connected since 20")
    assert client.outlook.overview is not None
    assert str((await client.outlook.overview()).leader) == process
    assert set(checks) == {
        "settings", "broker", "exchange", "dead letters", "permissions", "round trip", "database", "clock",
        "schema", "grants", "outbox", "leader", "tracked tables", "ticks", "instances",
    }  # fmt: skip
    code, out = await command("doctor", "--json", **settings)
    told = json.loads(out[out.index("{") :])
    assert (code, told["count"]["failed"], told["count"]["warning"]) == (0, 0, 0)
    assert {one["check"] for one in told["findings"]} == set(checks)


async def test_a_cache_outside_is_looked_at_and_what_it_keeps_of_who_uses_it(
    settings: dict[str, Any],
    redis: Redis,
    healthy: Healthy,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servers, "OPERATION_TIMEOUT", EVENTUAL)  # it answers, but in its own time
    settings |= {"cache_url": redis.url, "instance_id": "shop-1"}
    client = await healthy()
    await eventually(lambda: client.status()["registration"]["state"] == "registered", EVENTUAL)
    async with looking_into(redis.url, settings["namespace"]) as view:
        await eventually(lambda: keeps_a_tick(view, "shop-1"), EVENTUAL)
    checks = await found(settings)
    del checks["cache latency"]
    assert {one.level for findings in checks.values() for one in findings} == {"ok"}, checks
    assert checks.keys() > {"cache", "cache commands", "cache memory", "instances"}
    assert re.match(
        r"shop-1 has evicted all that was committed \d+\.\d s ago, from \d origins",
        only(checks, "proof").text,
    )


async def keeps_a_tick(view: SharedCacheView, instance_id: str) -> bool:
    proof = await view.proof(instance_id)
    return proof is not None and json.loads(proof)["checked_until"] is not None


async def test_the_exchange_is_deleted_and_then_of_another_type(settings: dict[str, Any]) -> None:
    name = f"cacheinval.{settings['namespace']}"
    async with operating(settings["broker_url"]) as operator:
        assert only(await found(settings), "exchange").text.startswith(f"{name} is missing")
        await operator.declare_exchange(name, ExchangeType.DIRECT, durable=True)
        try:
            finding = only(await found(settings), "exchange")
            assert (finding.level, "no durable fanout" in finding.text) == ("failed", True)
        finally:
            await operator.exchange_delete(name)


async def test_a_queue_is_deleted_while_its_instance_is_up_and_while_it_is_away(
    settings: dict[str, Any],
    rabbitmq: RabbitMQ,
    healthy: Healthy,
    expected: list[int],
    db: DB,
    eventually: Eventually,
) -> None:
    client = await healthy(instance_id="shop-1")
    await rabbitmq.ctl("delete_queue", str(client.status()["broker"]["queue"]))
    await eventually(lambda: client.status()["last_gap"] is not None, EVENTUAL)
    await client.wait_ready(EVENTUAL)
    (told,) = (await client.ask_instances(0.5))[:1]
    assert told["last_gap"]["reason"].endswith("queue deleted")
    assert failures(await found(settings)) == []

    # A cache outside the process, of which only the registration is left.
    await db.execute(
        "INSERT INTO cacheinval.instances VALUES ($1, 'shop-2', '', 5, now() - interval '1 min', now() + interval '1 min')",
        settings["namespace"],
    )
    checks = await found(settings)
    assert any("shop-2 is registered and silent" in one.text for one in checks["instances"])
    assert "shop-2 is gone" in only(checks, "queues").text
    code, out = await command("status", **settings)
    assert re.search(r"^shop-2 .* silent ", out, re.MULTILINE)
    assert code == 0

    async with operating(settings["broker_url"]) as operator:
        queue = await operator.declare_queue(f"cacheinval.{settings['namespace']}.shop-2", durable=True)
        try:
            finding = only(await found(settings), "queues")
            assert "holds 0 messages: " in finding.text
            await queue.consume(nothing, no_ack=True)
            finding = only(await found(settings), "queues")
            assert "is consumed, so shop-2 runs and does not answer" in finding.text
            assert "its cache cannot evict" in str(finding.remedy)
        finally:
            await queue.delete(if_unused=False)


async def nothing(message: AbstractIncomingMessage) -> None:
    """Takes it."""


async def test_the_relay_is_stopped(
    settings: dict[str, Any], clients: Clients, db: DB, expected: list[int]
) -> None:
    reader = await clients(**settings, max_staleness=5)
    await reader.wait_ready(EVENTUAL)
    expected.append(1)
    await db.execute(
        "INSERT INTO cacheinval.outbox (namespace, keys, recorded_at, publish_at)"
        " VALUES ($1, '{a}', now() - interval '2 min', now() - interval '2 min')",
        settings["namespace"],
    )
    checks = await found(settings)
    assert sorted(failures(checks)) == ["leader", "outbox", "ticks"]
    assert "cacheinval relay" in str(only(checks, "leader").remedy)
    assert only(checks, "outbox").text.startswith("1 rows wait, the oldest for 1")
    (told,) = await reader.ask_instances(0.5)
    assert told["watermark_age"] is None, "and status shows that nothing is proven"


async def test_whoever_may_not_log_in_or_names_no_vhost_is_told_so(
    settings: dict[str, Any], rabbitmq: RabbitMQ
) -> None:
    wrong = rabbitmq.url.replace("guest:guest", "guest:wrong")
    finding = only(await found(settings | {"broker_url": wrong}), "broker")
    assert "rabbitmqctl authenticate_user guest" in str(finding.remedy)
    assert "wrong" not in finding.text, "a password"
    finding = only(await found(settings | {"broker_url": f"{rabbitmq.url}nowhere"}), "broker")
    assert "rabbitmqctl add_vhost nowhere" in str(finding.remedy)


async def test_a_database_that_is_away_is_one_finding_to_which_the_others_refer(
    settings: dict[str, Any], healthy: Healthy
) -> None:
    await healthy()
    checks = await found(settings | {"database_url": "postgresql://127.0.0.1:1/nowhere"})
    with_remedy = [one for findings in checks.values() for one in findings if one.remedy is not None]
    assert [(one.check, one.level) for one in with_remedy] == [("database", "failed")]
    assert only(checks, "not checked").text.endswith("; see database first")


async def test_the_schema_is_missing_or_newer(settings: dict[str, Any], db: DB) -> None:
    await db.execute("INSERT INTO cacheinval.schema_version (version) VALUES (99)")
    assert "upgrade cacheinval here" in str(only(await found(settings), "schema").remedy)
    await db.execute("DROP SCHEMA cacheinval CASCADE")
    assert "cacheinval schema apply" in str(only(await found(settings), "schema").remedy)


async def test_triggers_are_gone_and_a_partition_was_attached_later(settings: dict[str, Any], db: DB) -> None:
    await db.execute("CREATE TABLE products (id int PRIMARY KEY)")
    await db.execute("CREATE TABLE orders (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    await db.execute("CREATE TABLE orders_1 PARTITION OF orders FOR VALUES FROM (0) TO (10)")
    for table in ("products", "orders"):
        await db.execute(f"SELECT cacheinval.track('{table}', '{table}:{{id}}')")
    assert only(await found(settings), "tracked tables").text == "3 are complete"
    await db.execute("CREATE TABLE orders_2 PARTITION OF orders FOR VALUES FROM (10) TO (20)")
    await db.execute("ALTER TABLE products DISABLE TRIGGER USER")
    checks = await found(settings)
    assert {one.text.split()[0] for one in checks["tracked tables"]} == {"products", "orders_2"}
    # All of them, as somebody does who restores a table without its triggers.
    for name in await db.fetch("SELECT tgname FROM pg_trigger WHERE tgrelid = 'orders'::regclass"):
        await db.execute(f"DROP TRIGGER {name['tgname']} ON orders")
    checks = await found(settings)
    assert {one.text.split()[0] for one in checks["tracked tables"]} == {"products", "orders", "orders_2"}
    for table in ("products", "orders"):
        await db.execute(f"SELECT cacheinval.track('{table}', '{table}:{{id}}')")
    assert only(await found(settings), "tracked tables").text == "4 are complete"
    await db.execute("SELECT cacheinval.untrack('orders'); DROP TABLE products")
    assert only(await found(settings), "tracked tables").text == "none"


@pytest.fixture
async def least_rights(rabbitmq: RabbitMQ) -> AsyncIterator[str]:
    """The address of the shared broker for the user of `config/definitions.json`."""
    await rabbitmq.ctl("import_definitions", str(ROOT / "config/definitions.json"))
    await rabbitmq.ctl("change_password", "cacheinval", "opensesame")
    try:
        yield rabbitmq.url.replace("guest:guest@", "cacheinval:opensesame@") + "cacheinval"
    finally:
        await rabbitmq.ctl("delete_vhost", "cacheinval")
        await rabbitmq.ctl("delete_user", "cacheinval")


async def test_with_the_least_rights_everything_is_ok(
    settings: dict[str, Any], least_rights: str, healthy: Healthy, db: DB, eventually: Eventually
) -> None:
    """An instance, its relay and the doctor, as the user of the definitions and a role with what `schema grant` gives."""
    role = f"least_{settings['namespace']}"
    await db.execute(f"CREATE ROLE {role} LOGIN")
    try:
        for statement in grants(role):
            await db.execute(statement)
        settings |= {
            "broker_url": least_rights,
            "database_url": settings["database_url"].replace("postgres@", f"{role}@"),
            "max_staleness": 5,
        }
        settings["database_url"] += f"{'&' if '?' in settings['database_url'] else '?'}application_name=shop"
        client = await healthy()
        await client.invalidate("a")
        await db.execute("SELECT cacheinval.invalidate('{b}', namespace => $1)", settings["namespace"])
        await eventually(lambda: client.stats()["relay"]["published_rows"] >= 1, EVENTUAL)
        await eventually(lambda: db.fetchval("SELECT count(*) = 0 FROM cacheinval.outbox"), EVENTUAL)
        checks = await found(settings)
        assert {one.level for findings in checks.values() for one in findings} == {"ok"}, checks
        assert only(checks, "leader").text.startswith("a relay leads: shop, server process "), (
            "as it was named"
        )
        await db.execute(f"ALTER ROLE {role} NOLOGIN")
        finding = only(await found(settings), "database")
        assert finding.text.endswith(f'role "{role}" is not permitted to log in')
        assert str(finding.remedy).startswith(f'`ALTER ROLE "{role}" LOGIN;`')
        await client.__aexit__(None, None, None)
    finally:
        await db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
