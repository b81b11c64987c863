"""What the rules decided, counted; and the gaps that they noticed."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from cacheinval.coherence.position import Interruption
from cacheinval.coherence.proof import Break

__all__ = ["Counters", "Gap", "GapReason"]

GapReason = Literal[
    "missing messages",
    "messages missing before a tick",
    "messages missing before a beat",
    "malformed message",
    "nothing kept with the cache",
    "the cache lost what it kept",
    "clock stepped",
    Break,
    Interruption,
]


class Gap(NamedTuple):
    """When messages may have been missed, by the clock of the instance, and why."""

    at: float
    reason: str


@dataclass(slots=True)
class Counters:
    """What the rules decided, counted since the start."""

    epochs: int = 0
    gaps: int = 0
    voided_loads: int = 0
    skipped_echoes: int = 0
    unknown_messages: int = 0
    duplicates: int = 0
    below_floor: int = 0
    ticks: int = 0
    refused_ticks: int = 0
    gap_reasons: dict[GapReason, int] = field(default_factory=dict)
