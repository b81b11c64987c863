"""What the code logs, as its source has it."""

import ast
from collections.abc import Iterator
from pathlib import Path

__all__ = ["logged"]

LOUD = {"WARNING", "ERROR", "CRITICAL"}
FUNCTIONS = {"event": (-2, -1), "_tell": (0, 1)}  # where a call has its level and its text

Function = ast.FunctionDef | ast.AsyncFunctionDef


def logged(folder: Path) -> set[str]:
    """The text of every line that modules in `folder` log at WARNING or above, whatever may decide on that when they run."""
    return {text for path in folder.glob("**/*.py") for text in _Module(ast.parse(path.read_text())).texts()}


class _Module:
    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree

    def texts(self) -> Iterator[str]:
        for node in ast.walk(self._tree):
            if (
                isinstance(node, ast.Tuple)
                and len(node.elts) == 2
                and self._levels(node.elts[0], None) & LOUD
            ):
                yield from self._constants(node.elts[1], None)
        for function in ast.walk(self._tree):
            if isinstance(function, Function):
                for node in ast.walk(function):
                    if isinstance(node, ast.Call):
                        yield from self._of_call(node, function)

    def _of_call(self, call: ast.Call, function: Function) -> Iterator[str]:
        name = _name(call)
        if name in ("exception", "warning", "error", "critical") and _of_logger(call):
            yield from self._constants(call.args[0], function)
        elif name in FUNCTIONS and len(call.args) >= 2:
            level, text = (call.args[place] for place in FUNCTIONS[name])
            if self._levels(level, function) & LOUD:
                yield from self._constants(text, function)

    def _levels(self, value: ast.expr, function: Function | None) -> set[str]:
        return {
            node.attr
            for one in self._meant(value, function)
            for node in ast.walk(one)
            if isinstance(node, ast.Attribute)
        }

    def _constants(self, value: ast.expr, function: Function | None) -> Iterator[str]:
        for one in self._meant(value, function):
            for branch in (one.body, one.orelse) if isinstance(one, ast.IfExp) else (one,):
                if isinstance(branch, ast.Constant) and isinstance(branch.value, str):
                    yield branch.value

    def _meant(self, value: ast.expr, function: Function | None) -> Iterator[ast.expr]:
        """What a name may stand for: what is assigned to it in the function, or given to its parameter in the module."""
        if not isinstance(value, ast.Name) or function is None:
            yield value
            return
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and any(_is(target, value.id) for target in node.targets):
                yield node.value
        parameters = [argument.arg for argument in function.args.args if argument.arg != "self"]
        if value.id in parameters and function.name not in FUNCTIONS:  # whose calls are looked at themselves
            for node in ast.walk(self._tree):
                if isinstance(node, ast.Call) and _name(node) == function.name:
                    yield from node.args[parameters.index(value.id) :][:1]


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _of_logger(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in ("log", "_log")


def _is(target: ast.expr, name: str) -> bool:
    return isinstance(target, ast.Name) and target.id == name
