"""Instances in processes of their own."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Self

from .servers import Urls

__all__ = ["Crowd", "Emptied"]

ANSWER_WITHIN = 60.0
LONGEST_ANSWER = 1 << 26


class Emptied(NamedTuple):
    """What it took until everything was evicted everywhere."""

    times: dict[str, float]
    """When each key was evicted from the last cache (of `time.perf_counter`, which all processes share on Linux)."""
    processor: float
    """Seconds of it, of all these processes together."""

    @property
    def at(self) -> float:
        """When the last key was evicted from the last cache."""
        return max(self.times.values())


class Crowd:
    """As many processes of `benchmarks.instance`, which live until the end of this context."""

    def __init__(self, size: int, urls: Urls) -> None:
        self._command = [sys.executable, "-m", "benchmarks.instance", str(size), *urls]
        self._size = size
        self._process: Process

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, stdout=PIPE, limit=LONGEST_ANSWER
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # which ends them
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            raise

    @asynccontextmanager
    async def subscribed(self, variant: str, namespace: str) -> AsyncIterator[None]:
        """Each process is an instance of this variant until the end of this context."""
        await self._say("subscribed", "open", variant, namespace)
        yield
        await self._say("closed", "close")

    async def fill(self, count: int) -> None:
        """Every process takes as many keys into its cache."""
        await self._say("filled", "fill", str(count))

    async def emptied(self) -> Emptied:
        """Waits until every process has evicted all of it."""
        said = await self._ask("wait")
        keys = said[0]["times"]
        return Emptied(
            {key: max(each["times"][key] for each in said) for key in keys},
            sum(each["processor"] for each in said),
        )

    async def _say(self, expected: str, *command: str) -> None:
        said = set(await self._ask(*command))
        if said != {expected}:
            raise AssertionError(f"a process said {said} to {command}, not {expected!r}")

    async def _ask(self, *command: str) -> list[Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join(command).encode() + b"\n")
        async with asyncio.timeout(ANSWER_WITHIN):
            answers: list[Any] = json.loads(await self._process.stdout.readline())
        if None in answers:
            raise AssertionError(f"a process has ended at {command}")
        return answers
