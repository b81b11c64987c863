"""What the page says: the sentence, the table, the writes; pure, with times that are made up."""

import re
from typing import Any

import msgspec
import pytest

from cacheinval.coherence.registration import NOT_YET, Registered
from cacheinval.errors import BlockedError, SchemaMissingError
from cacheinval.latencies import BUCKETS
from cacheinval.overview import Lapsed, Leader, Overview
from cacheinval.page.markup import Html, html, milliseconds, printable, seconds
from cacheinval.page.rendering import draw, whole
from cacheinval.recent import Evicted, Recent
from cacheinval.verdict import fleet as rules
from cacheinval.verdict.fleet import MISSED_AFTER, Condition, Fate, Fleet
from cacheinval.verdict.judging import Level, Verdict, judge
from cacheinval.verdict.member import SAMPLE_EVERY, WINDOW, Lag
from cacheinval.verdict.reports import understand
from cacheinval.verdict.words import clock_time
from cacheinval.verdict.writes import MOST_LINES, Writes

NOW = 1_795_391_943.5  # 23:59:03 UTC
LEADS = {"state": "leader", "since": 0.0, "reason": None, "oldest_row_age": None}


def status(id_: str, **fields: Any) -> dict[str, Any]:
    """What a healthy instance with a database answers."""
    return {
        "id": id_,
        "host": "host",
        "pid": 1,
        "version": "1",
        "state": "ready",
        "reason": None,
        "since": NOW - 100,
        "started_at": NOW - 200,
        "watermark_age": 0.4,
        "relay": LEADS,
    } | fields


def fleet(*statuses: dict[str, Any], own: str | None = "one") -> Fleet:
    """A fleet that has been asked for a while, and has just answered."""
    seen = Fleet(own)
    seen.asked(None, NOW - 60)
    for one in statuses:
        seen.heard(one, NOW)
    seen.asked(None, NOW)
    return seen


def verdict(seen: Fleet, now: float = NOW) -> Verdict:
    return judge(seen, here(), now)


URL = "amqp://shop:***@broker/prod"
REFUSED = "ACCESS_REFUSED - access to exchange 'cacheinval.shop' in vhost 'prod' refused for user 'shop'"
NOT_GRANTED = (
    "permission denied for table outbox; a role that writes or publishes the outbox needs what "
    "`cacheinval schema grant ROLE` gives (with `--print` it shows the SQL)"
)
SUSPECT = {"state": "suspect", "reason": "Connection reset", "since": NOW - 20}


class TestVerdict:
    def test_all_are_fresh(self) -> None:
        said = verdict(fleet(status("one"), status("two", watermark_age=0.8)))
        assert (said.level, said.sentence) == (Level.GOOD, "All 2 instances are fresh")
        assert said.detail == "proven up to 0.8 s ago."
        assert not said.todo
        assert verdict(fleet(status("one"))).sentence == "The one instance is fresh"

    def test_the_sentence_is_the_same_while_nothing_changes(self) -> None:
        """It is a live region: what a screen reader says again with each second is of no use."""
        for change in ({}, SUSPECT, {"watermark_age": 60.0}):
            first = verdict(fleet(status("one", **change)))
            again = fleet(status("one", **change))
            again.heard(
                status("one", **change | ({"watermark_age": 60.7} if "watermark_age" in change else {})),
                NOW + 0.7,
            )
            assert verdict(again, NOW + 0.7).sentence == first.sentence

    def test_one_is_suspect(self) -> None:
        said = verdict(fleet(status("one"), status("two", **SUSPECT)))
        assert (said.level, said.sentence) == (
            Level.BAD,
            "two may be stale since 23:58:43: Connection reset.",
        )
        assert "only what was loaded within the last second" in said.detail
        assert any("RabbitMQ" in step for step in said.todo)

    def test_the_bound_is_the_one_that_is_set(self) -> None:
        said = verdict(fleet(status("two", **SUSPECT, settings={"max_staleness": 5.0})))
        assert "within the last 5 s" in said.detail

    def test_several_are_suspect(self) -> None:
        many = [status(f"shop-{number}", **SUSPECT) for number in range(5)]
        said = verdict(fleet(status("one"), *many))
        assert said.sentence == (
            "shop-0, shop-1, shop-2 and 2 more (5 of 6 instances) may be stale, the first since 23:58:43: Connection reset."
        )

    @pytest.mark.parametrize(
        ("change", "step"),
        [
            ({"reason": "eviction failed: down"}, "cache server"),
            (
                {
                    "reason": "receiving failed: not evicted within 30 s: down",
                    "broker": {"consumer": "connecting", "reason": "receiving failed"},
                },
                "cache server",
            ),
            (
                {"reason": "away", "registration": {"state": "unregistered", "reason": "away"}},
                "Postgres runs",
            ),
            ({"reason": f"silence: {BlockedError()}"}, "rabbitmq-diagnostics alarms"),
            ({"reason": "catching up with the queue"}, "unless it takes long"),
            ({"broker": {"consumer": "standby"}}, "CACHEINVAL_INSTANCE_ID"),
            ({"broker": {"consumer": "connecting", "reason": "refused"}}, "RabbitMQ runs"),
            ({"broker": {"consumer": "connecting", "reason": "refused"}}, "itself, and starts empty."),
            (
                {
                    "broker": {"consumer": "connecting", "reason": "refused"},
                    "cache": {"url": "redis://cache:6379/0"},
                },
                "itself, and catches up from its queue.",
            ),
        ],
    )
    def test_what_to_do_depends_on_the_reason(self, change: dict[str, Any], step: str) -> None:
        said = verdict(fleet(status("two", **SUSPECT | change)))
        assert any(step in one for one in said.todo), said.todo

    def test_why_the_broker_cannot_be_reached_is_said(self) -> None:
        broker = {"consumer": "connecting", "reason": "Connection refused"}
        said = verdict(fleet(status("two", **SUSPECT, broker=broker)))
        assert said.sentence.endswith("the broker cannot be reached (Connection refused).")

    def test_the_broker_is_away(self) -> None:
        seen = fleet(status("one"), status("two"), status("three"))
        seen.asked("the broker cannot be reached", NOW + 1)
        seen.heard(status("one", **SUSPECT), NOW + 9)
        said = verdict(seen, NOW + 9)
        assert said.sentence.startswith("one may be stale since")
        assert (
            "2 other instances cannot be asked from here: expect the same of each until they can."
            in said.detail
        )

    def test_only_asking_fails(self) -> None:
        seen = fleet(status("one"), status("two"))
        seen.asked("blocked", NOW + 1)
        seen.heard(status("one"), NOW + 9)
        said = verdict(seen, NOW + 9)
        assert (said.level, said.sentence) == (
            Level.BAD,
            "Nobody can be asked from here since 23:59:04: blocked.",
        )
        assert verdict(seen, NOW + 2).level is Level.WARNING
        assert "one, which serves this page, is subscribed. How it is with 1 other instance" in said.detail

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"watermark_age": 60.0}, "Nothing proves"),
            ({"relay": LEADS | {"oldest_row_age": 12.0}}, "Committed changes"),
        ],
    )
    def test_a_broker_that_is_briefly_away_hides_nothing_worse(
        self, fields: dict[str, Any], said: str
    ) -> None:
        seen = fleet(status("one", **fields))
        seen.asked("blocked", NOW + 1)
        assert verdict(seen, NOW + 2).sentence.startswith(said)
        nobody = fleet()
        nobody.asked("blocked", NOW + 1)
        assert verdict(nobody, NOW + 2).sentence.startswith("Nobody can be asked")

    def test_one_does_not_answer(self) -> None:
        seen = fleet(status("one"), status("two"))
        seen.registry([Registered("two", "", None)], NOW)
        seen.heard(status("one"), NOW + 8)
        seen.asked(None, NOW + 8)
        said = verdict(seen, NOW + 8)
        assert (said.level, said.sentence) == (
            Level.BAD,
            "two has not answered since 23:59:03: it may be stale, cut off, or gone.",
        )
        assert "registered" in said.detail

    def test_one_that_has_left_is_no_matter(self) -> None:
        seen = fleet(status("one"), status("two"))
        seen.registry([], NOW)
        seen.heard(status("one"), NOW + 8)
        seen.asked(None, NOW + 8)
        assert verdict(seen, NOW + 8).sentence == "The one instance is fresh"

    def test_one_that_is_registered_and_was_never_heard(self) -> None:
        seen = fleet(status("one"))
        seen.registry([Registered("one", "", None), Registered("two", "", None)], NOW)
        said = verdict(seen)
        assert (said.sentence, said.detail) == (
            "1 of 2 instances is fresh.",
            "Proven up to 0.4 s ago. 1 more is being asked.",
        )
        seen.heard(status("one"), NOW + 8)
        seen.asked(None, NOW + 8)
        assert verdict(seen, NOW + 8).sentence.startswith("two has not answered since 23:59:03")

    def test_nothing_proves(self) -> None:
        late = {"watermark_age": 60.0}
        said = verdict(fleet(status("one", **late), status("two", **late)))
        assert (said.level, said.sentence) == (
            Level.BAD,
            "Nothing proves that any cache is fresh, since 23:58:03: no relay sends ticks.",
        )
        said = verdict(fleet(status("one"), status("two", tick_refused="from the future", **late)))
        assert "from the future" in said.sentence
        assert any("time service" in step for step in said.todo)

    @pytest.mark.parametrize(
        ("fields", "seen", "cause", "step"),
        [
            (
                {},
                Overview(leader=Leader(1, host="left", pid=4711)),
                "the relay that leads sends no ticks",
                "pid 4711 on host left) sends none: see its page",
            ),
            ({}, Overview(led=False), "no relay leads", "`cacheinval relay`"),
            ({}, "refused", "no relay sends ticks: refused", "Postgres runs"),
            ({"relay": LEADS | {"state": "unready", "reason": str(SchemaMissingError())}}, None,
             "one is unready: The schema", "`cacheinval schema apply`"),
            ({"relay": LEADS | {"state": "unready", "reason": NOT_GRANTED}}, None,
             "one is unready: permission denied for table outbox.", "`cacheinval schema grant ROLE`"),
            ({"relay": LEADS | {"state": "blocked", "reason": str(BlockedError())}}, None,
             "one is blocked: The broker blocks publishers", "`rabbitmq-diagnostics alarms`"),
            ({"relay": LEADS | {"no_ticks": "this clock and the database's differ by 60.0 s"}}, None,
             "the relay sends no ticks: this clock", "time service"),
            ({"relay": LEADS | {"no_ticks": f"the broker did not confirm: {REFUSED}"}}, None,
             "the relay sends no ticks: the broker did not confirm: ACCESS_REFUSED", "-p prod shop '"),
            ({"now": NOW + 60}, None, "the clock of one is at least 60 s ahead", "time service"),
            ({"tick_refused": "a tick of another database: a, not b"}, None, "of another database", "namespace of its own"),
        ],
    )  # fmt: skip
    def test_why_nothing_proves_is_said_with_what_to_do(
        self, fields: dict[str, Any], seen: Overview | str | None, cause: str, step: str
    ) -> None:
        late = fleet(status("one", **{"watermark_age": 60.0, "broker": {"url": URL}} | fields))
        if seen is not None:
            late.looked(seen, NOW)
        said = verdict(late)
        assert said.sentence.startswith("Nothing proves that any cache is fresh, since 23:58:03: ")
        assert cause in said.sentence
        assert step in said.todo[0]
        assert "GRANT" not in said.sentence

    def test_what_waits_is_said_beside(self) -> None:
        late = fleet(status("one", watermark_age=60.0))
        late.looked(Overview(led=False, oldest_row_age=75.2), NOW)
        assert "the oldest for 75 s" in verdict(late).detail
        late = fleet(status("one"))
        late.looked(Overview(led=False, oldest_row_age=75.2), NOW)
        assert verdict(late).sentence == "Committed changes wait to be published: no relay leads."
        late.looked(Overview(oldest_row_age=4.0), NOW)
        assert verdict(late).level is Level.GOOD

    def test_a_row_of_a_long_transaction_is_no_row_that_waits(self) -> None:
        """It is as old as its INSERT when it is seen first, and published by the next look."""
        seen = fleet(status("one"))
        levels = []
        for age in (None, 6.0, 9.0):
            seen.looked(Overview(oldest_row_age=age), NOW)
            levels.append(verdict(seen).level)
        assert levels == [Level.GOOD, Level.WARNING, Level.BAD]

    def test_nor_is_one_that_a_relay_sees_as_it_publishes_it(self) -> None:
        seen = fleet(status("one"))
        levels = []
        for age in (None, 6.0, None, 6.0, 7.0):
            seen.heard(status("one", relay=LEADS | {"oldest_row_age": age}), NOW)
            levels.append(verdict(seen).level)
        assert levels == [Level.GOOD, Level.WARNING, Level.GOOD, Level.WARNING, Level.BAD]

    def test_slow_ticks_are_not_late(self) -> None:
        slow = {"watermark_age": 25.0, "settings": {"tick_interval": 10.0}}
        assert verdict(fleet(status("one", **slow))).level is Level.GOOD

    def test_a_change_waits_to_be_published(self) -> None:
        relay = LEADS | {"state": "blocked", "reason": "an alarm", "oldest_row_age": 12.0}
        said = verdict(fleet(status("one"), status("two", relay=relay)))
        assert (said.level, said.sentence) == (
            Level.BAD,
            "Committed changes wait to be published: an alarm.",
        )
        looking = here(id="relay", relay=relay)
        assert judge(fleet(status("one"), own=None), looking, NOW).sentence == said.sentence

    @pytest.mark.parametrize(
        ("fields", "sentence", "step"),
        [
            ({"publisher": {"failing": True, "reason": REFUSED}}, "two cannot publish: ACCESS_REFUSED", "-p prod shop '"),
            ({"registration": {"state": "unregistered", "reason": NOT_GRANTED}}, "two cannot register: permission denied for table outbox.",
             "`cacheinval schema grant ROLE`"),
            ({"answering": {"failing": True, "reason": REFUSED}}, "two cannot answer who asks how it is: ACCESS_REFUSED", "-p prod shop '"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_although_all_are_fresh(
        self, fields: dict[str, Any], sentence: str, step: str
    ) -> None:
        said = verdict(fleet(status("one"), status("two", broker={"url": URL}, **fields)))
        assert said.level is Level.WARNING
        assert said.sentence.startswith(sentence)
        assert step in said.todo[0]

    def test_writes_that_are_refused_are_worse_than_rows_that_wait(self) -> None:
        waits = LEADS | {"state": "blocked", "reason": "an alarm", "oldest_row_age": 12.0}
        refused = {"failing": True, "since": NOW - 20, "reason": NOT_GRANTED}
        said = verdict(fleet(status("one", relay=waits), status("two", host="left", writing=refused)))
        assert (said.level, said.sentence) == (
            Level.BAD,
            "two cannot write since 23:58:43: permission denied for table outbox.",
        )
        assert "fails, and changes nothing" in said.detail
        assert "`cacheinval schema grant ROLE`" in said.todo[0]

    def test_of_several_that_cannot_write_the_first_says_since_when(self) -> None:
        def refused(seconds: float | None, reason: str | None) -> dict[str, Any]:
            since = None if seconds is None else NOW - seconds
            return {"writing": {"failing": True, "since": since, "reason": reason}}

        missing = str(SchemaMissingError())
        said = verdict(
            fleet(status("one", **refused(20, missing)), status("two", **refused(30, NOT_GRANTED)))
        )
        assert said.sentence.startswith(
            "one, two (2 of 2 instances) cannot write since 23:58:33: The schema `cacheinval` is missing"
        )
        assert "Run `cacheinval schema apply`" in said.todo[0]
        said = verdict(fleet(status("one", **refused(None, None)), status("two")))
        assert said.sentence == "one cannot write since an unknown time: its log says why."

    def test_who_is_only_about_to_register_is_not_blamed(self) -> None:
        starting = {"registration": {"state": "unregistered", "reason": NOT_YET}}
        assert verdict(fleet(status("one", **starting))).level is Level.GOOD

    def test_who_was_never_subscribed_says_why(self) -> None:
        refused = {"url": URL, "consumer": "connecting", "reason": REFUSED}
        said = verdict(fleet(status("one"), status("two", state="starting", since=NOW - 20, broker=refused)))
        assert (said.level, said.sentence) == (
            Level.BAD,
            f"two has not subscribed since 23:58:43: the broker refuses it ({REFUSED}).",
        )
        assert "-p prod shop '" in said.todo[0]

    @pytest.mark.parametrize(
        ("offset", "said"), [(0.05, "fresh"), (-0.2, "behind the one here"), (9, "ahead of")]
    )
    def test_the_clock_here_and_that_of_the_database(self, offset: float, said: str) -> None:
        seen = fleet(status("one"))
        seen.looked(Overview(offset=offset), NOW)
        assert said in verdict(seen).sentence

    def test_a_page_that_hears_nobody_else_may_be_elsewhere(self) -> None:
        """Not one that has heard them before."""
        alone, known = fleet(status("one")), fleet(status("one"), status("two"), status("three"))
        registered = [Registered(id_, "", None) for id_ in ("one", "two", "three")]
        for seen in (alone, known):
            seen.registry(registered, NOW)
            seen.heard(status("one"), NOW + 8)
            seen.asked(None, NOW + 8)
            said = verdict(seen, NOW + 8)
            elsewhere = "this process may use another broker or virtual host than they" in said.sentence
            assert (elsewhere, "CACHEINVAL_BROKER_URL" in said.todo[0]) == ((seen is alone),) * 2
            assert said.sentence.startswith("three, two (2 of 3 instances) do not answer: ")

    def test_a_single_look_waits_for_nobody(self) -> None:
        once = Fleet(None, patience=0.0)
        expected, starting = Registered("two", "", None), Registered("three", "", None)
        once.asked(None, NOW - 1)
        once.looked(Overview([expected, starting], [expected]), NOW - 1)
        once.heard(status("one"), NOW)
        once.asked(None, NOW)
        assert verdict(once).sentence.startswith("two does not answer: it may be stale")
        assert [member.id for member in once] == ["two", "one"]
        nobody = Fleet(None, patience=0.0)
        nobody.asked(None, NOW - 1)
        nobody.asked(None, NOW)
        assert verdict(nobody).sentence == "No instance of namespace shop answers."

    def test_one_that_was_never_heard_and_has_left_is_no_matter(self) -> None:
        seen = fleet(status("one"))
        seen.registry([Registered("two", "", None)], NOW)
        seen.registry([], NOW + 4)
        seen.heard(status("one"), NOW + 8)
        seen.asked(None, NOW + 8)
        assert verdict(seen, NOW + 8).sentence == "The one instance is fresh"

    def test_without_a_database_nothing_more_is_claimed(self) -> None:
        bare = {"relay": None, "watermark_age": None}
        said = verdict(fleet(status("one", **bare), status("two", **bare)))
        assert (said.level, said.detail) == (Level.GOOD, "Without a database nothing proves more.")

    def test_who_hears_no_ticks_any_more_is_not_proven_also_without_a_database(self) -> None:
        deaf = {"relay": None, "registration": None, "watermark_age": 900.0}
        said = verdict(fleet(status("one"), status("two", **deaf)))
        assert said.level is Level.BAD
        assert said.sentence.startswith("two is not proven to be fresh")

    def test_some_are_starting(self) -> None:
        said = verdict(fleet(status("one"), status("two", state="starting", reason="not subscribed yet")))
        assert (said.sentence, said.detail) == (
            "1 of 2 instances is fresh.",
            "Proven up to 0.4 s ago. 1 more is starting.",
        )
        assert verdict(fleet(status("two", state="starting"))).level is Level.WARNING

    def test_one_that_did_not_answer_just_now_is_not_counted(self) -> None:
        seen = fleet(status("one"), status("two"))
        seen.heard(status("two"), NOW + 0.4)
        seen.heard(status("one"), NOW + 2)
        seen.asked(None, NOW + 2)
        said = verdict(seen, NOW + 2)
        assert (said.level, said.sentence) == (Level.WARNING, "1 of 2 instances is fresh.")
        assert said.detail == "Proven up to 0.4 s ago. two did not answer when asked last."
        seen.asked(None, NOW + 3.6)
        said = verdict(seen, NOW + 3.6)
        assert (said.level, said.sentence) == (Level.WARNING, "No instance is proven to be fresh just now.")
        assert said.detail == "one, two (2 of 2 instances) did not answer when asked last."

    def test_nobody_is_said_to_be_fresh_before_somebody_has_answered_again(self) -> None:
        """While nobody could be asked each of them may have begun to be in doubt."""
        seen = fleet(status("one"), status("two"))
        seen.asked("the broker is away", NOW + 1)
        seen.asked(None, NOW + 2.5)
        assert verdict(seen, NOW + 2.5).level is Level.WARNING

    def test_one_that_has_just_subscribed_is_not_proven(self) -> None:
        anew = status("two", watermark_age=None, since=NOW - 0.3)
        said = verdict(fleet(status("one"), anew))
        assert (said.level, said.sentence) == (Level.WARNING, "1 of 2 instances is fresh.")
        assert said.detail == (
            "Proven up to 0.4 s ago. The first tick since two subscribed, which proves it, is yet to come."
        )
        said = verdict(fleet(anew))
        assert (said.level, said.sentence) == (Level.WARNING, "No instance is proven to be fresh just now.")

    def test_a_missing_exchange_is_no_trouble_where_nobody_is_known(self) -> None:
        missing = "the exchange cacheinval.shop is missing (NOT_FOUND - no exchange 'cacheinval.shop' in vhost 'prod')"
        seen = Fleet(None, patience=0.0)
        seen.asked(missing, NOW)
        assert seen.problem is None
        assert verdict(seen).sentence == "No instance of namespace shop answers."
        seen.looked(Overview([one := Registered("one", "", None)], [one]), NOW)
        seen.asked(missing, NOW)
        said = verdict(seen)
        assert (said.level, said.sentence) == (Level.BAD, f"Nobody can be asked from here: {missing}.")
        assert any("whoever subscribes next" in step for step in said.todo)

    def test_one_whose_lease_ran_out_has_ended_without_a_word(self) -> None:
        seen = fleet(status("one"))
        seen.looked(Overview(lapsed=[Lapsed("two", 60.0), Lapsed("three", 120.0)]), NOW)
        said = verdict(seen)
        assert (said.level, said.sentence) == (
            Level.WARNING,
            "two, three ended without a word, the last at 23:58:03.",
        )
        assert said.detail.endswith("The 1 that answers is fresh.")
        seen.looked(Overview(lapsed=[Lapsed("one", 1.0), Lapsed("three", 1000.0)]), NOW)
        assert verdict(seen).level is Level.GOOD, "one answers, and of the other it is long ago"

    def test_whoever_left_is_gone_as_soon_as_it_does_not_answer(self) -> None:
        seen = fleet(status("one"), status("two"))
        seen.looked(Overview([Registered("one", "", None)]), NOW + 2)
        seen.heard(status("one"), NOW + 2)
        seen.asked(None, NOW + 2)
        (two,) = [member for member in seen if member.id == "two"]
        assert seen.condition(two, NOW + 2) is Condition.GONE
        assert verdict(seen, NOW + 2).sentence == "The one instance is fresh"

    def test_nothing_proves_and_nothing_can_be_written(self) -> None:
        """By one cause, most often; and who is on call has to know of both."""
        refused = {"failing": True, "since": NOW - 10, "reason": NOT_GRANTED}
        said = verdict(fleet(status("one", watermark_age=60.0, writing=refused)))
        assert said.sentence.startswith("Nothing proves that any cache is fresh")
        assert said.sentence.endswith(" one cannot write since 23:58:53: permission denied for table outbox.")
        assert "Each write that says what it makes stale fails" in said.detail
        assert any("schema grant" in step for step in said.todo)

    def test_a_relay_that_is_blocked_is_not_taken_for_none(self) -> None:
        blocked = {"publisher": "blocked", "consumer": "subscribed", "url": URL}
        said = verdict(fleet(status("one", watermark_age=60.0, broker=blocked)))
        assert "no relay can publish ticks: The broker blocks publishers" in said.sentence
        assert any("alarm" in step for step in said.todo)

    def test_nobody_answers_and_the_database_cannot_be_asked(self) -> None:
        seen = fleet()
        seen.looked("connection refused", NOW)
        said = verdict(seen)
        assert said.level is Level.WARNING
        assert "whether there should be some is unknown: connection refused." in said.sentence
        assert "no cache" not in said.detail
        assert any("Postgres runs" in step for step in said.todo)

    def test_nobody_answers(self) -> None:
        assert verdict(fleet()).sentence == "No instance of namespace shop answers."
        assert verdict(Fleet(None)).sentence == "Asking the fleet."


def of_session(session: str, **fields: Any) -> dict[str, Any]:
    return status("two", registration={"state": "registered", "session": session}, **fields)


class TestTwins:
    """Two that share an id: one does not hide how the other is."""

    @pytest.mark.parametrize("worse_first", [True, False])
    @pytest.mark.parametrize(
        ("worse", "better"),
        [
            (of_session("a", **SUSPECT), of_session("b")),
            (status("two", pid=7, **SUSPECT), status("two", pid=8)),
        ],
    )
    def test_the_worse_one_is_judged(
        self, worse: dict[str, Any], better: dict[str, Any], worse_first: bool
    ) -> None:
        seen = fleet(*([worse, better] if worse_first else [better, worse]))
        assert verdict(seen).sentence.startswith("two may be stale")
        keys = re.findall(r'<tr [^>]*data-key="([^"]*)"', str(draw(seen, here(), NOW).parts["fleet"]))
        assert len(set(keys)) == 2

    def test_one_that_is_registered_and_silent_is_missed(self) -> None:
        seen = fleet(of_session("b"), own=None)
        seen.registry([Registered("two", "a", None), Registered("two", "b", None)], NOW)
        seen.heard(of_session("b"), NOW + 8)
        seen.asked(None, NOW + 8)
        assert verdict(seen, NOW + 8).sentence.startswith("two has not answered")
        seen.registry([Registered("two", "b", None)], NOW + 8)
        assert verdict(seen, NOW + 8).sentence == "The one instance is fresh"

    @pytest.mark.parametrize("told", [{}, {"registration": {"state": "registered", "session": ""}}])
    def test_who_tells_no_session_is_the_one_that_is_registered(self, told: dict[str, Any]) -> None:
        registered = [Registered("two", "" if told else "a", None)]
        before, after = Fleet(None), Fleet(None)
        before.registry(registered, NOW)
        for seen in (before, after):
            seen.asked(None, NOW)
            seen.heard(status("two", **told), NOW)
        after.registry(registered, NOW)
        for seen in (before, after):
            assert [(member.id, member.registered) for member in seen] == [("two", True)]

    def test_who_has_taken_the_place_of_another_does_not_leave_it_silent(self) -> None:
        seen = fleet(status("two", pid=7), own=None)
        seen.heard(status("two", pid=8), NOW + 8)
        seen.asked(None, NOW + 8)
        assert verdict(seen, NOW + 8).sentence == "The one instance is fresh"


class TestConditions:
    def test_who_could_not_be_asked_is_not_called_silent(self) -> None:
        """A question that the broker has not taken yet is no question."""
        seen = fleet(status("one"), status("two"))
        (_, two) = list(seen)
        assert seen.condition(two, NOW + 3) is Condition.FRESH
        assert seen.condition(two, NOW + 60) is Condition.UNKNOWN, "what it told is old"
        seen.asked("blocked", NOW + 60)
        assert seen.condition(two, NOW + 60) is Condition.UNKNOWN
        seen.asked(None, NOW + 61)
        assert seen.condition(two, NOW + 61) is Condition.UNKNOWN
        seen.asked(None, NOW + 66)
        assert seen.condition(two, NOW + 66) is Condition.SILENT

    def test_what_is_gone_is_forgotten(self) -> None:
        seen = fleet(status("one"), status("two"), status("three"))
        seen.registry([Registered("three", "", None)], NOW)
        later = NOW + rules.FORGOTTEN_AFTER + 1
        seen.heard(status("one"), later)
        seen.asked(None, later)
        seen.forget(later)
        assert sorted(member.id for member in seen) == ["one", "three"]

    def test_members_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rules, "MOST_MEMBERS", 3)
        seen = fleet(*(status(f"i{number}") for number in range(9)))
        seen.registry([Registered(f"r{number}", "", None) for number in range(9)], NOW)
        assert len(seen) == 3
        assert seen.not_understood == 6

    @pytest.mark.parametrize(
        "odd",
        [
            {"state": []},
            {"watermark_age": "old"},
            {"since": float("nan")},
            {"watermark_age": float("inf")},
            {"relay": "leader"},
            {"counters": {"receiver": {"latencies": "many"}}},
            {"evictions": {"since": 1}},
        ],
    )
    def test_what_cannot_be_understood_is_counted(self, odd: dict[str, Any]) -> None:
        seen = fleet(status("one"), status("two", **odd))
        assert ([member.id for member in seen], seen.not_understood) == (["one"], 1)
        assert b"1 answer could not be understood" in shown(seen)

    @pytest.mark.parametrize(
        "fields",
        [
            SUSPECT | {"reason": "odd", "broker": {"url": "amqp://["}},
            {"watermark_age": 99.0, "settings": {"max_staleness": 0.0}},
        ],
    )
    def test_an_odd_answer_is_judged(self, fields: dict[str, Any]) -> None:
        assert verdict(fleet(status("one", **fields))).level is Level.BAD

    def test_what_cannot_be_understood_is_not_called_fresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for healthy in ([status("one")], []):
            seen = fleet(*healthy, status("two", queue_depth="many", **SUSPECT), own=None)
            seen.heard(status("two", queue_depth="many"), NOW)  # the same one
            said = verdict(seen)
            assert said.level is Level.WARNING
            assert said.sentence.startswith("1 answer could not be understood")
        later = NOW + 60
        seen.heard(status("one"), later)
        seen.asked(None, later)
        seen.forget(later)
        assert verdict(seen, later).level is Level.GOOD
        monkeypatch.setattr(rules, "MOST_MEMBERS", 1)
        assert verdict(fleet(status("one"), status("two", **SUSPECT))).level is Level.WARNING

    def test_a_time_that_is_none_breaks_nothing(self) -> None:
        seen = fleet(status("one", **SUSPECT | {"since": 1e300}, last_gap={"at": -1e300}))
        assert b"since an unknown time" in shown(seen)
        assert clock_time(None) == clock_time(float("nan")) == "an unknown time"


class Ticking:
    """Two instances, asked each second, and a relay: what each tells depends on the moment at which it answers."""

    def __init__(self, *, interval: float = 1.0) -> None:
        self.seen = Fleet("one")
        self.interval = interval
        self.ticks: dict[str, float] = {}
        self.since = dict.fromkeys(("one", "two"), NOW - 100)

    def tick(self, at: float, *reached: str) -> None:
        self.ticks |= dict.fromkeys(reached or ("one", "two"), at)

    def answers(self, id_: str, at: float, **fields: Any) -> None:
        tick = self.ticks.get(id_)
        told = {
            "now": NOW + at,
            "watermark_age": None if tick is None else at - tick,
            "since": self.since[id_],
        }
        self.seen.heard(
            status(id_, **told | {"settings": {"tick_interval": self.interval}} | fields), NOW + at
        )

    def said(self, at: float) -> str:
        self.seen.asked(None, NOW + at)
        return verdict(self.seen, NOW + at).sentence

    def conditions(self, at: float) -> set[Condition]:
        return {self.seen.condition(member, NOW + at) for member in self.seen}


class TestTicks:
    """Who is accused where no ticks come: nobody, where that is so for all."""

    @pytest.mark.parametrize("apart", [0.0, 0.01, 0.3, 0.9, 1.7])
    def test_a_relay_that_stops_has_stopped_for_all(self, apart: float) -> None:
        """The answers of one instance are older than those of the other, and so is it late when it is seen first."""
        ticking, told = Ticking(), set()
        ticking.seen.asked(None, NOW - 1)
        for at in range(16):
            if at <= 5:
                ticking.tick(at - 0.1)
            ticking.answers("two", at)
            ticking.answers("one", at + apart)
            told.add(ticking.said(at + apart))
            assert len(ticking.conditions(at + apart)) == 1, "as if all had answered at the same moment"
        told = {sentence.partition(", since")[0] for sentence in told}
        if apart > MISSED_AFTER:
            told.remove("1 of 2 instances is fresh.")
        assert told == {"All 2 instances are fresh", "Nothing proves that any cache is fresh"} - (
            {"All 2 instances are fresh"} if apart > MISSED_AFTER else set()
        )

    def test_one_that_no_tick_reaches_is_named(self) -> None:
        ticking = Ticking()
        for at in range(8):
            ticking.tick(at, *(["one"] if at else []))
            ticking.answers("two", at + 0.1)
            ticking.answers("one", at + 0.3)
            said = ticking.said(at + 0.4)
            late = at > 4
            assert said.startswith("two is not proven to be fresh") == late
            assert said.endswith(": ticks do not reach it.") == late

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"tick_refused": "a tick from the future, by 60.0 s"},
            {"now": NOW + 100.0, "watermark_age": 100.0},
        ],
        ids=["cut off", "refusing", "wrong clock"],
    )
    def test_what_is_wrong_with_one_hides_no_relay_that_stops_for_all(self, fields: dict[str, Any]) -> None:
        ticking, said = Ticking(), list[str]()
        ticking.tick(0, "two")
        for at in range(20):
            if at < 10:
                ticking.tick(at, "one")
            ticking.answers("two", at + 0.1, **fields)
            ticking.answers("one", at + 0.3)
            ticking.seen.looked(Overview(led=at < 10), NOW + at + 0.3)
            said.append(ticking.said(at + 0.4))
        assert said[9].startswith("two is not proven to be fresh, since")
        since = clock_time(NOW + 9)
        assert said[19] == f"Nothing proves that any cache is fresh, since {since}: no relay leads."

    def test_who_has_only_just_been_heard_late_is_not_accused_along_with_one_that_is_cut_off(self) -> None:
        ticking = Ticking()
        ticking.tick(0, "two")
        for at in range(8):
            ticking.tick(at, "one")
            ticking.answers("two", at + 0.1)
            ticking.answers("one", at + 0.3)
        ticking.seen.heard(status("three", now=NOW + 7, watermark_age=7.0), NOW + 7)
        assert ticking.said(7.4).startswith("two is not proven to be fresh")

    def test_the_first_tick_after_a_relay_was_gone_accuses_nobody_who_answered_before_it(self) -> None:
        ticking = Ticking()
        ticking.tick(0)
        for at in (1, 9):
            ticking.answers("two", at)
            ticking.answers("one", at)
        assert ticking.said(9).startswith("Nothing proves")
        ticking.tick(10)
        ticking.answers("one", 10.01)
        ticking.ticks["two"] = 0  # its answer was given before that tick, and is a little slower
        ticking.answers("two", 9.99)
        ticking.tick(10)
        assert ticking.said(10.1).endswith("no tick had come when asked last.")
        ticking.answers("two", 10.9)
        assert ticking.said(11) == "All 2 instances are fresh"

    @pytest.mark.parametrize("since", [8.0, -0.05])
    def test_one_that_joins_while_no_relay_ticks_is_in_no_other_case(self, since: float) -> None:
        """Also where it joined right after the last tick, and has a clock that is a little behind."""
        ticking = Ticking()
        ticking.tick(0, "one")
        ticking.since["two"] = NOW + since
        for at in (7, 8, 9, 20):
            ticking.answers("one", at)
            if at >= 8:
                ticking.answers("two", at)
            assert ticking.said(at).startswith("Nothing proves that any cache is fresh"), at

    def test_one_that_joins_and_hears_no_tick_that_others_hear(self) -> None:
        ticking = Ticking()
        ticking.since["two"] = NOW + 0.5
        for at in range(8):
            ticking.tick(at, "one")
            ticking.answers("two", at + 0.6)
            ticking.answers("one", at + 0.7)
            assert ticking.said(at + 0.8).startswith("two is not proven to be fresh") == (at >= 5), at

    def test_one_without_a_database_awaits_no_ticks(self) -> None:
        ticking = Ticking()
        ticking.tick(0, "one")
        for at in (8, 9):
            ticking.answers("one", at)
            ticking.answers("two", at, relay=None)
        assert ticking.conditions(9) == {Condition.UNPROVEN, Condition.FRESH}

    def test_the_clock_of_one_says_nothing_about_the_others(self) -> None:
        """It calls its ticks late itself, and has heard the same as they."""
        ticking = Ticking()
        for at in range(3):
            ticking.tick(at)
            ticking.answers("one", at)
            ticking.answers("two", at, now=NOW + at + 60, watermark_age=60.0)
        assert ticking.said(2).startswith("two is not proven to be fresh, since")
        assert "the clock of two is at least 60 s ahead" in ticking.said(2)

    def test_a_single_look_compares_what_all_say_to_one_question(self) -> None:
        for reached in ("one", "two"), ("one",):
            ticking = Ticking()
            ticking.seen = Fleet(None, patience=0.0)
            ticking.tick(0)
            if len(reached) == 1:
                ticking.tick(4, *reached)
            ticking.answers("one", 4.99)
            ticking.answers("two", 5.01)
            said = ticking.said(5.1)
            assert said.startswith("Nothing proves" if len(reached) > 1 else "two is not proven"), said
            assert said.endswith("ticks do not reach it.") == (len(reached) == 1)


class TestLag:
    def test_it_counts_the_last_minute_by_the_buckets_of_the_metrics(self) -> None:
        counts = [0] * (len(BUCKETS) + 1)
        seen = Fleet(None)
        for second in range(120):
            counts[2] += 1  # up to 5 ms
            seen.heard(status("one", counters={"receiver": {"latencies": counts[:]}}), NOW + second)
        (member,) = seen
        assert 60 <= member.lag.total <= 60 + SAMPLE_EVERY
        assert (member.lag.below(0.5), member.lag.below(0.99)) == (0.005, 0.005)
        assert len(member._samples) <= WINDOW / SAMPLE_EVERY + 2

    def test_whoever_begins_to_look_sees_the_minute_before(self) -> None:
        """As much of it as the first answer tells; what was there before is not counted."""
        counts = [9] * (len(BUCKETS) + 1)
        told = [
            evicted(NOW - 20, committed_at=NOW - 20.004, seq=1),
            evicted(NOW - 10, committed_at=NOW - 10.02, seq=2),
            evicted(NOW - 9, committed_at=NOW - 10, seq=3, own=True),
            evicted(NOW - 8, committed_at=None, origin=None, seq=None, all=True, reason="new subscription"),
        ]
        recent = msgspec.to_builtins(Recent(NOW - 60, NOW, told))
        answer = status("one", counters={"receiver": {"latencies": counts}}, evictions=recent)
        seen = Fleet(None)
        seen.heard(answer, NOW)
        (member,) = seen
        assert (member.lag.total, member.lag.seconds) == (2, 60)
        assert (member.lag.below(0.5), member.lag.below(1)) == (0.005, 0.025)
        seen.heard(answer, NOW + 5)
        assert member.lag.total == 2
        seen.heard(answer, NOW + 65)
        assert member.lag.total == 0

    def test_a_restart_is_no_negative_number(self) -> None:
        seen = Fleet(None)
        for many in (9, 2, 3):
            counts = [many] * (len(BUCKETS) + 1)
            seen.heard(status("one", counters={"receiver": {"latencies": counts}}), NOW)
        (member,) = seen
        assert set(member.lag.counts) == {1}

    def test_quantiles_are_upper_bounds(self) -> None:
        counts = [0] * (len(BUCKETS) + 1)
        assert Lag(counts).below(0.5) is None
        counts[0], counts[3], counts[-1] = 50, 49, 1
        assert [Lag(counts).below(part) for part in (0.5, 0.51, 0.99, 0.995)] == [
            0.001,
            0.01,
            0.01,
            float("inf"),
        ]

    def test_another_versions_buckets_are_not_mixed_in(self) -> None:
        seen = fleet(status("one", counters={"receiver": {"latencies": [1, 2, 3]}}))
        (member,) = seen
        assert member.lag.total == 0


def evicted(at: float, **fields: Any) -> Evicted:
    return Evicted(**{"at": at, "committed_at": NOW, "origin": "o", "seq": 1, "keys": ["k"]} | fields)


def tells(
    id_: str, until: float, *told: Evicted, since: float | None = None, **fields: Any
) -> dict[str, Any]:
    recent = Recent(until - 60 if since is None else since, until, list(told))
    return status(id_, evictions=recent, **fields)


class TestWrites:
    def test_a_write_fans_out(self) -> None:
        seen = fleet(
            tells("one", NOW + 1, evicted(NOW + 0.002, own=True)),
            tells("two", NOW + 1, evicted(NOW + 0.0031)),
        )
        (line,) = seen.writes.newest(9)
        one, two = (member.identity for member in seen)
        assert (line.keys, line.after(one), line.after(("three", ""))) == (["k"], 0.0, None)
        assert line.after(two) == pytest.approx(0.0031, abs=1e-6)
        markup = str(draw(seen, here(), NOW + 1).parts["writes"])
        assert "<b>2 of 2</b> in 3.1 ms" in markup
        assert "<bdi>one</bdi> <span>wrote it</span>" in markup
        assert "<bdi>two</bdi> <span>3.1 ms</span>" in markup

    def test_what_is_told_again_is_no_news(self) -> None:
        seen = Fleet(None)
        for second in range(3):
            both = evicted(NOW + 0.5), evicted(NOW + 0.6, origin=None, seq=None)
            seen.heard(tells("one", NOW + 1 + second, *both), NOW)
        assert len(seen.writes.newest(9)) == 2

    def test_who_is_late_is_said(self) -> None:
        seen = fleet(tells("one", NOW + 1, evicted(NOW + 0.5)), tells("two", NOW + 1))
        (line,), two = seen.writes.newest(9), list(seen)[1]
        assert seen.fate(line, two, NOW + 1) is Fate.PENDING
        assert seen.fate(line, two, NOW + 9) is Fate.LATE
        assert "<bdi>two</bdi> <span>not yet</span>" in str(draw(seen, here(), NOW + 9).parts["writes"])
        seen.heard(tells("two", NOW + 10, evicted(NOW + 9.5)), NOW + 10)
        assert seen.fate(line, two, NOW + 10) is Fate.EVICTED

    def test_two_processes_with_one_id_do_not_hide_each_other(self) -> None:
        seen = fleet(
            tells("one", NOW + 1, evicted(NOW + 0.5), pid=1),
            tells("one", NOW + 1, pid=2),
            tells("two", NOW + 1, evicted(NOW + 0.4)),
        )
        (line,) = seen.writes.newest(9)
        fates = [seen.fate(line, member, NOW + 9) for member in seen]
        assert fates == [Fate.EVICTED, Fate.LATE, Fate.EVICTED]
        markup = str(draw(seen, here(), NOW + 9).parts["writes"])
        assert "<b>2 of 3</b>" in markup
        assert "<bdi>one (host, pid 1)</bdi> <span>500 ms</span>" in markup
        assert "<bdi>one (host, pid 2)</bdi> <span>not yet</span>" in markup
        assert "<bdi>two</bdi>" in markup
        for pid in (1, 2):
            dropped = Evicted(at=NOW + 9.5, all=True, reason="gap")
            seen.heard(tells("one", NOW + 10, dropped, pid=pid), NOW + 10)
        markup = str(draw(seen, here(), NOW + 10).parts["writes"])
        for pid in (1, 2):
            assert f"<bdi>one (host, pid {pid})</bdi> dropped everything: <bdi>gap</bdi>" in markup

    def test_who_had_left_before_a_write_is_not_late(self) -> None:
        seen = fleet(tells("one", NOW), tells("two", NOW), tells("three", NOW))
        seen.registry([Registered("one", "", None), Registered("three", "", None)], NOW + 4)
        seen.heard(tells("one", NOW + 9, evicted(NOW + 5, committed_at=NOW + 5)), NOW + 9)
        (line,) = seen.writes.newest(9)
        fates = [seen.fate(line, member, NOW + 9) for member in seen]
        assert fates == [Fate.EVICTED, Fate.UNKNOWN, Fate.LATE], "of the last nobody says that it has left"

    @pytest.mark.parametrize(
        ("answer", "fate"),
        [
            (
                tells("two", NOW + 1, Evicted(at=NOW + 0.9, all=True, reason="gap")),
                Fate.DROPPED,
            ),
            (tells("two", NOW + 1, since=NOW + 0.5), Fate.UNKNOWN),  # more than it tells
            (tells("two", NOW + 1, started_at=NOW + 0.5), Fate.UNKNOWN),  # it was not there
        ],
    )
    def test_who_need_not_tell_is_not_accused(self, answer: dict[str, Any], fate: Fate) -> None:
        seen = fleet(tells("one", NOW + 1, evicted(NOW + 0.5)), answer)
        line = seen.writes.newest(9)[-1]
        assert seen.fate(line, list(seen)[1], NOW + 9) is fate

    def test_what_a_sleeper_could_not_tell_at_first_it_tells_later(self) -> None:
        """Of the questions that waited for it, the first one asked for less than it has slept."""
        late = evicted(NOW + 0.5)
        seen = fleet(tells("one", NOW + 1, evicted(NOW + 0.1)), tells("two", NOW + 0.2))
        line = seen.writes.newest(1)[0]
        two = list(seen)[1]
        seen.heard(tells("two", NOW + 10, since=NOW + 5), NOW + 10)
        assert seen.fate(line, two, NOW + 10) is Fate.UNKNOWN
        seen.heard(tells("two", NOW + 10.1, since=NOW + 3), NOW + 10)
        assert (two.could_tell(NOW + 3), two.could_tell(NOW + 3.01)) == (False, True)
        seen.heard(tells("two", NOW + 10.19, since=NOW + 10.15), NOW + 10)  # and has slept once more
        seen.heard(tells("two", NOW + 10.2, late, since=NOW + 0.1), NOW + 10)
        assert seen.fate(line, two, NOW + 10) is Fate.EVICTED
        assert two.could_tell(NOW + 0.5)
        seen.heard(tells("two", NOW + 10.3, late, since=NOW + 0.1), NOW + 10)
        assert len(seen.writes.newest(9)) == 1

    def test_a_clock_that_was_set_back_silences_nobody(self) -> None:
        seen = Fleet(None)
        seen.heard(tells("one", NOW + 3600), NOW)
        seen.heard(tells("one", NOW, evicted(NOW - 1)), NOW)
        assert len(seen.writes.newest(9)) == 1

    def test_answers_that_overtake_each_other_are_told_once(self) -> None:
        seen = Fleet(None)
        dropped = Evicted(at=NOW, all=True, reason="gap")
        for until in (NOW + 2, NOW + 1, NOW + 3, NOW - 60):
            seen.heard(tells("one", until, dropped, evicted(NOW + 0.5, origin=None)), NOW)
        assert len(seen.writes.newest(9)) <= 3
        assert sum(line.reason is not None for line in seen.writes.newest(9)) == 1

    def test_programs_without_numbers_are_told_apart_by_time(self) -> None:
        writes = Writes()
        anonymous: dict[str, Any] = {"origin": None, "seq": None, "committed_at": None}
        for at in (NOW, NOW + 0.1, NOW + 30):
            for who in (("one", "1"), ("two", ""), ("one", "2")):
                writes.told(who, evicted(at, **anonymous))
        assert [len(line.evicted) for line in writes.newest(9)] == [3, 3, 3]

    def test_lines_are_bounded(self) -> None:
        writes = Writes()
        for number in range(3 * MOST_LINES):
            writes.told(("one", ""), evicted(NOW + number, seq=number + 1, committed_at=NOW + number))
        assert len(writes.newest(10 * MOST_LINES)) == len(writes._by_name) == MOST_LINES
        assert writes.newest(1)[0].at == NOW + 3 * MOST_LINES - 1

    def test_of_many_instances_the_slowest_are_shown(self) -> None:
        seen = fleet(
            *(tells(f"i{number:03}", NOW + 1, evicted(NOW + number / 1000)) for number in range(100))
        )
        markup = str(draw(seen, here(), NOW + 1).parts["writes"])
        assert markup.count("<bdi>i") == 3
        assert "i099" in markup
        assert "97 more" in markup

    def test_an_epoch_of_an_instance_is_a_line_of_its_own(self) -> None:
        seen = fleet(tells("one", NOW + 1, Evicted(at=NOW, all=True, reason="missing messages")))
        markup = str(draw(seen, here(), NOW + 1).parts["writes"])
        assert "<bdi>one</bdi> dropped everything: <bdi>missing messages</bdi>" in markup


def here(**fields: Any) -> Any:
    """How the process is that looks."""
    return understand(status("one", namespace="shop", broker={"url": URL}) | fields)


def shown(seen: Fleet, now: float = NOW) -> bytes:
    return whole(draw(seen, here(), now))


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{id}\u202egpj.\x00\n"


class TestMarkup:
    def test_what_others_say_is_text(self) -> None:
        gap = {"at": NOW - 1, "reason": HOSTILE}
        seen = fleet(
            tells("one", NOW + 1, evicted(NOW, keys=[HOSTILE], tags=[HOSTILE], origin=HOSTILE)),
            status(HOSTILE, host=HOSTILE, version=HOSTILE, last_gap=gap, **SUSPECT | {"reason": HOSTILE}),
            tells("two", NOW + 1, Evicted(at=NOW, all=True, reason=HOSTILE)),
            status("late", tick_refused=HOSTILE, watermark_age=99.0, relay=LEADS | {"reason": HOSTILE}),
        )
        seen.asked(HOSTILE, NOW)
        for own in ("one", None):
            seen.own = own
            page = whole(draw(seen, here(namespace=HOSTILE), NOW)).decode()
            assert page.count("<script") == 1
            assert "<img" not in page
            assert "\u202e" not in page
            assert "\0" not in page
            assert page.count("&lt;script&gt;") >= 8

    def test_values_are_escaped_and_never_filled_in_again(self) -> None:
        assert html("<b>{a}</b>{b}", a="{b}<", b=Html("<i>")) == "<b>{b}&lt;</b><i>"
        assert printable("a\u202eb\x07c") == "a\\u202eb\\x07c"
        assert printable("é 漢 \N{GRINNING FACE}") == "é 漢 \N{GRINNING FACE}"

    def test_a_large_fleet_is_shown_in_part_the_worst_first(self) -> None:
        seen = fleet(*(status(f"i{number:04}") for number in range(500)), status("zz", **SUSPECT))
        markup = str(draw(seen, here(), NOW).parts["fleet"])
        assert markup.count("<tr ") == 201
        assert "and 301 more" in markup
        assert markup.index("zz") < markup.index("i0000")

    def test_long_names_are_told_apart_by_their_ends(self) -> None:
        ids = [f"host-of-a-long-name-{number}-0a1b2c{number}" for number in range(2)]
        seen = fleet(*(tells(id_, NOW + 1, evicted(NOW)) for id_ in ids))
        markup = str(draw(seen, here(), NOW).parts["writes"])
        assert "<bdi>…-0a1b2c1</bdi>" in markup

    @pytest.mark.parametrize(
        ("age", "text"),
        [
            (0.04, "0.0 s"),
            (9.94, "9.9 s"),
            (59.6, "60 s"),
            (600, "10 min"),
            (7200, "2 h"),
            (2e5, "2 d"),
            (-1, "0.0 s"),
        ],
    )
    def test_ages_are_as_exact_as_one_wants_them(self, age: float, text: str) -> None:
        assert seconds(age) == text

    def test_short_durations(self) -> None:
        assert [milliseconds(one) for one in (0.0012, 0.0312, 2.5, 21)] == [
            "1.2 ms",
            "31 ms",
            "2500 ms",
            "21 s",
        ]
