"""How ticks, and what instances tell of themselves, are judged: decisions only, no I/O."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cacheinval.coherence.registration import Registered
from cacheinval.doctor.findings import Finding, failed, ok, warning
from cacheinval.verdict import remedies
from cacheinval.verdict.words import short

__all__ = ["of_instances", "of_tick"]

DEEP_QUEUE = 1_000  # messages
LATE = 2.0  # seconds that a tick may need beyond those for which one waits for it


def of_tick(age: float | None, waited: float, source: str | None, own_source: str | None) -> Finding:
    """`age`: of the first tick that was heard within `waited` seconds; None where there was none."""
    if age is None:
        return failed(
            "ticks",
            f"none within {waited:g} s: with MAX_STALENESS every instance soon reads the database each time",
            "see leader, clock and outbox: a leader ticks once everything before has been confirmed",
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


def of_instances(
    answered: Sequence[Mapping[str, Any]], silent: Sequence[Registered], namespace: str, max_skew: float
) -> list[Finding]:
    """How the instances are: who is suspect, silent, behind, or set up differently.

    Each of `answered` is what it told of itself, with `asked` and `arrived`, when that was by the clock here.
    """
    found = [*_of_state(answered, namespace), *_of_silent(silent), *_of_differences(answered)]
    for one in answered:
        offset = _clock_offset(one)
        if abs(offset) > max_skew:
            found.append(
                failed(
                    "instances",
                    f"{one['id']}: its clock is at least {abs(offset):.3f} s {'ahead' if offset > 0 else 'behind'}",
                    f"run a time service (chrony) on {one.get('host')} and here",
                )
            )
    return found


def _of_state(answered: Sequence[Mapping[str, Any]], namespace: str) -> Iterable[Finding]:
    ready = [one for one in answered if one["state"] == "ready"]
    if not answered:
        yield warning(
            "instances",
            f"none of namespace {namespace} answers",
            "start one, or correct CACHEINVAL_NAMESPACE and CACHEINVAL_BROKER_URL, which have to be the same for all",
        )
    elif ready:
        heard = "its queue and binding are there, for the question came through them"
        yield ok("instances", f"{len(ready)} of {len(answered)} that answer are ready ({heard})")
    for one in answered:
        if one["state"] != "ready":
            yield warning(
                "instances",
                f"{one['id']} is {one['state']}: {one.get('reason')}",
                f"its log says more: host {one.get('host')}, pid {one.get('pid')}",
            )
        yield from (warning("instances", f"{one['id']} {text}", remedy) for text, remedy in _complaints(one))
        if (one.get("queue_depth") or 0) > DEEP_QUEUE:
            yield warning(
                "queues",
                f"{one['queue_depth']} messages wait for {one['id']}: it evicts more slowly than others write",
                "invalidate tags instead of many keys; see whether its host or its cache is overloaded",
            )


def _complaints(one: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What an instance says of itself that may be so although it is ready."""
    if refused := one.get("tick_refused"):
        yield (
            f"believes no tick: {refused}",
            "see clock and ticks: with MAX_STALENESS it soon reads the database each time",
        )
    registration = one.get("registration") or {}
    if registration.get("state") == "unregistered":
        yield (
            f"is not registered, and no writer waits for it: {registration.get('reason')}",
            "see database and grants, and leave its pool a free connection",
        )
    writing = one.get("writing") or {}
    if writing.get("failing"):
        reason = short(str(writing.get("reason")))
        yield f"cannot write: {reason}", remedies.database(reason, one.get("host") or "its host")
    if (one.get("publisher") or {}).get("failing"):
        yield (
            "cannot publish: its writes wait for the relay",
            "see broker, exchange and permissions from there",
        )
    relay = one.get("relay") or {}
    if relay.get("state") in ("blocked", "unready", "disconnected"):
        yield f"cannot relay: {relay.get('reason')}", "see database, schema, grants and broker from there"


def _of_silent(silent: Sequence[Registered]) -> Iterable[Finding]:
    for one in silent:
        yield failed(
            "instances",
            f"{one.id} is registered and silent: it died within its lease, or its queue or binding is gone",
            f"{remedies.SILENT}. Where it lives, it subscribes anew within 3 ticks, else restart it",
        )


def _of_differences(answered: Sequence[Mapping[str, Any]]) -> Iterable[Finding]:
    for what, values in {
        "version": {one["id"]: one.get("version") for one in answered},
        "source": {one["id"]: one["source"] for one in answered if one.get("source")},
        **{
            name: {one["id"]: one["settings"].get(name) for one in answered if one.get("settings")}
            for name in ("max_staleness", "max_clock_skew", "tick_interval", "max_replica_lag")
        },
    }.items():
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


def _clock_offset(one: Mapping[str, Any]) -> float:
    """By how much its clock surely differs: it answered some time between the question and the arrival."""
    now = one.get("now")
    if now is None:
        return 0.0
    return float(max(0.0, now - one["arrived"]) - max(0.0, one["asked"] - now))
