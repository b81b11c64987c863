"""`cacheinval status`: what its table says, once, again and again, and where something cannot be found out."""

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from rich.console import Console
from waiting import Eventually

from cacheinval import Client, Settings, status_command
from cacheinval.coherence.registration import Registered
from cacheinval.errors import DatabaseError, PublishError, SchemaMissingError
from cacheinval.fleet import silent_among
from cacheinval.overview import Overview
from cacheinval.status_command import ago, status, watch
from cacheinval.verdict import Fleet

Answer = dict[str, Any]

READY: Answer = {
    "id": "shop-1",
    "host": "left",
    "version": "0.1.0",
    "state": "ready",
    "reason": None,
    "now": 1000.0,
    "watermark_age": 0.74,
    "queue_depth": 3,
    "hit_ratio": 0.975,
    "last_gap": {"at": 865.0, "reason": "missing messages"},
    "counters": {"cache": {"evicted_entries": 12}},
}
OF_AN_OLDER_VERSION: Answer = {
    "id": "shop-0",
    "host": "right",
    "version": "0.0.9",
    "state": "suspect",
    "reason": "silence",
}
NOT_ASKED = "registered in the database, and nobody could be asked"


class Asked:
    """What the instances answer; where it is an error, that is raised."""

    def __init__(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[Answer] | Exception = []
        self.overview: Overview | Exception = Overview()
        self.times = 0
        monkeypatch.setattr(client, "ask_instances", self._ask)
        monkeypatch.setattr(client.outlook, "overview", self._look)

    async def _ask(self, wait: float = 1.0) -> list[Answer]:
        self.times += 1
        if isinstance(self.answers, Exception):
            raise self.answers
        return list(self.answers)

    async def _look(self) -> Overview:
        if isinstance(self.overview, Exception):
            raise self.overview
        return self.overview


class Clock:
    """In place of the module `time`."""

    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        return self.now


@pytest.fixture
async def client(namespace: str) -> AsyncIterator[Client]:
    settings = Settings(broker_url="memory://", database_url="", namespace=namespace)
    async with Client(settings, subscribe=False) as client:
        yield client


@pytest.fixture
def asked(client: Client, monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(client, monkeypatch)


def table(out: str) -> list[str]:
    """The lines of the table, below the verdict."""
    lines = out.splitlines()
    return lines[next(at for at, line in enumerate(lines) if line.startswith("INSTANCE ")) :]


Said = Callable[[], tuple[str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: tuple(capsys.readouterr())


async def test_the_table_says_how_each_one_is(client: Client, asked: Asked, said: Said) -> None:
    asked.answers = [READY, OF_AN_OLDER_VERSION]
    await status(client, as_json=False)
    out, err = said()
    header, older, ready = table(out)
    assert err == ""
    for title, value in {
        "INSTANCE": "shop-1",
        "HOST": "left",
        "VERSION": "0.1.0",
        "STATE": "ready",
        "LAST GAP": "2 min ago: missing messages",
    }.items():
        assert ready.startswith(value, header.index(title)), title
    assert ready.split()[4:9] == ["0.7", "s", "3", "97.5%", "12"]
    # What an older version does not tell is not made up.
    assert older.split() == ["shop-0", "right", "0.0.9", "suspect", "-", "-", "-", "-", "-", "silence"]


async def test_a_tick_that_is_not_believed_is_a_reason_also_while_it_is_ready(
    client: Client, asked: Asked, said: Said
) -> None:
    asked.answers = [READY | {"tick_refused": "a tick from the future"}]
    await status(client, as_json=False)
    assert table(said()[0])[1].endswith("  a tick from the future")


async def test_who_is_registered_and_does_not_answer_is_silent(
    client: Client, asked: Asked, said: Said
) -> None:
    asked.answers = [READY]
    starting = Registered("shop-9", "s", None)  # of which no answer can be expected yet
    registered = Registered("shop-0", "s", None)
    asked.overview = Overview([registered, starting], [registered])
    await status(client, as_json=False)
    out = said()[0]
    assert out.startswith("shop-0 does not answer: it may be stale, cut off, or gone.\n")
    _, silent, ready = table(out)
    assert silent.split()[:4] == ["shop-0", "-", "-", "silent"]
    assert silent.endswith("registered in the database, and does not answer")
    assert ready.startswith("shop-1")
    await status(client, as_json=True)
    told = json.loads(said()[0])
    assert told["verdict"]["level"] == "bad"
    instances = told["instances"]
    assert [one["state"] for one in instances] == ["silent", "ready"]
    assert {"id", "host", "version", "state", "watermark_age"} <= set(instances[0])


@pytest.mark.parametrize(
    "odd",
    [
        {"watermark_age": "1", "hit_ratio": "n/a"},
        {"watermark_age": 10**400},
        {"counters": [1]},
        {"counters": {"cache": [1]}},
        {"last_gap": {"reason": "x"}},
        {"last_gap": "x"},
        {"now": None},
        {"registration": "on"},
        {"registration": {"session": ["x"]}},
        {"id": ["a"]},
    ],
)
async def test_an_odd_answer_hides_no_other(client: Client, asked: Asked, said: Said, odd: Answer) -> None:
    asked.answers = [READY | odd, OF_AN_OLDER_VERSION]
    asked.overview = Overview([one := Registered("shop-9", "s", None)], [one])
    await status(client, as_json=False)
    out = said()[0]
    assert out.startswith("shop-0 may be stale: silence.\n")  # since when it does not tell
    assert len(table(out)) == 4


def test_who_answers_is_told_from_who_is_silent_by_its_session() -> None:
    answered = [
        {"id": "a", "registration": {"session": "one"}},
        {"id": "without a database", "registration": None},
    ]
    registered = [Registered("a", "one", 1.0), Registered("a", "two", 1.0), Registered("b", "", None)]
    assert [one["id"] for one in silent_among(registered, answered)] == ["a", "b"]
    assert silent_among([Registered("without a database", "x", None)], answered) == []


async def test_a_database_that_is_away_is_told_beside_what_is_known(
    client: Client, asked: Asked, said: Said
) -> None:
    asked.answers, asked.overview = [READY], DatabaseError("refused")
    await status(client, as_json=True)
    out, err = said()
    told = json.loads(out)
    assert [one["id"] for one in told["instances"]] == ["shop-1"]
    assert told["verdict"]["level"] == "warning"
    assert told["verdict"]["sentence"].endswith("whether there are more is unknown: refused.")
    assert "Postgres runs" in told["verdict"]["todo"][0]
    asked.overview = SchemaMissingError()
    await status(client, as_json=False)
    assert "→ Run `cacheinval schema apply`" in said()[0]
    assert err == ""


async def test_where_nothing_is_wrong_one_line_says_so(client: Client, asked: Asked, said: Said) -> None:
    asked.answers = [READY | {"relay": {"state": "leader"}}]
    await status(client, as_json=False)
    out = said()[0]
    assert out.startswith("The one instance is fresh: proven up to 0.7 s ago.\nINSTANCE ")
    assert len(out.splitlines()) == 3


async def test_what_is_wrong_comes_with_what_to_do(client: Client, asked: Asked, said: Said) -> None:
    broker = {"url": "amqp://shop:***@broker/prod", "consumer": "connecting", "reason": "Connection refused"}
    asked.answers = [READY, OF_AN_OLDER_VERSION | {"since": 1_795_391_943.5, "broker": broker}]
    await status(client, as_json=False)
    first, second, *steps = said()[0].split("INSTANCE")[0].splitlines()
    assert first == "shop-0 may be stale since 23:59:03: the broker cannot be reached (Connection refused)."
    assert second.startswith("Meanwhile it reads the database")
    assert steps[0].startswith(
        "→ See that RabbitMQ runs (`rabbitmq-diagnostics status`), and that CACHEINVAL_BROKER_URL"
    )


async def test_answers_are_dated_when_they_arrive(
    client: Client, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database may take seconds to be looked at, after that."""
    fleet, looked_at = Fleet(None), []

    async def look() -> Overview:
        looked_at.append(time.time())
        return Overview()

    monkeypatch.setattr(client.outlook, "overview", look)
    asked.answers = [READY]
    await status_command._look(client, fleet, 1.0)
    (member,) = fleet
    assert member.heard_at is not None
    assert member.heard_at <= looked_at[0]


async def test_nobody_and_a_broker_that_is_away(client: Client, asked: Asked, said: Said) -> None:
    assert await status(client, as_json=False)
    assert said()[0].startswith(f"No instance of namespace {client.settings.namespace} answers.\n")
    asked.answers = PublishError("the broker cannot be reached: Connection refused")
    asked.overview = Overview([one := Registered("shop-0", "s", None)], [one])
    for as_json in (False, True):
        assert not await status(client, as_json=as_json)
    out, err = said()
    assert err == "", "it is said once"
    told, _, rest = out.partition("{")
    assert told.startswith(
        "Nobody can be asked from here: the broker cannot be reached: Connection refused.\n"
    )
    assert table(told)[1].split() == f"shop-0 - - not asked - - - - - {NOT_ASKED}".split()
    assert "How it is with 1 instance is unknown." in told
    assert "→ See that RabbitMQ runs" in told
    told_as_json = json.loads("{" + rest)
    assert told_as_json["verdict"]["level"] == "bad"
    (one_told,) = told_as_json["instances"]
    assert (one_told["id"], one_told["state"], one_told["reason"]) == ("shop-0", "not asked", NOT_ASKED)
    asked.overview = DatabaseError("refused")
    assert not await status(client, as_json=True)
    assert json.loads(said()[0])["instances"] is None, "of nobody anything is known"


async def test_what_others_say_at_length_is_cut_in_the_table_alone(
    client: Client, asked: Asked, said: Said
) -> None:
    gap = {"at": 865.0, "reason": "subscription lost: " + 250 * "x"}
    asked.answers = [READY | {"last_gap": gap}]
    await status(client, as_json=False)
    assert table(said()[0])[1].rstrip().endswith(f"2 min ago: subscription lost: {100 * 'x'}…")
    await status(client, as_json=True)
    assert json.loads(said()[0])["instances"][0]["last_gap"] == gap


async def test_where_nobody_answers_whoever_asks_may_be_elsewhere(
    client: Client, asked: Asked, said: Said
) -> None:
    registered = [Registered("shop-0", "a", None), Registered("shop-1", "b", None)]
    asked.overview = Overview(registered, registered)
    await status(client, as_json=False)
    said_first = said()[0].splitlines()
    assert said_first[0] == (
        "shop-0, shop-1 (2 of 2 instances) do not answer: this process may use another broker or virtual host than they; "
        "else they may be stale, cut off, or gone."
    )
    assert said_first[2] == "→ Compare CACHEINVAL_BROKER_URL here with that of shop-0."
    assert said_first[3].startswith("→ See whether its process runs")
    asked.answers = [{"id": "shop-9", "state": ["of another version"]}]
    await status(client, as_json=False)
    assert said()[0].startswith("shop-0, shop-1 (2 of 2 instances) do not answer: they may be stale")
    asked.answers = [READY | {"registration": {"session": "b"}}]
    await status(client, as_json=False)
    assert said()[0].startswith("shop-0 does not answer: it may be stale")


async def test_watching_knows_of_those_that_answer_no_more(
    client: Client, asked: Asked, said: Said, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a database nobody else knows that there should be one."""
    monkeypatch.setattr(status_command, "SILENT_AFTER", 0.2)
    monkeypatch.setattr(client.outlook, "overview", None)
    asked.answers = [READY, READY | {"id": "shop-2"}]
    watching = asyncio.create_task(watch(client, 0.01, as_json=True))
    await eventually(lambda: asked.times > 1)
    asked.answers = [READY]
    seen: list[str] = []

    def is_named() -> bool:
        seen.extend(json.loads(line)["verdict"]["sentence"] for line in said()[0].splitlines())
        return seen[-1].startswith("shop-2 has not answered since")

    await eventually(is_named)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching


async def test_the_table_calls_nobody_silent_before_the_verdict_does(
    client: Client, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, now = Fleet(None), time.time()
    monkeypatch.setattr(status_command, "time", clock := Clock(now))
    asked.overview = Overview([one := Registered("shop-1", "", None)], [one])
    for later, answers, state in ((0.0, [READY], "ready"), (1.0, [], "unknown"), (9.0, [], "silent")):
        clock.now, asked.answers = now + later, answers
        look = await status_command._look(client, fleet, 1.0)
        assert [told["state"] for told in look.instances] == [state]
        if state == "unknown":
            assert look.instances[0]["reason"] == "registered in the database, and has not answered just now"
        assert ("has not answered since" in look.verdict.sentence) == (state == "silent")


async def test_watching_goes_on_without_the_broker(
    client: Client, asked: Asked, said: Said, eventually: Eventually
) -> None:
    asked.answers = PublishError("the broker cannot be reached")
    watching = asyncio.create_task(watch(client, 0.01, as_json=True))
    await eventually(lambda: asked.times > 1)
    asked.answers = [READY]
    seen = asked.times + 1
    await eventually(lambda: asked.times > seen)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    looks = [json.loads(line) for line in said()[0].splitlines()]
    assert (looks[0]["instances"], looks[0]["problem"]) == (None, "the broker cannot be reached")
    assert [one["id"] for one in looks[-1]["instances"]] == ["shop-1"]
    assert looks[-1]["problem"] is None
    assert [look["at"] for look in looks] == sorted(look["at"] for look in looks)


@pytest.mark.parametrize("terminal", [False, True])
async def test_watching_appends_where_it_is_piped_and_stays_in_place_on_a_terminal(
    client: Client, asked: Asked, monkeypatch: pytest.MonkeyPatch, eventually: Eventually, terminal: bool
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=200, highlight=False)
    monkeypatch.setattr(status_command, "_console", lambda: console)
    asked.answers = [READY]
    watching = asyncio.create_task(watch(client, 0.01, as_json=False))
    await eventually(lambda: screen.getvalue().count("shop-1") >= 3)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    up = "\x1b[1A"  # moves to the line above
    assert (up in screen.getvalue()) == terminal
    if terminal:
        assert "\x1b[?25l" in screen.getvalue()  # hides the cursor
        assert screen.getvalue().rstrip().endswith("\x1b[?25h")  # and gives it back


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-0.2, "0 s"), (0.4, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (200_000, "2 d")],
)
def test_durations_are_told_in_the_largest_unit(seconds: float, text: str) -> None:
    assert ago(seconds) == text


# What the instances tell


async def test_an_instance_tells_its_hit_ratio_its_last_gap_and_its_own_time(
    namespace: str, eventually: Eventually
) -> None:
    async def load() -> int:
        return 1

    settings = Settings(broker_url="memory://", database_url="", namespace=namespace, max_staleness=9.0)
    async with Client(settings) as client:
        await client.wait_ready(30)
        assert (client.status()["hit_ratio"], client.status()["last_gap"]) == (None, None)
        for _ in range(4):
            await client.cache.get_or_set("k", load)
        client.instance.lost("cut")
        client._subscriber.resubscribe("cut")
        await eventually(lambda: client.ready)
        told = client.status()
        assert told["hit_ratio"] == 0.75
        assert told["last_gap"]["reason"] == "new subscription: cut"
        assert told["started_at"] <= told["last_gap"]["at"] <= told["now"]
        assert told["settings"]["max_staleness"] == 9.0
