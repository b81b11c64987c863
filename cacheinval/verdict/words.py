"""How numbers, names and times are written in a sentence."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime

__all__ = ["clock_time", "cut", "listed", "named", "plural", "sentence", "short"]

MOST_NAMED = 3
"""Instances that a sentence names."""

MOST_OF_A_CELL = 120
"""Characters of what somebody else says, in a table."""


def plural(number: int, noun: str) -> str:
    """`number` with its noun."""
    return f"{number:,} {noun}" if number == 1 or noun == "more" else f"{number:,} {noun}s"


def named(names: Sequence[str], of: int) -> str:
    """The first of `names`, how many more there are, and of how many."""
    return f"{listed(names)} ({len(names)} of {of} instances)" if len(names) > 1 else listed(names)


def listed(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    rest = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + rest


def short(reason: str) -> str:
    """`reason` without what it says to do, which is said elsewhere, and without a full stop."""
    return reason.partition("; a role that ")[0].rstrip(".")


def cut(text: str) -> str:
    """`text`, or as much of it as has room in a table."""
    return text if len(text) <= MOST_OF_A_CELL else f"{text[: MOST_OF_A_CELL - 1]}…"


def sentence(phrase: str) -> str:
    """`phrase` with a capital and a full stop."""
    return phrase[:1].upper() + phrase[1:].rstrip(".") + "."


def clock_time(seconds: float | None, *, parts: bool = False) -> str:
    """A moment as the log writes it, in UTC: hours, minutes and seconds, and thousandths with `parts`."""
    if seconds is None or not math.isfinite(seconds):
        return "an unknown time"
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return "an unknown time"
    return f"{moment:%H:%M:%S}" + (f".{moment.microsecond // 1000:03d}" if parts else "")
