"""The command line, in this process: what it parses, and how it ends."""

import asyncio
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

import pytest

import cacheinval.cli
import cacheinval.worker
from cacheinval.cli import main
from cacheinval.errors import CacheinvalError, ConfigurationError
from cacheinval.settings import Settings


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command sets up logging for its process, which here is that of all the tests."""
    root, ours = logging.getLogger(), logging.getLogger("cacheinval")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    for logger, level in zip((root, ours), levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEINVAL_BROKER_URL", "memory://")
    monkeypatch.setenv("CACHEINVAL_DATABASE_URL", "")


def ended(monkeypatch: pytest.MonkeyPatch, *command: str) -> int:
    """The exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["cacheinval", *command])
    with pytest.raises(SystemExit) as exit_:
        main()
    code = exit_.value.code
    return code if isinstance(code, int) else 0


class TestUse:
    def test_version(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert ended(monkeypatch, "--version") == 0
        assert capsys.readouterr().out == version("cacheinval") + "\n"

    def test_help_names_every_command(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert ended(monkeypatch, "--help") == 0
        out = capsys.readouterr().out
        for command in (
            "serve",
            "worker",
            "relay",
            "invalidate",
            "status",
            "audit",
            "schema",
            "sandbox",
            "demo",
        ):
            assert f" {command} " in out

    def test_help_is_not_kept_waiting_by_what_it_does_not_need(self) -> None:
        heavy = ("aio_pika", "aiocache", "asyncpg", "fastapi", "prometheus_client", "pydantic", "uvicorn")
        program = (
            "import sys; sys.argv = ['cacheinval', '--help']\n"
            "from cacheinval.cli import main\n"
            "try: main()\n"
            f"finally: print('loaded:', *[name for name in {heavy} if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
        )
        assert done.stdout.splitlines()[-1] == "loaded:"

    @pytest.mark.parametrize(
        "command",
        [
            ["nonsense"],
            ["--nonsense"],
            ["invalidate"],
            ["invalidate", "--tag"],
            ["invalidate", "a", "--wait", "0"],
            ["invalidate", "a", "--wait", "inf"],
            ["invalidate", "a", "--wait", "nan"],
            ["invalidate", "a", "--wait", "long"],
            ["status", "x"],
            ["demo", "--bus", "x"],
        ],
    )
    def test_wrong_use_is_2(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
    ) -> None:
        assert ended(monkeypatch, *command) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err != ""

    def test_a_key_that_can_never_be_sent_is_wrong_use(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert ended(monkeypatch, "invalidate", "k" * 513) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "has 513 bytes" in line


class TestWaiting:
    def test_nobody_knows_how_many_there_are_without_a_database(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert ended(monkeypatch, "invalidate", "a", "--wait", "0.05") == 1
        said = "invalidated a: evicted by 0, of how many is unknown: there is no database\n"
        assert capsys.readouterr() == (said, "")

    @pytest.mark.parametrize(
        ("is_terminal", "said"),
        [(True, "cacheinval: waiting for the instances, at most 0.2 s\n"), (False, "")],
    )
    def test_a_person_who_waits_is_told_so(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        is_terminal: bool,
        said: str,
    ) -> None:
        monkeypatch.setattr(cacheinval.cli, "SILENT_WAIT", 0.01)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
        assert ended(monkeypatch, "invalidate", "a", "--wait", "0.2") == 1
        assert capsys.readouterr().err == said


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [
            (ConfigurationError("one\ntwo"), 2, ["cacheinval: one", "cacheinval: two"]),
            (CacheinvalError("it failed"), 1, ["cacheinval: it failed"]),
            (RuntimeError("a\ndefect"), 1, ["cacheinval: RuntimeError: a defect"]),
            (KeyboardInterrupt(), 130, []),
        ],
    )
    def test_each_is_an_exit_code_and_a_line(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        error: BaseException,
        code: int,
        said: list[str],
    ) -> None:
        def fail(settings: Settings) -> int:
            raise error

        monkeypatch.setattr(cacheinval.worker, "serve", fail)
        assert ended(monkeypatch, "serve") == code
        captured = capsys.readouterr()
        assert (captured.out, captured.err.splitlines()) == ("", said)

    def test_a_defect_is_shown_to_who_debugs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(settings: Settings) -> int:
            raise RuntimeError("a defect")

        monkeypatch.setattr(cacheinval.worker, "serve", fail)
        monkeypatch.setattr(sys, "argv", ["cacheinval", "serve"])
        monkeypatch.setenv("CACHEINVAL_LOG_LEVEL", "debug")
        with pytest.raises(RuntimeError):
            main()

    def test_a_wrong_setting_is_2_and_names_its_variable(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("CACHEINVAL_NAMESPACE", "a.b")
        monkeypatch.setenv("CACHEINVAL_PREFETCH", "many")
        assert ended(monkeypatch, "worker") == 2
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith("cacheinval: CACHEINVAL_NAMESPACE=a.b: accepted: ")
        assert second.startswith("cacheinval: CACHEINVAL_PREFETCH=many: ")

    def test_serve_without_its_extra_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delitem(sys.modules, "cacheinval.products.http", raising=False)
        monkeypatch.setitem(sys.modules, "fastapi", None)
        assert ended(monkeypatch, "serve") == 1
        assert capsys.readouterr().err == "cacheinval: serve needs fastapi: pip install 'cacheinval[http]'\n"

    @pytest.mark.parametrize("command", ["status", "audit"])
    def test_who_asks_others_needs_a_broker_that_others_hear(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
    ) -> None:
        assert ended(monkeypatch, command) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert err.startswith("cacheinval: CACHEINVAL_BROKER_URL=memory://: accepted: amqp://…, amqps://… (")


class TestProcesses:
    @pytest.mark.parametrize("command", ["serve", "worker", "relay"])
    def test_the_exit_code_is_the_process_s(self, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
        asked: list[Settings] = []

        def run(settings: Settings) -> int:
            asked.append(settings)
            return 7

        monkeypatch.setattr(cacheinval.worker, command, run)
        assert ended(monkeypatch, command) == 7
        assert asked[0].broker_url == "memory://"

    def test_demo_and_sandbox_are_called_with_what_was_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import cacheinval.demo
        import cacheinval.sandbox.running

        async def sandbox(command: list[str], *, cluster: bool) -> int:
            assert command == ["ls", "-l", "--all"]
            return 6 if cluster else 5

        def demo(bus: str) -> int:
            return {"rabbitmq": 3, "memory": 4}[bus]

        monkeypatch.setattr(cacheinval.sandbox.running, "run", sandbox)
        monkeypatch.setattr(cacheinval.demo, "run", demo)
        assert ended(monkeypatch, "sandbox", "--", "ls", "-l", "--all") == 5
        assert ended(monkeypatch, "sandbox", "--cluster", "--", "ls", "-l", "--all") == 6
        assert ended(monkeypatch, "demo") == 3
        assert ended(monkeypatch, "demo", "--bus", "memory") == 4


class TestSignals:
    async def test_the_handlers_are_put_back(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with cacheinval.worker.signals() as stop:
            assert signal.getsignal(signal.SIGTERM) is not before
            signal.raise_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                await stop.wait()
        assert signal.getsignal(signal.SIGTERM) is before

    async def test_a_shutdown_that_hangs_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ended: asyncio.Queue[int] = asyncio.Queue()
        monkeypatch.setattr(cacheinval.worker.os, "_exit", ended.put_nowait)
        monkeypatch.setattr(cacheinval.worker, "SHUTDOWN_TIMEOUT", 0.01)
        with cacheinval.worker.signals():
            signal.raise_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                assert await ended.get() == 1

    async def test_a_second_one_ends_the_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        codes: list[int] = []
        monkeypatch.setattr(cacheinval.worker.os, "_exit", codes.append)
        with cacheinval.worker.signals():
            signal.raise_signal(signal.SIGINT)
            assert codes == []
            signal.raise_signal(signal.SIGTERM)
        assert codes == [128 + signal.SIGTERM]


def test_the_rights_of_a_role_are_printed_or_the_name_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, "schema", "grant", "shop", "--print") == 0
    out = capsys.readouterr().out.splitlines()
    assert 'GRANT SELECT, INSERT, DELETE ON TABLE cacheinval.outbox TO "shop";' in out
    assert ended(monkeypatch, "schema", "grant", "r" * 64) == 2
    assert "accepted: the name of a role" in " ".join(capsys.readouterr().err.replace("│", " ").split())
