"""The arithmetic of the benchmarks, and that a missed target is not overlooked."""

import asyncio
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from benchmarks import __main__ as command
from benchmarks.measuring import Figure, Holds, cpu_seconds, percentile, take_turns
from benchmarks.reporting import Report

REPOSITORY = Path(__file__).parents[2]


# Figures


def test_a_figure_is_its_median_with_its_spread() -> None:
    figure = Figure((5.0, 1.0, 9.0, 2.0))
    assert (figure.median, figure.low, figure.high) == (3.5, 1.0, 9.0)


def test_a_ratio_is_taken_round_by_round() -> None:
    ratio = Figure((1.0, 8.0, 9.0)) / Figure((8.0, 1.0, 2.0))
    assert ratio.values == (0.125, 8.0, 4.5)
    assert ratio.median == 4.5  # where that of the medians is 4


def test_sums_and_differences_are_taken_round_by_round() -> None:
    one, two = Figure((1.0, 10.0)), Figure((3.0, 4.0))
    assert (one + two).values == (4.0, 14.0)
    assert (one - two).values == (-2.0, 6.0)


@pytest.mark.parametrize("operation", ["__truediv__", "__add__", "__sub__"])
def test_figures_of_different_rounds_do_not_go_together(operation: str) -> None:
    with pytest.raises(ValueError, match="shorter"):
        getattr(Figure((1.0, 2.0)), operation)(Figure((1.0,)))


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1), (0.5, 51), (0.99, 100), (1.0, 100), (0.989, 99), (0.01, 2)]
)
def test_percentile(share: float, value: int) -> None:
    assert percentile([*range(100, 0, -1)], share) == value


def test_a_percentile_of_one_value_is_that_value() -> None:
    assert percentile([7.0], 0.5) == percentile([7.0], 0.99) == 7.0


# Turns


async def test_variants_take_turns_in_an_order_that_turns_around() -> None:
    ran: list[str] = []

    def variant(name: str) -> object:
        async def once() -> dict[str, float]:
            ran.append(name)
            return {"place": float(len(ran)), "one": 1.0}

        return once

    found = await take_turns({name: variant(name) for name in "abc"}, rounds=3)  # type: ignore[arg-type]
    assert "".join(ran) == "abccbaabc"
    assert found["a"]["place"].values == (1.0, 6.0, 7.0)
    assert found["c"]["place"].values == (3.0, 4.0, 9.0)
    assert found["b"]["one"].values == (1.0, 1.0, 1.0)


async def test_a_variant_that_has_not_done_its_work_ends_the_run() -> None:
    async def cheats() -> dict[str, float]:
        raise AssertionError("nothing was evicted")

    with pytest.raises(AssertionError, match="nothing was evicted"):
        await take_turns({"cheats": cheats}, rounds=2)


# Holds and processor time


async def test_a_hold_is_seen_that_ends_without_suspending() -> None:
    with Holds() as holds:
        time.sleep(0.05)
    assert holds.longest >= 0.05


async def test_a_hold_is_seen_between_two_turns() -> None:
    with Holds() as holds:
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(time.sleep, 0.05)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        seen = holds.longest
    assert seen >= 0.05


async def test_waiting_is_no_hold() -> None:
    longest = []
    for _ in range(5):  # of which the machine may spoil some
        with Holds() as holds:
            await asyncio.sleep(0.2)
        longest.append(holds.longest)
    assert 0 < min(longest) < 0.2


BURN = "import time\nwhile time.process_time() < 0.3: pass"


def test_processor_time_counts_descendants_that_have_ended() -> None:
    waits = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used = cpu_seconds(process.pid)
        assert process.stdin is not None
        process.stdin.close()
    assert used >= 0.28
    assert cpu_seconds(process.pid) == 0


def test_processor_time_counts_descendants_that_still_run() -> None:
    burns = f"{BURN}\nprint(flush=True)\ninput()"
    passes_on = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burns!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", passes_on], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used = cpu_seconds(process.pid)
        process.communicate(b"\n")
    assert used >= 0.28


# Reports


@pytest.fixture
def report() -> Report:
    return Report(out=io.StringIO())


def test_targets_hold_by_their_medians(report: Report) -> None:
    figure = Figure((1.0, 2.0, 9.0))
    report.at_most("as much as it may", figure, 2.0)
    report.at_most("too much", figure, 1.9, "ms")
    report.at_least("as much as it must", figure, 2.0)
    report.at_least("too little", figure, 2.1)
    assert report.missed == ["too much", "too little"]
    said = report.out.getvalue().splitlines()
    assert said[0] == "ok     as much as it may: 2 (1–9) x (<= 2 x)"
    assert said[1] == "MISSED too much: 2 (1–9) ms (<= 1.9 ms)"
    assert said[3] == "MISSED too little: 2 (1–9) x (>= 2.1 x)"


def test_a_table_shows_medians_with_their_spread(report: Report) -> None:
    rows = {"cacheinval": [Figure((1.0, 2.0, 3.0)), "all"], "peer": [Figure((12345.6,)), None]}
    report.table("Rates", ["a second", "evicted"], rows, "Of one run.")
    assert (
        report.out.getvalue()
        == """
Rates
                          a second  evicted
cacheinval                 2 (1–3)      all
peer        12,346 (12,346–12,346)        –
Of one run.
"""
    )


def test_everything_is_in_the_json(report: Report, tmp_path: Path) -> None:
    report.table("Rates", ["a second"], {"cacheinval": [Figure((1.0, 2.0, 3.0))], "peer": [None]}, "A note.")
    report.at_most("a target", Figure((4.0, 6.0)), 4.5, "ms")
    report.pictures["scaling"] = {"cacheinval": {1: 2.0}}
    report.write(tmp_path / "found.json", "two cores")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"] == "two cores"
    assert found["tables"] == [
        {
            "title": "Rates",
            "columns": ["a second"],
            "rows": {
                "cacheinval": [{"median": 2.0, "low": 1.0, "high": 3.0, "values": [1.0, 2.0, 3.0]}],
                "peer": [None],
            },
            "note": "A note.",
        }
    ]
    target = {"what": "a target", "limit": 4.5, "at_most": True, "unit": "ms", "holds": False}
    assert found["targets"] == [{**target, "median": 5.0, "low": 4.0, "high": 6.0, "values": [4.0, 6.0]}]
    assert found["pictures"] == {"scaling": {"cacheinval": {"1": 2.0}}}


def test_each_part_says_how_long_it_took(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", iter([10.0, 17.4]).__next__)
    with report.part("N = 4"):
        pass
    assert report.out.getvalue() == "   N = 4: 7 s\n"


# The command


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Two benchmarks in the place of the real ones: `fast` holds its target, `slow` misses it."""
    ran: list[tuple[str, int]] = []
    for name, took in (("fast", 1.0), ("slow", 3.0)):

        async def run(report: Report, rounds: int, name: str = name, took: float = took) -> None:
            ran.append((name, rounds))
            report.at_most(f"{name} is fast", Figure((took,) * rounds), 2.0)

        module = ModuleType(f"benchmarks.{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(command, "BENCHMARKS", {"fast": "", "slow": ""})
    return ran


def test_all_run_unless_some_are_named(ran: list[tuple[str, int]]) -> None:
    command.main([])
    assert ran == [("fast", 5), ("slow", 5)]
    ran.clear()
    command.main(["slow", "--rounds", "2"])
    assert ran == [("slow", 2)]


def test_a_missed_target_is_exit_code_1_and_named(
    ran: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["fast"]) == 0
    assert "1 of 1 targets hold" in capsys.readouterr().out
    assert command.main(["fast", "slow"]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 targets hold" in said
    assert said.splitlines()[-1] == "missed: slow is fast"


def test_the_json_is_written_also_where_a_target_is_missed(
    ran: list[tuple[str, int]], tmp_path: Path
) -> None:
    assert command.main(["slow", "--rounds", "1", "--json", str(tmp_path / "found.json")]) == 1
    (target,) = json.loads((tmp_path / "found.json").read_text())["targets"]
    assert (target["what"], target["holds"], target["values"]) == ("slow is fast", False, [3.0])


def test_an_unknown_name_is_refused(ran: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        command.main(["fast", "hits"])
    assert refused.value.code == 2
    assert "hits: accepted: fast, slow" in capsys.readouterr().err
    assert ran == []


def test_every_benchmark_that_is_there_can_be_named() -> None:
    modules = (REPOSITORY / "tests/benchmarks").glob("*.py")
    assert {
        path.stem for path in modules if "\nasync def run(" in path.read_text()
    } <= command.BENCHMARKS.keys()


def test_make_bench_passes_its_variables_on() -> None:
    asked = ["make", "-n", "bench", "ONLY=hit tags", "ROUNDS=3", "PICTURES=drawn"]
    said = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    words = said.replace("\\\n", " ").split()
    begins = words.index("benchmarks")
    assert words[begins : begins + 7] == [
        *("benchmarks", "hit", "tags", "--rounds", "3", "--json", "../bench.json")
    ]
    assert words[begins + 7 :][:2] == ["--pictures", str(REPOSITORY / "drawn")]


# Pictures


def test_pictures_are_drawn_of_what_was_found(tmp_path: Path) -> None:
    pictures = pytest.importorskip("benchmarks.pictures", reason="matplotlib is in the extra `bench`")
    latencies = {"cacheinval": [0.5, 0.6, 0.7, 0.7], "peer": [3.0, 3.5, 40.0]}
    rates = {"cacheinval": {1: 1000.0, 4: 900.0, 16: 800.0}, "peer": {"1": 90.0, "4": 30.0}}
    drawn = pictures.draw({"latency N = 4": latencies, "scaling": rates}, tmp_path / "new")
    assert [path.name for path in drawn] == ["latency-N-4.svg", "scaling.svg"]
    latency, scaling = (path.read_text() for path in drawn)
    for text in (latency, scaling):
        assert text.count(">cacheinval<") == text.count(">peer<") == 1
    assert ">N = 4" not in scaling
    assert "Latency, N = 4" in latency
    assert ">16<" in scaling
    assert ">40<" in latency  # the p99 of `peer`


def test_the_same_pictures_are_the_same_files(tmp_path: Path) -> None:
    pictures = pytest.importorskip("benchmarks.pictures", reason="matplotlib is in the extra `bench`")
    found = {"latency": {"cacheinval": [1.0, 2.0, 5.0]}}
    one, two = (pictures.draw(found, tmp_path / name)[0].read_bytes() for name in ("one", "two"))
    assert one == two


def test_an_unknown_picture_is_refused(tmp_path: Path) -> None:
    pictures = pytest.importorskip("benchmarks.pictures", reason="matplotlib is in the extra `bench`")
    with pytest.raises(ValueError, match="'heat map': accepted: latency, scaling"):
        pictures.draw({"heat map": {}}, tmp_path)
