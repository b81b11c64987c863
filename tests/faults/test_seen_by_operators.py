"""What an operator sees of each fault: `doctor`, `status` and the page name it, and say what to do in the same words."""

import asyncio
import html
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import asyncpg
import httpx
import pytest
import typer
from aio_pika import ExchangeType
from clocks import WrongClock, shifted
from scene import EVENTUAL, Clients, Eventually, Program, Programs, operating

from cacheinval import Client, Settings, cli, receiver, status_command
from cacheinval.bus import receiving
from cacheinval.doctor import broker, examine
from cacheinval.errors import DatabaseError
from cacheinval.outbox import apply_schema, relay
from cacheinval.outbox.grants import grants
from cacheinval.page import Page, watching
from cacheinval.sandbox import RabbitMQ, Redis
from cacheinval.verdict import member

pytest_plugins = ("scene",)

pytestmark = pytest.mark.timeout(180)  # of which nearly all is for a broker to start where others are busy

DB = asyncpg.Connection
TICK = 0.2
SHOWN = "SHOW_WORDS" in os.environ
"""Whether the words are printed, for whoever wants to read them."""

WELL = r"(The one instance is|All \d instances are) fresh: proven up to"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is right because it was waited for: whoever looks too early looks again."""
    monkeypatch.setattr(broker, "ANSWERS_WITHIN", 0.3)
    monkeypatch.setattr(status_command, "ANSWER_WITHIN", 0.3)
    monkeypatch.setattr(member, "LATE", 0.5)
    monkeypatch.setattr(watching, "INTERVAL", 0.3)
    monkeypatch.setattr(watching, "COUNT_EVERY", 0.3)
    monkeypatch.setattr(relay, "PAUSES", (0.2, 0.4))
    monkeypatch.setattr(receiving, "LONGEST_PAUSE", 0.4)


@dataclass
class Scene:
    """Instances, servers, and whoever looks at them."""

    settings: dict[str, Any]
    rabbitmq: RabbitMQ
    db: DB
    clients: Clients
    programs: Programs
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    eventually: Eventually
    seen_from: Client | None = None
    shown: Page | None = None
    finally_: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def instance(self, **more: Any) -> Client:
        """Another instance, in this process; by default it relays."""
        return await self.clients(**{**self.settings, "relay": "auto", **more})

    def program(self, command: str, **more: Any) -> Program:
        """A `cacheinval` process."""
        return self.programs("-m", "cacheinval", command, **{**self.settings, **more})

    async def begin(self, **more: Any) -> None:
        """Starts `shop-1`, whose page is seen, and waits until it is proven to be fresh."""
        client = self.seen_from = await self.instance(instance_id="shop-1", **more)
        await self.eventually(lambda: client.ready and client.watermark_age is not None, EVENTUAL)
        await self.has_been_there("shop-1")

    async def has_been_there(self, id_: str) -> None:
        """Makes it one that registered a minute ago: of one that has only just done so nobody expects an answer."""
        known = (
            "UPDATE cacheinval.instances SET since = now() - interval '1 min' WHERE id = $1 RETURNING true"
        )
        await self.eventually(lambda: self.db.fetchval(known, id_), EVENTUAL)

    async def doctor(self) -> str:
        """What the doctor finds, but what is well."""
        found = await examine(Settings(**self.settings))
        unchecked = [one.text.partition(";")[0].split(", ") for one in found if one.check == "not checked"]
        reported = {one.check for one in found}
        assert all(map(reported.isdisjoint, unchecked)), "nothing is reported that was not looked at"
        return "\n".join(
            f"{one.check} {one.level}: {one.text}" + (f" → {one.remedy}" if one.remedy else "")
            for one in found
            if one.level != "ok"
        )

    async def status(self) -> str:
        """What `cacheinval status` prints; where nobody can be asked, it ends with 1 besides."""
        self.capsys.readouterr()
        with suppress(typer.Exit):
            await cli._status(Settings(**self.settings), None, as_json=False)
        return self.capsys.readouterr().out

    async def page(self) -> str:
        """What the page shows, as it is sent first."""
        assert self.seen_from is not None
        self.shown = self.shown or Page(self.seen_from.outlook)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(self.shown), base_url="http://one"
        ) as http:
            answer = await http.get("/")
        text = re.sub(r"<[^>]*>", " ", re.sub(r"</?(span|b|bdi|code|time)\b[^>]*>", "", answer.text))
        return " ".join(html.unescape(text).split())

    async def sees(self, words: "Words") -> None:
        """Waits until each of the three has found it, and says what to do."""
        for place in ("doctor", "status", "page"):
            wanted = [
                re.compile(one, re.IGNORECASE | re.MULTILINE) for one in (getattr(words, place), words.remedy)
            ]
            told = await self._tells(place, *wanted)
            if SHOWN:
                print(f"--- {place}\n{told}", file=sys.__stdout__)

    async def is_well(self) -> None:
        """Waits until each of the three says so."""
        for place, wanted in (("doctor", r"\A(?![^$]* failed: )"), ("status", rf"\A{WELL}"), ("page", WELL)):
            await self._tells(place, re.compile(wanted))

    async def _tells(self, place: str, *wanted: re.Pattern[str], never: str | None = None) -> str:
        """What is told there, as soon as it has all that is wanted; `never` is not told on the way there either."""
        told, wrong = "", list[str]()

        async def is_told() -> bool:
            nonlocal told
            told = await getattr(self, place)()
            if never is not None and re.search(never, told):
                wrong.append(told)
            return all(one.search(told) for one in wanted)

        await self.eventually(is_told, EVENTUAL, describe=lambda: f"{place}: {told}")
        assert not wrong, wrong[0]
        return told

    async def close(self) -> None:
        if self.shown is not None:
            await self.shown.close()
        await self.finally_.aclose()


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[DB]:
    connection = await asyncpg.connect(database_url, timeout=30, command_timeout=30)
    await apply_schema(connection)
    yield connection
    connection.terminate()


@pytest.fixture
async def scene(
    request: pytest.FixtureRequest,
    database_url: str,
    namespace: str,
    db: DB,
    clients: Clients,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    eventually: Eventually,
) -> AsyncIterator[Scene]:
    fault: Fault | None = getattr(request, "param", None)
    rabbitmq = request.getfixturevalue(
        "own_rabbitmq" if fault is not None and fault.own_broker else "rabbitmq"
    )
    settings = {
        "broker_url": rabbitmq.url,
        "database_url": database_url,
        "namespace": namespace,
        "tick_interval": TICK,
        "publish_timeout": 1,
    }
    scene = Scene(settings, rabbitmq, db, clients, programs, monkeypatch, capsys, eventually)
    yield scene
    await scene.close()


# The faults


@dataclass(frozen=True)
class Words:
    """What the three say, as patterns; and the remedy, which is the same in all."""

    doctor: str
    status: str
    page: str
    remedy: str


Cause = Callable[[Scene], AbstractAsyncContextManager[None]]


@dataclass(frozen=True)
class Fault:
    """Within `cause` there is a fault, that of nothing else; it begins with an instance `shop-1`, whose page is seen."""

    cause: Cause
    words: Words
    own_broker: bool = False


@asynccontextmanager
async def broker_killed(scene: Scene) -> AsyncIterator[None]:
    await scene.begin()
    await scene.rabbitmq.kill()
    yield
    await scene.rabbitmq.start()


@asynccontextmanager
async def alarm(scene: Scene) -> AsyncIterator[None]:
    await scene.begin()
    await scene.rabbitmq.ctl("set_vm_memory_high_watermark", "0.0000001")
    try:
        yield
    finally:
        await scene.rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")


@asynccontextmanager
async def exchange_of_another_type(scene: Scene) -> AsyncIterator[None]:
    await scene.begin()
    name = f"cacheinval.{scene.settings['namespace']}"
    async with operating(scene.settings["broker_url"]) as operator:
        await operator.exchange_delete(name)
        await operator.declare_exchange(name, ExchangeType.DIRECT, durable=True)
        yield
        (pasted,) = re.findall("`(rabbitmqctl eval .*?)` deletes it", await scene.doctor())
        assert await scene.rabbitmq.ctl(*shlex.split(pasted)[1:]) == "ok\n"


def relay_gone(stop: signal.Signals) -> Cause:
    @asynccontextmanager
    async def cause(scene: Scene) -> AsyncIterator[None]:
        leader = scene.program("relay")
        await scene.begin(relay="off")
        other = await scene.instance(instance_id="shop-2", relay="off")
        await scene.eventually(lambda: other.ready and other.watermark_age is not None, EVENTUAL)
        await scene.page()
        leader.signal(stop)
        # It looks on all the while, at answers that are of different age: of one its own, which has none.
        await scene._tells(
            "page", re.compile("Nothing proves"), never="shop-. is not proven|ticks do not reach"
        )
        yield
        if stop is signal.SIGSTOP:
            leader.signal(signal.SIGCONT)
        else:
            scene.program("relay")

    return cause


def instance_gone(stop: signal.Signals) -> Cause:
    @asynccontextmanager
    async def cause(scene: Scene) -> AsyncIterator[None]:
        await scene.begin()
        other = scene.program("worker", instance_id="shop-2", relay="off")
        await scene.eventually(other.ready, EVENTUAL)
        await scene.has_been_there("shop-2")
        other.signal(stop)
        yield
        if stop is signal.SIGSTOP:
            other.signal(signal.SIGCONT)
        else:  # its lease ends, which would take up to ten seconds
            await scene.db.execute("UPDATE cacheinval.instances SET expires_at = now() WHERE id = 'shop-2'")
            for place in ("status", "page"):
                await scene._tells(place, re.compile("shop-2 ended without a word at"), re.compile("shop-1"))
            await scene.db.execute("DELETE FROM cacheinval.instances WHERE id = 'shop-2'")  # as after an hour

    return cause


@asynccontextmanager
async def clock_of_the_host_behind(scene: Scene) -> AsyncIterator[None]:
    """That of the one host where all of this runs; so it is the database's that is ahead."""
    await scene.begin()
    with scene.monkeypatch.context() as patch:
        for module in ("clock", "outbox.session", "outbox.looking"):
            patch.setattr(f"cacheinval.{module}.time", shifted(-60))
        relay = f"the relay that leads .pid {os.getpid()} on host .* its clock may differ"  # the one of whoever looks does not
        await scene._tells("doctor", re.compile(f"ticks failed: none within .* → {relay}"))
        patch.setattr("cacheinval.doctor.database.time", shifted(-60))
        yield


def clock_of_an_instance(seconds: float) -> Cause:
    @asynccontextmanager
    async def cause(scene: Scene) -> AsyncIterator[None]:
        await scene.begin()
        with scene.monkeypatch.context() as patch:
            patch.setattr("cacheinval.client.Clock", partial(WrongClock, seconds))
            wrong = await scene.instance(instance_id="shop-2", relay="off")
        yield
        await wrong.__aexit__(None, None, None)

    return cause


def permissions(configure: str, write: str, read: str) -> Cause:
    @asynccontextmanager
    async def cause(scene: Scene) -> AsyncIterator[None]:
        await set_permissions(scene.rabbitmq, ".*", ".*", ".*", first=ADD_USER)
        scene.finally_.push_async_callback(scene.rabbitmq.ctl, "delete_user", "limited")
        scene.settings["broker_url"] = scene.rabbitmq.url.replace("guest:guest", "limited:limited")
        await scene.begin()
        await set_permissions(scene.rabbitmq, configure, write, read)
        yield
        await set_permissions(scene.rabbitmq, ".*", ".*", ".*")

    return cause


ADD_USER = 'rabbit_auth_backend_internal:add_user(<<"limited">>, <<"limited">>, <<"test">>), '


async def set_permissions(rabbitmq: RabbitMQ, *rights: str, first: str = "") -> None:
    """As `rabbitmqctl set_permissions` does, and ends the user's connections, which go by what was checked before."""
    told = ", ".join(f'<<"{one}">>' for one in rights)
    await rabbitmq.ctl(
        "eval",
        f'{first}rabbit_auth_backend_internal:set_permissions(<<"limited">>, <<"/">>, {told}, <<"test">>), '
        'rabbit_networking:close_all_user_connections(<<"limited">>, <<"other permissions">>).',
    )


@asynccontextmanager
async def another_may_not_publish(scene: Scene) -> AsyncIterator[None]:
    """What it writes is refused; when that ends it writes no more, and finds out by itself."""
    await set_permissions(scene.rabbitmq, ".*", ".*", ".*", first=ADD_USER)
    scene.finally_.push_async_callback(scene.rabbitmq.ctl, "delete_user", "limited")
    await scene.begin()
    limited = scene.rabbitmq.url.replace("guest:guest", "limited:limited")
    other = await scene.instance(instance_id="shop-2", relay="off", broker_url=limited)
    await scene.eventually(lambda: other.ready, EVENTUAL)
    await scene.has_been_there("shop-2")
    await set_permissions(scene.rabbitmq, ".*", "^(amq.gen-.*|.*dead|amq.default)$", ".*")
    await other.invalidate("a")
    yield
    await set_permissions(scene.rabbitmq, ".*", ".*", ".*")


def revoked(right: str) -> Cause:
    @asynccontextmanager
    async def cause(scene: Scene) -> AsyncIterator[None]:
        role = f"limited_{scene.settings['namespace']}"
        await scene.db.execute(f"CREATE ROLE {role} LOGIN")
        scene.finally_.push_async_callback(scene.db.execute, f"DROP OWNED BY {role}; DROP ROLE {role}")
        for statement in grants(role):
            await scene.db.execute(statement)
        scene.settings["database_url"] = scene.settings["database_url"].replace("postgres@", f"{role}@")
        await scene.begin()
        await scene.db.execute(f"REVOKE {right} FROM {role}")
        yield
        for statement in grants(role):
            await scene.db.execute(statement)

    return cause


@asynccontextmanager
async def usage_revoked(scene: Scene) -> AsyncIterator[None]:
    """That of everybody, too."""
    await scene.db.execute("REVOKE USAGE ON SCHEMA cacheinval FROM PUBLIC")
    async with revoked("USAGE ON SCHEMA cacheinval")(scene):
        yield


@asynccontextmanager
async def writing_revoked(scene: Scene) -> AsyncIterator[None]:
    """It writes once, and when that is granted no more: it finds out by itself."""
    async with revoked("INSERT ON cacheinval.outbox")(scene):
        assert scene.seen_from is not None
        with pytest.raises(DatabaseError):
            await scene.seen_from.invalidate("a")
        yield


def schema(*statements: str) -> Cause:
    @asynccontextmanager
    async def cause(scene: Scene) -> AsyncIterator[None]:
        await scene.begin()
        for statement in statements:
            await scene.db.execute(statement)
        yield
        await apply_schema(scene.db)

    return cause


@asynccontextmanager
async def schema_dropped(scene: Scene) -> AsyncIterator[None]:
    """With it go the triggers of tables that were tracked: once it is there again, all else is well."""
    async with schema("DROP SCHEMA cacheinval CASCADE")(scene):
        yield
    wanted = (
        "tracked tables warning: none; but shop-1 met another schema .* → if .*cacheinval invalidate --all"
    )
    await scene._tells("doctor", re.compile(wanted))


NO_RELAY = Words(
    "leader failed: no relay leads",
    "^Nothing proves that any cache is fresh, since [^:]+:..:..: no relay leads",
    "Nothing proves that any cache is fresh, since [^:]+:..:..: no relay leads",
    "`?cacheinval relay`?.* one that hangs counts as none: restart a process whose /healthz does not answer",
)
SILENT = Words(
    "shop-2 is registered and silent",
    "^shop-2 does not answer: it may",
    "shop-2 has not answered since",
    "see whether its process runs",
)
NO_SCHEMA = Words(
    "schema failed: ",
    "^Nothing proves .*: The schema `cacheinval` is missing or too old",
    "Nothing proves .*: The schema `cacheinval` is missing or too old",
    "run `?cacheinval schema apply",
)
FAULTS = {
    "the broker is killed": Fault(
        broker_killed,
        Words(
            "broker failed: .*(refused|reset|Connect call failed)",
            "^Nobody can be asked from here: .*the broker cannot be reached",
            r"shop-1 may be stale since \d\d:\d\d:\d\d: the broker cannot be reached",
            "see that RabbitMQ runs .*rabbitmq-diagnostics status",
        ),
        own_broker=True,
    ),
    "the broker raises an alarm": Fault(
        alarm,
        Words(
            "alarms failed: the broker blocks publishers",
            "^Nobody can be asked from here: .*the broker blocks publishers",
            "(shop-1 may be stale|Nobody can be asked).*: the broker blocks publishers",
            "rabbitmq-diagnostics alarms",
        ),
        own_broker=True,
    ),
    "the exchange is of another type": Fault(
        exchange_of_another_type,
        Words(
            "exchange failed: .* is no durable fanout",
            "^Nobody can be asked from here: .* is not a durable fanout: PRECONDITION_FAILED",
            "shop-1 may be stale since .*: the broker refuses it .PRECONDITION_FAILED",
            r"`?rabbitmqctl eval 'rabbit_exchange:delete\(.*'`? deletes it, at best while nothing else uses it",
        ),
    ),
    "the relay is stopped": Fault(relay_gone(signal.SIGTERM), NO_RELAY),
    "the relay is frozen": Fault(relay_gone(signal.SIGSTOP), NO_RELAY),
    "an instance is killed": Fault(instance_gone(signal.SIGKILL), SILENT),
    "an instance is frozen": Fault(instance_gone(signal.SIGSTOP), SILENT),
    "the clock of the host is behind": Fault(
        clock_of_the_host_behind,
        Words(
            "clock failed: the database's is .* ahead of this host's",
            "^Nothing proves .*: the relay sends no ticks: this clock and the database's differ by",
            "Nothing proves .*: the relay sends no ticks: this clock and the database's differ by",
            r"run a time service \(chrony\)",
        ),
    ),
    "the clock of an instance is ahead": Fault(
        clock_of_an_instance(60),
        Words(
            "instances failed: shop-2: its clock is at least .* s ahead",
            r"^shop-2 is not proven to be fresh, .*: the clock of shop-2 is at least \d+ s ahead",
            r"shop-2 is not proven to be fresh, .*: the clock of shop-2 is at least \d+ s ahead",
            r"run a time service \(chrony\)",
        ),
    ),
    "the clock of an instance is behind": Fault(
        clock_of_an_instance(-60),
        Words(
            "instances failed: shop-2: its clock is at least .* s behind",
            "^shop-2 is not proven to be fresh, .*: ticks are refused: a tick from the future",
            "shop-2 is not proven to be fresh, .*: ticks are refused: a tick from the future",
            r"run a time service \(chrony\)",
        ),
    ),
    "the user of the broker may not configure": Fault(
        permissions("^$", ".*", ".*"),
        Words(
            "permissions failed: configure on .*ACCESS_REFUSED",
            "^Nobody can be asked from here: .*ACCESS_REFUSED - access to exchange",
            "shop-1 may be stale since .*: the broker refuses it .ACCESS_REFUSED - access to exchange",
            "rabbitmqctl set_permissions -p / limited '",
        ),
    ),
    "the user of the broker may not read": Fault(
        permissions(".*", ".*", "^amq.gen-.*$"),
        Words(
            "permissions failed: read on cacheinval.*ACCESS_REFUSED",
            "^shop-1 does not answer: this process may use another broker",
            "shop-1 may be stale since .*: the broker refuses it .ACCESS_REFUSED - access to exchange",
            "rabbitmqctl set_permissions -p / limited '|own page",
        ),
    ),
    "the user of the broker may not publish": Fault(
        permissions(".*", "^(amq.gen-.*|.*dead|amq.default)$", ".*"),
        Words(
            "permissions failed: write on cacheinval.*ACCESS_REFUSED",
            "^Nobody can be asked from here: .*ACCESS_REFUSED - access to exchange",
            "shop-1 .*ACCESS_REFUSED - access to exchange",
            "rabbitmqctl set_permissions -p / limited '",
        ),
    ),
    "the user of the broker may not write": Fault(
        permissions(".*", "^$", ".*"),
        Words(
            r"\A[^→]*permissions failed: write on cacheinval\.\w+\.dead, write on amq\.gen-…, write on cacheinval\.\w+, "
            r"write on amq\.default are not permitted: ACCESS_REFUSED[^→]*→[^→]*\Z",  # nothing else has a remedy
            "^Nobody can be asked from here: .*ACCESS_REFUSED - access to exchange",
            "shop-1 .*ACCESS_REFUSED - access to",
            "rabbitmqctl set_permissions -p / limited '",
        ),
    ),
    "the user of the broker may not answer": Fault(
        permissions(".*", "^cacheinval.*|amq.gen-.*$", ".*"),
        Words(
            "permissions failed: write on amq.default .*ACCESS_REFUSED",
            "^shop-1 does not answer: this process may use another broker",
            "shop-1 cannot answer who asks how it is: .*ACCESS_REFUSED - access to exchange 'amq.default'",
            "rabbitmqctl set_permissions -p / limited '|its own page .*say so where it may not",
        ),
    ),
    "an instance may not publish what it writes": Fault(
        another_may_not_publish,
        Words(
            "instances warning: shop-2 cannot publish",
            "^shop-2 cannot publish: .*ACCESS_REFUSED - access to exchange 'cacheinval",
            "shop-2 cannot publish: .*ACCESS_REFUSED - access to exchange 'cacheinval.*tries again by itself",
            "rabbitmqctl set_permissions -p / limited '|see broker, exchange and permissions from there",
        ),
    ),
    "the role may not use the outbox": Fault(
        revoked("ALL ON cacheinval.outbox"),
        Words(
            "grants failed: role limited_.* lacks SELECT, INSERT, DELETE on cacheinval.outbox",
            "^Nothing proves .*permission denied for table outbox",
            "Nothing proves .*permission denied for table outbox",
            "cacheinval schema grant",
        ),
    ),
    "the role may not use the schema": Fault(
        usage_revoked,
        Words(
            "schema warning: it is there; .*: permission denied for schema cacheinval; see grants first\n"
            r"grants failed: role limited_\w+ lacks USAGE on cacheinval → `cacheinval schema grant limited_\w+`[^→]*"
            r"\nleader failed: no relay leads: [^→]*; see grants first$",
            "^Nothing proves .*permission denied for schema cacheinval",
            "Nothing proves .*permission denied for schema cacheinval",
            "cacheinval schema grant",
        ),
    ),
    "the role may not write": Fault(
        writing_revoked,
        Words(
            "instances warning: shop-1 cannot write: permission denied for table outbox",
            r"^shop-1 cannot write since \d\d:\d\d:\d\d: permission denied for table outbox",
            r"shop-1 cannot write since \d\d:\d\d:\d\d: permission denied for table outbox",
            "cacheinval schema grant",
        ),
    ),
    "the role may not register": Fault(
        revoked("ALL ON cacheinval.instances"),
        Words(
            "grants failed: role limited_.* lacks .* on cacheinval.instances",
            "permission denied for table instances",
            "permission denied for table instances",
            "cacheinval schema grant",
        ),
    ),
    "the schema is missing": Fault(schema_dropped, NO_SCHEMA),
    "the schema is older": Fault(
        schema(
            "ALTER TABLE cacheinval.outbox DROP COLUMN context",
            "DELETE FROM cacheinval.schema_version",
            "INSERT INTO cacheinval.schema_version (version) VALUES (1)",
        ),
        NO_SCHEMA,
    ),
}


@pytest.mark.parametrize("scene", FAULTS.values(), ids=FAULTS, indirect=True)
async def test_a_fault_is_named_in_three_places_with_what_to_do(
    scene: Scene, request: pytest.FixtureRequest
) -> None:
    fault = request.node.callspec.params["scene"]
    async with fault.cause(scene):
        await scene.sees(fault.words)
    await scene.is_well()


async def test_the_commands_say_so_and_fail(scene: Scene, own_rabbitmq: RabbitMQ) -> None:
    scene.settings["broker_url"] = own_rabbitmq.url
    await own_rabbitmq.kill()
    for command in ("doctor", "status"):
        program = scene.program(command, relay="off")
        async with asyncio.timeout(EVENTUAL):
            assert await program.ended() == 1, program.last_words
        assert re.search(
            "see that RabbitMQ runs .*rabbitmq-diagnostics status", program.last_words, re.IGNORECASE
        )
        if command == "doctor":
            assert re.search("^ok +database ", program.last_words, re.MULTILINE), (
                "the rest is looked at nevertheless"
            )


async def test_what_the_operator_may_not_do_hides_nothing_of_the_fleet(scene: Scene) -> None:
    instance = await scene.instance(instance_id="shop-1", relay="off")  # so that no relay leads
    await scene.eventually(lambda: instance.ready, EVENTUAL)
    await set_permissions(scene.rabbitmq, ".*", "^$", ".*", first=ADD_USER)
    scene.finally_.push_async_callback(scene.rabbitmq.ctl, "delete_user", "limited")
    scene.settings["broker_url"] = scene.rabbitmq.url.replace("guest:guest", "limited:limited")
    told = await scene.doctor()
    assert re.search("^permissions failed: write on ", told, re.MULTILINE), told
    assert re.search("^leader failed: no relay leads.* → see that a relay runs", told, re.MULTILINE), told


async def test_a_worker_that_stops_is_not_missed(scene: Scene, redis: Redis) -> None:
    """Its cache outlives it, so its row stays; and nobody takes it for one that does not answer."""
    await scene.begin()
    other = scene.program("worker", instance_id="shop-2", relay="off", cache_url=redis.url)
    await scene.eventually(other.ready, EVENTUAL)
    await scene.has_been_there("shop-2")
    other.signal(signal.SIGTERM)
    assert await other.ended() == 0
    assert await scene.db.fetchval("SELECT expires_at > now() FROM cacheinval.instances WHERE session = ''")
    told = await scene.status()
    assert re.match(WELL, told), told
    assert "shop-2" not in told
    assert "shop-2" not in await scene.doctor()


# What makes itself good


async def its_queue_is_deleted(scene: Scene, client: Client) -> None:
    await scene.rabbitmq.ctl("delete_queue", str(client.status()["broker"]["queue"]))


async def the_exchange_is_made_again(scene: Scene, client: Client) -> None:
    """Its queue is bound to nothing then, and nobody says so."""
    name = f"cacheinval.{scene.settings['namespace']}"
    async with operating(scene.settings["broker_url"]) as operator:
        await operator.exchange_delete(name)
        await operator.declare_exchange(name, ExchangeType.FANOUT, durable=True)
        await operator.declare_exchange(f"{name}.dead", ExchangeType.FANOUT, durable=True)


@pytest.mark.parametrize(
    ("happens", "durable", "reason"),
    [
        (its_queue_is_deleted, False, "queue deleted"),
        (its_queue_is_deleted, True, "queue deleted"),
        (the_exchange_is_made_again, False, "silence: a probe was published and did not arrive"),
    ],
    ids=["queue", "durable queue", "exchange"],
)
async def test_what_makes_itself_good_is_told_as_the_last_gap(
    scene: Scene,
    redis: Redis,
    durable: bool,
    happens: Callable[[Scene, Client], Awaitable[None]],
    reason: str,
) -> None:
    await scene.begin(**{"cache_url": redis.url} if durable else {})
    client = scene.seen_from
    assert client is not None
    gap = client.status()["last_gap"]
    await happens(scene, client)
    await scene.eventually(lambda: client.status()["last_gap"] != gap, EVENTUAL)
    await scene.is_well()
    for told in (await scene.status(), await scene.page()):
        assert re.search(rf"ago.*({reason})", told), told


async def test_a_cache_server_that_is_away_is_named_for_as_long_as_it_is(
    scene: Scene, own_redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also once the eviction was given up and the queue is read again, and nothing else is taken for the cause."""
    monkeypatch.setattr(receiver, "RETRY_LIMIT", 2.0)
    scene.settings["cache_url"] = own_redis.url
    await scene.begin(cache_url=own_redis.url)
    client = scene.seen_from
    assert client is not None
    await own_redis.kill()
    await client.invalidate("k")
    cause = r"eviction failed: the redis cache failed|not evicted within 2 s: the redis cache failed"
    remedy = f"cache server at {own_redis.url} runs and can be reached from|cache failed"
    words = Words("cache failed: .*connect", f"shop-1 .*({cause})", f"shop-1 .*({cause})", remedy)
    await scene.sees(words)
    given_up = client.status()["broker"]["since"]
    await scene.eventually(lambda: client.status()["broker"]["since"] != given_up, EVENTUAL)
    await scene.sees(words)
    for _ in range(5):
        told = await scene.status()
        assert "silence" not in told, told
    await own_redis.start()
    await scene.is_well()
