"""`cacheinval audit` against real services: it finds a change that nobody recorded, and accuses of nothing else."""

import json

import asyncpg
import pytest
from running import Started, run
from waiting import until

from cacheinval.sandbox import Redis

pytestmark = pytest.mark.timeout(180)  # each starts several processes, each of which takes a second of a core


async def change_unrecorded(settings: dict[str, object], product_id: str) -> None:
    """The mistake that an audit is there to find: an UPDATE of which nobody is told."""
    connection = await asyncpg.connect(str(settings["database_url"]), timeout=30)
    try:
        await connection.execute("UPDATE products SET price = 99 WHERE id = $1", product_id)
    finally:
        await connection.close()


def rows(table: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in table.splitlines()}


async def test_a_change_that_nobody_recorded_is_found(started: Started, settings: dict[str, object]) -> None:
    one, other = [
        await started.start_http("serve", **settings | {"instance_id": name}) for name in ("one", "other")
    ]
    for service in (one, other):
        await started.until(service, "ready")
    for product_id in ("kettle", "lamp"):
        await started.put(one, product_id, "1")
        await other.eventually_logged("evicted", key=f"product:{product_id}")  # not after it has read
        for service in (one, other):
            await started.read(service, product_id)

    code, out, err = await run("audit", timeout=60, **settings)
    assert (code, rows(out)["total"]) == (0, ["4", "4", "0", "0", "0"]), out + err
    assert "waiting for the audit of 2 instances" in err

    await change_unrecorded(settings, "kettle")
    code, out, err = await run("audit", timeout=60, **settings)
    assert (code, rows(out)["one"], rows(out)["other"]) == (
        1,
        ["2", "1", "0", "1", "0"],
        ["2", "1", "0", "1", "0"],
    )
    assert "inconsistent: 'product:kettle' in one" in out
    assert err.splitlines()[-1] == "cacheinval: inconsistent: 2 of 4 entries"
    assert (await one.eventually_logged("inconsistent entry"))["key"] == "product:kettle"
    assert await started.read(one, "kettle") == ("1", "cacheinval; hit"), "an audit observes"
    assert "cacheinval_inconsistent_entries_total 1.0" in (await started.get(one, "/metrics")).text

    # Told of it, and the very same command has nothing to say any more.
    assert (await run("invalidate", "product:kettle", **settings))[0] == 0
    await one.eventually_logged("evicted", key="product:kettle")
    await other.eventually_logged("evicted", key="product:kettle")
    assert await started.read(one, "kettle") == ("99", "cacheinval; fwd=miss; stored")
    code, out, err = await run("audit", "--json", timeout=60, **settings)
    assert (code, json.loads(out)["total"]["inconsistent"]) == (0, 0), out + err


async def test_whoever_does_not_report_in_time_is_named(
    started: Started, settings: dict[str, object]
) -> None:
    service = await started.start_http("serve", **settings | {"instance_id": "slow"})
    await started.until(service, "ready")
    await started.put(service, "kettle", "1")
    await started.read(service, "kettle")
    await change_unrecorded(settings, "kettle")
    code, out, err = await run("audit", "--delay", "600", "--wait", "1", **settings)
    assert (code, err.splitlines()[-1]) == (1, "cacheinval: no report in time from slow")
    assert rows(out)["slow"] == ["-"] * 5 + ["no", "answer"]


async def test_a_service_with_redis_audits_what_its_worker_cannot(
    started: Started, settings: dict[str, object], redis: Redis, namespace: str
) -> None:
    outside = settings | {"cache_url": redis.url}
    names = (worker_id, reader_id) = (f"{namespace}-worker", f"{namespace}-reader")
    worker, reader = [
        await started.start_http(command, **outside | {"instance_id": name})
        for command, name in zip(("worker", "serve"), names, strict=True)
    ]
    for process in (worker, reader):
        await started.until(process, "ready")
    await started.put(reader, "kettle", "1.50")
    for process in (worker, reader):
        await process.eventually_logged("evicted", key="product:kettle")  # not after it has been read

    async def reader_has_audited_it() -> bool:
        # The relay may tell of the write as well, and then what was read is evicted once more.
        await started.read(reader, "kettle")
        code, out, err = await run("audit", timeout=60, **settings)
        assert code == 0, out + err
        assert rows(out)[worker_id] == ["0"] * 5 + ["no", "loaders"]
        return rows(out)[reader_id] == ["1", "1", "0", "0", "0"]

    await until(reader_has_audited_it, 60)

    await change_unrecorded(settings, "kettle")
    code, out, err = await run("audit", timeout=60, **settings)
    assert (code, rows(out)[reader_id]) == (1, ["1", "0", "0", "1", "0"]), out + err


async def test_without_instances_it_says_so(settings: dict[str, object]) -> None:
    code, out, err = await run("audit", **settings)
    assert (code, out) == (1, "")
    assert err == f"cacheinval: no instance of namespace {settings['namespace']} answers\n"
