"""Instances in processes of their own."""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from typing import NamedTuple, Self

from .servers import Urls

__all__ = ["Crowd", "Emptied"]

ANSWER_WITHIN = 60.0


class Emptied(NamedTuple):
    """When the last process had evicted everything, and what that took of all of them, in seconds."""

    at: float
    processor: float


class Crowd:
    """Processes of `benchmarks.instance`, which live until the end of this context."""

    def __init__(self, variant: str, size: int, namespace: str, urls: Urls) -> None:
        self._command = [sys.executable, "-m", "benchmarks.instance", variant, namespace, *urls[:2]]
        self._size = size
        self._processes: list[Process] = []

    async def __aenter__(self) -> Self:
        try:
            for _ in range(self._size):
                self._processes.append(
                    await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE)
                )
            await self._say("subscribed")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.terminate()
        await asyncio.gather(*(process.wait() for process in self._processes))

    async def fill(self, count: int) -> None:
        """Every process takes as many keys into its cache."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(b"%d\n" % count)
        await self._say("filled")

    async def emptied(self) -> Emptied:
        """Waits until every process has evicted all of it."""
        said = [line.split() for line in await self._lines()]
        return Emptied(max(float(at) for at, _ in said), sum(float(used) for _, used in said))

    async def _say(self, expected: str) -> None:
        said = set(await self._lines())
        if said != {expected}:
            raise AssertionError(f"a process said {said}, not {expected!r}")

    async def _lines(self) -> Sequence[str]:
        async with asyncio.timeout(ANSWER_WITHIN):
            return [line.decode().strip() for line in await asyncio.gather(*map(_line, self._processes))]


async def _line(process: Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.readline()
