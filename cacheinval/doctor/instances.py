"""How ticks, and what instances tell of themselves, are judged: decisions only, no I/O."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cacheinval.coherence.proof import Break
from cacheinval.coherence.registration import Registered
from cacheinval.doctor.findings import (
    BROKER,
    BROKER_HERE,
    DATABASE,
    DATABASE_HERE,
    Finding,
    failed,
    ok,
    warning,
)
from cacheinval.overview import Leader
from cacheinval.verdict import remedies
from cacheinval.verdict.reports import Report, understand
from cacheinval.verdict.words import short

__all__ = ["of_instances", "of_tick", "who_met_another_schema"]

DEEP_QUEUE = 1_000  # messages
MADE_ANEW: Break = "the schema cacheinval was made anew"
LATE = 2.0  # seconds that a tick may need beyond those for which one waits for it


def of_tick(
    age: float | None, waited: float, source: str | None, own_source: str | None, leader: Leader | None = None
) -> Finding:
    """`age`: of the first tick that was heard within `waited` seconds; None where there was none. `leader`: who is to send it."""
    if age is None:
        return failed(
            "ticks",
            f"none within {waited:g} s: with MAX_STALENESS every instance soon reads the database each time",
            "see leader, clock and outbox: a leader ticks once everything before has been confirmed"
            if leader is None
            else remedies.silent_leader(leader),
            (*BROKER_HERE, *DATABASE_HERE, "clock", "leader", "outbox"),
        )
    if None not in (source, own_source) and source != own_source:
        return failed(
            "ticks",
            f"they come from database {source}, this one is {own_source}: they prove nothing here",
            "give each database a namespace of its own (CACHEINVAL_NAMESPACE)",
        )
    if age > waited + LATE:
        return warning(
            "ticks",
            f"heard, but of {age:.1f} s ago: so much later than a write it may be that an entry is proven",
            "see clock, outbox and broker: the leader waits for confirms, or messages wait",
        )
    return ok("ticks", f"heard; all that was committed {max(0.0, age):.1f} s ago is on its way")


def who_met_another_schema(answered: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those whose last gap is that the schema was made anew."""
    reports = [report for told in answered if (report := understand(told)) is not None]
    return sorted(one.id for one in reports if one.last_gap is not None and MADE_ANEW in one.last_gap.reason)


class _Answer(NamedTuple):
    report: Report
    settings: Mapping[str, Any]
    """As far as it tells them: what an older version does not is no difference."""
    asked: float
    arrived: float


def of_instances(
    answered: Sequence[Mapping[str, Any]], silent: Sequence[Registered], namespace: str, max_skew: float
) -> list[Finding]:
    """How the instances are: who is suspect, silent, behind, or set up differently.

    Each of `answered` is what it told of itself, with `asked` and `arrived`, when that was by the clock here. Nothing in
    it is believed to be as it should: what cannot be understood is a finding.
    """
    understood, found = list[_Answer](), list[Finding]()
    for told in answered:
        report = understand(told)
        if report is None:
            text = f"{told.get('id')} answers what cannot be understood: how it is is unknown"
            found.append(warning("instances", text, "upgrade cacheinval here and there to the same version"))
        else:
            understood.append(_Answer(report, told.get("settings") or {}, told["asked"], told["arrived"]))
    reports = [one.report for one in understood]
    found = [*_of_state(reports, len(answered), namespace, len(silent)), *found]
    found += [*_of_silent(silent), *_of_differences(understood)]
    for one in understood:
        offset = _clock_offset(one)
        if abs(offset) > max_skew:
            found.append(
                failed(
                    "instances",
                    f"{one.report.id}: its clock is at least {abs(offset):.3f} s {'ahead' if offset > 0 else 'behind'}",
                    f"run a time service (chrony) on {one.report.host or 'its host'} and here",
                )
            )
    return found


def _of_state(reports: Sequence[Report], answers: int, namespace: str, silent: int) -> Iterable[Finding]:
    ready = [one for one in reports if one.state == "ready"]
    if silent and not answers:
        yield failed(
            "instances",
            f"nobody answers, of {silent} registered: the broker or the virtual host here may be another than theirs",
            "compare CACHEINVAL_BROKER_URL here with theirs; if it is the same, see each",
            BROKER_HERE,
        )
    elif not answers:
        yield warning(
            "instances",
            f"none of namespace {namespace} answers",
            "start one, or correct CACHEINVAL_NAMESPACE and CACHEINVAL_BROKER_URL, which have to be the same for all",
            BROKER_HERE,
        )
    elif ready:
        heard = "its queue and binding are there, for the question came through them"
        yield ok("instances", f"{len(ready)} of {answers} that answer are ready ({heard})")
    for one in reports:
        if one.state != "ready" and one.cache_failure is not None:
            yield warning(
                "instances",
                f"{one.id} is {one.state}, it cannot use the cache server {one.cache_server}: {one.cache_failure}",
                remedies.cache_server(one.cache_server, one.host or "its host"),
                ("cache",),
            )
        elif one.state != "ready":
            yield warning(
                "instances",
                f"{one.id} is {one.state}: {one.why}",
                f"its log says more: host {one.host or 'unknown'}, pid {one.pid}",
                DATABASE if one.reason is not None and one.reason == one.unregistered else (*BROKER, "cache"),
            )
        for text, remedy, after in _complaints(one):
            yield warning("instances", f"{one.id} {text}", remedy, after)
        if (one.queue_depth or 0) > DEEP_QUEUE:
            yield warning(
                "queues",
                f"{one.queue_depth} messages wait for {one.id}: it evicts more slowly than others write",
                "invalidate tags instead of many keys; see whether its host or its cache is overloaded",
            )


def _complaints(one: Report) -> Iterable[tuple[str, str, tuple[str, ...]]]:
    """What an instance says of itself that may be so although it is ready; what to do, and after which checks."""
    if one.tick_refused:
        yield (
            f"believes no tick: {one.tick_refused}",
            "see clock and ticks: with MAX_STALENESS it soon reads the database each time",
            ("clock", "ticks"),
        )
    if one.unregistered:
        yield (
            f"is not registered, and no writer waits for it: {short(one.unregistered)}",
            f"{remedies.database(one.unregistered, one.host or 'its host')}; and leave its pool a free connection",
            DATABASE,
        )
    if one.writing.failing:
        reason = short(one.writing.reason or "its log says why")
        yield f"cannot write: {reason}", remedies.database(reason, one.host or "its host"), DATABASE
    if one.publisher.failing:
        reason = one.publisher.reason or "its log says why"
        yield (
            f"cannot publish: {reason}; its writes wait for the relay",
            remedies.broker(reason, one.url, one.host or "its host"),
            BROKER,
        )
    relay = one.relay
    if relay is not None and relay.state == "blocked":
        reason = relay.reason or ""
        yield f"cannot relay: {reason}", remedies.broker(reason, one.url, one.host or "its host"), BROKER
    if relay is not None and relay.state in ("unready", "disconnected"):
        reason = relay.reason or ""
        yield f"cannot relay: {short(reason)}", remedies.database(reason, one.host or "its host"), DATABASE


def _of_silent(silent: Sequence[Registered]) -> Iterable[Finding]:
    for one in silent:
        yield failed(
            "instances",
            f"{one.id} is registered and silent: it died within its lease, or its queue or binding is gone",
            f"{remedies.SILENT}. Where it lives, it subscribes anew within 3 ticks, else restart it",
            BROKER,
        )


def _of_differences(answered: Sequence[_Answer]) -> Iterable[Finding]:
    differing: dict[str, dict[str, Any]] = {
        "version": {one.report.id: one.report.version for one in answered},
        "source": {one.report.id: one.report.source for one in answered if one.report.source},
        **{
            name: {one.report.id: one.settings.get(name) for one in answered if one.settings}
            for name in ("max_staleness", "max_clock_skew", "tick_interval", "max_replica_lag")
        },
    }
    for what, values in differing.items():
        different = sorted({str(value) for value in values.values()})
        if len(different) > 1:
            told = "; ".join(
                f"{value}: {', '.join(sorted(str(id_) for id_, one in values.items() if str(one) == value))}"
                for value in different
            )
            remedy = {
                "version": "fine during a rolling deploy; afterwards restart those that were left out",
                "source": "all instances of a namespace have to use one database: give the others another namespace",
            }.get(what, f"give all the same CACHEINVAL_{what.upper()}, unless you mean it")
            level = failed if what == "source" else warning
            yield level("instances", f"they differ in {what} ({told})", remedy)


def _clock_offset(one: _Answer) -> float:
    """By how much its clock surely differs: it answered some time between the question and the arrival."""
    now = one.report.now
    return 0.0 if now is None else max(0.0, now - one.arrived) - max(0.0, one.asked - now)
