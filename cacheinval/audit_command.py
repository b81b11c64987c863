"""What `cacheinval audit` does: asks every live instance, says what it waits for, and prints what they found."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cacheinval.audit import LONGEST_DELAY, LOOKS_TAKE, AuditAnswer, AuditReport
from cacheinval.client import Client
from cacheinval.errors import CacheinvalError, PublishError
from cacheinval.messages import Audit, encode

__all__ = ["audit"]

PATIENCE = 5.0  # seconds for the question and the answers to travel, on a machine that is busy
QUIET = 2.0  # seconds before progress is shown
WIDEST = 10_000  # columns of a table that is not for a terminal

COUNTS = ("checked", "consistent", "settling", "inconsistent", "failed")


async def audit(
    client: Client, sample: int, delay: float | None, wait: float | None, *, as_json: bool
) -> None:
    """Has every live instance audit its cache, and prints the reports.

    Args:
        sample, delay: as in `Client.audit`.
        wait: seconds within which the reports have to arrive; as long as such audits can take if None.

    Raises:
        CacheinvalError: an entry is inconsistent, an instance did not report, or there is none.
    """
    instances = await _instances(client)
    ids = [str(instance["id"]) for instance in instances]
    answers: list[AuditAnswer] = []
    if ids:
        async with _progress(ids, wait or _longest(instances, delay)) as (seconds, heard):
            answers = await _ask(client, ids, Audit(v=1, sample=sample, delay=delay), seconds, heard)
    missing = _missing(ids, answers)
    if as_json:
        print(json.dumps(_as_json(answers, missing), ensure_ascii=False, indent=2))
    elif ids:
        _print_table(answers, missing)
    problems = _problems(client.settings.namespace, answers, missing)
    if problems:
        raise CacheinvalError("\n".join(problems))


async def _instances(client: Client) -> list[dict[str, Any]]:
    try:
        return await client.ask_instances()
    except PublishError as error:
        if "no exchange" not in str(error):
            raise
        return []  # nobody has ever subscribed


async def _ask(
    client: Client, ids: Sequence[str], question: Audit, wait: float, heard: Callable[[int], None]
) -> list[AuditAnswer]:
    """What instances answer within `wait` seconds, or until those with these `ids` have; by id."""
    answers: list[AuditAnswer] = []

    def enough(bodies: Sequence[bytes]) -> bool:
        with suppress(msgspec.DecodeError):
            answers.append(msgspec.json.decode(bodies[-1], type=AuditAnswer))
        missing = len(_missing(ids, answers))
        heard(len(ids) - missing)
        return not missing

    await client.bus.ask(encode(question), wait, enough)
    return sorted(answers, key=lambda answer: answer.id)


def _missing(ids: Sequence[str], answers: Sequence[AuditAnswer]) -> list[str]:
    # Counted: processes with a cache of their own may share an id.
    return sorted((Counter(ids) - Counter(answer.id for answer in answers)).elements())


def _longest(instances: Sequence[dict[str, Any]], delay: float | None) -> float:
    """How long an audit can take where everything differs and every loader is slow."""
    longest = min(delay or 0.0, LONGEST_DELAY)
    for instance in instances:
        known = instance.get("audit") or {}  # an older one has none, and will not answer
        longest = max(longest, float(known.get("delay" if delay is None else "least_delay", 0)))
    return longest + LOOKS_TAKE + PATIENCE


@asynccontextmanager
async def _progress(ids: Sequence[str], seconds: float) -> AsyncIterator[tuple[float, Any]]:
    """Says on stderr what is waited for; on a terminal also how it goes, when it takes longer than a moment."""
    answered = 0

    def heard(number: int) -> None:
        nonlocal answered
        answered = number

    async def tell() -> None:
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(QUIET)
        while True:
            passed = asyncio.get_running_loop().time() - began
            line = f"cacheinval: {answered} of {len(ids)} have answered, {passed:.0f} s"
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(1)

    instances = "1 instance" if len(ids) == 1 else f"{len(ids)} instances"
    print(f"cacheinval: waiting for the audit of {instances}, at most {seconds:.0f} s", file=sys.stderr)
    telling = asyncio.create_task(tell()) if sys.stderr.isatty() else None
    try:
        yield seconds, heard
    finally:
        if telling is not None:
            telling.cancel()
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _problems(namespace: str, answers: Sequence[AuditAnswer], missing: Sequence[str]) -> list[str]:
    problems = []
    if not answers and not missing:
        problems.append(f"no instance of namespace {namespace} answers")
    if missing:
        problems.append(f"no report in time from {', '.join(missing)}")
    busy = [answer.id for answer in answers if answer.report is None]
    if busy:
        problems.append(f"busy with an audit that somebody else asked for: {', '.join(busy)}")
    total = _total(answers)
    if total.inconsistent:
        problems.append(f"inconsistent: {total.inconsistent} of {total.checked} entries")
    return problems


def _total(answers: Sequence[AuditAnswer]) -> AuditReport:
    reports = [answer.report for answer in answers if answer.report is not None]
    return AuditReport(**{name: sum(getattr(report, name) for report in reports) for name in COUNTS})


def _as_json(answers: Sequence[AuditAnswer], missing: Sequence[str]) -> dict[str, Any]:
    total = asdict(_total(answers))
    del total["examples"]
    return {
        "instances": [
            {"id": answer.id, "loaders": answer.loaders, "busy": answer.report is None}
            | asdict(answer.report or AuditReport())
            for answer in answers
        ],
        "missing": list(missing),
        "total": total,
    }


def _print_table(answers: Sequence[AuditAnswer], missing: Sequence[str]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=bool(answers))
    table.add_column("INSTANCE", "total", no_wrap=True)
    total = _total(answers)
    for name in COUNTS:
        table.add_column(name.upper(), str(getattr(total, name)), no_wrap=True, justify="right")
    table.add_column("NOTE", no_wrap=True)
    for answer in answers:
        table.add_row(Text(answer.id), *_counts(answer.report), Text(_note(answer)))
    for id_ in missing:
        table.add_row(Text(id_), *_counts(None), Text("no answer", style="red"))
    # Piped, a line is as long as it has to be: nothing is cut off.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDEST)
    console.print(table)
    for answer in answers:
        for key in answer.report.examples if answer.report is not None else ():
            console.print(Text(f"inconsistent: {key!r} in {answer.id}"))


def _counts(report: AuditReport | None) -> list[Text]:
    if report is None:
        return [Text("-")] * len(COUNTS)
    return [
        Text(
            str(getattr(report, name)), style="red" if name == "inconsistent" and report.inconsistent else ""
        )
        for name in COUNTS
    ]


def _note(answer: AuditAnswer) -> str:
    if answer.report is None:
        return "busy"
    if not answer.loaders:
        return "no loaders"
    return "" if answer.report.checked else "nothing cached"
