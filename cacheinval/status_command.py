"""What `cacheinval status` does: asks every live instance how it is, once or again and again, and says what follows."""

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cacheinval.client import Client
from cacheinval.errors import DatabaseError, PublishError
from cacheinval.fleet import known_by_name, silent_registered
from cacheinval.overview import Overview
from cacheinval.verdict import Fleet, Level, Verdict, judge
from cacheinval.verdict.fleet import SILENT_AFTER, Condition
from cacheinval.verdict.reports import understand
from cacheinval.verdict.words import cut

__all__ = ["status", "watch"]

ANSWER_WITHIN = 1.0  # seconds
WIDEST = 10_000  # columns of a table that is not for a terminal

STYLES = {"ready": "green", "silent": "red"}
LEVELS = {Level.WARNING: "bold yellow", Level.BAD: "bold red"}
UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))

Instances = Sequence[Mapping[str, Any]]


async def status(client: Client, *, as_json: bool) -> bool:
    """Asks once, and prints the verdict and what is answered; returns whether anybody could be asked."""
    look = await _look(client, Fleet(None, patience=0.0), ANSWER_WITHIN)
    if as_json:
        print(json.dumps(look.as_json(), ensure_ascii=False, indent=2))
    else:
        _console().print(look.shown())
    return look.problem is None


async def watch(client: Client, interval: float, *, as_json: bool) -> None:
    """Asks every `interval` seconds until cancelled: on a terminal in one place, otherwise one block after the other.

    A broker that cannot be reached does not end it. As JSON, each look is one line.
    """
    console = _console()
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    loop = asyncio.get_running_loop()
    fleet = Fleet(None, patience=max(SILENT_AFTER, 1.5 * interval), missed_after=0.0)
    with live or nullcontext():
        while True:
            began = loop.time()
            shown = await _block(client, fleet, min(interval, ANSWER_WITHIN), as_json)
            if live is not None:
                live.update(shown, refresh=True)
            else:
                console.print(shown, soft_wrap=as_json)
                console.file.flush()
            await asyncio.sleep(max(0.0, began + interval - loop.time()))


async def _block(client: Client, fleet: Fleet, wait: float, as_json: bool) -> RenderableType:
    """One look, with the time."""
    at = time.time()
    look = await _look(client, fleet, wait)
    fleet.forget(at)
    if as_json:
        return Text(json.dumps({"at": at, **look.as_json()}, ensure_ascii=False))
    return Group(Text(time.strftime("%H:%M:%S", time.localtime(at)), style="dim"), look.shown(), Text(""))


@dataclass(frozen=True, slots=True)
class _Look:
    """Who answers and who should, by id, and what follows from it."""

    instances: Instances
    verdict: Verdict
    problem: str | None
    """Why nobody can be asked."""

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": asdict(self.verdict),
            "instances": None if self.problem is not None and not self.instances else self.instances,
            "problem": self.problem,
        }

    def shown(self) -> RenderableType:
        parts = [_said(self.verdict)]
        if self.instances:
            parts.append(_table(self.instances))
        return Group(*parts)


async def _look(client: Client, fleet: Fleet, wait: float) -> _Look:
    began = time.time()
    problem = None
    try:
        answered = await client.ask_instances(wait)
    except PublishError as error:
        answered, problem = [], str(error)
    answered_at = time.time()
    overview = await _overview(client)
    now = time.time()
    here = understand(client.status())
    assert here is not None, "a process understands itself"
    if overview is not None:
        fleet.looked(overview, began)
    fleet.asked(problem, began)
    for one in answered:
        fleet.heard(one, answered_at)
    fleet.asked(fleet.problem, answered_at)
    if isinstance(overview, Overview):
        answered += _unheard(overview, answered, fleet, now)
    instances = sorted(answered, key=lambda instance: str(instance["id"]))
    return _Look(instances, judge(fleet, here, now), fleet.problem)


def _unheard(overview: Overview, answered: Instances, fleet: Fleet, now: float) -> list[dict[str, Any]]:
    """Those that are registered and have not answered, each called as the verdict calls it."""
    silent = {member.id for member in fleet if fleet.condition(member, now) is Condition.SILENT}
    found = []
    for one in silent_registered(overview.settled, answered):
        if fleet.problem is not None:
            found.append(known_by_name(one, "not asked", "nobody could be asked"))
        elif one.id in silent:
            found.append(known_by_name(one, "silent", "does not answer"))
        else:
            found.append(known_by_name(one, "unknown", "has not answered just now"))
    return found


async def _overview(client: Client) -> Overview | str | None:
    """What the database says; or why it cannot be used. None where there is none."""
    if client.outlook.overview is None:
        return None
    try:
        return await client.outlook.overview()
    except DatabaseError as error:
        return str(error)


def _console() -> Console:
    # Piped, a line is as long as it has to be: nothing is cut off.
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDEST)


def _said(verdict: Verdict) -> RenderableType:
    if verdict.level is Level.GOOD:
        return Text(f"{verdict.sentence.rstrip('.')}: {verdict.detail}", style="green")
    lines = [Text(verdict.sentence, style=LEVELS[verdict.level])]
    lines += [Text(verdict.detail)] if verdict.detail else []
    lines += [Text(f"→ {step}") for step in verdict.todo]
    return Group(*lines)


def _table(instances: Instances) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("INSTANCE", "HOST", "VERSION", "STATE"):
        table.add_column(column, no_wrap=True)
    for column in ("WATERMARK AGE", "QUEUE", "HIT RATIO", "EVICTIONS"):
        table.add_column(column, no_wrap=True, justify="right")
    table.add_column("LAST GAP", overflow="fold")
    table.add_column("REASON", overflow="fold")
    for instance in instances:
        table.add_row(*_row(instance))
    return table


def _row(instance: Mapping[str, Any]) -> list[Text]:
    state = str(instance["state"])
    counters = _within(_within(instance, "counters"), "cache")
    return [
        Text(str(instance["id"])),
        Text(_or_dash(instance.get("host"))),
        Text(_or_dash(instance.get("version"))),
        Text(state, style=STYLES.get(state, "yellow")),
        Text(_or_dash(instance.get("watermark_age"), "{:.1f} s")),
        Text(_or_dash(instance.get("queue_depth"))),
        Text(_or_dash(instance.get("hit_ratio"), "{:.1%}")),
        Text(_or_dash(counters.get("evicted_entries"))),
        Text(_last_gap(instance)),
        Text(str(instance.get("reason") or instance.get("tick_refused") or "")),
    ]


def _or_dash(value: object, form: str = "{}") -> str:
    if value is None:
        return "-"
    try:
        return form.format(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def _within(instance: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What is told there; nothing where another version tells something else."""
    part = instance.get(name)
    return part if isinstance(part, Mapping) else {}


def _last_gap(instance: Mapping[str, Any]) -> str:
    gap = _within(instance, "last_gap")
    if not gap:
        return "-"
    try:
        # Both by the clock of that instance, whatever the one here says.
        when = f"{ago(instance['now'] - gap['at'])} ago"
    except (KeyError, TypeError, ValueError, OverflowError):
        when = "at an unknown time"
    return f"{when}: {cut(str(gap.get('reason')))}"


def ago(seconds: float) -> str:
    """A duration in the largest unit of which there is one, rounded down."""
    for size, unit in UNITS:
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return "0 s"
