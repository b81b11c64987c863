"""Caching what a coroutine function returns, under a key made of its arguments; and evicting it when another one has run."""

import functools
from collections.abc import Awaitable, Callable, Collection, Coroutine
from copy import deepcopy
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

from cacheinval.cache.coherent import CoherentCache
from cacheinval.cache.templates import Arguments, compiled
from cacheinval.cache.versions import VersionOf
from cacheinval.messages import check_names

__all__ = ["Cached", "CachedMethod", "cached", "invalidates"]

P = ParamSpec("P")
Q = ParamSpec("Q")
S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Evict = Callable[[Collection[str], Collection[str]], Awaitable[None]]
"""Takes keys and tags."""


class Cached(Protocol[P, T_co]):
    """A coroutine function whose results are cached, as `Client.cached` makes it.

    >>> @client.cached("price:{product_id}")
    ... async def price_of(product_id: str) -> int:
    ...     return 99

    >>> await price_of("abc-123")
    99
    """

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T_co]:
        """The cached result for these arguments, else what the function returns."""

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The key under which the result for these arguments is cached.

        >>> @client.cached("price:{product_id}")
        ... async def price_of(product_id: str) -> int:
        ...     return 99

        >>> price_of.key("abc-123")
        'price:abc-123'
        """

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, None]:
        """Evicts that result everywhere, as `Client.invalidate` does; within `Client.transaction`, when that commits.

        >>> @client.cached("price:{product_id}")
        ... async def price_of(product_id: str) -> int:
        ...     return 99

        >>> await price_of.invalidate("abc-123")
        """

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T_co]:
        """Calls the function now, and stores and returns its result. Nobody else hears of it: this is no invalidation.

        >>> @client.cached("price:{product_id}")
        ... async def price_of(product_id: str) -> int:
        ...     return 99

        >>> await price_of.refresh("abc-123")
        99
        """

    @overload
    def __get__(
        self: "Cached[Concatenate[S, Q], T]", instance: None, owner: type[S]
    ) -> "CachedMethod[S, Q, T]": ...
    @overload
    def __get__(
        self: "Cached[Concatenate[S, Q], T]", instance: S, owner: type[S] | None = None
    ) -> "BoundMethod[Q, T]": ...


class BoundMethod(Protocol[P, T_co]):
    """A method whose results are cached, of one object."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T_co]:
        """See `Cached`."""

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """See `Cached`."""

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, None]:
        """See `Cached`."""


class CachedMethod(Protocol[S_contra, P, T_co]):
    """The same, taken from its class. What is cached belongs to no object, so `key` and `invalidate` take none."""

    def __call__(self, instance: S_contra, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T_co]:
        """See `Cached`."""

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """See `Cached`."""

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, None]:
        """See `Cached`."""

    def refresh(self, instance: S_contra, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T_co]:
        """See `Cached`."""


# Functions with the parameters of the decorated one: taking any arguments, and binding them to find the key, would cost a
# hit ten times what it costs. So would an object that knows when it is bound to another one, as methods are, cost twice:
# these are functions, and have the others as attributes.
_CACHED = """\
async def read_through({declared}):
    cacheinval_key = {key}
    cacheinval_entry = cacheinval_hit(cacheinval_key)
    if cacheinval_entry is not None:
        return {value}
    return await cacheinval_load(False, cacheinval_key, {tags}, {passed})

async def refresh({declared}):
    return await cacheinval_load(True, {key}, {tags}, {passed})

def key({declared_for_key}):
    return {key}
"""

_NAMES = """\
def names({declared}):
    return {keys}, {tags}
"""


def cached(
    cache: CoherentCache,
    evict: Evict,
    key: str,
    *,
    ttl: float | None,
    tags: Collection[str],
    model: Any,
    version: VersionOf | None,
    primary: Callable[..., Awaitable[Any]] | None,
    skip_if: Callable[[Any], object] | None,
    copy: bool | Callable[[Any], Any],
    **policies: float | None,
) -> Callable[[Callable[P, Awaitable[T]]], Cached[P, T]]:
    """See `Client.cached`."""
    copied: Callable[[Any], Any] | None = deepcopy if copy is True else copy or None

    def decorate(function: Callable[P, Awaitable[T]]) -> Cached[P, T]:
        arguments = Arguments(function)

        async def load(
            refresh: bool, name: str, tags: Collection[str], /, *args: P.args, **kwargs: P.kwargs
        ) -> T:
            def loader(load: Callable[..., Awaitable[T]]) -> Callable[[], Awaitable[T]]:
                return _loader(functools.partial(load, *args, **kwargs), cache, skip_if, refresh)

            read = await cache.read(
                name,
                loader(function),
                ttl=ttl,
                tags=tags,
                model=model,
                version=version,
                primary=None if primary is None else loader(primary),
                refresh=refresh,
                **policies,
            )
            value: T = read.value
            return value if copied is None else copied(value)

        made = compiled(
            _CACHED.format(
                declared=arguments.declared,
                declared_for_key=arguments.declared_without_self(key),
                passed=arguments.passed,
                key=arguments.name(key),
                tags=arguments.names(tags, "tag"),
                value="cacheinval_entry.value"
                if copied is None
                else "cacheinval_copied(cacheinval_entry.value)",
            ),
            {
                "cacheinval_hit": cache.hit,
                "cacheinval_load": load,
                "cacheinval_copied": copied,
                **arguments.defaults,
            },
        )
        key_of = made["key"]

        async def invalidate(*args: Any, **kwargs: Any) -> None:
            await evict([key_of(*args, **kwargs)], [])

        read_through: Any = functools.wraps(function)(made["read_through"])
        read_through.key, read_through.invalidate, read_through.refresh = key_of, invalidate, made["refresh"]
        return cast(Cached[P, T], read_through)

    return decorate


def _loader(
    load: Callable[[], Awaitable[T]],
    cache: CoherentCache,
    skip_if: Callable[[Any], object] | None,
    refresh: bool,
) -> Callable[[], Awaitable[T]]:
    if skip_if is None:
        return load

    async def load_and_judge() -> T:
        value = await load()
        if skip_if(value):
            await cache.withhold(drop=refresh)
        return value

    return load_and_judge


def invalidates(
    evict: Evict, keys: Collection[str], tags: Collection[str]
) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """See `Client.invalidates`."""

    def decorate(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        arguments = Arguments(function)
        source = _NAMES.format(
            declared=arguments.declared,
            keys=arguments.names(keys, "key"),
            tags=arguments.names(tags, "tag"),
        )
        names_of = compiled(source, arguments.defaults)["names"]

        @functools.wraps(function)
        async def invalidating(*args: P.args, **kwargs: P.kwargs) -> T:
            # Before it runs: what could not be evicted is not to be changed, and what it changes in its arguments is not
            # what they were called for.
            keys, tags = names_of(*args, **kwargs)
            check_names(keys)
            check_names(tags, "tag")
            result = await function(*args, **kwargs)
            await evict(keys, tags)
            return result

        return invalidating

    return decorate
