"""Pictures of what a run found: how latencies are distributed, and how a rate scales."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Sheet
from matplotlib.ticker import FuncFormatter, NullLocator

from .measuring import percentile

__all__ = ["draw"]

OURS, PEERS, INK, PAPER = "#c2410c", "#64748b", "#1e293b", "#ffffff"
BINS_A_DECADE = 30
LABEL_APART = 0.055
"""What two names at the end of their lines are apart, in heights of the picture."""


def draw(pictures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws what there is into `folder`, as SVG: `latency` and `scaling`, or such a word and what it is about.

    Args:
        pictures: `latency`: the milliseconds of each variant; `scaling`: the rates of each variant, by N.

    Raises:
        ValueError: no picture of that name is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, found in pictures.items():
        kind, _, about = name.partition(" ")
        if kind not in _DRAWN:
            raise ValueError(f"picture {name!r}: accepted: {', '.join(_DRAWN)}, and words after that")
        with mpl.rc_context({"svg.hashsalt": "cacheinval", "svg.fonttype": "none", "font.size": 11}):
            sheet = _DRAWN[kind](found, about)
            path = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}.svg"
            sheet.savefig(path, facecolor=PAPER, bbox_inches="tight", metadata={"Date": None})
        drawn.append(path)
    return drawn


def _latency(found: Mapping[str, Sequence[float]], about: str) -> Sheet:
    """A row for each variant: its distribution, and where half and 99 of 100 lie."""
    sheet = Sheet(figsize=(9, 0.55 * len(found) + 1.2))
    axes = sheet.subplots()
    shown = [percentile(each, share) for each in found.values() for share in (0.001, 0.999)]
    low, high = math.floor(math.log10(min(shown)) * 4) / 4, math.ceil(math.log10(max(shown)) * 4) / 4
    steps = max(1, round((high - low) * BINS_A_DECADE))
    bins = [10 ** (low + at * (high - low) / steps) for at in range(steps + 1)]
    for row, (variant, latencies) in enumerate(found.items()):
        _draw_row(axes, -row, latencies, bins, _colour(variant))
    axes.set_yticks([-row for row in range(len(found))], list(found))
    for label, variant in zip(axes.get_yticklabels(), found, strict=True):
        label.set_color(_colour(variant))
    axes.set_ylim(-len(found) + 0.75, 0.95)
    axes.set_xscale("log")
    axes.set_xlim(10**low, 10**high)
    axes.set_xlabel("ms")
    _plain(axes, axes.xaxis)
    axes.set_title(_title("Latency", about, "marked: p50 and p99"), loc="left", color=INK)
    return sheet


def _draw_row(axes: Axes, y: float, latencies: Sequence[float], bins: Sequence[float], colour: str) -> None:
    counts = [0] * (len(bins) - 1)
    scale = (len(bins) - 1) / math.log(bins[-1] / bins[0])
    for latency in latencies:
        counts[min(max(0, int(math.log(latency / bins[0]) * scale)), len(counts) - 1)] += 1
    heights = [0.62 * count / max(counts) for count in counts]
    axes.fill_between(
        bins,
        y,
        [y + height for height in (*heights, heights[-1])],
        step="post",
        color=colour,
        alpha=0.35,
        lw=0,
    )
    axes.axhline(y, color=colour, lw=0.8)
    for share in (0.5, 0.99):
        value = percentile(latencies, share)
        axes.plot([value, value], [y, y + 0.66], color=colour, lw=1.8)
        axes.annotate(
            _number(value),
            (value, y + 0.66),
            (2 if share > 0.5 else -2, 0),
            textcoords="offset points",
            ha="left" if share > 0.5 else "right",
            va="center",
            fontsize=9,
            color=INK,
        )


def _scaling(found: Mapping[str, Mapping[Any, float]], about: str) -> Sheet:
    """A line for each variant, with its name at the end."""
    sheet = Sheet(figsize=(9, 5.5))
    axes = sheet.subplots()
    steps = sorted({float(n) for rates in found.values() for n in rates})
    ends: dict[str, tuple[float, float]] = {}
    for variant, rates in found.items():
        points = sorted((float(n), rate) for n, rate in rates.items())
        width = 2.6 if _is_ours(variant) else 1.4
        axes.plot(*zip(*points, strict=True), color=_colour(variant), lw=width, marker="o", ms=4)
        ends[variant] = points[-1]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(steps, [f"{n:g}" for n in steps])
    axes.set_xlabel("N")
    _plain(axes, axes.yaxis)
    axes.xaxis.set_minor_locator(NullLocator())
    for variant, y in _apart({variant: rate for variant, (_, rate) in ends.items()}, axes).items():
        axes.annotate(
            variant,
            ends[variant],
            (1.03, y),
            textcoords="axes fraction",
            va="center",
            color=_colour(variant),
            arrowprops={"arrowstyle": "-", "lw": 0.6, "ls": ":", "color": _colour(variant)},
        )
    axes.set_title(_title("Rate, a second", about), loc="left", color=INK)
    return sheet


def _apart(ends: Mapping[str, float], axes: Axes) -> dict[str, float]:
    """Where the names go: beside the ends of their lines, and never over each other."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    ordered = sorted(ends, key=lambda variant: ends[variant])
    places: dict[str, float] = {}
    last = -LABEL_APART
    for variant in ordered:
        last = places[variant] = max((math.log(ends[variant]) - low) / (high - low), last + LABEL_APART)
    excess = max(0.0, last - 1)
    return {variant: place - excess for variant, place in places.items()}


def _plain(axes: Axes, axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, at: _number(value)))
    axes.grid(axis=axis.axis_name, which="major", color="#e2e8f0", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, which="both", colors=INK)


def _is_ours(variant: str) -> bool:
    return variant.startswith("cacheinval")


def _colour(variant: str) -> str:
    return OURS if _is_ours(variant) else PEERS


def _title(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


_DRAWN = {"latency": _latency, "scaling": _scaling}
