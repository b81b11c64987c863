"""How the version of a row is taken from what a loader returned."""

from collections.abc import Callable
from typing import Any

from cacheinval.errors import CacheError

__all__ = ["VersionOf", "version_of"]

VersionOf = str | Callable[[Any], int | None]
"""The name of an attribute or of a mapping's key, or what takes the value and returns its version."""


def version_of(value: Any, version: VersionOf | None) -> int | None:
    """The version of `value`; None where the row is absent, its version unknown, or none was asked for.

    Raises:
        CacheError: there is no such attribute or key, or what is there is no integer.
    """
    if value is None or version is None:
        return None
    found = _named(value, version) if isinstance(version, str) else version(value)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
        raise CacheError(
            f"version={version!r} of a {type(value).__name__} is {found!r}; accepted: int or None"
        )
    return found


def _named(value: Any, name: str) -> Any:
    try:
        # A record of asyncpg is no Mapping by name, and a named tuple has items that are not meant.
        has_keys = hasattr(type(value), "keys") and hasattr(type(value), "__getitem__")
        return value[name] if has_keys else getattr(value, name)
    except (LookupError, AttributeError):
        raise CacheError(
            f"version={name!r}: this {type(value).__name__} has nothing of that name; accepted: an attribute, a key of "
            "a mapping, or a callable"
        ) from None
