"""Whether any cache may be stale: one sentence for whoever is on call, and what to do about it. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from cacheinval.coherence import SUSPECT_AGE
from cacheinval.page.fleet import Condition, Fleet, Member
from cacheinval.page.reports import Report

__all__ = ["Level", "Verdict", "clock_time", "judge", "plural"]

OLD_ROW = 5.0
"""Seconds for which a committed change may wait to be published before somebody should look."""

PASSING = 3.0
"""Seconds for which the broker may not answer this page before that means anything."""

MOST_NAMED = 3
"""Instances that the sentence names."""

DOCTOR = "`cacheinval doctor`, run where it runs, names the cause."


class Level(StrEnum):
    """How bad it is."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer: a sentence that changes only when something does, what is always changing beside it, and what to do."""

    level: Level
    sentence: str
    detail: str = ""
    todo: Sequence[str] = ()


def judge(fleet: Fleet, namespace: str, relays: Sequence[Report], now: float) -> Verdict:
    """What is worst is said first.

    Args:
        relays: reports of those that are no instances and relay: the process that looks.
    """
    by_condition: dict[Condition, list[Member]] = {condition: [] for condition in Condition}
    for member in sorted(fleet, key=lambda member: member.id):
        by_condition[fleet.condition(member, now)].append(member)
    present = [member for member in fleet if member not in by_condition[Condition.GONE]]
    waiting = _waiting_rows([*(member.report for member in fleet if member.report), *relays])
    suspect, silent = by_condition[Condition.SUSPECT], by_condition[Condition.SILENT]
    if suspect:
        return _suspect(suspect, len(present), fleet)
    if fleet.problem is not None:
        return _not_asked(fleet, by_condition[Condition.UNKNOWN], now)
    if silent:
        return _silent(silent, len(present), now)
    if not present:
        return _nobody(fleet, namespace, now)
    if by_condition[Condition.UNPROVEN]:
        return _unproven(by_condition[Condition.UNPROVEN], len(present), relays, now)
    if waiting is not None:
        return waiting
    return _fresh(by_condition, present, now)


def _suspect(suspect: Sequence[Member], of: int, fleet: Fleet) -> Verdict:
    first = suspect[0]
    if len(suspect) == 1:
        assert first.report is not None
        sentence = f"{first.id} may be stale since {clock_time(first.report.since)}: {_reason(first.report)}."
        detail = f"Meanwhile it {_meanwhile(first.report)}."
    else:
        since = min(
            (m.report.since for m in suspect if m.report and m.report.since is not None), default=None
        )
        who = _named(suspect, of)
        sentence = f"{who} may be stale, the first since {clock_time(since)}: {_reason(first.report)}."
        detail = f"Meanwhile they {_meanwhile(_laxest(suspect), many=True)}."
    if fleet.problem is not None and len(fleet) > len(suspect):
        others = plural(len(fleet) - len(suspect), "other instance")
        detail += f" {others} cannot be asked from here: while the broker is away, expect the same of each."
    todo = dict.fromkeys(step for member in suspect if member.report for step in _remedy(member.report))
    return Verdict(Level.BAD, sentence, detail, list(todo)[:4])


def _meanwhile(report: Report, *, many: bool = False) -> str:
    bound = report.settings.max_staleness
    age = SUSPECT_AGE if bound is None else bound
    within = "second" if age == 1 else f"{age:g} s"
    if many:
        return f"read the database, and serve from their caches only what was loaded within the last {within}"
    return f"reads the database, and serves from its cache only what was loaded within the last {within}"


def _laxest(members: Sequence[Member]) -> Report:
    reports = [member.report for member in members if member.report is not None]
    return max(reports, key=lambda report: report.settings.max_staleness or SUSPECT_AGE)


def _not_asked(fleet: Fleet, unknown: Sequence[Member], now: float) -> Verdict:
    since = clock_time(fleet.problem_since)
    sentence = f"Nobody can be asked from here since {since}: {fleet.problem}."
    detail = "" if fleet.own is None else f"{fleet.own}, which serves this page, is subscribed. "
    if unknown:
        detail += f"How it is with {plural(len(unknown), 'other instance')} is unknown."
    lasting = now - (fleet.problem_since or now) > PASSING
    return Verdict(
        Level.BAD if lasting else Level.WARNING,
        sentence,
        detail,
        [
            "See that RabbitMQ runs, that this host reaches it, and that no alarm (memory, disk) blocks publishers.",
            DOCTOR,
        ],
    )


def _silent(silent: Sequence[Member], of: int, now: float) -> Verdict:
    first = silent[0]
    if len(silent) == 1:
        since = first.seen_at if first.heard_at is None else first.heard_at
        sentence = (
            f"{first.id} has not answered since {clock_time(since)}: it may be stale, cut off, or gone."
        )
    else:
        sentence = f"{_named(silent, of)} do not answer: they may be stale, cut off, or gone."
    registered = [member for member in silent if member.registered]
    if registered:
        which = "It is" if len(silent) == 1 else f"{len(registered)} of them are"
        detail = (
            f"{which} registered in the database: a process that was killed drops out when its lease ends."
        )
    else:
        detail = "What hears nothing of the broker serves only what is young, and reads the database."
    return Verdict(
        Level.BAD,
        sentence,
        detail,
        [
            "See whether the process runs, and what its log says last; its own page and /status answer without the broker.",
            "If it runs, look at its connection in RabbitMQ's management; restarting it is always safe: it starts empty.",
        ],
    )


def _nobody(fleet: Fleet, namespace: str, now: float) -> Verdict:
    if fleet.asked_since is None or now - fleet.asked_since < 2:
        return Verdict(Level.WARNING, "Asking the fleet.", "It answers within a second.")
    return Verdict(
        Level.WARNING,
        f"No instance of namespace {namespace} answers.",
        "So no cache of it can be stale, unless one is cut off from this broker.",
        [
            "If there should be some: compare their CACHEINVAL_BROKER_URL and CACHEINVAL_NAMESPACE with these here."
        ],
    )


def _unproven(late: Sequence[Member], of: int, relays: Sequence[Report], now: float) -> Verdict:
    ages = [age for member in late if (age := member.proven_age(now)) is not None]
    since = clock_time(now - max(ages)) if ages else "their start"
    refused = next((m.report.tick_refused for m in late if m.report and m.report.tick_refused), None)
    all_of_them = len(late) == of
    if refused:
        cause = f"ticks are refused: {refused}"
    elif all_of_them:
        cause = "no relay sends ticks"
    else:
        cause = "ticks do not reach it" if len(late) == 1 else "ticks do not reach them"
    if all_of_them:
        sentence = f"Nothing proves that any cache is fresh, since {since}: {cause}."
    else:
        sentence = f"{_named(late, of)} {'is' if len(late) == 1 else 'are'} not proven to be fresh, since {since}: {cause}."
    bounds = [member.report.settings.max_staleness for member in late if member.report]
    if bounds and None not in bounds:
        detail = f"By their own clocks they serve nothing older than {max(b for b in bounds if b):g} s."
    else:
        detail = "What clients publish still arrives; what a killed one left in the outbox does not."
    states = [report.relay for report in [*(m.report for m in late if m.report), *relays] if report.relay]
    todo = [f"The relay is {state.state}: {state.reason}." for state in states if state.reason][:1]
    if refused:
        todo.append(
            "Compare the clocks of hosts and database (NTP), and that all use one database for this namespace."
        )
    else:
        todo.append(
            "See that a relay runs (`cacheinval relay`, or CACHEINVAL_RELAY=auto) and reaches database and broker."
        )
    return Verdict(Level.BAD, sentence, detail, [*todo, DOCTOR])


def _waiting_rows(reports: Sequence[Report]) -> Verdict | None:
    relays = [report.relay for report in reports if report.relay is not None]
    waiting = [relay for relay in relays if (relay.oldest_row_age or 0.0) > OLD_ROW]
    if not waiting:
        return None
    worst = max(waiting, key=lambda relay: relay.oldest_row_age or 0.0)
    reason = f": {worst.reason}" if worst.reason else ""
    return Verdict(
        Level.BAD,
        f"Committed changes wait to be published{reason}.",
        f"The oldest for {worst.oldest_row_age:.0f} s. Until then each cache may hold what they replaced.",
        [
            "See that RabbitMQ takes messages (no alarm of memory or disk), and what the relay's log says.",
            DOCTOR,
        ],
    )


def _fresh(by_condition: dict[Condition, list[Member]], present: Sequence[Member], now: float) -> Verdict:
    fresh, starting = by_condition[Condition.FRESH], by_condition[Condition.STARTING]
    if not fresh:
        some = starting or by_condition[Condition.UNKNOWN]
        verb = "is" if len(some) == 1 else "are"
        doing = "starting" if starting else "being asked"
        reads = " Until it has subscribed, each reads the database." if starting else ""
        return Verdict(Level.WARNING, f"{plural(len(some), 'instance')} {verb} {doing}.", reads.strip())
    ages = [age for member in fresh if (age := member.proven_age(now)) is not None]
    others = len(present) - len(fresh)
    if others:
        who = f"{len(fresh)} of {len(present)} instances {'is' if len(fresh) == 1 else 'are'}"
        more = f" {plural(others, 'more')} {'is' if others == 1 else 'are'} {'starting' if starting else 'being asked'}."
    else:
        who, more = "The one instance is" if len(present) == 1 else f"All {len(fresh)} instances are", ""
    if not any(member.report and (member.report.relay or member.report.registration) for member in fresh):
        return Verdict(
            Level.GOOD,
            f"{who} subscribed, and missed nothing that would be noticed.",
            "Without a database nothing proves more.",
        )
    if not ages:
        return Verdict(
            Level.GOOD, f"{who} subscribed.", "The first tick of the relay, which proves it, is yet to come."
        )
    return Verdict(Level.GOOD, f"{who} fresh", f"proven up to {max(ages):.1f} s ago.{more}")


def _remedy(report: Report) -> list[str]:
    reason, registration = report.reason or "", report.registration
    if report.broker is not None and report.broker.consumer == "standby":
        return ["Another process uses this CACHEINVAL_INSTANCE_ID: stop one of them, or name it otherwise."]
    if reason.startswith("eviction failed"):
        return [f"See that the cache server of {report.id} runs and can be reached from {report.host}."]
    if isinstance(registration, dict) and registration.get("reason") == reason:
        return [
            f"See that Postgres runs and can be reached from {report.host}: {report.id} cannot register there."
        ]
    if reason.startswith("silence"):
        return [
            "Look for alarms (memory, disk) in RabbitMQ: they block publishers, and so all that proves anything."
        ]
    if reason.startswith(("catching up", "new subscription")):
        return [f"Nothing, unless it takes long: {report.id} is working through its queue."]
    return [
        f"See that RabbitMQ runs and that {report.host or 'its host'} reaches it. It joins again by itself, and starts empty.",
        DOCTOR,
    ]


def _reason(report: Report | None) -> str:
    if report is None:
        return "no reason is known"
    broker = report.broker
    if broker is not None and broker.consumer == "connecting" and broker.reason:
        return f"the broker cannot be reached ({broker.reason.rstrip('.')})"
    return (report.reason or "no reason was given").rstrip(".")


def _named(members: Sequence[Member], of: int) -> str:
    names = ", ".join(member.id for member in members[:MOST_NAMED])
    rest = f" and {len(members) - MOST_NAMED} more" if len(members) > MOST_NAMED else ""
    return f"{names}{rest} ({len(members)} of {of} instances)" if len(members) > 1 else names


def plural(number: int, noun: str) -> str:
    """`number` with its noun."""
    return f"{number:,} {noun}" if number == 1 or noun == "more" else f"{number:,} {noun}s"


def clock_time(seconds: float | None, *, parts: bool = False) -> str:
    """A moment as the log writes it, in UTC: hours, minutes and seconds, and thousandths with `parts`."""
    if seconds is None or not math.isfinite(seconds):
        return "an unknown time"
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return "an unknown time"
    return f"{moment:%H:%M:%S}" + (f".{moment.microsecond // 1000:03d}" if parts else "")
