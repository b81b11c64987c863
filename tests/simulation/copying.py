"""Copies of worlds, many times faster than pickling or `copy.deepcopy`: what cannot change is shared.

How an object is copied is written out, as code, when the first of its type is met: all of a type have the same attributes.
Lists, sets and dictionaries are held in one place, objects may be held in several. `test_copying.py` asks whether that is so.
"""

import copy
import enum
import types
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

__all__ = ["SHARED", "attributes", "copied"]

Memo = dict[int, Any]
Way = Callable[[Any, Memo], Any]

SHARED: set[type] = {
    bool,
    bytes,
    float,
    frozenset,
    int,
    str,
    type,
    type(None),
    types.FunctionType,
    types.ModuleType,
    uuid.UUID,
}
"""What is of these types cannot change; tuples, and what is frozen, join them as they are met."""


def copied(world: Any) -> Any:
    """A world that shares nothing with `world` that may change. Tuples are taken to hold what does not."""
    return _WAYS[type(world)](world, {})


class _Ways(dict[type, Way]):
    """How values of a type are copied."""

    def __missing__(self, kind: type) -> Way:
        way = self[kind] = _way(kind)
        return way


def _way(kind: type) -> Way:
    if _frozen(kind) or issubclass(kind, enum.Enum | tuple):
        SHARED.add(kind)
        return _shared
    if issubclass(kind, dict | list | set):
        return copy.deepcopy
    return _first_of_its_type


def _frozen(kind: type) -> bool:
    how = getattr(kind, "__dataclass_params__", None) or getattr(kind, "__struct_config__", None)
    return how is not None and how.frozen


def attributes(value: Any) -> Iterable[str]:
    """The names of what an object holds."""
    if isinstance(value, msgspec.Struct):
        return value.__struct_fields__
    slots = [name for base in type(value).__mro__ for name in vars(base).get("__slots__", ())]
    return slots or vars(value)


def _shared(value: Any, memo: Memo) -> Any:
    return value


def _set(value: set[Any], memo: Memo) -> set[Any]:
    return value.copy()


def _list(value: list[Any], memo: Memo) -> list[Any]:
    return [held if type(held) in SHARED else _WAYS[type(held)](held, memo) for held in value]


def _dict(value: dict[Any, Any], memo: Memo) -> dict[Any, Any]:
    new = value.copy()
    for name, held in value.items():
        if type(held) not in SHARED:
            new[name] = _WAYS[type(held)](held, memo)
    return new


def _first_of_its_type(value: Any, memo: Memo) -> Any:
    way = _WAYS[type(value)] = _written(type(value), attributes(value))
    return way(value, memo)


def _written(kind: type, names: Iterable[str]) -> Way:
    made = "value.__copy__()" if issubclass(kind, msgspec.Struct) else "make(kind)"
    lines = [
        "def way(value, memo):",
        "    at = id(value)",
        "    if at in memo:",
        "        return memo[at]",
        f"    new = memo[at] = {made}",
    ]
    for name in names:
        lines.append(f"    held = value.{name}")
        lines.append(f"    new.{name} = held if type(held) in SHARED else ways[type(held)](held, memo)")
    lines.append("    return new")
    scope: dict[str, Any] = {"kind": kind, "make": object.__new__, "SHARED": SHARED, "ways": _WAYS}
    exec("\n".join(lines), scope)
    return scope["way"]  # type: ignore[no-any-return]


_WAYS = _Ways({dict: _dict, list: _list, set: _set, OrderedDict: _dict})
