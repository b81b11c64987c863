"""Why something is not as it should be, and what to do about that."""

from collections.abc import Sequence

from cacheinval.errors import BlockedError
from cacheinval.verdict import remedies
from cacheinval.verdict.member import Member
from cacheinval.verdict.reports import Relay, Report
from cacheinval.verdict.seen import Seen
from cacheinval.verdict.words import short

__all__ = ["DOCTOR_THERE", "of_suspect", "of_unproven", "of_waiting"]

DOCTOR_THERE = "`cacheinval doctor`, run where it runs, names the cause"


def of_suspect(report: Report) -> list[str]:
    """What to do where this instance may have missed something."""
    reason, host = report.reason or "", report.host or "its host"
    broker = report.broker
    if broker is not None and broker.consumer == "standby":
        return ["Another process uses this CACHEINVAL_INSTANCE_ID: stop one of them, or name it otherwise."]
    if report.cache_failure is not None:
        return [remedies.cache_server(report.cache_server, host)]
    if report.unsubscribed is not None:
        return [
            remedies.broker(report.unsubscribed, report.url, host),
            f"It joins again by itself, and {_then(report)}.",
            DOCTOR_THERE,
        ]
    if reason == report.unregistered:
        return [
            remedies.database(reason, host),
            f"From then on {report.id} serves from its cache again.",
        ]
    if reason.startswith("silence: a probe"):
        return [
            f"It subscribes anew by itself within seconds, and {_then(report)}. If it does so again and again: see that "
            "nobody deletes the exchange, and that the network drops nothing silently.",
            DOCTOR_THERE,
        ]
    if reason.startswith(("catching up", "new subscription")):
        return [f"Nothing, unless it takes long: {report.id} is working through its queue."]
    return [remedies.broker(reason, report.url, host), DOCTOR_THERE]


def _then(report: Report) -> str:
    return "catches up from its queue" if report.cache.outside else "starts empty"


def of_unproven(seen: Seen, late: Sequence[Member]) -> tuple[str, str]:
    """Why no tick proves anything to those, and what to do about it."""
    stopped = seen.fleet.ticks_stopped
    for is_so, told in ((_refuses, _of_refusing), (_clock_is_ahead, _of_clock_ahead)):
        those = [member for member in late if is_so(member)]
        if those and (len(those) == len(late) or not stopped):  # else it explains nothing of the others
            return told(those[0])
    if any(map(seen.fleet.cut_off, late)) and not stopped:
        who = "it" if len(late) == 1 else "them"
        step = "see its log, and its connection in RabbitMQ's management; restarting it is always safe"
        return f"ticks do not reach {who}", step
    if len(late) < len(seen.present) and not stopped:
        return "no tick had come when asked last", "nothing, unless it stays so: ticks come again"
    return _of_no_ticks(seen)


def _of_no_ticks(seen: Seen) -> tuple[str, str]:
    blocked = next(
        (one for one in [*seen.reports, seen.here] if one.broker and one.broker.publisher == "blocked"), None
    )
    if blocked is not None:
        reason = str(BlockedError())
        return f"no relay can publish ticks: {reason}", remedies.broker(reason, blocked.url)
    troubled = next((relay for relay in seen.relays if relay.no_ticks), None)
    if troubled is not None and troubled.no_ticks is not None:
        return f"the relay sends no ticks: {troubled.no_ticks}", _way_of_ticks(seen, troubled.no_ticks)
    stuck = next((relay for relay in seen.relays if relay.reason), None)
    if stuck is not None:
        return f"no relay sends ticks, one is {stuck.state}: {short(stuck.reason or '')}", _way(seen, stuck)
    if seen.fleet.database_problem is not None:
        problem = seen.fleet.database_problem
        return f"no relay sends ticks: {short(problem)}", remedies.database(problem)
    if not seen.led:
        return "no relay leads", remedies.RELAY
    leader = None if seen.fleet.overview is None else seen.fleet.overview.leader
    if leader is not None:
        return "the relay that leads sends no ticks", remedies.silent_leader(leader)
    return "no relay sends ticks", remedies.RELAY


def _refuses(member: Member) -> bool:
    return member.report is not None and bool(member.report.tick_refused)


def _of_refusing(member: Member) -> tuple[str, str]:
    assert member.report is not None
    reason = member.report.tick_refused or ""
    if "database" in reason:
        step = "give each database a namespace of its own (CACHEINVAL_NAMESPACE), and all instances of one the same database"
        return f"ticks are refused: {reason}", step
    step = (
        f"run a time service (chrony) on {member.report.host or 'its host'} and on the host of the database"
    )
    return f"ticks are refused: {reason.partition(', by ')[0]}", step


def _clock_is_ahead(member: Member) -> bool:
    return member.report is not None and member.ahead > member.report.settings.max_clock_skew + 1


def _of_clock_ahead(member: Member) -> tuple[str, str]:
    assert member.report is not None
    step = f"run a time service (chrony) on {member.report.host or 'its host'} and here"
    return f"the clock of {member.id} is at least {member.ahead:.0f} s ahead of this one", step


def _way_of_ticks(seen: Seen, reason: str) -> str:
    return remedies.TIME_SERVICE if "clock" in reason else remedies.broker(reason, seen.here.url)


def of_waiting(seen: Seen) -> tuple[str, str]:
    """Why what was committed is not published, and what to do about it."""
    stuck = next((relay for relay in seen.relays if relay.reason), None)
    if stuck is not None:
        return f": {short(stuck.reason or '')}", _way(seen, stuck)
    if not seen.led:
        return ": no relay leads", remedies.RELAY
    step = "see that RabbitMQ takes messages (`rabbitmq-diagnostics alarms`), and what the relay's log says"
    return "", step


def _way(seen: Seen, relay: Relay) -> str:
    reason = relay.reason or ""
    return remedies.broker(reason, seen.here.url) if relay.state == "blocked" else remedies.database(reason)
