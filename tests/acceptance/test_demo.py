"""`cacheinval demo`, as somebody runs it; and what it says of a reader that ends with an old price."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from cacheinval import cli, demo
from cacheinval.bus.memory import EventBus
from cacheinval.demo import stage
from cacheinval.demo.acts import without_invalidation
from cacheinval.demo.memory import MemoryStage
from cacheinval.demo.page import Page
from cacheinval.demo.stage import Wrong, wrong_at_the_end, wrong_prices
from cacheinval.sandbox import RabbitMQ

ELSEWHERE = {  # what the demo must not mind
    "CACHEINVAL_BROKER_URL": "amqp://nowhere.invalid/",
    "CACHEINVAL_CACHE_URL": "redis://nowhere.invalid/0",
    "CACHEINVAL_CACHE_TTL": "0.01",
    "CACHEINVAL_RELAY": "off",
}
FIGURE = r"\s+[\d,]+(?:\.\d+)?"
READER_ROWS = 3


class Demo:
    """A demo under way, in a scratch place of its own by which all that it starts can be told."""

    def __init__(self, place: Path, *options: str) -> None:
        self.place = place
        self.output = place.with_suffix(".out")
        kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cacheinval", "demo", *options],
                env=kept | ELSEWHERE | {"TMPDIR": str(place)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.output.read_text()

    def descendants(self) -> list[int]:
        """All processes that were started with the scratch place in their environment, or name it."""
        mark = os.fsencode(self.place)
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                told = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if mark in told and int(folder.name) != self.process.pid:
                found.append(int(folder.name))
        return found

    def wait_for(self, state: Callable[[], object], timeout: float) -> None:
        end = time.monotonic() + timeout
        while not state():
            assert time.monotonic() < end, self.said
            time.sleep(0.05)

    def left(self) -> list[object]:
        """What it has left behind."""
        return [*self.descendants(), *self.place.iterdir()]


@pytest.fixture
def start() -> Iterator[Callable[..., Demo]]:
    # Not tmp_path: the user that Postgres runs as must get through.
    base = Path(tempfile.mkdtemp(prefix="demo-"))
    place = base / "scratch"
    place.mkdir()
    base.chmod(0o755)
    started: list[Demo] = []

    def start(*options: str) -> Demo:
        started.append(Demo(place, *options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        for pid in one.descendants():
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(base)


def rows(said: str, begin: str, *figures: str) -> list[tuple[str, ...]]:
    """The figures in parentheses, of each line of a table whose name begins so and whose figures look so."""
    return [line.groups() for line in re.finditer(rf"^   {begin}-\d{''.join(figures)}$", said, re.MULTILINE)]


def check_acts_1_to_3(said: str) -> None:
    assert [line for line in said.splitlines() if len(line) > 80 or line != line.rstrip()] == []
    assert "\x1b" not in said
    first, second, third = [*re.split(r"(?m)^\d  ", said), "", "", ""][1:4]
    assert first.startswith("Without invalidation")
    old = rows(first, "reader", r"\s+20\.30", r"\s+19\.99", r"\s+(\d+)", r"\s+(\d+)")
    assert len(old) == READER_ROWS
    assert all(reads == stale and int(reads) > 0 for reads, stale in old)
    assert second.startswith("Polling")
    assert len(rows(second, "polling", FIGURE * 3, (FIGURE + " ms") * 2)) == READER_ROWS
    assert third.startswith("Events")
    new = rows(third, "reader", r"\s+([\d.,]+) ms", r"\s+([\d.]+)", r"\s+([\d.]+)", r"\s+(\d+)")
    assert len(new) == READER_ROWS
    assert all(database == served and 0 < int(queries) <= 2 for _, database, served, queries in new)
    assert "Every reader ended with the right price" in said
    assert "Next:" in said


def test_in_one_process(start: Callable[..., Demo]) -> None:
    one = start("--bus", "memory")
    assert one.process.wait(100) == 0, one.said
    check_acts_1_to_3(one.said)
    assert "The broker dies" not in one.said
    assert one.left() == []


def test_sigterm_ends_it(start: Callable[..., Demo]) -> None:
    one = start("--bus", "memory")
    one.wait_for(lambda: "Polling" in one.said, 60)
    one.process.terminate()
    assert one.process.wait(60) == 128 + signal.SIGTERM
    assert "Events" not in one.said


@pytest.mark.timeout(240)
def test_on_private_servers(start: Callable[..., Demo]) -> None:
    one = start()
    one.wait_for(lambda: "The broker dies" in one.said or one.process.poll() is not None, 120)
    assert len(one.descendants()) > 5  # else "nothing is left" would say nothing
    assert one.process.wait(100) == 0, one.said
    said = one.said
    check_acts_1_to_3(said)
    figures = dict(re.findall(r"^   {1,3}(\w[\w ,()]+?)  +([\d,]+)$", said, re.MULTILINE))
    made = int(figures["updates made"].replace(",", ""))
    published = int(figures["published at once"]) + int(figures["recovered from the outbox"])
    assert made >= 150
    assert int(figures["of them while RabbitMQ was down"]) > 0
    assert int(figures["recovered from the outbox"]) > 0
    assert published - int(figures["published twice (harmless)"]) == made
    assert figures["updates that failed"] == "0"
    assert len(rows(said, "reader", r"\s+\d+", r"\s+0", r"\s+[\d.]+ s", r"\s+0")) == READER_ROWS
    assert one.left() == []


@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_leaves_nothing_when_interrupted(start: Callable[..., Demo], how: signal.Signals) -> None:
    one = start()
    one.wait_for(lambda: "Without invalidation" in one.said or one.process.poll() is not None, 90)
    assert len(one.descendants()) > 5
    one.process.send_signal(how)
    code = one.process.wait(60)
    if how == signal.SIGINT:
        assert code == 130, one.said
        assert one.left() == []
    else:
        one.wait_for(lambda: not one.left(), 60)
    assert "Traceback" not in one.said


# The verdict


def test_wrong_prices_are_named() -> None:
    truth = {"lamp": Decimal("17.99"), "desk": Decimal("80")}
    served = {
        "reader-1": {"lamp": Decimal("17.99"), "desk": Decimal("80.00")},
        "reader-2": {"lamp": Decimal("19.99"), "desk": Decimal("80")},
        "reader-3": {"lamp": Decimal("17.99")},
    }
    wrong = wrong_prices(truth, served)
    assert wrong == [
        Wrong("reader-2", "lamp", Decimal("19.99"), Decimal("17.99")),
        Wrong("reader-3", "desk", None, Decimal("80")),
    ]
    assert str(wrong[0]) == "reader-2 serves lamp at 19.99; the database says 17.99"


async def test_a_reader_that_hears_nothing_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "PATIENCE", 0.05)
    async with MemoryStage() as playing:
        monkeypatch.setattr(EventBus, "publish", lambda *_: None)
        wrong = await without_invalidation(playing, Page(), seconds=0.05)
        assert [one.reader for one in wrong] == ["reader-1", "reader-2", "reader-3"]
        assert wrong == await wrong_at_the_end(playing, ["lamp"])
    assert "not every reader listened" in capsys.readouterr().out


def test_a_wrong_price_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story() -> list[Wrong]:
        return [Wrong("reader-2", "lamp", Decimal("19.99"), Decimal("17.99"))]

    monkeypatch.setattr(demo, "_tell", lambda bus, page: story())
    assert demo.run("memory") == 1
    said = capsys.readouterr().out
    assert "reader-2 serves lamp at 19.99; the database says 17.99" in said
    assert "right price" not in said


def test_a_missing_server_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RabbitMQ, "programs", {"no-such-server": ()})
    monkeypatch.setattr(sys, "argv", ["cacheinval", "demo"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "cacheinval: no-such-server was not found: `apt-get install rabbitmq-server`, or use docker/compose.yaml"
    ]
