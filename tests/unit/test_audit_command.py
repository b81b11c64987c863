"""`cacheinval audit`, and the instances that it asks, in one process: `memory://`."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from waiting import Eventually

import cacheinval.client.parts as parts
from cacheinval import AuditReport, Client, Settings, audit_command, cli, messages
from cacheinval import audit as auditing
from cacheinval.audit import AuditAnswer
from cacheinval.audit_command import audit
from cacheinval.bus import Delivery
from cacheinval.cli import main
from cacheinval.coherence import Eviction
from cacheinval.errors import CacheinvalError
from cacheinval.messages import Audit, encode


class Source:
    """The source of truth; `loads` counts how often it was asked."""

    def __init__(self, value: Any = "true") -> None:
        self.value = value
        self.loads = 0

    async def __call__(self) -> Any:
        self.loads += 1
        return self.value


def settings(namespace: str, name: str, **others: Any) -> Settings:
    return Settings(broker_url="memory://", database_url="", namespace=namespace, instance_id=name, **others)


@pytest.fixture(autouse=True)
def hardly_a_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SUSPECT_AGE", 0.01)


@pytest.fixture
async def instances(namespace: str) -> AsyncIterator[list[Client]]:
    async with Client(settings(namespace, "a")) as a, Client(settings(namespace, "b")) as b:
        await asyncio.gather(a.wait_ready(30), b.wait_ready(30))
        yield [a, b]


@pytest.fixture
async def asker(namespace: str) -> AsyncIterator[Client]:
    async with Client(settings(namespace, "asker"), subscribe=False) as asker:
        yield asker


Ask = Callable[..., Awaitable[tuple[list[str], list[str]]]]


@pytest.fixture
def ask(asker: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Runs the command; what it prints, line by line, and why it failed."""

    async def all_that_are_there() -> list[dict[str, Any]]:
        there = asker.bus.state["sessions"]  # type: ignore[attr-defined]
        bodies = await asker.bus.ask(encode(messages.Ask(v=1)), 10, lambda bodies: len(bodies) == there)
        return [json.loads(body) for body in bodies]

    monkeypatch.setattr(asker, "ask_instances", all_that_are_there)

    async def ask(
        sample: int = 100, delay: float | None = 0.0, wait: float | None = 10.0, as_json: bool = False
    ) -> tuple[list[str], list[str]]:
        problems: list[str] = []
        try:
            await audit(asker, sample, delay, wait, as_json=as_json)
        except CacheinvalError as error:
            problems = str(error).splitlines()
        return capsys.readouterr().out.splitlines(), problems

    return ask


def rows(lines: list[str]) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in lines}


async def poison(client: Client, key: str) -> None:
    await client.cache.get_or_set(key, Source())
    client.cache._backend.look(key).value = "lie"  # type: ignore[attr-defined]


async def test_a_client_audits_itself(instances: list[Client]) -> None:
    (client, _) = instances
    await client.cache.get_or_set("truth", Source())
    await poison(client, "lie")
    report = await client.audit(delay=0)
    assert report == AuditReport(checked=2, consistent=1, inconsistent=1, examples=("lie",))
    status = json.loads(json.dumps(client.status()))["audit"]
    assert (status["loaders"], status["running"], status["last"]["inconsistent"]) == (2, False, 1)
    assert client.stats()["audit"]["checked"] == 2


@pytest.mark.parametrize(
    ("more", "least"), [({}, 0.01), ({"max_staleness": 3.0}, 3.1), ({"max_staleness": 3600.0}, 3600.1)]
)
async def test_an_instance_waits_as_long_as_its_rules_allow(
    namespace: str, more: dict[str, Any], least: float
) -> None:
    state = Client(settings(namespace, "a", **more)).auditor.state
    assert (state["least_delay"], state["delay"]) == (pytest.approx(least), pytest.approx(least + 1))


async def test_every_instance_is_asked_and_the_table_tells(instances: list[Client], ask: Ask) -> None:
    (a, b) = instances
    await a.cache.get_or_set("truth", Source())
    await b.cache.get_or_set("truth", Source())
    assert await ask() == (
        [
            "INSTANCE  CHECKED  CONSISTENT  SETTLING  INCONSISTENT  FAILED  NOTE",
            "a               1           1         0             0       0      ",
            "b               1           1         0             0       0      ",
            "total           2           2         0             0       0      ",
        ],
        [],
    )
    await poison(b, "a key with spaces")
    table, problems = await ask()
    assert rows(table)["b"] == ["2", "1", "0", "1", "0"]
    assert rows(table)["total"] == ["3", "2", "0", "1", "0"]
    assert table[-1] == "inconsistent: 'a key with spaces' in b"
    assert problems == ["inconsistent: 1 of 3 entries"]


async def test_json_has_the_same(instances: list[Client], ask: Ask) -> None:
    await poison(instances[1], "lie")
    async with asyncio.timeout(20):  # it returns with the last report, not when its time is up
        out, problems = await ask(as_json=True, wait=600.0)
    assert problems == ["inconsistent: 1 of 1 entries"]
    zeros = {"checked": 0, "consistent": 0, "settling": 0, "inconsistent": 0, "failed": 0}
    one = zeros | {"checked": 1, "inconsistent": 1}
    assert json.loads("\n".join(out)) == {
        "instances": [
            {"id": "a", "loaders": 0, "busy": False, "examples": []} | zeros,
            {"id": "b", "loaders": 1, "busy": False, "examples": ["lie"]} | one,
        ],
        "missing": [],
        "total": one,
    }


async def test_who_knows_no_loader_or_has_nothing_cached_says_so(instances: list[Client], ask: Ask) -> None:
    (_, b) = instances
    await b.cache.get_or_set("k", Source())
    await b.invalidate(everything=True)
    table, problems = await ask()
    assert rows(table)["a"] == ["0"] * 5 + ["no", "loaders"]
    assert rows(table)["b"] == ["0"] * 5 + ["nothing", "cached"]
    assert problems == []


async def test_instances_that_share_an_id_are_each_heard(
    instances: list[Client], ask: Ask, namespace: str
) -> None:
    async with Client(settings(namespace, "a")) as twin:
        await twin.wait_ready(30)
        await poison(twin, "lie")
        for client in instances:
            await client.cache.get_or_set("truth", Source())
        table, problems = await ask()
        assert [line.split()[0] for line in table[1:4]] == ["a", "a", "b"]
        assert problems == ["inconsistent: 1 of 3 entries"]
        _, problems = await ask(delay=600.0, wait=1.0)
        assert problems == ["no report in time from a"]


async def test_an_invalidation_that_comes_late_is_settling(
    instances: list[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of a write is held back at one instance until that has seen the difference."""
    (a, b) = instances
    source, seen, receive = Source("old"), asyncio.Event(), b.instance._evict

    async def hold_back(eviction: Eviction) -> None:
        await seen.wait()
        await receive(eviction)

    async def load() -> Any:
        if source.value == "new":
            seen.set()
        return source.value

    await b.cache.get_or_set("k", load)
    monkeypatch.setattr(b.instance, "_evict", hold_back)
    source.value = "new"
    await a.invalidate("k")
    assert await b.audit(delay=0.2) == AuditReport(checked=1, settling=1)


async def test_whoever_does_not_report_in_time_is_named(
    instances: list[Client], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, b) = instances
    for client in (a, b):
        await client.cache.get_or_set("truth", Source())
    await poison(b, "lie")  # so that it waits before it accuses
    table, problems = await ask(delay=600.0, wait=1.0)
    assert rows(table)["a"] == ["1", "1", "0", "0", "0"]
    assert rows(table)["b"] == ["-"] * 5 + ["no", "answer"]
    assert problems == ["no report in time from b"]


async def test_the_second_who_asks_finds_it_busy(
    instances: list[Client], ask: Ask, eventually: Eventually
) -> None:
    source = Source()
    await instances[1].cache.get_or_set("lie", source)
    source.value = "changed"
    first = asyncio.create_task(ask(delay=600.0, wait=None))
    await eventually(lambda: instances[1].auditor.state["running"] and source.loads == 2)
    table, problems = await ask()
    assert rows(table)["b"] == ["-"] * 5 + ["busy"]
    assert problems == ["busy with an audit that somebody else asked for: b"]
    first.cancel()
    await asyncio.wait([first])


async def test_a_flood_of_questions_costs_one_audit(
    instances: list[Client], asker: Client, eventually: Eventually
) -> None:
    (a, _) = instances
    release, loads = asyncio.Event(), 0

    async def load() -> str:
        nonlocal loads
        loads += 1
        if loads > 1:
            await release.wait()
        return "true"

    await a.cache.get_or_set("k", load)
    tasks = len(asyncio.all_tasks())
    for _ in range(1_000):
        asker.bus.publish(Delivery(encode(Audit(v=1, sample=10**9)), "nobody"))  # type: ignore[attr-defined]
    await eventually(lambda: a.stats()["receiver"]["messages"] >= 1_000)
    await eventually(lambda: len(asyncio.all_tasks()) < tasks + 10)
    assert (loads, a.auditor.state["running"]) == (2, True)
    release.set()
    await eventually(lambda: not a.auditor.state["running"])
    assert loads == 2


async def test_an_audit_that_fails_is_told_and_the_next_is_made(
    instances: list[Client], ask: Ask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (a, _) = instances
    working = a.auditor.audit

    async def fail(sample: int, delay: float | None) -> AuditReport:
        monkeypatch.setattr(a.auditor, "audit", working)
        raise RuntimeError("a defect")

    monkeypatch.setattr(a.auditor, "audit", fail)
    assert (await ask(wait=1.0))[1] == ["no report in time from a"]
    assert "a defect" in caplog.text
    assert (await ask())[1] == []


async def test_an_audit_under_way_does_not_outlive_its_client(namespace: str, eventually: Eventually) -> None:
    before = asyncio.all_tasks()
    async with Client(settings(namespace, "a")) as client:
        await client.wait_ready(30)
        await poison(client, "lie")
        client.bus.publish(Delivery(encode(Audit(v=1, delay=600)), "nobody"))  # type: ignore[attr-defined]
        await eventually(lambda: client.auditor.state["running"])
    assert asyncio.all_tasks() == before


async def test_a_client_audits_by_itself_if_it_is_asked_to(
    namespace: str, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = asyncio.all_tasks()
    async with Client(settings(namespace, "a", audit_interval=0.01)) as client:
        await client.wait_ready(30)
        client.auditor._delay = 0.01
        await poison(client, "lie")
        await eventually(lambda: client.stats()["audit"]["inconsistent"] >= 2)
        assert client.status()["audit"]["last"]["examples"] == ("lie",)
    assert asyncio.all_tasks() == before
    async with Client(settings(namespace, "b")) as client:
        assert not any("audit" in task.get_name() for task in asyncio.all_tasks())


async def test_answers_that_are_none_are_left_out_and_those_of_latecomers_are_not(
    instances: list[Client], ask: Ask, asker: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [
        b"nonsense",
        b"[]",
        b'{"no":"id"}',
        b'{"id":"late","loaders":1,"report":{"checked":1,"inconsistent":1,"examples":["k"]}}',
        b'{"id":"a","report":{"checked":"x"}}',
    ]

    async def answer(body: bytes, wait: float, enough: Callable[[list[bytes]], bool]) -> list[bytes]:
        for number in range(len(bodies)):
            assert not enough(bodies[: number + 1])
        return bodies

    monkeypatch.setattr(asker.bus, "ask", answer)

    async def statuses() -> list[dict[str, Any]]:
        return [{"id": "a"}]

    monkeypatch.setattr(asker, "ask_instances", statuses)
    table, problems = await ask()
    assert problems == ["no report in time from a", "inconsistent: 1 of 1 entries"]
    assert set(rows(table)) == {"INSTANCE", "late", "total", "a", "inconsistent:"}


def test_how_long_the_reports_may_take() -> None:
    beside = auditing.LOOKS_TAKE + audit_command.PATIENCE
    instances = [
        {"id": "a", "audit": {"delay": 2.0, "least_delay": 1.0}},
        {"id": "b", "audit": {"delay": 6.1, "least_delay": 5.1}},
        {"id": "old"},
    ]
    assert audit_command._longest(instances, None) == 6.1 + beside
    assert audit_command._longest(instances, 0.0) == 5.1 + beside
    assert audit_command._longest(instances, 60.0) == 60 + beside


async def test_it_says_what_it_waits_for(
    instances: list[Client], asker: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    await audit(asker, 1, 0.0, 7.0, as_json=False)
    captured = capsys.readouterr()
    assert captured.err == "cacheinval: waiting for the audit of 2 instances, at most 7 s\n"


async def test_on_a_terminal_it_shows_how_it_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr(audit_command, "QUIET", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said, before = "", asyncio.all_tasks()

    def shown() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "1 of 2 have answered, 0 s" in said

    async with audit_command._progress(["a", "b"], 7.0) as (_, heard):
        heard(1)
        await eventually(shown)
    assert capsys.readouterr().err.endswith("\r\033[K")
    await eventually(lambda: asyncio.all_tasks() == before)


class TestCommand:
    async def test_without_instances_it_fails(
        self, capsys: pytest.CaptureFixture[str], namespace: str
    ) -> None:
        for as_json, printed in (False, ""), (True, '"instances": []'):
            with pytest.raises(CacheinvalError, match=f"^no instance of namespace {namespace} answers$"):
                await cli._audit(settings(namespace, "nobody"), 100, None, None, as_json=as_json)
            assert printed in capsys.readouterr().out

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--sample", "0"],
            ["--sample", "1001"],
            ["--delay", "-1"],
            ["--delay", "601"],
            ["--wait", "0"],
            ["x"],
        ],
    )
    def test_what_no_instance_would_do_is_wrong_use(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["cacheinval", "audit", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2


def test_an_answer_is_small_and_reads_back() -> None:
    import msgspec

    for answer in (
        AuditAnswer(id="a"),
        AuditAnswer(id="a", loaders=3, report=AuditReport(checked=1, inconsistent=1, examples=("k",))),
    ):
        body = msgspec.json.encode(answer)
        assert msgspec.json.decode(body, type=AuditAnswer) == answer
    assert msgspec.json.encode(AuditAnswer(id="a")) == b'{"id":"a"}'
