"""Whether any cache may be stale: one sentence for whoever is on call, and what to do about it. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cacheinval.coherence import SUSPECT_AGE
from cacheinval.verdict import causes, remedies
from cacheinval.verdict.fleet import MOST_MEMBERS, Condition, Fleet
from cacheinval.verdict.reports import Report
from cacheinval.verdict.seen import Seen
from cacheinval.verdict.words import clock_time, listed, plural, sentence, short

__all__ = ["Level", "Verdict", "judge"]

OLD_ROW = 5.0
"""Seconds for which a committed change may wait to be published before somebody should look."""

PASSING = 3.0
"""Seconds for which the broker may not answer a page before that means anything."""

LAPSED_FOR = 900.0
"""Seconds for which it is told that an instance has ended without a word."""

MOST_STEPS = 4

DOCTOR = "`cacheinval doctor` looks at everything, from where it runs"


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


def judge(fleet: Fleet, here: Report, now: float) -> Verdict:
    """What is worst is said first.

    Args:
        here: how the process is that looks.
        now: seconds since 1970.
    """
    seen = Seen(fleet, here, now)
    return next(verdict for judgement in _WORST_FIRST if (verdict := judgement(seen)) is not None)


def _suspect(seen: Seen) -> Verdict | None:
    suspect = seen.those(Condition.SUSPECT)
    if not suspect:
        return None
    reports = [member.report for member in suspect if member.report is not None]
    first = reports[0]
    why = short(first.why or "no reason was given")
    if len(reports) == 1:
        said = f"{first.id} may be stale{_since(first.since)}: {why}."
        detail = f"Meanwhile it {_meanwhile(first)}."
    else:
        since = min((report.since for report in reports if report.since is not None), default=None)
        said = f"{seen.named(suspect)} may be stale{_since(since, ', the first since')}: {why}."
        laxest = max(reports, key=lambda report: report.settings.max_staleness or SUSPECT_AGE)
        detail = f"Meanwhile they {_meanwhile(laxest, many=True)}."
    if seen.fleet.problem is not None and len(seen.fleet) > len(suspect):
        others = plural(len(seen.fleet) - len(suspect), "other instance")
        detail += f" {others} cannot be asked from here: expect the same of each until they can."
    return Verdict(
        Level.BAD, said, detail, _steps(*(step for report in reports for step in causes.of_suspect(report)))
    )


def _since(moment: float | None, word: str = " since") -> str:
    """Nothing where nobody knows: a single look cannot tell how long it has been so."""
    return "" if moment is None else f"{word} {clock_time(moment)}"


def _meanwhile(report: Report, *, many: bool = False) -> str:
    bound = report.settings.max_staleness
    age = SUSPECT_AGE if bound is None else bound
    within = "second" if age == 1 else f"{age:g} s"
    if many:
        return f"read the database, and serve from their caches only what was loaded within the last {within}"
    return f"reads the database, and serves from its cache only what was loaded within the last {within}"


def _not_subscribed(seen: Seen) -> Verdict | None:
    refused = [m for m in seen.those(Condition.STARTING) if m.report and m.report.unsubscribed]
    if not refused:
        return None
    report = refused[0].report
    assert report is not None
    many = len(refused) > 1
    return Verdict(
        Level.BAD,
        f"{seen.named(refused)} {'have' if many else 'has'} not subscribed since {clock_time(report.since)}: {report.why}.",
        f"Until then {'each' if many else 'it'} {_meanwhile(report)}.",
        _steps(*(step for member in refused if member.report for step in causes.of_suspect(member.report))),
    )


def _not_asked(seen: Seen) -> Verdict | None:
    return _asking_fails(seen, Level.BAD) if _lasting(seen) else None


def _not_asked_just_now(seen: Seen) -> Verdict | None:
    return None if _lasting(seen) else _asking_fails(seen, Level.WARNING)


def _lasting(seen: Seen) -> bool:
    return seen.fleet.asking_once or seen.now - (seen.fleet.problem_since or seen.now) > PASSING


def _asking_fails(seen: Seen, level: Level) -> Verdict | None:
    fleet, unknown = seen.fleet, seen.those(Condition.UNKNOWN)
    if fleet.problem is None:
        return None
    detail = "" if fleet.own is None else f"{fleet.own}, which serves this page, is subscribed. "
    if unknown:
        others = plural(len(unknown), "instance" if fleet.own is None else "other instance")
        detail += f"How it is with {others} is unknown. "
    if fleet.own is None:
        detail += (
            "An instance that hears nothing of the broker reads the database, and serves only what is young."
        )
    since = None if fleet.asking_once else fleet.problem_since
    return Verdict(
        level,
        f"Nobody can be asked from here{_since(since)}: {short(fleet.problem)}.",
        detail.strip(),
        _steps(remedies.broker(fleet.problem, seen.here.url), DOCTOR),
    )


def _silent(seen: Seen) -> Verdict | None:
    silent = seen.those(Condition.SILENT)
    if not silent:
        return None
    first, elsewhere, compare = silent[0], "", list[str]()
    if _nobody_was_heard(seen):
        elsewhere = f"this process may use another broker or virtual host than {'it' if len(silent) == 1 else 'they'}; else "
        compare = [f"Compare CACHEINVAL_BROKER_URL here with that of {first.id}."]
    if len(silent) == 1:
        since = first.seen_at if first.heard_at is None else first.heard_at
        once = seen.fleet.asking_once
        does_not = "does not answer" if once else f"has not answered since {clock_time(since)}"
        said = f"{first.id} {does_not}: {elsewhere}it may be stale, cut off, or gone."
    else:
        said = f"{seen.named(silent)} do not answer: {elsewhere}they may be stale, cut off, or gone."
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
        said,
        detail,
        _steps(
            *compare,
            remedies.SILENT,
            "If it runs, look at its connection in RabbitMQ's management; restarting it is always safe.",
            causes.DOCTOR_THERE,
        ),
    )


def _nobody_was_heard(seen: Seen) -> bool:
    """Whether nobody but the one that looks has ever answered."""
    others = [member for member in seen.present if member.id != seen.fleet.own]
    return not seen.fleet.odd(seen.now) and all(member.heard_at is None for member in others)


def _nobody(seen: Seen) -> Verdict | None:
    if seen.present or seen.fleet.problem is not None or seen.fleet.odd(seen.now):
        return None
    if seen.fleet.asking(seen.now):
        return Verdict(Level.WARNING, "Asking the fleet.", "It answers within a second.")
    said = f"No instance of namespace {seen.here.namespace} answers"
    compare = "If there should be some: compare their CACHEINVAL_BROKER_URL and CACHEINVAL_NAMESPACE with these here."
    problem = seen.fleet.database_problem
    if problem is not None:
        return Verdict(
            Level.WARNING,
            f"{said}; whether there should be some is unknown: {short(problem)}.",
            "Who is registered stands in the database: one of them may be cut off from this broker.",
            _steps(remedies.database(problem), compare),
        )
    return Verdict(
        Level.WARNING,
        f"{said}.",
        "So no cache of it can be stale, unless one is cut off from this broker.",
        _steps(compare),
    )


def _unproven(seen: Seen) -> Verdict | None:
    late = seen.those(Condition.UNPROVEN)
    if not late:
        return None
    if not seen.fleet.ticks_stopped:
        late = [member for member in late if seen.fleet.cut_off(member)] or late
    ages = [age for member in late if (age := member.proven_age(seen.now)) is not None]
    starts = [member.report.since for member in late if member.report and member.report.since is not None]
    nobody = len(late) == len(seen.present)
    unproven_for = (min if nobody else max)(ages, default=0.0)  # of nobody not before the last of them
    since = clock_time(seen.now - unproven_for if ages else min(starts, default=None))
    cause, step = causes.of_unproven(seen, late)
    if nobody:
        said = f"Nothing proves that any cache is fresh, since {since}: {cause}."
    else:
        verb = "is" if len(late) == 1 else "are"
        said = f"{seen.named(late)} {verb} not proven to be fresh, since {since}: {cause}."
    bounds = [member.report.settings.max_staleness for member in late if member.report]
    if bounds and None not in bounds:
        detail = f"By their own clocks they serve nothing older than {max((b for b in bounds if b), default=0):g} s."
    else:
        detail = "What clients publish still arrives; what a killed one left in the outbox does not."
    waiting = seen.oldest_row
    if waiting > OLD_ROW:
        detail += f" Committed changes wait to be published, the oldest for {waiting:.0f} s."
    cannot_write = _cannot_write(seen)
    if cannot_write is not None:  # the same cause, most often
        return Verdict(
            Level.BAD,
            f"{said} {cannot_write.sentence}",
            cannot_write.detail,
            _steps(step, *cannot_write.todo),
        )
    return Verdict(Level.BAD, said, detail, _steps(step, DOCTOR))


def _cannot_write(seen: Seen) -> Verdict | None:
    failing = [member for member in seen.present if member.report and member.report.writing.failing]
    reports = [member.report for member in failing if member.report is not None]
    if not reports:
        return None
    since = min((one.writing.since for one in reports if one.writing.since is not None), default=None)
    reason = short(reports[0].writing.reason or "its log says why")
    return Verdict(
        Level.BAD,
        f"{seen.named(failing)} cannot write since {clock_time(since)}: {reason}.",
        "Each write that says what it makes stale fails, and changes nothing. It asks again by itself each second.",
        _steps(remedies.database(reason, reports[0].host or "its host"), causes.DOCTOR_THERE),
    )


def _waiting_rows(seen: Seen) -> Verdict | None:
    oldest = seen.oldest_row
    if oldest <= OLD_ROW:
        return None
    reason, step = causes.of_waiting(seen)
    return Verdict(
        Level.BAD if _waits_on(seen) else Level.WARNING,
        f"Committed changes wait to be published{reason}.",
        f"The oldest for {oldest:.0f} s. Until then each cache may hold what they replaced.",
        _steps(step, DOCTOR),
    )


def _waits_on(seen: Seen) -> bool:
    """A row is as old as its INSERT: that of a long transaction is old when it is committed, and gone by the next look."""
    if seen.fleet.asking_once or any(
        relay.reason and (relay.oldest_row_age or 0.0) > OLD_ROW for relay in seen.relays
    ):
        return True  # or it says itself why it waits
    if any(min(member.row_age, member.row_age_before) > OLD_ROW for member in seen.present):
        return True
    before = seen.fleet.overview_before
    return before is not None and (before.oldest_row_age or 0.0) > OLD_ROW


def _not_understood(seen: Seen) -> Verdict | None:
    odd = seen.fleet.odd(seen.now)
    if not odd:
        return None
    whose = "that instance is" if odd == 1 else "those instances are"
    return Verdict(
        Level.WARNING,
        f"{plural(odd, 'answer')} could not be understood: how {whose} is unknown.",
        f"Another version answers, or there are more than {MOST_MEMBERS:,} instances.",
        _steps("upgrade cacheinval here and there to the same version", causes.DOCTOR_THERE),
    )


def _cannot_publish(seen: Seen) -> Verdict | None:
    failing = [member for member in seen.present if member.report and member.report.publisher.failing]
    if not failing:
        return None
    report = failing[0].report
    assert report is not None
    reason = short(report.publisher.reason or "its log says why")
    with_relay = any(report.relay or report.registration for report in seen.reports)
    detail = (
        "What it writes is published by the relay, a little later."
        if with_relay
        else "Without a database nobody else does."
    ) + " It tries again by itself, every few seconds."
    return Verdict(
        Level.WARNING,
        f"{seen.named(failing)} cannot publish: {reason}.",
        detail,
        _steps(remedies.broker(reason, report.url, report.host or "its host"), causes.DOCTOR_THERE),
    )


def _not_registered(seen: Seen) -> Verdict | None:
    missing = [member for member in seen.present if member.report and member.report.unregistered]
    if not missing:
        return None
    report = missing[0].report
    assert report is not None
    reason = report.unregistered or ""
    return Verdict(
        Level.WARNING,
        f"{seen.named(missing)} cannot register: {short(reason)}.",
        "No writer that waits for the others waits for it.",
        _steps(remedies.database(reason, report.host or "its host"), causes.DOCTOR_THERE),
    )


def _cannot_answer(seen: Seen) -> Verdict | None:
    failing = [report for report in seen.reports if report.answering.failing]
    if not failing:
        return None
    report = failing[0]
    reason = short(report.answering.reason or "its log says why")
    return Verdict(
        Level.WARNING,
        f"{report.id} cannot answer who asks how it is: {reason}.",
        "`cacheinval status` and other pages call it silent.",
        _steps(remedies.broker(reason, report.url, report.host or "its host")),
    )


def _database_away(seen: Seen) -> Verdict | None:
    problem = seen.fleet.database_problem
    if problem is None or not seen.those(Condition.FRESH):
        return None
    return Verdict(
        Level.WARNING,
        f"{_who_is_fresh(seen)}; whether there are more is unknown: {short(problem)}.",
        "Who is registered, and what waits to be published, stands in the database.",
        _steps(remedies.database(problem), DOCTOR),
    )


def _clock_here(seen: Seen) -> Verdict | None:
    overview, skew = seen.fleet.overview, seen.here.settings.max_clock_skew
    if overview is None or abs(overview.offset) <= skew:
        return None
    ahead = "ahead of" if overview.offset > 0 else "behind"
    return Verdict(
        Level.WARNING,
        f"The database's clock is {ahead} the one here by more than the {skew:g} s that are accepted.",
        f"By {abs(overview.offset):.1f} s. A relay here sends no ticks, and what waits for the others here is not told of all.",
        _steps(remedies.TIME_SERVICE, "`cacheinval doctor` at other hosts says which clock it is."),
    )


def _lapsed(seen: Seen) -> Verdict | None:
    overview = seen.fleet.overview
    answering = {member.id for member in seen.present if member.report is not None}
    lapsed = [] if overview is None else [one for one in overview.lapsed if one.seconds < LAPSED_FOR]
    lapsed = [one for one in lapsed if one.id not in answering]
    if not lapsed:
        return None
    last = clock_time(seen.now - lapsed[0].seconds)
    fresh = len(seen.those(Condition.FRESH))
    others = f" The {fresh} that answer{'s is' if fresh == 1 else ' are'} fresh." if fresh else ""
    return Verdict(
        Level.WARNING,
        f"{listed([one.id for one in lapsed])} ended without a word{', the last' if len(lapsed) > 1 else ''} at {last}.",
        "That is when its lease ran out: it was killed, hangs, or has lost its database. It serves nothing that it cannot "
        f"prove; of a cache outside the process, what is published waits in its queue, for 24 hours.{others}",
        _steps(
            "see whether its process runs, and what its log says last; if it is gone for good, nothing is to be done"
        ),
    )


def _fresh(seen: Seen) -> Verdict:
    fresh, starting = seen.those(Condition.FRESH), seen.those(Condition.STARTING)
    if not fresh:
        some = starting or seen.those(Condition.UNKNOWN)
        verb = "is" if len(some) == 1 else "are"
        doing = "starting" if starting else "being asked"
        reads = "Until it has subscribed, each reads the database." if starting else ""
        return Verdict(Level.WARNING, f"{plural(len(some), 'instance')} {verb} {doing}.", reads)
    missed = [member for member in fresh if seen.fleet.missed(member)]
    unproven = [
        member
        for member in fresh
        if member not in missed and member.awaits_ticks and member.proven_age(seen.now) is None
    ]
    proven = [member for member in fresh if member not in (*missed, *unproven)]
    others = len(seen.present) - len(fresh)
    level = Level.WARNING if others or missed or unproven else Level.GOOD
    more = ""
    if missed:
        more += f" {seen.named(missed)} did not answer when asked last."
    if unproven:
        more += f" The first tick since {seen.named(unproven)} subscribed, which proves it, is yet to come."
    if others:
        more += f" {plural(others, 'more')} {'is' if others == 1 else 'are'} {'starting' if starting else 'being asked'}."
    who, ages = _who(seen, len(proven)), [member.proven_age(seen.now) for member in proven]
    told = [age for age in ages if age is not None]
    if not proven:
        return Verdict(level, "No instance is proven to be fresh just now.", more.strip())
    if not any(member.awaits_ticks for member in proven):
        return Verdict(
            level,
            f"{who} subscribed, and missed nothing that would be noticed.",
            f"Without a database nothing proves more.{more}",
        )
    proven_ago = f"proven up to {max(told):.1f} s ago.{more}"
    if level is Level.GOOD:
        return Verdict(level, f"{who} fresh", proven_ago)
    return Verdict(level, f"{who} fresh.", sentence(proven_ago))


def _who(seen: Seen, fresh: int) -> str:
    of = len(seen.present)
    if fresh < of:
        return f"{fresh} of {of} instances {'is' if fresh == 1 else 'are'}"
    return "The one instance is" if of == 1 else f"All {fresh} instances are"


def _who_is_fresh(seen: Seen) -> str:
    fresh = len(seen.those(Condition.FRESH))
    return f"{plural(fresh, 'instance')} that {'answers is' if fresh == 1 else 'answer are'} fresh"


_WORST_FIRST: Sequence[Callable[[Seen], Verdict | None]] = (
    _suspect,
    _not_subscribed,
    _not_asked,
    _silent,
    _nobody,
    _unproven,
    _cannot_write,
    _waiting_rows,
    _not_asked_just_now,
    _not_understood,
    _cannot_publish,
    _not_registered,
    _cannot_answer,
    _clock_here,
    _database_away,
    _lapsed,
    _fresh,
)


def _steps(*steps: str) -> list[str]:
    return [sentence(step) for step in dict.fromkeys(steps)][:MOST_STEPS]
