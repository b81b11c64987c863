"""The examples in the docstrings of what users call, run as they are typed at a prompt that allows `await`."""

import ast
import doctest
import inspect
import io
import traceback
from collections.abc import AsyncIterator
from contextlib import redirect_stdout
from typing import Any

import cacheinval
import cacheinval.sqlalchemy
from cacheinval.cache.decorating import Cached

WITHOUT_EXAMPLE = {
    # Of the package's own parts: users have other names for it.
    "CoherentCache.close",
    "CoherentCache.evict",
    "CoherentCache.evict_ahead",
    "CoherentCache.evict_now",
    "CoherentCache.hit",
    "Transaction.leaves_session",
    "Transaction.named",
    "Transaction.unrecorded",
    # Seen in logs and states only, or where a broker's alarm is on.
    "BlockedError",
    "EvictionError",
    "SubscriptionError",
}
WITH_DATABASE = {
    "Client.execute",
    "Client.fetch",
    "Client.fetchrow",
    "Client.pool",
    "Client.record",
    "Client.transaction",
    "CoherentCache",
    "Receipt",
    "Receipt.complete",
    "Transaction",
    "Transaction.connection",
    "Transaction.execute",
    "Transaction.fetch",
    "Transaction.fetchrow",
    "Transaction.fetchval",
    "Transaction.invalidate",
}
WITHOUT_SCHEMA = ["SchemaMissingError", "Client.apply_schema"]
"""The second one applies it."""


def documented() -> dict[str, object]:
    """What has to have an example, by name: what is public, and the methods and properties of public classes."""
    public: dict[str, object] = {name: getattr(cacheinval, name) for name in cacheinval.__all__}
    public |= {name: getattr(cacheinval.sqlalchemy, name) for name in cacheinval.sqlalchemy.__all__}
    public["Cached"] = Cached  # what `Client.cached` makes
    return public | {
        f"{name}.{attribute}": member
        for name, value in public.items()
        if inspect.isclass(value)
        for attribute, member in vars(value).items()
        if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }


def examples(documented: object) -> list[doctest.Example]:
    """Those in a docstring."""
    return doctest.DocTestParser().get_examples(inspect.getdoc(documented) or "")


async def differences(documented: object, client: Any) -> list[str]:
    """Runs what is in a docstring, with the public names and `client`; what comes out otherwise than it says."""
    names = {name: getattr(cacheinval, name) for name in cacheinval.__all__}
    names |= {"record_changes": cacheinval.sqlalchemy.record_changes, "client": client}
    return [wrong async for wrong in _run(examples(documented), names)]


async def _run(examples: list[doctest.Example], names: dict[str, Any]) -> AsyncIterator[str]:
    checker, explained = doctest.OutputChecker(), doctest.ELLIPSIS
    for example in examples:
        printed, raised = io.StringIO(), ""
        code = compile(example.source, "<example>", "single", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        try:
            with redirect_stdout(printed):
                result = eval(code, names)
                if inspect.isawaitable(result):
                    await result
        except Exception as error:
            raised = traceback.format_exception_only(error)[-1]
        if not checker.check_output(example.exc_msg or "", raised, explained):
            yield f"{example.source}raises {raised or 'nothing'}"
        elif not example.exc_msg and not checker.check_output(example.want, printed.getvalue(), explained):
            yield f"{example.source}prints {printed.getvalue()}"
