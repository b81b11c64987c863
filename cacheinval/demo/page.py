"""What the demo shows: in colour on a terminal, in plain aligned lines elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["Page", "good", "milliseconds", "plural", "poor"]

WIDTH = 80
INDENT = 3

Cell = str | Text


def good(text: object) -> Text:
    """`text` as something to be glad of."""
    return Text(str(text), style="green")


def poor(text: object) -> Text:
    """`text` as something to be sorry for."""
    return Text(str(text), style="red")


def milliseconds(seconds: float) -> str:
    """A duration, to three digits or to the millisecond."""
    thousandths = seconds * 1e3
    return f"{thousandths:.2f} ms" if thousandths < 10 else f"{thousandths:,.0f} ms"


def plural(number: int, noun: str, nouns: str = "") -> str:
    """`number` with its noun, which is `nouns` (or just has an s) where they are not one."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


class Page:
    """Writes the story on stdout, at most 80 columns wide.

    Args:
        console: where to write; stdout if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._console.width = min(self._console.width, WIDTH)

    def title(self, text: str, sentence: str) -> None:
        """Opens the page."""
        self._console.print(Text(text, style="bold"))
        self._indented(Text(sentence))

    def act(self, number: int, title: str, sentence: str) -> None:
        """Opens an act: what happens in it."""
        self._console.print()
        self._console.print(Text(f"{number}  {title}", style="bold cyan"))
        self._indented(Text(sentence))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Figures, one line for each of those who take part; names to the left, figures to the right."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
        self._set_off(table)

    def facts(self, facts: Sequence[tuple[str, Cell]], *, to_right: bool = True) -> None:
        """Figures that have a name each."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right" if to_right else "left", no_wrap=True)
        for name, figure in facts:
            table.add_row(Text(name), figure if isinstance(figure, Text) else Text(figure, style="bold"))
        self._set_off(table)

    def say(self, sentence: str) -> None:
        """What the figures mean."""
        self._console.print()
        self._indented(Text(sentence))

    def end(self, wrong: Sequence[object], sentence: str, next_steps: Sequence[tuple[str, str]]) -> None:
        """Closes the page: whether all went well, and where to go next."""
        self._console.print()
        if wrong:
            self._console.print(poor("Wrong prices at the end of an act:"))
            for one in wrong:
                self._indented(poor(one))
        else:
            self._console.print(good(sentence))
            self._console.print(Text("Next:", style="bold"))
            self.facts([(command, Text(what)) for command, what in next_steps], to_right=False)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Shows on a terminal, for as long as the block lasts, what is going on."""
        with self._console.status(Text(text, style="dim"), spinner="line"):
            yield

    def _set_off(self, what: RenderableType) -> None:
        self._console.print()
        self._indented(what)

    def _indented(self, what: RenderableType) -> None:
        with self._console.capture() as captured:
            self._console.print(Padding(what, (0, 0, 0, INDENT)))
        for line in captured.get().splitlines():
            self._console.out(line.rstrip(), highlight=False)  # rich fills lines up to the width
