"""What `cacheinval doctor` does: looks at all that has to be right, and says what to do about what is not."""

import asyncio
import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from cacheinval.doctor.broker import BrokerSeen, HeardTick
from cacheinval.doctor.cache import CacheSeen
from cacheinval.doctor.checking import Checks
from cacheinval.doctor.database import DatabaseSeen
from cacheinval.doctor.findings import Finding, causes_first, of_settings, tracking_doubted, warning
from cacheinval.doctor.instances import of_instances, of_tick, who_met_another_schema
from cacheinval.fleet import silent_registered
from cacheinval.settings import Settings, unknown_variables

__all__ = ["Finding", "doctor", "examine"]

WIDEST = 10_000  # columns where it is not for a terminal
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
TOLD = ("check", "level", "text", "remedy")
LOOK_WITHIN = 10.0  # seconds


async def doctor(settings: Settings, *, as_json: bool) -> bool:
    """Runs every check, and prints what they find; returns whether nothing failed."""
    found = await examine(settings)
    if as_json:
        count = {level: sum(one.level == level for one in found) for level in STYLES}
        told = [{name: getattr(one, name) for name in TOLD} for one in found]
        print(json.dumps({"findings": told, "count": count}, ensure_ascii=False, indent=2))
    else:
        _print(found)
    return all(one.level != "failed" for one in found)


async def examine(settings: Settings) -> list[Finding]:
    """Runs every check. Nothing that they find is raised, and nothing stays behind in broker, database or cache."""
    checks = Checks()
    checks.add(of_settings(settings))
    checks.add(
        warning("settings", text, "correct or unset it: nothing reads it") for text in unknown_variables()
    )
    # Each has its own, so that their findings come in one order.
    of_database, of_broker, of_cache = Checks(), Checks(), Checks()
    database = DatabaseSeen(settings, of_database) if settings.database_url else None
    broker = None if settings.broker_url.startswith("memory:") else BrokerSeen(settings, of_broker)
    cache = CacheSeen(settings, of_cache) if settings.cache_is_external else None
    async with checks.progress_of(of_database, of_broker, of_cache):
        try:
            _, _, tick = await asyncio.gather(
                database.examine() if database is not None else _nothing(),
                cache.examine() if cache is not None else _nothing(),
                broker.examine() if broker is not None else _nothing(),
            )
            if cache is not None:
                known = ([], None) if database is None else (database.registered, database.source)
                await cache.look_for_proofs(*known)
            for found in (of_broker.found, of_database.found, of_cache.found):
                checks.add(found)
            await _judge_together(settings, checks, broker, database, tick)
        finally:
            if database is not None:
                database.close()
            if cache is not None:
                await cache.close()
            if broker is not None:
                await broker.close()
    return causes_first(checks.found)


async def _nothing() -> None:
    return None


async def _judge_together(
    settings: Settings,
    checks: Checks,
    broker: BrokerSeen | None,
    database: DatabaseSeen | None,
    tick: HeardTick | None,
) -> None:
    """What can be told only by broker and database together."""
    if broker is None:
        return
    if broker.awaited_tick and database is not None:
        age, source = tick or (None, None)
        checks.add(of_tick(age, 3 * settings.tick_interval, source, database.source, database.leader))
    if broker.answered is None:
        return
    silent = silent_registered(database.registered if database is not None else [], broker.answered)
    answered = broker.answered
    checks.found = tracking_doubted(checks.found, who_met_another_schema(answered), settings.namespace)

    async def judge() -> list[Finding]:
        return of_instances(answered, silent, settings.namespace, settings.max_clock_skew)

    await checks.run("instances", LOOK_WITHIN, judge)  # what others told may be odd
    if silent:
        await checks.run("queues", LOOK_WITHIN, lambda: broker.look_for_queues(silent))


def _print(found: Sequence[Finding]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDEST)
    level, check = (max(len(getattr(one, name)) for one in found) for name in ("level", "check"))
    for one in found:
        line = Text()
        line.append(f"{one.level:{level}}  ", style=STYLES[one.level])
        line.append(f"{one.check:{check}}  {one.text}")
        console.print(line, soft_wrap=True)
        if one.remedy is not None:
            console.print(Text(" " * (level + check + 4) + f"→ {one.remedy}"), soft_wrap=True)
