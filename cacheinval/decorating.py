"""Caching what a coroutine function returns, under a key made of its arguments."""

import ast
import functools
import inspect
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator
from inspect import Parameter, Signature
from string import Formatter
from typing import Any, ParamSpec, TypeVar

from cacheinval.cache import CoherentCache
from cacheinval.errors import InvalidKeyError
from cacheinval.versions import VersionOf

__all__ = ["cached"]

P = ParamSpec("P")
T = TypeVar("T")

OURS = "cacheinval_"

# A function with the parameters of the decorated one: taking any arguments, and binding them to find the key, would cost a
# hit ten times what it costs.
_READ_THROUGH = """\
async def read_through({parameters}):
    cacheinval_key = {key}
    cacheinval_entry = cacheinval_hit(cacheinval_key)
    if cacheinval_entry is not None:
        return cacheinval_entry.value
    return await cacheinval_get_or_load(cacheinval_key, {arguments})
"""


def cached(
    cache: CoherentCache,
    key: str,
    *,
    ttl: float | None,
    tags: Collection[str],
    model: Any,
    version: VersionOf | None,
    primary: Callable[P, Awaitable[T]] | None,
) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """See `Client.cached`."""

    def decorate(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        signature = inspect.signature(function)
        fields = _fields(key, signature, function)
        hidden = [name for name in signature.parameters if name.startswith(OURS)]
        if hidden:
            raise ValueError(
                f"{function.__qualname__}{signature} has a parameter {hidden[0]!r}; accepted: names that do not begin with "
                f"{OURS!r}"
            )

        def get_or_load(name: str, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
            return cache.get_or_set(
                name,
                lambda: function(*args, **kwargs),
                ttl=ttl,
                tags=tags,
                model=model,
                version=version,
                primary=None if primary is None else lambda: primary(*args, **kwargs),
            )

        read_through = _compiled(
            _READ_THROUGH.format(
                parameters=_parameters(signature),
                key=_key_expression(key, fields),
                arguments=_arguments(signature),
            ),
            {"cacheinval_hit": cache.hit, "cacheinval_get_or_load": get_or_load, **_defaults(signature)},
        )
        return functools.wraps(function)(read_through)

    return decorate


def _fields(template: str, signature: Signature, function: Any) -> set[str]:
    """The parameters that `template` names."""
    try:
        fields = set(_named(template))
    except ValueError as error:
        raise InvalidKeyError(f"key template {template!r}: {error}") from None
    missing = fields - signature.parameters.keys()
    if missing:
        raise InvalidKeyError(
            f"key template {template!r} names {', '.join(sorted(map(repr, missing)))}; accepted: the arguments of "
            f"{function.__qualname__}{signature}"
        )
    return fields


def _named(template: str) -> Iterator[str]:
    for _, field, spec, _ in Formatter().parse(template):
        if field is not None:
            yield field.split(".")[0].split("[")[0]
            yield from _named(spec or "")


def _key_expression(template: str, fields: Iterable[str]) -> str:
    """The source of what `template.format(…)` would give; an f-string, unless it looks into its arguments."""
    pieces: list[ast.expr] = []
    for text, field, spec, conversion in Formatter().parse(template):
        pieces.append(ast.Constant(text))
        if field is None:
            continue
        if field not in fields or spec or conversion:
            return f"{template!r}.format({', '.join(f'{name}={name}' for name in sorted(fields))})"
        pieces.append(ast.FormattedValue(ast.Name(field), -1))
    return ast.unparse(ast.JoinedStr(pieces))


def _parameters(signature: Signature) -> str:
    return str(
        signature.replace(
            parameters=[
                one.replace(
                    annotation=Parameter.empty,
                    default=one.default
                    if one.default is Parameter.empty
                    else _Name(f"cacheinval_default_{name}"),
                )
                for name, one in signature.parameters.items()
            ],
            return_annotation=Signature.empty,
        )
    )[1:-1]


def _arguments(signature: Signature) -> str:
    forms: dict[Any, str] = {
        Parameter.VAR_POSITIONAL: "*{0}",
        Parameter.KEYWORD_ONLY: "{0}={0}",
        Parameter.VAR_KEYWORD: "**{0}",
    }
    return ", ".join(forms.get(one.kind, "{0}").format(one.name) for one in signature.parameters.values())


def _defaults(signature: Signature) -> dict[str, Any]:
    return {f"cacheinval_default_{name}": one.default for name, one in signature.parameters.items()}


class _Name:
    """Stands in a signature for a default value."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def _compiled(source: str, names: dict[str, Any]) -> Any:
    exec(compile(source, "<cached>", "exec"), names)  # noqa: S102 (made of the names of parameters alone)
    return names["read_through"]
