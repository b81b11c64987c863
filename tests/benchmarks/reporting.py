"""What a run found: tables to read, the same as JSON, and the targets that did not hold."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .measuring import Figure

__all__ = ["Cell", "Report"]

Cell = Figure | str | None


@dataclass
class _Target:
    what: str
    figure: Figure
    limit: float
    at_most: bool
    unit: str

    @property
    def holds(self) -> bool:
        return self.figure.median <= self.limit if self.at_most else self.figure.median >= self.limit


@dataclass
class Report:
    """Collects tables and targets, and prints each as it comes."""

    out: Any = sys.stdout
    tables: list[dict[str, Any]] = field(default_factory=list)
    targets: list[_Target] = field(default_factory=list)
    pictures: dict[str, Any] = field(default_factory=dict)
    """What pictures are made of: by name, whatever `pictures.py` knows how to draw."""

    def table(
        self, title: str, columns: Sequence[str], rows: Mapping[str, Sequence[Cell]], note: str = ""
    ) -> None:
        """A table with a row for each variant. A figure is shown as its median, with the least and the greatest value."""
        self.tables.append(
            {
                "title": title,
                "columns": list(columns),
                "rows": {name: [_plain(cell) for cell in row] for name, row in rows.items()},
                "note": note,
            }
        )
        texts = [["", *columns], *([name, *map(_shown, row)] for name, row in rows.items())]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        self._say(f"\n{title}")
        for text in texts:
            first, *rest = (
                cell.ljust(width) if not at else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(text, widths, strict=True))
            )
            self._say("  ".join((first, *rest)).rstrip())
        if note:
            self._say(note)

    def at_most(self, what: str, figure: Figure, limit: float, unit: str = "x") -> None:
        """A target: the median of `figure` is not more than `limit`."""
        self._target(_Target(what, figure, limit, True, unit))

    def at_least(self, what: str, figure: Figure, limit: float, unit: str = "x") -> None:
        """A target: the median of `figure` is not less than `limit`."""
        self._target(_Target(what, figure, limit, False, unit))

    def _target(self, target: _Target) -> None:
        self.targets.append(target)
        verdict = "ok    " if target.holds else "MISSED"
        limit = f"{'<=' if target.at_most else '>='} {target.limit:g} {target.unit}"
        self._say(f"{verdict} {target.what}: {_shown(target.figure)} {target.unit} ({limit})")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Says in the end how long this part of a run took."""
        began = time.monotonic()
        yield
        self._say(f"   {name}: {time.monotonic() - began:.0f} s")

    def progress(self, text: str) -> None:
        """Tells somebody who watches what is going on; nobody who reads the output later."""
        if sys.stderr.isatty():
            print(f"\r\x1b[2K{text[:100]}", end="", file=sys.stderr, flush=True)

    def _say(self, line: str) -> None:
        self.progress("")
        print(line, file=self.out, flush=True)

    @property
    def missed(self) -> list[str]:
        """The targets that do not hold."""
        return [target.what for target in self.targets if not target.holds]

    def write(self, path: Path, machine: str) -> None:
        """Everything, as JSON."""
        targets = [
            {
                "what": one.what,
                "limit": one.limit,
                "at_most": one.at_most,
                "unit": one.unit,
                "holds": one.holds,
                **_plain(one.figure),
            }
            for one in self.targets
        ]
        found = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine,
            "tables": self.tables,
            "targets": targets,
            "pictures": self.pictures,
        }
        path.write_text(json.dumps(found, indent=1))


def _plain(cell: Cell) -> Any:
    if isinstance(cell, Figure):
        return {"median": cell.median, "low": cell.low, "high": cell.high, "values": list(cell.values)}
    return cell


def _shown(cell: Cell) -> str:
    if isinstance(cell, Figure):
        return f"{_number(cell.median)} ({_number(cell.low)}–{_number(cell.high)})"
    return cell or "–"


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
