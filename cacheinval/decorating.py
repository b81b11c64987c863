"""Caching what a coroutine function returns, under a key made of its arguments."""

import functools
import inspect
from collections.abc import Awaitable, Callable, Collection, Coroutine
from string import Formatter
from typing import Any, ParamSpec, TypeVar

from cacheinval.cache import CoherentCache
from cacheinval.errors import InvalidKeyError
from cacheinval.versions import VersionOf

__all__ = ["cached"]

P = ParamSpec("P")
T = TypeVar("T")


def cached(
    cache: Callable[[], CoherentCache],
    key: str,
    *,
    ttl: float | None,
    tags: Collection[str],
    model: Any,
    version: VersionOf | None,
    primary: Callable[P, Awaitable[T]] | None,
) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """See `Client.cached`; `cache` gives the cache when the function is called."""

    def decorate(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        signature = inspect.signature(function)
        _check_template(key, signature, function)

        @functools.wraps(function)
        async def read_through(*args: P.args, **kwargs: P.kwargs) -> T:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return await cache().get_or_set(
                key.format(**bound.arguments),
                lambda: function(*args, **kwargs),
                ttl=ttl,
                tags=tags,
                model=model,
                version=version,
                primary=None if primary is None else lambda: primary(*args, **kwargs),
            )

        return read_through

    return decorate


def _check_template(key: str, signature: inspect.Signature, function: Any) -> None:
    try:
        names = {
            field.split(".")[0].split("[")[0]
            for _, field, _, _ in Formatter().parse(key)
            if field is not None
        }
    except ValueError as error:
        raise InvalidKeyError(f"key template {key!r}: {error}") from None
    missing = names - signature.parameters.keys()
    if missing:
        raise InvalidKeyError(
            f"key template {key!r} names {', '.join(sorted(map(repr, missing)))}; accepted: the arguments of "
            f"{function.__qualname__}{signature}"
        )
