"""What `cacheinval status` does: asks every live instance how it is, once or again and again, and prints a table."""

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cacheinval.client import Client
from cacheinval.errors import CacheinvalError, DatabaseError, PublishError, SchemaMissingError

__all__ = ["status", "watch"]

ANSWER_WITHIN = 1.0  # seconds
WIDEST = 10_000  # columns of a table that is not for a terminal

STYLES = {"ready": "green", "silent": "red"}
UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))

Instances = Sequence[Mapping[str, Any]]


async def status(client: Client, *, as_json: bool) -> None:
    """Asks once, and prints what is answered; what could not be found out is said on stderr.

    Raises:
        CacheinvalError: nobody can be asked.
    """
    instances, problem = await _look(client)
    if problem is not None:
        print(f"cacheinval: {problem}", file=sys.stderr)
    if as_json:
        print(json.dumps({"instances": instances}, ensure_ascii=False, indent=2))
    else:
        _console().print(_shown(client.settings.namespace, instances))


async def watch(client: Client, interval: float, *, as_json: bool) -> None:
    """Asks every `interval` seconds until cancelled: on a terminal in one place, otherwise one block after the other.

    A broker that cannot be reached does not end it. As JSON, each look is one line.
    """
    console = _console()
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    loop = asyncio.get_running_loop()
    with live or nullcontext():
        while True:
            began = loop.time()
            shown = await _block(client, min(interval, ANSWER_WITHIN), as_json)
            if live is not None:
                live.update(shown, refresh=True)
            else:
                console.print(shown, soft_wrap=as_json)
                console.file.flush()
            await asyncio.sleep(max(0.0, began + interval - loop.time()))


async def _block(client: Client, wait: float, as_json: bool) -> RenderableType:
    """One look, with the time and with what could not be found out."""
    at = time.time()
    try:
        instances, problem = await _look(client, wait)
    except CacheinvalError as error:
        instances, problem = None, str(error)
    if as_json:
        said = {"at": at, "instances": instances, "problem": problem}
        return Text(json.dumps(said, ensure_ascii=False))
    parts: list[RenderableType] = [Text(time.strftime("%H:%M:%S", time.localtime(at)), style="dim")]
    if problem is not None:
        parts.append(Text(problem, style="red"))
    if instances is not None:
        parts.append(_shown(client.settings.namespace, instances))
    return Group(*parts, Text(""))


async def _look(client: Client, wait: float = ANSWER_WITHIN) -> tuple[Instances, str | None]:
    """Who answers and who should, by id; and why it is not known who should, where that is so."""
    try:
        instances = await client.ask_instances(wait)
    except PublishError as error:
        if "no exchange" not in str(error):
            raise
        instances = []  # nobody has ever subscribed
    problem = None
    try:
        instances += await client.silent_instances(instances)
    except SchemaMissingError:
        pass  # so nobody is registered
    except DatabaseError as error:
        problem = f"which instances are registered is unknown: {error}"
    return sorted(instances, key=lambda instance: str(instance["id"])), problem


def _console() -> Console:
    # Piped, a line is as long as it has to be: nothing is cut off.
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDEST)


def _shown(namespace: str, instances: Instances) -> RenderableType:
    if not instances:
        return Text(f"no instance of namespace {namespace} answers")
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
    counters = instance.get("counters") or {}
    return [
        Text(str(instance["id"])),
        Text(_or_dash(instance.get("host"))),
        Text(_or_dash(instance.get("version"))),
        Text(state, style=STYLES.get(state, "yellow")),
        Text(_or_dash(instance.get("watermark_age"), "{:.1f} s")),
        Text(_or_dash(instance.get("queue_depth"))),
        Text(_or_dash(instance.get("hit_ratio"), "{:.1%}")),
        Text(_or_dash((counters.get("cache") or {}).get("evicted_entries"))),
        Text(_last_gap(instance)),
        Text(str(instance.get("reason") or instance.get("tick_refused") or "")),
    ]


def _or_dash(value: object, form: str = "{}") -> str:
    return "-" if value is None else form.format(value)


def _last_gap(instance: Mapping[str, Any]) -> str:
    gap = instance.get("last_gap")
    if not gap:
        return "-"
    # Both by the clock of that instance, whatever the one here says.
    return f"{ago(instance['now'] - gap['at'])} ago: {gap['reason']}"


def ago(seconds: float) -> str:
    """A duration in the largest unit of which there is one, rounded down."""
    for size, unit in UNITS:
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return "0 s"
