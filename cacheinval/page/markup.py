"""HTML in which nothing is markup that was not written here."""

import math
from html import escape

__all__ = ["NOTHING", "Html", "html", "joined", "milliseconds", "printable", "seconds"]

NOTHING = "\N{EN DASH}"
"""Where nothing is known."""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def html(template: str, **values: object) -> Html:
    """`template` with its `{names}` filled in; whatever is not `Html` is text, and is escaped."""
    filled = {
        name: value if isinstance(value, Html) else escape(printable(str(value)))
        for name, value in values.items()
    }
    return Html(template.format_map(filled))


def joined(parts: "list[Html]") -> Html:
    """One after the other."""
    return Html("".join(parts))


def printable(text: str) -> str:
    """`text` with all that cannot be seen, or that turns the order of what is seen, written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def seconds(age: float | None) -> str:
    """A duration, as exact as one wants to know it."""
    if age is None or not math.isfinite(age):
        return NOTHING
    if age < 9.95:
        return f"{max(0.0, age):.1f} s"
    if age < 120:
        return f"{age:.0f} s"
    if age < 7200:
        return f"{age / 60:.0f} min"
    return f"{age / 3600:.0f} h" if age < 172_800 else f"{age / 86400:.0f} d"


def milliseconds(duration: float) -> str:
    """A short duration, to two digits or three."""
    thousandths = duration * 1e3
    if thousandths < 10:
        return f"{thousandths:.1f} ms"
    return f"{thousandths:.0f} ms" if thousandths < 10_000 else seconds(duration)
