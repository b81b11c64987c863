"""How findings of `cacheinval doctor` are judged, how its checks are run, and what it prints."""

import asyncio
import json
import re
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cacheinval import Settings, doctor
from cacheinval.coherence.registration import Registered
from cacheinval.doctor import checking, findings, instances
from cacheinval.doctor.checking import Checks
from cacheinval.doctor.findings import Finding, ok
from cacheinval.outbox import leading
from cacheinval.outbox.grants import NEEDED, Right, grants
from cacheinval.overview import Leader
from cacheinval.verdict import causes, remedies
from cacheinval.verdict.reports import understand

URL = "amqp://shop:secret@broker/prod"
ROOT = Path(__file__).parents[2]


def levels(found: list[Finding]) -> list[str]:
    return [one.level for one in found]


def answer(id_: str = "a", **more: Any) -> dict[str, Any]:
    told = {
        "id": id_,
        "host": "h",
        "state": "ready",
        "version": "1",
        "now": 100.0,
        "asked": 99.0,
        "arrived": 101.0,
    }
    return told | {"source": "s", "settings": {"max_staleness": 5.0}, "registration": None} | more


# Settings


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"broker_url": "memory://"}, "memory:// brings nothing from other processes"),
        ({"broker_ca_file": "/ca.pem"}, "CACHEINVAL_BROKER_CA_FILE is set"),
        ({"database_url": ""}, "no database"),
        ({"database_url": "", "max_staleness": 5}, "MAX_STALENESS is set without a database"),
        ({"stale_if_error": 10}, "STALE_IF_ERROR=10"),
        ({"max_clock_skew": 0}, "MAX_CLOCK_SKEW=0"),
    ],
)
def test_settings_that_contradict_each_other(values: dict[str, Any], said: str) -> None:
    found = findings.of_settings(Settings(**{"broker_url": URL, **values}))
    assert set(levels(found)) == {"warning"}
    assert any(one.text.startswith(said) for one in found)
    assert "secret" not in str(found)


def test_settings_that_do_not() -> None:
    assert levels(findings.of_settings(Settings(broker_url=URL, max_staleness=5, stale_if_error=600))) == [
        "ok"
    ]


# The broker


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("ACCESS_REFUSED - Login was refused", "rabbitmqctl authenticate_user shop"),
        ("the broker refuses the vhost: it is missing", "rabbitmqctl add_vhost prod"),
        ("NOT_FOUND - no exchange 'cacheinval.shop' in vhost 'prod'", "whoever subscribes next"),
        (
            "the exchange cacheinval.shop is missing: nobody has subscribed yet (NOT_FOUND - no exchange "
            "'cacheinval.shop' in vhost 'prod')",
            "it is made by whoever subscribes next",
        ),
        (
            "ACCESS_REFUSED - write access to exchange 'x' in vhost 'prod' refused for user 'shop'",
            "grant what is needed",
        ),
        ("NOT_FOUND - home node 'a@b' of durable queue 'q' in vhost 'prod' is down", "start that node"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "CACHEINVAL_BROKER_CA_FILE"),
        (
            "[SSL: WRONG_VERSION_NUMBER] wrong version number",
            "that port speaks no TLS: name the port that does",
        ),
        ("Connection refused", "rabbitmq-diagnostics status"),
        ("Name or service not known", "leads to it from here"),
    ],
)
def test_each_reason_why_the_broker_cannot_be_reached_has_its_way(reason: str, remedy: str) -> None:
    found = findings.of_unreachable_broker(URL.replace("secret", "***"), reason)
    assert found.level == "failed"
    assert remedy in str(found.remedy)


def test_a_port_that_speaks_tls_is_recognised_by_its_number() -> None:
    reset = "Server connection reset: Connection reset by peer"
    assert "use amqps://" in remedies.broker(reset, "amqp://shop:***@broker:5671/")
    assert "use amqps://" in remedies.broker(reset, "amqp://shop:***@one:5671,two:5671/")
    for url in ("amqp://shop:***@broker:5672/", "amqps://shop:***@broker:5671/"):
        assert "rabbitmq-diagnostics status" in remedies.broker(reset, url)


@pytest.mark.parametrize(
    ("vhost", "in_erlang"),
    [
        ("/", '<<"/">>'),
        ("it's", '<<"it\'s">>'),
        ('a"b\\c', r'<<"a\"b\\c">>'),
        ("größe $x", '<<"größe $x"/utf8>>'),
    ],
)
def test_what_is_of_another_type_is_deleted_by_a_command_that_can_be_pasted(
    vhost: str, in_erlang: str
) -> None:
    inequivalent = (
        f"PRECONDITION_FAILED - inequivalent arg 'type' for %s in vhost '{vhost}': received 'fanout'"
    )
    said = remedies.broker(inequivalent % "exchange 'cacheinval.x'", URL)
    expression = f'rabbit_exchange:delete(rabbit_misc:r({in_erlang}, exchange, <<"cacheinval.x">>), false, <<"operator">>).'
    assert shlex.split(said.split("`")[1]) == ["rabbitmqctl", "eval", expression]
    said = remedies.broker(inequivalent % "queue 'cacheinval.x.one'", URL)
    assert shlex.split(said.split("`")[1]) == ["rabbitmqctl", "delete_queue", "-p", vhost, "cacheinval.x.one"]


def test_the_permissions_that_are_recommended_are_those_of_the_definitions() -> None:
    (rights,) = json.loads((ROOT / "config/definitions.json").read_text())["permissions"]
    said = remedies.set_permissions(URL)
    assert said.startswith("`rabbitmqctl set_permissions -p prod shop '")
    assert re.findall(r"'([^']*)'", said) == [rights["configure"], rights["write"], rights["read"]]
    assert "-p / guest " in remedies.set_permissions("amqp://broker")
    assert "-p 'a b' 'c;d' " in remedies.set_permissions("amqp://c%3Bd:***@broker/a%20b")


def test_the_default_vhost_is_there_unless_somebody_deleted_it() -> None:
    said = remedies.broker("the broker refuses the vhost: it is missing", "amqp://shop:***@broker/")
    assert said.startswith("`rabbitmqctl set_permissions -p / shop '")
    assert said.endswith("deleted, `rabbitmqctl add_vhost /` first")


@pytest.mark.parametrize(
    ("reason", "permission"),
    [
        ("access to exchange 'cacheinval.shop.dead' in vhost '/' refused for user 'shop'", "write on cacheinval.shop.dead"),
        ("access to queue 'amq.gen-LhZ' in vhost '/' refused for user 'shop'", "read on amq.gen-…"),
        ("configure access to queue 'amq.gen-LhZ' in vhost '/' refused for user 'shop'", "configure on amq.gen-…"),
        ("refused", "read on the queue or write on the exchange"),
    ],
)  # fmt: skip
def test_the_permission_that_is_missing_is_the_one_that_the_broker_names(
    reason: str, permission: str
) -> None:
    needed = {"queue": "read", "exchange": "write"}
    assert findings.lacking(f"ACCESS_REFUSED - {reason}", needed) == permission


def test_what_follows_from_another_failure_refers_to_it() -> None:
    leader, ticks = findings.of_leader(None, True, 1), instances.of_tick(None, 3, None, None)
    refused = findings.of_refusals(
        URL, {"write on cacheinval.shop": "ACCESS_REFUSED", "write on amq.default": ""}
    )
    clock = findings.of_clock(1.0, 0.1)
    assert refused.text.startswith(
        "write on cacheinval.shop, write on amq.default are not permitted: ACCESS_REFUSED"
    )
    *others, follows = findings.causes_first([refused, clock, ticks])
    assert others == [refused, clock], "what follows from nothing stays"
    assert (follows.level, follows.text, follows.remedy) == (
        "failed",
        f"{ticks.text}; see permissions first",
        None,
    )
    assert findings.causes_first([leader, ticks])[0] == leader
    assert findings.causes_first([leader, ticks])[1].text.endswith("; see leader first")
    assert findings.causes_first([ticks]) == [ticks]
    sentence = findings.warning("ticks", "None.", "wait", ("leader",))
    assert findings.causes_first([leader, sentence])[1].text == "None; see leader first"
    (grants,) = findings.of_rights("shop", [Right("SCHEMA", "cacheinval", ("USAGE",))])
    assert findings.causes_first([grants, leader])[1].text.endswith("; see grants first"), (
        "as a relay here lacks them"
    )
    away = findings.of_unreachable_broker(URL, "refused")
    settled = findings.causes_first([leader, away, ticks])
    assert all(settled[at].text.endswith("; see broker first") for at in (0, 2)), "not what follows itself"


def test_what_whoever_looks_may_not_do_explains_nothing_of_the_others() -> None:
    lacking = [
        findings.of_refusals(URL, {"write on cacheinval.shop": "ACCESS_REFUSED"}),
        *findings.of_rights("shop", [Right("TABLE", "cacheinval.outbox", ("INSERT",))]),
    ]
    said = [
        {"state": "suspect", "reason": "cut"},
        {"registration": {"state": "unregistered", "reason": "lapsed", "session": "x"}},
        {"writing": {"failing": True}},
        {"publisher": {"failing": True}},
        {"relay": {"state": "blocked"}},
        {"relay": {"state": "unready"}},
    ]
    theirs = [
        findings.of_outbox(3, 10.0),
        findings.of_outbox(3, 100.0),
        *judged(
            answer(),
            *(answer(f"b{at}", **one) for at, one in enumerate(said)),
            silent=(Registered("z", "s", None),),
        ),
    ]
    assert len(theirs) == 2 + 1 + len(said) + 1
    assert findings.causes_first([*lacking, *theirs]) == [*lacking, *theirs]


def test_dead_letters() -> None:
    assert findings.of_dead_letters("amqp://broker/shop", "x.dead", 0).level == "ok"
    found = findings.of_dead_letters("amqp://broker/shop", "x.dead", 3)
    assert (found.level, "rabbitmqctl purge_queue -p shop x.dead" in str(found.remedy)) == ("warning", True)


# The database


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ('role "shop" is not permitted to log in', '`ALTER ROLE "shop" LOGIN;`'),
        ('password authentication failed for user "shop"', "correct the password in CACHEINVAL_DATABASE_URL"),
        ('password authentication failed for user "shop"', """`ALTER ROLE "shop" PASSWORD '…';`"""),
        (
            'no pg_hba.conf entry for host "10.0.0.7", user "shop", database "prod", no encryption',
            "`host prod shop 10.0.0.7/32 scram-sha-256` in pg_hba.conf",
        ),
        (
            'no pg_hba.conf entry for host "::1", user "shop", database "prod", SSL encryption',
            "shop ::1/128 scram",
        ),
        (
            'no pg_hba.conf entry for host "[local]", user "a b", database "prod", no encryption',
            '`local prod "a b" scram',
        ),
        (
            'no pg_hba.conf entry for host "10.0.0.7", user "shop", database "prod"',
            "`SELECT pg_reload_conf();`",
        ),
        ("pg_hba.conf rejects connection for host …", "let pg_hba.conf on the server admit it"),
        ('role "shop" does not exist', """`CREATE ROLE "shop" LOGIN PASSWORD '…';`"""),
        ('database "Prod" does not exist', '`CREATE DATABASE "Prod";`'),
        ("too many connections for role", "raise max_connections"),
        ("Connection refused", "pg_isready"),
    ],
)
def test_each_reason_why_the_database_cannot_be_used_has_its_way(reason: str, remedy: str) -> None:
    for said in (reason, f"the database cannot be used: {reason}", f"InvalidPasswordError: {reason}"):
        assert remedy in remedies.database(said)
        assert ("pg_isready" in remedies.database(said)) == (remedy == "pg_isready")


@pytest.mark.parametrize(
    ("offset", "level"), [(0.0, "ok"), (0.04, "ok"), (-0.06, "warning"), (0.11, "failed"), (-5.0, "failed")]
)
def test_clocks(offset: float, level: str) -> None:
    found = findings.of_clock(offset, 0.1)
    assert found.level == level
    assert ("behind" in found.text) == (offset < 0)


@pytest.mark.parametrize(("version", "level"), [(None, "failed"), (1, "failed"), (2, "ok"), (3, "warning")])
def test_the_schema(version: int | None, level: str) -> None:
    found = findings.of_schema(version, 2)
    assert found.level == level
    if level != "ok":
        assert ("upgrade cacheinval" if version == 3 else "cacheinval schema apply") in str(found.remedy)


def test_every_missing_right_is_named_with_its_grant() -> None:
    assert levels(findings.of_rights("shop", [])) == ["ok"]
    found = findings.of_rights("shop", NEEDED)
    assert levels(found) == ["failed"] * len(NEEDED)
    assert 'GRANT SELECT, INSERT, DELETE ON TABLE cacheinval.outbox TO "shop";' in str(found[2].remedy)


@pytest.mark.parametrize("role", ["shop", "Shop Team", 'odd"name', "größe"])
def test_a_role_is_quoted_whatever_its_name(role: str) -> None:
    quoted = '"' + role.replace('"', '""') + '"'
    assert all(statement.endswith(f" TO {quoted};") for statement in grants(role))


@pytest.mark.parametrize("role", ["", "r" * 64, "ü" * 32, "a\0b", "a\nb"])
def test_what_no_role_can_be_called_is_refused(role: str) -> None:
    with pytest.raises(ValueError, match="accepted: the name of a role, 1 to 63 bytes"):
        grants(role)


@pytest.mark.parametrize(
    ("count", "oldest", "level"),
    [(0, None, "ok"), (2, 0.2, "ok"), (2, 6.0, "warning"), (2, 61.0, "failed")],
)
def test_the_outbox(count: int, oldest: float | None, level: str) -> None:
    assert findings.of_outbox(count, oldest).level == level


def test_rows_of_a_namespace_that_nobody_relays() -> None:
    (finding,) = findings.of_strays(["default"], "shop")
    assert finding.level == "warning"
    assert "'default'" in finding.text
    assert "namespace => 'shop'" in str(finding.remedy)
    assert findings.of_strays([], "shop") == []


LEADER = Leader(991, "cacheinval relay vm 6735", "vm", 6735, "10.0.0.7", 1_000_000_000.0, 0.1)


def test_the_leader() -> None:
    found = findings.of_leader(LEADER, True, 1)
    told = "a relay leads: pid 6735 on host vm, connected since 2001-09-09 01:46:40 UTC from 10.0.0.7 (server process 991)"
    assert found == ok("leader", told)
    assert findings.of_leader(Leader(991, "shop"), True, 1).text == "a relay leads: shop, server process 991"
    hangs = findings.of_leader(replace(LEADER, quiet=3.2), True, 1)
    assert (hangs.level, hangs.text.startswith(told)) == ("warning", True)
    assert "has said nothing to the database for 3 s" in hangs.text
    assert "server process (991)" in str(hangs.remedy)
    assert findings.of_leader(None, True, 1).level == "failed"
    assert "CACHEINVAL_RELAY=off" in findings.of_leader(None, False, 1).text


@pytest.mark.parametrize(("host", "told"), [("vm", "vm"), ("größe 1", "gr??e-1"), ("h" * 80, "h" * 41)])
def test_a_session_is_named_after_its_process(host: str, told: str) -> None:
    row = {"leader": 991, "leader_address": None, "leader_since": None, "leader_quiet": None}
    name = leading.session_name(host, 6735)
    assert len(name.encode()) <= 63
    leader = leading.leader_in(row | {"leader_name": name})
    assert (leader and (leader.host, leader.pid)) == (told, 6735)
    older = leading.leader_in(row | {"leader_name": "cacheinval relay shop"})
    assert str(older) == "cacheinval relay shop, server process 991"


def test_tracked_tables() -> None:
    assert findings.of_tracking([], [], 0) == [ok("tracked tables", "none")]
    assert levels(findings.of_tracking(["orders"], ["orders_2"], 3)) == ["failed", "failed"]


def test_tables_are_not_known_to_have_been_tracked_in_a_schema_that_was_made_anew() -> None:
    gap = {"at": 1.0, "reason": "the schema cacheinval was made anew"}
    those = instances.who_met_another_schema(
        [answer("a", last_gap=gap), answer("b"), answer("c", relay="odd")]
    )
    assert those == ["a"]
    none, others = findings.of_tracking([], [], 0), [ok("leader", "x")]
    (found,) = findings.tracking_doubted(none, those, "shop")
    assert (found.check, found.level) == ("tracked tables", "warning")
    assert found.text.startswith("none; but a met another schema cacheinval than before")
    assert "`SELECT cacheinval.track('TABLE', 'TEMPLATE', namespace => 'shop');`" in str(found.remedy)
    assert "`cacheinval invalidate --all`" in str(found.remedy)
    (again,) = findings.tracking_doubted(findings.of_tracking([], [], 3), those, "shop")
    assert (again.level, again.text.startswith("3 are complete; ")) == ("ok", True)
    gone = findings.of_tracking(["orders"], [], 3)
    assert findings.tracking_doubted([*others, *gone], those, "shop") == [*others, *gone], (
        "which says what to do"
    )
    assert findings.tracking_doubted(none, [], "shop") == none


# Ticks and instances


def test_ticks() -> None:
    assert instances.of_tick(0.2, 3.0, "s", "s").level == "ok"
    assert instances.of_tick(0.2, 3.0, None, "s").level == "ok"
    assert instances.of_tick(None, 3.0, None, "s").level == "failed"
    missing = instances.of_tick(None, 3.0, None, "s", LEADER)
    assert str(missing.remedy).startswith(
        "the relay that leads (pid 6735 on host vm) sends none: see its page at /"
    )
    late = instances.of_tick(60.0, 3.0, "s", "s")
    assert (late.level, "60.0 s ago" in late.text) == ("warning", True)
    other = instances.of_tick(0.2, 3.0, "theirs", "mine")
    assert (other.level, "theirs" in other.text) == ("failed", True)


def judged(*answers: dict[str, Any], silent: tuple[Registered, ...] = ()) -> list[Finding]:
    return instances.of_instances(answers, silent, "shop", 0.1)


def test_instances_that_are_well() -> None:
    assert levels(judged(answer(), answer("b"))) == ["ok"]


@pytest.mark.parametrize(
    ("more", "level", "said"),
    [
        ({"state": "suspect", "reason": "cut"}, "warning", "b is suspect: cut"),
        ({"version": "2"}, "warning", "they differ in version (1: a; 2: b)"),
        ({"source": "other"}, "failed", "they differ in source (other: b; s: a)"),
        ({"settings": {"max_staleness": None}}, "warning", "they differ in max_staleness (5.0: a; None: b)"),
        ({"queue_depth": 1001}, "warning", "1001 messages wait for b"),
        ({"tick_refused": "a tick from the future"}, "warning", "b believes no tick: a tick from the future"),
        (
            {"registration": {"state": "unregistered", "reason": "lapsed", "session": "x"}},
            "warning",
            "b is not registered, and no writer waits for it: lapsed",
        ),
        (
            {
                "writing": {
                    "failing": True,
                    "reason": "permission denied for table outbox; a role that writes needs",
                }
            },
            "warning",
            "b cannot write: permission denied for table outbox",
        ),
        ({"publisher": {"failing": True}}, "warning", "b cannot publish"),
        ({"relay": {"state": "blocked", "reason": "refused"}}, "warning", "b cannot relay: refused"),
        ({"now": 101.2}, "failed", "b: its clock is at least 0.200 s ahead"),
        ({"now": 98.5}, "failed", "b: its clock is at least 0.500 s behind"),
    ],
)
def test_instances_that_are_not(more: dict[str, Any], level: str, said: str) -> None:
    (found,) = (one for one in judged(answer(), answer("b", **more)) if one.level != "ok")
    assert found.level == level
    assert found.text.startswith(said)


FAILED = "the redis cache failed: ConnectionError Error 111 connecting to cache:6379"


@pytest.mark.parametrize(
    "told",
    [
        {"state": "suspect", "reason": f"eviction failed: {FAILED}"},
        {"state": "starting", "broker": {"consumer": "connecting", "reason": FAILED}},
    ],
)
def test_a_cache_server_that_is_away_is_named_by_its_address(told: dict[str, Any]) -> None:
    """Whoever looks may have no CACHEINVAL_CACHE_URL, and none of the checks of a cache."""
    away = answer("b", **told)
    for url, where in (
        ("redis://shop:***@cache:6379/0", "at redis://shop:***@cache:6379/0"),
        ("memory://", "of b"),
    ):
        (found,) = (one for one in judged(answer(), away | {"cache": {"url": url}}) if one.level != "ok")
        assert found.text.startswith(f"b is {told['state']}, it cannot use the cache server {where}: ")
        assert found.text.endswith(FAILED)
        assert found.remedy == f"see that the cache server {where} runs and can be reached from h"
        report = understand(away | {"cache": {"url": url}})
        assert report is not None
        assert causes.of_suspect(report)[0] == found.remedy
        assert "broker" not in str(report.why)


def test_an_older_version_tells_less_and_is_not_accused_of_it() -> None:
    older = {"id": "b", "host": "h", "state": "ready", "version": "1", "asked": 99.0, "arrived": 101.0}
    assert levels(judged(answer(), older)) == ["ok"]


@pytest.mark.parametrize(
    "odd",
    [
        {"settings": "many"},
        {"relay": "leader"},
        {"queue_depth": "deep"},
        {"now": "noon"},
        {"now": float("nan")},
        {"registration": [], "state": None},
        {"publisher": []},
    ],
)
def test_an_odd_answer_hides_no_other(odd: dict[str, Any]) -> None:
    found = judged(answer(), answer("b", **odd), answer("c", state="suspect", reason="cut"))
    assert levels(found) == ["ok", "warning", "warning"]
    assert {one.text for one in found[1:]} == {
        "b answers what cannot be understood: how it is is unknown",
        "c is suspect: cut",
    }


def test_nobody_and_who_is_silent() -> None:
    assert levels(judged()) == ["warning"]
    found = judged(answer(), silent=(Registered("b", "s", None),))
    assert levels(found) == ["ok", "failed"]
    assert found[1].text.startswith("b is registered and silent")
    found = judged(silent=(Registered("a", "s", None), Registered("b", "s", None)))
    assert levels(found) == ["failed"] * 3
    assert found[0].text.startswith("nobody answers, of 2 registered: the broker or the virtual host here")
    assert found[1].text.startswith("a is registered and silent")


# Running them


def test_what_is_reported_is_not_said_to_be_unchecked() -> None:
    checks = Checks()
    checks.add(findings.of_refusals(URL, {"configure on cacheinval.shop": "ACCESS_REFUSED"}))
    checks.not_checked(("permissions", "ticks", "instances"), ("permissions",))
    checks.not_checked(("permissions",), ("permissions",))
    said = [(one.check, one.text) for one in findings.causes_first(checks.found)[1:]]
    assert said == [("not checked", "ticks, instances; see permissions first")]


async def test_a_check_that_hangs_or_raises_stops_no_other() -> None:
    checks = Checks()

    async def hangs() -> Finding:
        await asyncio.Event().wait()
        raise AssertionError

    async def breaks() -> Finding:
        raise ZeroDivisionError("by\nzero")

    async def passes() -> Finding:
        return ok("fine", "it is")

    assert not await checks.run("hangs", 0.01, hangs)
    assert not await checks.run("breaks", 5, breaks)
    assert await checks.run("fine", 5, passes)
    assert [(one.check, one.level) for one in checks.found] == [
        ("hangs", "failed"),
        ("breaks", "failed"),
        ("fine", "ok"),
    ]
    assert checks.found[0].text == "no answer within 0.01 s"
    assert checks.found[1].text == "ZeroDivisionError: by zero"


async def test_a_check_that_cannot_be_cancelled_is_left_to_itself() -> None:
    """As is what waits for room to write to a connection that is dead."""
    over = asyncio.Event()

    async def clings() -> Finding:
        while not over.is_set():
            with suppress(asyncio.CancelledError):
                await over.wait()
        raise ZeroDivisionError

    checks = Checks()
    async with asyncio.timeout(30):
        assert not await checks.run("clings", 0.01, clings)
    assert checks.found[0].text == "no answer within 0.01 s"
    over.set()
    await asyncio.sleep(0)


async def test_what_takes_long_is_said_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checking, "QUIET", 0.0)
    checks, others = Checks(), Checks()
    said = ""

    async def until_it_is_said() -> list[Finding]:
        nonlocal said
        while not said:
            await asyncio.sleep(0.001)
            said = capsys.readouterr().err
        return []

    async with checks.progress_of(others):
        assert await others.run("outbox", 10, until_it_is_said)
    assert said == "cacheinval: checking outbox …\n"


@pytest.mark.parametrize("as_json", [False, True])
async def test_it_prints_what_it_finds_and_returns_whether_all_is_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    found = [ok("broker", "there"), findings.failed("outbox", "old", "relay it")]

    async def examine(settings: Settings) -> list[Finding]:
        return found

    monkeypatch.setattr(doctor, "examine", examine)
    assert not await doctor.doctor(Settings(), as_json=as_json)
    out = capsys.readouterr().out
    if as_json:
        told = json.loads(out)
        assert told["count"] == {"ok": 1, "warning": 0, "failed": 1}
        assert told["findings"][1] == {
            "check": "outbox",
            "level": "failed",
            "text": "old",
            "remedy": "relay it",
        }
    else:
        assert out.splitlines() == ["ok      broker  there", "failed  outbox  old", " " * 16 + "→ relay it"]
    del found[1]
    assert await doctor.doctor(Settings(), as_json=as_json)
