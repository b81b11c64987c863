"""The sandbox, on which all other tests of real servers stand."""

import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aio_pika
import asyncpg
import pytest
from waiting import Eventually

from cacheinval.errors import SandboxError
from cacheinval.sandbox import (
    SERVICES,
    Memcached,
    Postgres,
    RabbitMQ,
    Redis,
    Sandbox,
    Server,
    processes,
    running,
    server,
)
from cacheinval.sandbox.processes import living


def _refuses(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), 1).close()
    except OSError:
        return True
    return False


async def _ask(server: Server, question: bytes) -> bytes:
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(question)
        answer = await reader.readline()
        writer.close()
        return answer


# Servers that answer


async def test_rabbitmq_takes_messages_in_the_clear_and_over_tls(rabbitmq: RabbitMQ, namespace: str) -> None:
    context = aio_pika.abc.SSLOptions(cafile=str(rabbitmq.ca_file))
    async with asyncio.timeout(60):
        async with await aio_pika.connect(rabbitmq.tls_url, ssl_options=context) as connection:
            channel = await connection.channel()
            await channel.declare_queue(namespace)
            await channel.default_exchange.publish(aio_pika.Message(b"hello"), namespace)
        async with await aio_pika.connect(rabbitmq.url) as connection:
            channel = await connection.channel()
            queue = await channel.get_queue(namespace)
            message = await queue.get(no_ack=True)
            assert message is not None
            assert message.body == b"hello"
            await queue.delete()


async def test_rabbitmqctl(rabbitmq: RabbitMQ) -> None:
    assert "amq.fanout\tfanout" in await rabbitmq.ctl("list_exchanges")
    with pytest.raises(SandboxError, match=r"rabbitmqctl --quiet delete_queue nowhere.* ended with code \d+"):
        await rabbitmq.ctl("delete_queue", "nowhere")


async def test_what_is_printed_reaches_the_broker_from_any_shell(
    rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Started:
        servers = (rabbitmq,)

        async def open(self) -> None: ...
        async def close(self) -> None: ...
        def environment(self) -> dict[str, str]:
            return {}

    monkeypatch.setattr(running, "Sandbox", lambda *_, **__: Started())
    assert await running.run(["true"]) == 0
    line = capsys.readouterr().err.splitlines()[1]
    of_others = {"PATH": "/usr/bin:/bin", "HOME": "/", "RABBITMQ_NODENAME": "else@nowhere"}
    of_others["ERL_FLAGS"] = "-start_epmd false"  # a script that lets these through must not leave one behind
    for command in (line, line.replace("rabbitmqctl list_queues", "rabbitmq-diagnostics alarms")):
        done = await asyncio.to_thread(
            subprocess.run, command, shell=True, env=of_others, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert f"Node {rabbitmq.node}" in done.stdout or "Listing queues" in done.stdout


async def test_postgres_answers_and_keeps_what_it_acknowledged(database_url: str) -> None:
    async with asyncio.timeout(60):
        connection = await asyncpg.connect(database_url)
        assert await connection.fetchval("SHOW fsync") == "on"
        assert await connection.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'products'") == 0
        await connection.close()


async def test_redis_and_memcached_answer(redis: Redis, memcached: Memcached) -> None:
    assert await _ask(redis, b"PING\r\n") == b"+PONG\r\n"
    assert (await _ask(memcached, b"version\r\n")).startswith(b"VERSION ")


def test_environment_points_at_what_was_started(
    sandbox: Sandbox, rabbitmq: RabbitMQ, postgres: Postgres
) -> None:
    environment = sandbox.environment()
    assert (
        environment["CACHEINVAL_BROKER_URL"]
        == rabbitmq.url
        == f"amqp://guest:guest@127.0.0.1:{rabbitmq.port}/"
    )
    assert environment["CACHEINVAL_DATABASE_URL"] == postgres.url
    assert postgres.url == f"postgresql://postgres@127.0.0.1:{postgres.port}/postgres"


async def test_only_what_was_asked_for_is_there() -> None:
    async with Sandbox(["redis"]) as sandbox:
        assert sandbox.environment() == {"CACHEINVAL_CACHE_URL": f"redis://127.0.0.1:{sandbox.redis.port}/0"}
        with pytest.raises(SandboxError, match="this sandbox has no postgres"):
            _ = sandbox.postgres
        folder = sandbox.folder
    assert not folder.exists()
    with pytest.raises(SandboxError, match="the sandbox is not open"):
        _ = sandbox.folder


# Faults


async def test_rabbitmq_killed_and_started_again_is_the_same(own_rabbitmq: RabbitMQ) -> None:
    async with asyncio.timeout(100):
        port, members = own_rabbitmq.port, own_rabbitmq.pids
        async with await aio_pika.connect(own_rabbitmq.url) as connection:
            channel = await connection.channel(publisher_confirms=True)
            await channel.declare_queue("kept", durable=True)
            message = aio_pika.Message(b"hello", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await channel.default_exchange.publish(message, "kept")
        # That there is such a queue is only written down some time after it was said.
        await own_rabbitmq.ctl("eval", "mnesia:sync_log().")
        assert len(members) > 1
        await own_rabbitmq.kill()
        assert not own_rabbitmq.running
        assert _refuses(own_rabbitmq)
        assert living().keys().isdisjoint(members)
        await own_rabbitmq.start()
        assert own_rabbitmq.port == port
        async with await aio_pika.connect(own_rabbitmq.url) as connection:
            channel = await connection.channel()
            received = await (await channel.get_queue("kept")).get(no_ack=True)
            assert received is not None
            assert received.body == b"hello"


async def test_postgres_killed_stopped_and_started_again_is_the_same(own_postgres: Postgres) -> None:
    async with asyncio.timeout(100):
        port = own_postgres.port
        connection = await asyncpg.connect(own_postgres.url)
        await connection.execute("CREATE TABLE kept (value int); INSERT INTO kept VALUES (42)")
        for end in (own_postgres.kill, own_postgres.stop):
            members = own_postgres.pids
            assert len(members) > 1
            await end()
            assert not own_postgres.running
            assert _refuses(own_postgres)
            assert living().keys().isdisjoint(members)
            await own_postgres.start()
            assert own_postgres.port == port
            connection.terminate()
            connection = await asyncpg.connect(own_postgres.url)
            assert await connection.fetchval("SELECT value FROM kept") == 42
        await connection.close()


async def test_a_paused_server_is_silent_until_it_is_resumed(own_postgres: Postgres) -> None:
    connection = await asyncpg.connect(own_postgres.url)
    own_postgres.pause()
    query = asyncio.create_task(connection.fetchval("SELECT 1"))
    _, pending = await asyncio.wait([query], timeout=0.3)
    assert pending
    assert own_postgres.running
    own_postgres.resume()
    async with asyncio.timeout(60):
        assert await query == 1
    own_postgres.pause()
    async with asyncio.timeout(60):
        await own_postgres.stop()
    assert not own_postgres.running


async def test_nobody_gets_the_port_of_a_server_that_is_down(own_redis: Redis) -> None:
    await own_redis.kill()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", own_redis.port))
    await own_redis.start()
    assert await _ask(own_redis, b"PING\r\n") == b"+PONG\r\n"
    with pytest.raises(SandboxError, match="redis is running already"):
        await own_redis.start()


async def test_a_port_that_somebody_took_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        taken = [somebody.dup()]
        monkeypatch.setattr(server, "claim_port", lambda: taken.pop() if taken else processes.claim_port())
        async with Sandbox(["redis"]) as sandbox:
            assert not taken
            assert sandbox.redis.port != somebody.getsockname()[1]
            assert await _ask(sandbox.redis, b"PING\r\n") == b"+PONG\r\n"


# Errors


async def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(Postgres, "programs", {"postgres": ("/nowhere/*/postgres",)})
    with pytest.raises(
        SandboxError, match=r"postgres was not found: `apt-get install postgresql`, or use docker/"
    ):
        await Sandbox(["postgres"]).open()


def test_an_unknown_service_is_refused() -> None:
    with pytest.raises(
        SandboxError, match="unknown service 'mysql': there are rabbitmq, postgres, redis, memcached"
    ):
        Sandbox(["redis", "mysql"])


def test_a_cluster_over_tls_is_refused() -> None:
    with pytest.raises(SandboxError, match="choose one of tls and cluster"):
        Sandbox(tls=True, cluster=True)


async def test_a_sandbox_without_a_cluster_says_so() -> None:
    async with Sandbox(()) as sandbox:
        with pytest.raises(SandboxError, match=r"no cluster: use Sandbox\(…, cluster=True\)"):
            _ = sandbox.cluster


async def test_a_server_that_cannot_start_says_why_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(_open_to_all(tmp_path)))
    monkeypatch.setattr(Redis, "_command", lambda self: ["/bin/sh", "-c", "echo out of cheese; exit 3"])
    with pytest.raises(SandboxError, match=r"redis ended with code 3 while it started:\nout of cheese"):
        await Sandbox(["redis", "memcached"]).open()
    assert list(tmp_path.iterdir()) == []


async def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Redis, "boot_timeout", 0.2)
    monkeypatch.setattr(Redis, "_command", lambda self: ["/bin/sleep", "60"])
    with pytest.raises(SandboxError, match=r"redis was not ready in 0.2 s"):
        await Sandbox(["redis"]).open()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's Postgres runs as another user")
async def test_a_folder_that_the_other_user_cannot_reach_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(SandboxError, match=r"the user postgres cannot pass /\S+: choose another folder"):
        await Sandbox(["postgres"], folder=closed / "data").open()


async def test_a_folder_that_was_given_is_kept_with_its_data(tmp_path: Path) -> None:
    folder = _open_to_all(tmp_path) / "data"
    for round_ in ("make", "find"):
        async with Sandbox(["postgres"], folder=folder) as sandbox, asyncio.timeout(100):
            connection = await asyncpg.connect(sandbox.postgres.url)
            if round_ == "make":
                await connection.execute("CREATE TABLE kept AS SELECT 42 AS value")
            assert await connection.fetchval("SELECT value FROM kept") == 42
            await connection.close()


def _open_to_all(folder: Path) -> Path:
    """The user postgres has to get through the folders of pytest, which are closed."""
    for path in [folder, *folder.parents]:
        if path.owner() == "nobody" or path == path.parent:
            break
        with contextlib.suppress(PermissionError):
            path.chmod(path.stat().st_mode | 0o011)
    return folder


# Whatever becomes of the owner

_OWNER = """
import asyncio, json, sys
from cacheinval.sandbox import Sandbox

async def main():
    async with Sandbox(sys.argv[2:]) as sandbox:
        pids = [pid for server in sandbox.servers for pid in server.pids]
        if "paused" in sys.argv:
            sandbox.postgres.pause()
        print(json.dumps({"folder": str(sandbox.folder), "pids": pids}), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("number", "state", "services"),
    [
        (signal.SIGKILL, "running", SERVICES),
        (signal.SIGKILL, "paused", ("postgres",)),
        (signal.SIGTERM, "running", ("postgres", "redis")),
        (signal.SIGINT, "running", ("postgres", "redis")),
    ],
)
async def test_nothing_outlives_the_owner(
    number: int, state: str, services: tuple[str, ...], eventually: Eventually
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, state, *services], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert owner.stdout is not None
        told = json.loads(owner.stdout.readline())
        assert len(told["pids"]) > len(services)
        assert not living().keys().isdisjoint(told["pids"])
        owner.send_signal(number)
        owner.wait(60)
    finally:
        owner.kill()
        owner.communicate()
    await eventually(lambda: living().keys().isdisjoint(told["pids"]), timeout=60)
    await eventually(lambda: not Path(told["folder"]).exists(), timeout=60)


_EXIT = {"x86_64": 60, "aarch64": 93}.get(platform.machine(), 0)  # the system call that ends one thread


@pytest.mark.skipif(sys.platform != "linux" or not _EXIT, reason="only Linux has such processes")
async def test_a_process_lives_until_its_last_thread_has_ended(eventually: Eventually) -> None:
    code = "import ctypes, threading; threading.Thread(target=input).start(); "
    code += f"ctypes.CDLL(None).syscall({_EXIT}, 0)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    state = Path(f"/proc/{process.pid}/stat")
    await eventually(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z")
    assert process.pid in living()
    process.communicate(b"end\n", timeout=60)
    assert process.pid not in living()


# `run`

_RUN = """
import asyncio, sys
from cacheinval.sandbox.running import run
sys.exit(asyncio.run(run(sys.argv[1:], ["redis"])))
"""


def _start(*command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _RUN, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes to kill if the test did not end them."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_run_gives_the_command_its_servers_and_hands_back_its_exit_code() -> None:
    process = _start("/bin/sh", "-c", "echo $CACHEINVAL_CACHE_URL; exit 7")
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 7
    assert re.fullmatch(r"redis://127\.0\.0\.1:\d+/0\n", output)
    assert re.fullmatch(r"redis +\d+\.\d s  redis://127\.0\.0\.1:\d+/0\n", errors)


def test_run_of_a_command_that_does_not_exist() -> None:
    process = _start("no-such-command")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 127
    assert errors == "cacheinval sandbox: no-such-command: command not found\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_passes_signals_on(number: signal.Signals, started: list["subprocess.Popen[str]"]) -> None:
    script = "trap 'echo told; exit 5' INT TERM; echo ready; while :; do sleep 0.05; done"
    started.append(process := _start("/bin/sh", "-c", script))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "told\n"
    assert process.returncode == 5


def test_run_without_a_command_prints_the_variables_and_waits(started: list["subprocess.Popen[str]"]) -> None:
    started.append(process := _start())
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"export CACHEINVAL_CACHE_URL=redis://127\.0\.0\.1:(\d+)/0\n", line)
    assert found
    port = int(found[1])
    socket.create_connection(("127.0.0.1", port), 1).close()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1)


def test_run_can_be_ended_while_the_servers_start(
    started: list["subprocess.Popen[str]"], tmp_path: Path
) -> None:
    code = _RUN.replace(
        "from cacheinval", "import tempfile; tempfile.tempdir = sys.argv.pop(1)\nfrom cacheinval"
    )
    code = code.replace('["redis"]', '["rabbitmq"]')
    process = subprocess.Popen([sys.executable, "-c", code, str(_open_to_all(tmp_path)), "true"], text=True)
    started.append(process)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("cacheinval-*/rabbitmq/server.log")) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
