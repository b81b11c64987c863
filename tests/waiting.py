"""Waiting for states, never for seconds."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import pytest

_T = TypeVar("_T")


class Eventually(Protocol):
    """The fixture `eventually`, for annotations."""

    async def __call__(
        self, predicate: Callable[[], _T | Awaitable[_T]], timeout: float = 30.0, *, describe: object = None
    ) -> _T: ...


async def until(
    predicate: Callable[[], _T | Awaitable[_T]], timeout: float = 30.0, *, describe: object = None
) -> _T:
    end = time.monotonic() + timeout
    pause = 0.001
    while True:
        seen: object
        try:
            value = predicate()
            if inspect.isawaitable(value):
                async with asyncio.timeout(max(0.1, end - time.monotonic())):
                    value = await value
            if value:
                return value
            seen = value
        except (AssertionError, TimeoutError) as error:
            seen = error
        if time.monotonic() > end:
            about = f" ({describe() if callable(describe) else describe})" if describe is not None else ""
            pytest.fail(f"not true within {timeout:g} s; last seen: {seen!r}{about}")
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.05)
