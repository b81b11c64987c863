"""What the checks find, and how it is judged: decisions only, no I/O."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from cacheinval.outbox.grants import Right, quoted
from cacheinval.overview import Leader
from cacheinval.settings import Settings
from cacheinval.verdict import remedies
from cacheinval.verdict.words import named

__all__ = [
    "BROKER",
    "BROKER_HERE",
    "DATABASE",
    "DATABASE_HERE",
    "Finding",
    "causes_first",
    "failed",
    "ok",
    "unchecked",
    "warning",
]

Level = Literal["ok", "warning", "failed"]

NONE_TRACKED = "none"
QUIET = 1.0  # seconds for which a leader may say nothing, beyond what its ticks make of it
OLD_ROW, VERY_OLD_ROW = 5.0, 60.0  # seconds that a row may wait; a write's own client takes milliseconds


BROKER, DATABASE = ("broker", "exchange", "alarms"), ("database", "schema")
"""Checks without which nobody can use broker or database."""

BROKER_HERE, DATABASE_HERE = (*BROKER, "permissions"), (*DATABASE, "grants")
"""Those without which they cannot be used from here: others may be permitted what whoever looks is not.

But a relay mostly works as the role that looks, and without its grants none leads."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `remedy` says what to do, unless it is `ok`, or follows from what another has found.

    `after` names the checks that would explain it, were they to fail: see `causes_first`.
    """

    check: str
    level: Level
    text: str
    remedy: str | None = None
    after: tuple[str, ...] = ()


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def warning(check: str, text: str, remedy: str | None, after: tuple[str, ...] = ()) -> Finding:
    return Finding(check, "warning", text, remedy, after)


def failed(check: str, text: str, remedy: str, after: tuple[str, ...] = ()) -> Finding:
    return Finding(check, "failed", text, remedy, after)


def unchecked(
    found: Iterable[Finding], names: Iterable[str], after: tuple[str, ...], why: str = ""
) -> list[Finding]:
    """That those of `names` were not looked at of which nothing has been found: what is reported was."""
    reported = {one.check for one in found}
    left = ", ".join(name for name in names if name not in reported)
    return [warning("not checked", f"{left}: {why}" if why else left, None, after)] if left else []


def causes_first(found: Sequence[Finding]) -> list[Finding]:
    """The same, but what may follow from another that failed names that, and has no remedy of its own, which would mislead."""
    all_failed = {one.check for one in found if one.level == "failed"}
    causes = [one.check for one in found if one.level == "failed" and all_failed.isdisjoint(one.after)]

    def settled(one: Finding) -> Finding:
        cause = next((check for check in causes if check in one.after), None)
        return (
            one
            if cause is None
            else replace(one, text=f"{one.text.rstrip('.')}; see {cause} first", remedy=None)
        )

    return [settled(one) for one in found]


# Settings


def of_settings(settings: Settings) -> list[Finding]:
    """Settings that are accepted one by one, and contradict each other."""
    found = [warning("settings", text, remedy) for text, remedy in _contradictions(settings)]
    return found or [ok("settings", f"namespace {settings.namespace}; nothing contradicts itself")]


def _contradictions(settings: Settings) -> Iterable[tuple[str, str]]:
    if settings.broker_url.startswith("memory:"):
        yield "memory:// brings nothing from other processes", "set CACHEINVAL_BROKER_URL=amqp://…"
    if settings.broker_url.startswith("amqp:"):
        for name in ("broker_ca_file", "broker_cert_file", "broker_key_file"):
            if getattr(settings, name, None):
                variable = f"CACHEINVAL_{name.upper()}"
                yield (
                    f"{variable} is set, and CACHEINVAL_BROKER_URL is not amqps://",
                    f"use amqps://…, or unset {variable}",
                )
    if not settings.database_url:
        yield (
            "no database: an invalidation that is not confirmed when its process dies is lost",
            "set CACHEINVAL_DATABASE_URL, so that it is committed with the change",
        )
        if settings.max_staleness is not None:
            yield (
                "MAX_STALENESS is set without a database: no relay ticks, and no entry is served for longer than that",
                "set CACHEINVAL_DATABASE_URL, or choose CACHEINVAL_CACHE_TTL instead",
            )
    if 0 < settings.stale_if_error <= settings.cache_ttl:
        yield (
            f"STALE_IF_ERROR={settings.stale_if_error:g} is no more than CACHE_TTL={settings.cache_ttl:g}: "
            "evicted values, and those that cannot be proven, hardly ever help",
            "make it longer than the ttl",
        )
    if settings.max_clock_skew < 0.005:
        yield (
            f"MAX_CLOCK_SKEW={settings.max_clock_skew:g}: hardly two hosts' clocks agree so well",
            "allow as much as your time service promises, 0.1 by default",
        )


# The broker


def of_unreachable_broker(url: str, reason: str) -> Finding:
    """Why there is no connection, and what to do about each of the usual reasons."""
    return failed("broker", f"{url}: {reason}", remedies.broker(reason, url))


def of_lost_nodes(reasons: Mapping[str, str]) -> list[Finding]:
    """Nodes of a cluster that there is no connection to, each with the reason."""
    remedy = (
        "start it, or see the way to it; at another node `rabbitmqctl cluster_status` says how they see it"
    )
    return [
        warning("broker", f"no connection to {node}: {reason}", remedy) for node, reason in reasons.items()
    ]


def lacking(reason: str, needed: Mapping[str, str]) -> str:
    """The permission that the broker's user lacks, and on what.

    Args:
        reason: the broker's words, which name the resource, and from RabbitMQ 3.11 or so the permission too.
        needed: what was tried needs these, by the sort of resource.
    """
    told = re.search(r"(?:(configure|write|read) )?access to (exchange|queue) '([^']*)'", reason)
    if told is None:
        return " or ".join(f"{permission} on the {sort}" for sort, permission in needed.items())
    permission, sort, name = told.groups()
    return f"{permission or needed.get(sort, 'access')} on {re.sub('^amq[.]gen-.*', 'amq.gen-…', name)}"


def of_refusals(url: str, refusals: Mapping[str, str]) -> Finding:
    """Permissions that the broker's user lacks, each with the words of the broker."""
    verb = "is" if len(refusals) == 1 else "are"
    text = f"{', '.join(refusals)} {verb} not permitted: {next(iter(refusals.values()))}"
    return failed("permissions", text, remedies.set_permissions(url))


def of_refusal(url: str, reason: str, needed: Mapping[str, str]) -> Finding:
    """One of these; see `lacking`."""
    return of_refusals(url, {lacking(reason, needed): reason})


def of_dead_letters(url: str, name: str, count: int) -> Finding:
    if count == 0:
        return ok("dead letters", f"{name} is empty")
    return warning(
        "dead letters",
        f"{count} messages in {name}: nobody could understand them, and each cost every instance its cache",
        f"look at one (`rabbitmqadmin --vhost={remedies.vhost_of(url)} get queue={name}`) for who publishes it, "
        f"then `rabbitmqctl purge_queue -p {remedies.vhost_of(url)} {name}`",
    )


# The database


def of_clock(offset: float, max_skew: float) -> Finding:
    """`offset`: seconds by which the database's clock is ahead of this host's, as far as a round trip tells."""
    text = f"the database's is {abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} this host's"
    remedy = remedies.TIME_SERVICE
    if abs(offset) > max_skew:
        return failed("clock", f"{text}, accepted: {max_skew:g}: no ticks from here, and no receipts", remedy)
    if abs(offset) > max_skew / 2:
        return warning("clock", f"{text}, more than half of what is accepted ({max_skew:g})", remedy)
    return ok("clock", f"database and host agree within {max(abs(offset), 0.001):.3f} s")


def of_schema(version: int | None, known: int) -> Finding:
    """`version` is None where there is no schema."""
    if version is None:
        return failed(
            "schema",
            "the schema cacheinval is missing",
            "run `cacheinval schema apply` as the role that is to own it",
        )
    if version > known:
        text = f"the schema has version {version}, this cacheinval knows {known}, which works with it but cannot apply its own"
        return warning("schema", text, "upgrade cacheinval here")
    if version < known:
        text = f"the schema has version {version}, this cacheinval needs {known}"
        return failed("schema", text, "run `cacheinval schema apply` as its owner")
    return ok("schema", f"version {version}")


def of_rights(role: str, missing: Sequence[Right]) -> list[Finding]:
    if not missing:
        return [ok("grants", f"role {role} has what it needs")]
    return [
        failed(
            "grants",
            f"role {role} lacks {', '.join(right.privileges)} on {right.name}",
            f"{remedies.grant(role)}, or {right.grant(quoted(role))}",
        )
        for right in missing
    ]


def of_outbox(count: int, oldest: float | None) -> Finding:
    """`oldest`: seconds since the oldest row was recorded."""
    if oldest is None:
        return ok("outbox", "empty")
    text = f"{count} rows wait, the oldest for {oldest:.1f} s"
    remedy = "see leader, broker and exchange: the relay publishes what waits as soon as it can"
    if oldest > VERY_OLD_ROW:
        return failed(
            "outbox", f"{text}: their invalidations have reached nobody by the relay", remedy, BROKER
        )
    if oldest > OLD_ROW:
        return warning("outbox", text, remedy, BROKER)
    return ok("outbox", text)


def of_strays(namespaces: Sequence[str], own: str) -> list[Finding]:
    """`namespaces`: others than `own` whose rows nobody has published for long."""
    return [
        warning(
            "outbox",
            f"rows of namespace {namespace!r} wait for longer than {VERY_OLD_ROW:.0f} s: nobody relays it",
            f"run a relay with CACHEINVAL_NAMESPACE={namespace}; or, if they are meant for {own}, name that: "
            f"cacheinval.invalidate(…, namespace => '{own}'), and the same with track and record_changes",
        )
        for namespace in namespaces
    ]


def of_leader(leader: Leader | None, may_lead: bool, tick_interval: float) -> Finding:
    """`may_lead`: whether a relay of this process would."""
    if leader is not None:
        text = f"a relay leads: {_of_session(leader)}"
        if (
            leader.quiet or 0.0
        ) <= 2 * tick_interval + QUIET:  # it says something every half interval at least
            return ok("leader", text)
        return warning(
            "leader",
            f"{text}; it has said nothing to the database for {leader.quiet:.0f} s: it hangs, or its statement does",
            "restart it, and another takes over; pg_stat_activity tells what its server process "
            f"({leader.session}) waits for",
        )
    here = "" if may_lead else " (here CACHEINVAL_RELAY=off)"
    return failed(
        "leader",
        f"no relay leads{here}: what a killed process left behind stays unpublished, and no tick proves anything",
        f"{remedies.RELAY}. In services CACHEINVAL_RELAY=auto takes a direct connection to the database",
        (*BROKER, *DATABASE_HERE),  # without which a relay lets go of the lead, or never takes it
    )


def _of_session(leader: Leader) -> str:
    told = str(leader)
    if leader.since is not None:
        told += f", connected since {datetime.fromtimestamp(leader.since, UTC):%Y-%m-%d %H:%M:%S} UTC"
        told += f" from {leader.address or 'a local socket'}"
    return told if leader.pid is None else f"{told} (server process {leader.session})"


def of_tracking(incomplete: Sequence[str], untracked: Sequence[str], tracked: int) -> list[Finding]:
    """`incomplete`: tracked tables that lack some of their triggers; `untracked`: parts of tracked tables with none."""
    found = [
        failed(
            "tracked tables",
            f"{table} records only some of its changes: triggers of cacheinval.track are gone or disabled",
            f"SELECT cacheinval.track('{table}', …) again, with the template it had",
        )
        for table in incomplete
    ]
    found += [
        failed(
            "tracked tables",
            f"{part} was attached after its table was tracked, and records nothing",
            "SELECT cacheinval.track(…) on the whole table again, with the template it had",
        )
        for part in untracked
    ]
    return found or [ok("tracked tables", f"{tracked} are complete" if tracked else NONE_TRACKED)]


def tracking_doubted(found: Sequence[Finding], ids: Sequence[str], namespace: str) -> list[Finding]:
    """The same, but that tracked tables are well says little while instances, `ids`, tell of a schema that was made anew."""
    met = f"{named(ids, len(ids))} met another schema cacheinval than before, with which the triggers of tracked tables went"

    def doubted(one: Finding) -> Finding:
        if not ids or (one.check, one.level) != ("tracked tables", "ok"):
            return one
        if one.text != NONE_TRACKED:  # somebody has done it again
            return ok(one.check, f"{one.text}; if others were tracked before, track them again: {met}")
        return warning(
            one.check,
            f"{one.text}; but {met}",
            "if tables were tracked before, their changes reach nobody now: for each "
            f"`SELECT cacheinval.track('TABLE', 'TEMPLATE', namespace => '{namespace}');`, then `cacheinval invalidate --all`",
        )

    return list(map(doubted, found))
