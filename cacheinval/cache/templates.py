"""Names made of a function's arguments, compiled into functions that take the same arguments."""

import ast
import inspect
from collections.abc import Callable, Collection, Iterator
from inspect import Parameter, Signature
from string import Formatter
from typing import Any

from cacheinval.errors import InvalidKeyError
from cacheinval.messages import check_names

__all__ = ["Arguments", "compiled"]

OURS = "cacheinval_"


class Arguments:
    """The parameters of a coroutine function, as pieces of source.

    Raises:
        TypeError: it is no coroutine function.
        ValueError: a parameter has a name that the compiled functions use themselves.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = getattr(function, "__qualname__", repr(function))
        if not inspect.iscoroutinefunction(function) and not inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 (an object with such a method is as good)
        ):
            raise TypeError(
                f"{self._name} is no coroutine function; accepted: async def without yield, below @staticmethod or "
                "@classmethod if there is one"
            )
        self._signature = inspect.signature(function)
        hidden = [name for name in self._signature.parameters if name.startswith(OURS)]
        if hidden:
            raise ValueError(
                f"{self._name}{self._signature} has a parameter {hidden[0]!r}; accepted: names that do not begin with "
                f"{OURS!r}"
            )
        self.declared = _declared(self._signature)
        self.passed = _passed(self._signature)
        self.defaults = {
            f"cacheinval_default_{name}": one.default for name, one in self._signature.parameters.items()
        }

    def declared_without_self(self, template: str) -> str:
        """The same as `declared`, without a first parameter that is called self or cls and not named by `template`."""
        parameters = list(self._signature.parameters.values())
        if parameters and parameters[0].name in {"self", "cls"} - self._fields(template, "key"):
            return _declared(self._signature.replace(parameters=parameters[1:]))
        return self.declared

    def name(self, template: str, what: str = "key") -> str:
        """An expression for what `template.format(…)` would give: an f-string, unless it looks into the arguments.

        Raises:
            InvalidKeyError: it names something that is no argument, or could never be the name of an entry.
        """
        fields = self._fields(template, what)
        pieces: list[ast.expr] = []
        for text, field, spec, conversion in Formatter().parse(template):
            pieces.append(ast.Constant(text))
            if field is None:
                continue
            if field not in fields or spec or conversion:
                return f"{template!r}.format({', '.join(f'{name}={name}' for name in sorted(fields))})"
            pieces.append(ast.FormattedValue(ast.Name(field), -1))
        return ast.unparse(ast.JoinedStr(pieces))

    def names(self, templates: Collection[str], what: str) -> str:
        """An expression for the tuple of what these give; see `name`."""
        checked = check_names(templates, f"{what} template")
        return "(" + "".join(f"{self.name(template, what)}, " for template in checked) + ")"

    def _fields(self, template: str, what: str) -> set[str]:
        check_names((template,), f"{what} template")
        try:
            fields = set(_named(template))
        except ValueError as error:
            raise InvalidKeyError(f"{what} template {template!r} of {self._name}: {error}") from None
        missing = fields - self._signature.parameters.keys()
        if missing:
            raise InvalidKeyError(
                f"{what} template {template!r} names {', '.join(sorted(map(repr, missing)))}; accepted: the arguments "
                f"of {self._name}{self._signature}"
            )
        return fields


def _named(template: str) -> Iterator[str]:
    for _, field, spec, _ in Formatter().parse(template):
        if field is not None:
            yield field.split(".")[0].split("[")[0]
            yield from _named(spec or "")


def _declared(signature: Signature) -> str:
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


def _passed(signature: Signature) -> str:
    forms: dict[Any, str] = {
        Parameter.VAR_POSITIONAL: "*{0}",
        Parameter.KEYWORD_ONLY: "{0}={0}",
        Parameter.VAR_KEYWORD: "**{0}",
    }
    return ", ".join(forms.get(one.kind, "{0}").format(one.name) for one in signature.parameters.values())


class _Name:
    """Stands in a signature for a default value."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def compiled(source: str, names: dict[str, Any]) -> dict[str, Any]:
    """What `source` defines, which is made of the names of parameters and of templates alone."""
    exec(compile(source, "<cacheinval>", "exec"), names)  # noqa: S102 (as said)
    return names
