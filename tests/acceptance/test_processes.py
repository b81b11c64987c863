"""Real processes, signals, and commands, against real servers."""

import asyncio
import json
import re
import signal
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from running import Started, run

from cacheinval.sandbox import Postgres, RabbitMQ, Redis

NOWHERE = "127.0.0.1:1"  # nobody listens on port 1
NO_BROKER, NO_DATABASE = f"amqp://guest:guest@{NOWHERE}/", f"postgresql://postgres@{NOWHERE}/postgres"

pytestmark = pytest.mark.timeout(180)  # each starts several processes, each of which takes a second of a core


async def fetchval(database_url: object, query: str, *args: object) -> Any:
    """What a statement gives in a session of its own."""
    async with asyncio.timeout(30):
        connection = await asyncpg.connect(str(database_url))
        try:
            return await connection.fetchval(query, *args)
        finally:
            await connection.close()


class TestTheJob:
    async def test_a_change_on_one_is_fresh_on_the_other(
        self, started: Started, settings: dict[str, object], eventually: Any
    ) -> None:
        writer, reader = await asyncio.gather(*(started.start_http("serve", **settings) for _ in range(2)))
        await started.until(writer, "ready")
        await started.until(reader, "ready")

        assert (await started.put(writer, "kettle", "19.990")).status_code == 201
        await reader.eventually_logged("evicted", seq=1)  # else it may evict what it is about to store
        assert await started.read(reader, "kettle") == ("19.990", "cacheinval; fwd=miss; stored")
        assert await started.read(reader, "kettle") == ("19.990", "cacheinval; hit")
        assert (await started.put(writer, "kettle", "21")).json()["version"] == 2

        line = await reader.eventually_logged("evicted", seq=2)
        assert line["key"] == "product:kettle"
        assert len(line["origin"]) >= 16
        assert 0 <= line["latency_ms"] < 60_000
        assert await started.read(reader, "kettle") == ("21", "cacheinval; fwd=miss; stored")
        assert not [line for line in writer.log + reader.log if line["level"] in ("WARNING", "ERROR")]

        # Confirmed and deleted: nothing is left for the relay.
        query = "SELECT count(*) FROM cacheinval.outbox"
        assert await eventually(lambda: _is_zero(settings["database_url"], query))

    async def test_the_relay_sends_what_a_program_in_another_language_recorded(
        self, started: Started, settings: dict[str, object], eventually: Any
    ) -> None:
        reader = await started.start_http("serve", **settings | {"relay": "off"})
        await started.until(reader, "ready")
        await started.put(reader, "kettle", "1")
        await started.read(reader, "kettle")
        relay = await started.start_http("relay", **settings | {"relay": "off"})
        await started.until(relay, "ready")

        database = settings["database_url"]
        await fetchval(
            database,
            """
            WITH changed AS (UPDATE products SET price = 2 WHERE id = 'kettle')
            SELECT cacheinval.invalidate(ARRAY['product:kettle'], namespace => $1)
            """,
            settings["namespace"],
        )

        async def fresh() -> bool:
            return (await started.read(reader, "kettle"))[0] == "2"

        await eventually(fresh)
        assert (await started.get(relay, "/status")).json()["relay"]["state"] == "leader"
        relay.signal(signal.SIGTERM)
        assert await relay.ended(60) == 0

    async def test_a_cache_outside_the_process_is_kept_honest_too(
        self, started: Started, settings: dict[str, object], redis: Redis, namespace: str
    ) -> None:
        writer = await started.start_http("serve", **settings)
        outside = settings | {"cache_url": redis.url}
        worker = await started.start_http("worker", **outside, instance_id=f"{namespace}-worker")
        reader = await started.start_http("serve", **outside, instance_id=f"{namespace}-reader")
        for process in (writer, worker, reader):
            await started.until(process, "ready")
        await started.put(writer, "kettle", "0.1000000000000000055511151231257827")
        for process in (worker, reader):
            await process.eventually_logged("evicted", seq=1)
        for status in ("cacheinval; fwd=miss; stored", "cacheinval; hit"):
            assert await started.read(reader, "kettle") == ("0.1000000000000000055511151231257827", status)
        answer = await started.put(writer, "kettle", "2")
        await worker.eventually_logged("evicted", seq=2)
        await reader.eventually_logged("evicted", seq=2)
        assert await started.read(reader, "kettle") == ("2", "cacheinval; fwd=miss; stored")
        assert (await started.get(reader, "/products/kettle")).json() == answer.json()
        assert not [line for line in worker.log if "CACHEINVAL_CACHE_URL" in line["event"]]

    async def test_ten_start_at_once_on_an_empty_database(
        self, started: Started, settings: dict[str, object]
    ) -> None:
        services = await asyncio.gather(*(started.start_http("serve", **settings) for _ in range(10)))
        for service in services:
            await started.until(service, "ready")
        answers = await asyncio.gather(*(started.put(service, "kettle", "1") for service in services))
        assert sorted(answer.status_code for answer in answers) == [200] * 9 + [201]
        assert sorted(answer.json()["version"] for answer in answers) == list(range(1, 11))
        for service in services:
            assert not [line for line in service.log if line["level"] in ("WARNING", "ERROR")]
            service.signal(signal.SIGTERM)
        for service in services:
            assert await service.ended(60) == 0


async def _is_zero(database_url: object, query: str) -> bool:
    return await fetchval(database_url, query) == 0


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("command", ["serve", "worker", "relay"])
    async def test_one_ends_it_in_order(
        self,
        started: Started,
        settings: dict[str, object],
        redis: Redis,
        namespace: str,
        command: str,
        number: signal.Signals,
    ) -> None:
        if command != "serve":
            assert (await run("schema", "apply", **settings))[0] == 0
        if command == "worker":
            settings |= {"cache_url": redis.url, "instance_id": namespace}
        process = await started.start_http(command, **settings)
        await started.until(process, "ready")
        process.signal(number)
        assert await process.ended(60) == 0
        assert process.logged("stopping")[0]["signal"] == number.name
        assert process.log[-1]["event"] == "stopped"
        assert not [line for line in process.log if line["level"] in ("WARNING", "ERROR")]

    async def test_work_under_way_is_finished(
        self, started: Started, settings: dict[str, object], eventually: Any
    ) -> None:
        writer, reader = await asyncio.gather(*(started.start_http("serve", **settings) for _ in range(2)))
        await started.until(writer, "ready")
        await started.until(reader, "ready")
        prices: dict[str, str] = {}

        async def change_again_and_again(product_id: str) -> None:
            price = 0
            while True:
                price += 1
                try:
                    answer = await started.put(writer, product_id, str(price))
                except httpx.TransportError:
                    return  # it has closed the connection, or its port
                assert answer.status_code in (200, 201)
                prices[product_id] = str(price)
                await started.read(reader, product_id)

        changing = [asyncio.create_task(change_again_and_again(f"p{number}")) for number in range(8)]
        await eventually(lambda: len(prices) == 8 and all(int(price) > 3 for price in prices.values()))
        writer.signal(signal.SIGTERM)
        assert await writer.ended(60) == 0
        async with asyncio.timeout(60):
            await asyncio.gather(*changing)

        # Every change that was answered reached the reader: published, or left in the outbox for its relay.
        async def fresh() -> bool:
            read = {product_id: (await started.read(reader, product_id))[0] for product_id in prices}
            return all(int(read[product_id] or 0) >= int(price) for product_id, price in prices.items())

        await eventually(fresh)

    async def test_a_second_one_ends_it_at_once(self, started: Started, settings: dict[str, object]) -> None:
        process = await started.start_http("serve", **settings)
        await started.until(process, "ready")
        # A request that never ends keeps it for some seconds.
        address = urlsplit(process.url)
        with socket.create_connection((str(address.hostname), address.port or 0)) as connection:
            connection.sendall(b"PUT /products/a HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            await asyncio.sleep(0.2)
            process.signal(signal.SIGTERM)
            await process.eventually_logged("stopping")
            process.signal(signal.SIGTERM)
            assert await process.ended(60) == 128 + signal.SIGTERM  # not 0, as in order
        assert not process.logged("stopped")

    async def test_it_ends_in_time_whatever_is_under_way(
        self, started: Started, settings: dict[str, object]
    ) -> None:
        process = await started.start_http("serve", **settings)
        await started.until(process, "ready")
        address = urlsplit(process.url)
        with socket.create_connection((str(address.hostname), address.port or 0)) as connection:
            connection.sendall(b"PUT /products/a HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            await asyncio.sleep(0.2)
            process.signal(signal.SIGTERM)
            assert await process.ended(60) == 0

    async def test_it_ends_in_time_while_the_database_does_not_answer(
        self, started: Started, settings: dict[str, object], own_postgres: Postgres
    ) -> None:
        process = await started.start_http("serve", **settings | {"database_url": own_postgres.url})
        await started.until(process, "ready")
        assert (await started.put(process, "a", "1")).status_code == 201
        own_postgres.pause()
        try:
            answer = await started.get(process, "/products/a")
            assert (answer.status_code, answer.headers["cache-status"]) == (503, "cacheinval; fwd=miss")
            reading = asyncio.create_task(started.get(process, "/products/a"))
            process.signal(signal.SIGTERM)
            assert await process.ended(60) == 0
            await asyncio.gather(reading, return_exceptions=True)
        finally:
            own_postgres.resume()

    async def test_it_ends_in_time_while_the_broker_does_not_answer(
        self, started: Started, settings: dict[str, object], own_rabbitmq: RabbitMQ
    ) -> None:
        process = await started.start_http("serve", **settings | {"broker_url": own_rabbitmq.url})
        await started.until(process, "ready")
        own_rabbitmq.pause()
        try:
            assert (await started.put(process, "a", "1")).status_code == 201
            process.signal(signal.SIGTERM)
            assert await process.ended(60) == 0
        finally:
            own_rabbitmq.resume()

    async def test_one_is_enough_before_the_database_has_answered(
        self, started: Started, settings: dict[str, object], own_postgres: Postgres
    ) -> None:
        own_postgres.pause()
        try:
            process = await started.start_http("serve", **settings | {"database_url": own_postgres.url})
            assert (await started.get(process, "/readyz")).status_code == 503
            process.signal(signal.SIGTERM)
            assert await process.ended(60) == 0
        finally:
            own_postgres.resume()


class TestOutages:
    async def test_serve_starts_without_a_broker_and_joins_when_it_comes(
        self,
        started: Started,
        settings: dict[str, object],
        own_rabbitmq: RabbitMQ,
        eventually: Any,
    ) -> None:
        await own_rabbitmq.kill()
        settings |= {"broker_url": own_rabbitmq.url, "publish_timeout": 600}
        service = await started.start_http("serve", **settings)
        await started.until(service, "degraded")
        assert (await started.get(service, "/readyz")).status_code == 200
        assert (
            await started.put(service, "kettle", "1")
        ).status_code == 201  # without waiting for the broker
        assert await started.read(service, "kettle") == ("1", "cacheinval; fwd=bypass; stored")
        await fetchval(settings["database_url"], "UPDATE products SET price = 2")

        async def from_database() -> bool:
            return await started.read(service, "kettle") == ("2", "cacheinval; fwd=bypass; stored")

        await eventually(from_database)  # it serves for a second what it loaded itself
        assert len(service.logged("broker unreachable, retrying")) == 1
        assert await fetchval(settings["database_url"], "SELECT count(*) FROM cacheinval.outbox") == 1

        await own_rabbitmq.start()
        await started.until(service, "ready")
        assert len(service.logged("joined")) == 1
        query = "SELECT count(*) FROM cacheinval.outbox"
        await eventually(lambda: _is_zero(settings["database_url"], query))

    async def test_while_the_database_is_down_an_evicted_product_is_given_if_that_is_asked_for(
        self, started: Started, settings: dict[str, object], own_postgres: Postgres
    ) -> None:
        settings |= {"database_url": own_postgres.url, "stale_if_error": 60}
        service = await started.start_http("serve", **settings)
        await started.until(service, "ready")
        for name in ("a", "b"):
            assert (await started.put(service, name, "1")).status_code == 201
        assert await started.read(service, "a") == ("1", "cacheinval; fwd=miss; stored")
        assert (await started.put(service, "a", "2")).status_code == 200
        await own_postgres.stop()
        assert await started.read(service, "a") == ("1", "cacheinval; hit; detail=stale-if-error")
        assert (await started.get(service, "/products/b")).status_code == 503
        assert "cacheinval_cache_stale_if_error_total 1.0" in (await started.get(service, "/metrics")).text
        assert len(service.logged("cannot load, and gives what is stale")) == 1
        await own_postgres.start()
        end = time.monotonic() + 30
        while (read := await started.read(service, "a")) != ("2", "cacheinval; fwd=miss; stored"):
            assert read == ("1", "cacheinval; hit; detail=stale-if-error")
            assert time.monotonic() < end
            await asyncio.sleep(0.05)

    async def test_serve_waits_for_the_database(
        self,
        started: Started,
        settings: dict[str, object],
        own_postgres: Postgres,
    ) -> None:
        await own_postgres.stop()
        service = await started.start_http("serve", **settings | {"database_url": own_postgres.url})
        assert (await started.get(service, "/healthz")).status_code == 200
        readyz = await started.get(service, "/readyz")
        assert (readyz.status_code, readyz.json()["status"]) == (503, "starting")
        for answer in (await started.get(service, "/products/a"), await started.put(service, "a", "1")):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert set(answer.json()) == {"detail"}
        await service.eventually_logged("the database is not ready, retrying")
        await asyncio.sleep(1.5)  # several attempts more, and still
        assert len(service.logged("the database is not ready, retrying")) == 1
        await own_postgres.start()
        await started.until(service, "ready")
        assert (await started.put(service, "a", "1")).status_code == 201
        assert "Traceback" not in service.said

    async def test_a_worker_tells_each_change_of_its_state_once(
        self,
        started: Started,
        settings: dict[str, object],
        own_rabbitmq: RabbitMQ,
    ) -> None:
        await own_rabbitmq.kill()
        settings |= {"broker_url": own_rabbitmq.url, "database_url": ""}
        worker = await started.start_http("worker", **settings)
        readyz = await started.get(worker, "/readyz")
        assert readyz.status_code == 503
        await worker.eventually_logged("broker unreachable, retrying")
        await own_rabbitmq.start()
        await started.until(worker, "ready")
        assert (await started.get(worker, "/readyz")).status_code == 200
        before = worker.logged("broker unreachable, retrying")[-1:]
        await own_rabbitmq.kill()
        await worker.eventually_logged("subscription lost")
        readyz = await started.get(worker, "/readyz")
        assert (readyz.status_code, readyz.json()["status"]) == (503, "suspect")
        async with asyncio.timeout(30):  # the next attempt may be seconds away
            while worker.logged("broker unreachable, retrying")[-1:] == before:
                await asyncio.sleep(0.05)
        await own_rabbitmq.start()
        await started.until(worker, "ready")

        told = [line["event"] for line in worker.log if line["logger"] == "cacheinval.bus"]
        changes = [event for at, event in enumerate(told) if at == 0 or event != told[at - 1]]
        assert changes == [
            "broker unreachable, retrying",
            "joined",
            "subscription lost",
            "broker unreachable, retrying",
            "joined",
        ]
        # A booting broker refuses in more than one way; each is told once.
        assert len(told) <= len(changes) + 4


class TestConfiguration:
    @pytest.mark.parametrize("command", ["serve", "worker", "relay", "status"])
    async def test_a_wrong_value_is_named_in_one_line(self, command: str) -> None:
        code, out, err = await run(command, broker_url="http://user:s3cret@host/")
        assert (code, out) == (2, "")
        assert err.splitlines() == [
            "cacheinval: CACHEINVAL_BROKER_URL=http://user:***@host/: accepted: amqp://…, amqps://…, memory://…"
        ]

    async def test_an_unknown_variable_is_warned_of(self) -> None:
        code, _, err = await run(
            "invalidate", "a", broker_ulr="amqp://", broker_url="memory://", database_url=""
        )
        assert code == 0
        assert err.splitlines() == [
            "cacheinval: warning: CACHEINVAL_BROKER_ULR is not a setting; did you mean CACHEINVAL_BROKER_URL?"
        ]

    async def test_a_relay_needs_a_database_and_a_broker(self) -> None:
        code, _, err = await run("relay", database_url="")
        assert (code, err.startswith("cacheinval: CACHEINVAL_DATABASE_URL=: accepted: ")) == (2, True)
        code, _, err = await run("relay", broker_url="memory://")
        assert (code, err.startswith("cacheinval: CACHEINVAL_BROKER_URL=memory://: accepted: ")) == (2, True)

    async def test_a_busy_port_ends_serve_and_only_warns_a_worker(self, started: Started) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            settings = {"broker_url": "memory://", "database_url": "", "http_port": port}
            code, out, err = await run("serve", **settings)
            assert (code, out) == (1, "")
            (line,) = err.splitlines()
            assert line.startswith("cacheinval: cannot listen on ")
            assert f"CACHEINVAL_HTTP_PORT={port}" in line
            worker = await started.start_http("worker", **settings)
            assert (await started.get(worker, "/healthz")).status_code == 200
            warnings = [line["event"] for line in worker.log if line["level"] == "WARNING"]
            assert warnings == [
                "memory:// brings nothing from other processes",
                "nobody reads what a worker keeps in its own memory: set CACHEINVAL_CACHE_URL",
                "listening on another port",
            ]

    async def test_a_service_in_one_process_needs_no_server(self, started: Started) -> None:
        service = await started.start_http("serve", broker_url="memory://", database_url="", http_port=0)
        await started.until(service, "ready")
        assert (await started.put(service, "kettle", "1")).status_code == 201
        await started.read(service, "kettle")
        assert (await started.put(service, "kettle", "2")).status_code == 200
        assert await started.read(service, "kettle") == ("2", "cacheinval; fwd=miss; stored")
        assert await started.read(service, "kettle") == ("2", "cacheinval; hit")

    async def test_passwords_are_never_shown(
        self, started: Started, settings: dict[str, object], eventually: Any
    ) -> None:
        broker, database = (urlsplit(str(settings[name])) for name in ("broker_url", "database_url"))
        wrong = {
            "broker_url": f"amqp://guest:s3cret@{broker.hostname}:{broker.port}/",
            "database_url": f"postgresql://postgres:t0psecret@{NOWHERE}/postgres?sslpassword=h1dden",
            "log_level": "DEBUG",
        }
        said = ""
        for command in ("serve", "worker", "relay"):
            process = await started.start_http(command, **settings | wrong)
            if command != "relay":
                await eventually(lambda process=process: "ACCESS_REFUSED" in process.said)
            for path in ("/readyz", "/status", "/metrics", "/products/a"):
                said += (await started.get(process, path)).text
            process.signal(signal.SIGTERM)
            assert await process.ended(60) == 0
            said += process.said
        for command in (["status"], ["invalidate", "a"], ["schema", "apply"]):
            code, out, err = await run(*command, **settings | wrong | {"log_level": "INFO"})
            said_in_out = command == ["status"]
            assert (code, bool(out), len(err.splitlines())) == (1, said_in_out, 0 if said_in_out else 1), err
            said += out + err
        # With a password that is right, nothing fails, and nothing shows it either.
        right = f"postgresql://postgres:t0psecret@{database.hostname}:{database.port}{database.path}"
        service = await started.start_http("serve", **settings | {"database_url": right})
        await started.until(service, "ready")
        said += (await started.get(service, "/status")).text + service.said
        for secret in ("s3cret", "t0psecret", "h1dden"):
            assert secret not in said


class TestCommands:
    async def test_invalidate_reaches_every_instance(
        self, started: Started, settings: dict[str, object], eventually: Any
    ) -> None:
        service = await started.start_http("serve", **settings)
        await started.until(service, "ready")
        await started.put(service, "kettle", "1")

        for arguments in (["product:kettle"], ["--tag", "products"], ["--all"]):
            await started.read(service, "kettle")
            assert await started.read(service, "kettle") == ("1", "cacheinval; hit")
            code, out, err = await run("invalidate", *arguments, **settings)
            assert (code, err) == (0, "")
            assert out.startswith("invalidated ")

            async def evicted() -> bool:
                return (await started.read(service, "kettle"))[1] == "cacheinval; fwd=miss; stored"

            await eventually(evicted)

    async def test_invalidate_waits_and_says_who_is_missing(
        self, started: Started, settings: dict[str, object], namespace: str
    ) -> None:
        services = [await started.start_http("serve", **settings) for _ in range(2)]
        for service in services:
            await started.until(service, "ready")
            await service.eventually_logged("registered")
        await started.put(services[0], "kettle", "1")
        for service in services:
            await started.read(service, "kettle")
            assert await started.read(service, "kettle") == ("1", "cacheinval; hit")
        code, out, err = await run("invalidate", "product:kettle", "--wait", "60", **settings)
        assert (code, out, err) == (0, "invalidated product:kettle: evicted by 2 of 2 instances\n", "")
        for service in services:
            assert await started.read(service, "kettle") == ("1", "cacheinval; fwd=miss; stored")

        for silent, staleness in (("silent", None), ("by-time", 0.1), ("later", 3600.0)):
            statement = (
                "INSERT INTO cacheinval.instances VALUES ($1, $2, '', $3, now(), now() + interval '1 hour')"
            )
            await fetchval(settings["database_url"], statement, namespace, silent, staleness)
        code, out, err = await run("invalidate", "product:kettle", "--wait", "2", **settings)
        first, later, silently = out.splitlines()
        assert first == "invalidated product:kettle: evicted by 3 of 5 instances, 1 of them by time"
        assert later.startswith("  later   no answer within 2 s; safe in 359")
        assert (
            silently == "  silent  no answer within 2 s; it has no max_staleness: not safe until it answers"
        )
        assert (code, err) == (1, "")

    async def test_invalidate_with_a_database_needs_no_broker(
        self, started: Started, settings: dict[str, object]
    ) -> None:
        assert (await run("schema", "apply", **settings))[0] == 0
        code, out, err = await run("invalidate", "product:kettle", **settings | {"broker_url": NO_BROKER})
        assert (code, out) == (0, "invalidated product:kettle\n")
        assert err == "cacheinval: recorded, but not confirmed by the broker: the relay will send it\n"
        assert await fetchval(settings["database_url"], "SELECT keys FROM cacheinval.outbox") == [
            "product:kettle"
        ]

    async def test_invalidate_without_a_database_needs_the_broker(self, settings: dict[str, object]) -> None:
        settings |= {"database_url": ""}
        code, out, err = await run("invalidate", "a", **settings | {"broker_url": NO_BROKER})
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert err.startswith("cacheinval: ")

    async def test_status_asks_every_instance(self, started: Started, settings: dict[str, object]) -> None:
        for number in range(2):
            name = f"an-instance-with-a-name-of-more-than-forty-characters-{number}"
            process = await started.start_http("worker", **settings | {"instance_id": name})
            await started.until(process, "ready")
        code, out, err = await run("status", **settings)
        header, *rows = out[out.index("INSTANCE ") :].splitlines()
        assert (code, err, len(rows)) == (0, "", 2)
        assert header.split()[:4] == ["INSTANCE", "HOST", "VERSION", "STATE"]
        for number, row in enumerate(rows):
            assert row.startswith(f"an-instance-with-a-name-of-more-than-forty-characters-{number} ")
            assert row.index("ready") == header.index("STATE")

        code, out, err = await run("status", "--json", **settings)
        instances = json.loads(out)["instances"]
        assert (code, err, len(instances)) == (0, "", 2)
        for instance in instances:
            assert {"id", "host", "version", "state", "watermark_age"} <= set(instance)

    async def test_status_watches_until_it_is_interrupted(
        self, started: Started, settings: dict[str, object], eventually: Any
    ) -> None:
        process = started.start("status", "--watch", "--interval", "0.2", **settings)
        await eventually(lambda: process.said.count("No instance") >= 2, 30)
        process.signal(signal.SIGINT)
        assert await process.ended(60) == 0
        assert "Traceback" not in process.said

    async def test_status_without_instances_says_so(
        self, started: Started, settings: dict[str, object]
    ) -> None:
        code, out, err = await run("status", **settings)
        assert (code, err) == (0, "")
        # There is no schema yet, in which they would be registered.
        assert out.startswith(f"No instance of namespace {settings['namespace']} answers; ")
        assert "schema apply" in out
        code, out, err = await run("status", "--json", **settings)
        told = json.loads(out)
        assert (code, told["instances"], told["verdict"]["level"], err) == (0, [], "warning", "")

    async def test_status_needs_the_broker(self) -> None:
        code, out, err = await run("status", broker_url=NO_BROKER)
        assert (code, err, out.count("the broker cannot be reached")) == (1, "", 1)
        assert "See that RabbitMQ runs" in out

    async def test_the_schema_is_applied_once(self, settings: dict[str, object]) -> None:
        code, out, err = await run("schema", "apply", **settings)
        assert (code, out, err) == (0, f"the schema cacheinval made in {settings['database_url']}\n", "")
        code, out, err = await run("schema", "apply", **settings)
        assert (code, out, err) == (
            0,
            f"the schema cacheinval is up to date in {settings['database_url']}\n",
            "",
        )
        # Made again, it lacks what the one before had, which nobody else says.
        await fetchval(settings["database_url"], "DROP SCHEMA cacheinval CASCADE")
        await fetchval(settings["database_url"], "CREATE TABLE orders (id int)")
        code, out, err = await run("schema", "apply", **settings)
        assert (code, out.split(" in ")[0]) == (0, "the schema cacheinval made")
        assert re.match("only if it was there before: .*schema grant.*track.*invalidate --all", err)
        # It touches only its own schema: the table of the reference application is not its business.
        assert await fetchval(settings["database_url"], "SELECT to_regclass('products')") is None

    async def test_the_schema_is_shown(self, settings: dict[str, object]) -> None:
        code, out, err = await run("schema", "show")
        assert (code, err) == (0, "")
        await fetchval(settings["database_url"], "SELECT 1")
        assert "cacheinval.outbox" in out

    async def test_a_database_that_is_down_is_one_line(self) -> None:
        for command in (["invalidate", "a"], ["schema", "apply"]):
            code, out, err = await run(*command, database_url=NO_DATABASE, broker_url=NO_BROKER)
            assert (code, out, len(err.splitlines())) == (1, "", 1)
            assert "Traceback" not in err
            assert NOWHERE.split(":")[0] in err
