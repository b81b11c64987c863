"""Instances in processes of their own: python -m benchmarks.instance SIZE RABBITMQ_URL POSTGRES_URL REDIS_URL

As many processes are forked once everything is imported, so that sixty-four are there as fast as one, and small. Each line
of input goes to all of them, and each line of output is a JSON list of what they answer (null where one has ended):

    open VARIANT NAMESPACE   subscribes, as cacheinval or as one of the peers; eight at a time
    fill COUNT               takes as many keys into the cache
    wait                     waits until all of them are evicted: see `Emptied`
    close                    ends the subscription
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import IO, Any, Protocol

import uvloop

from cacheinval import Client

from .fleet import fill, gone, names, note_evictions, settings
from .peers import PEERS
from .servers import Urls

OURS = "cacheinval"
AT_A_TIME = 8
"""Who connect to the servers."""
EVICTED_WITHIN = 50.0


class _Cache(Protocol):
    async def fill(self, keys: list[str]) -> None: ...
    async def gone(self) -> None:
        """Raises AssertionError where the cache is not empty, or something else has emptied it."""


class _Ours:
    def __init__(self, client: Client, evicted: Callable[[str], None]) -> None:
        self._client = client
        self._evicted = evicted
        self._notes = False

    async def fill(self, keys: list[str]) -> None:
        await fill(self._client, keys)
        if not self._notes:  # what was evicted before was nothing that a cache held
            note_evictions(self._client, self._evicted)
        self._notes = True

    async def gone(self) -> None:
        await gone(self._client)


class _Dictionary:
    def __init__(self, evicted: Callable[[str], None]) -> None:
        self._entries: dict[str, str] = {}
        self._evicted = evicted

    def evict(self, key: str) -> None:
        del self._entries[key]
        self._evicted(key)

    async def fill(self, keys: list[str]) -> None:
        self._entries.update(dict.fromkeys(keys, "value"))

    async def gone(self) -> None:
        assert not self._entries


@asynccontextmanager
async def _subscribed(
    variant: str, namespace: str, urls: Urls, evicted: Callable[[str], None]
) -> AsyncIterator[_Cache]:
    if variant == OURS:
        async with Client(settings(urls, namespace, relay="off")) as client:
            await client.wait_ready(30)
            yield _Ours(client, evicted)
    else:
        cache = _Dictionary(evicted)
        async with PEERS[variant](urls, publishes=False) as peer:
            await peer.subscribe(cache.evict)
            yield cache


class _Process:
    def __init__(self, urls: Urls) -> None:
        self._urls = urls
        self._stack = AsyncExitStack()
        self._times: dict[str, float] = {}
        self._filled = 0
        self._empty = asyncio.Event()
        self._cache: _Cache
        self._used = 0.0

    async def open(self, variant: str, namespace: str) -> str:
        subscribed = _subscribed(variant, namespace, self._urls, self._note)
        self._cache = await self._stack.enter_async_context(subscribed)
        return "subscribed"

    def _note(self, key: str) -> None:
        self._times[key] = time.perf_counter()
        if len(self._times) == self._filled:
            self._empty.set()

    async def fill(self, count: str) -> str:
        self._filled = int(count)
        await self._cache.fill(names(self._filled))
        self._times.clear()
        self._empty.clear()
        self._used = time.process_time()
        return "filled"

    async def wait(self) -> dict[str, Any]:
        async with asyncio.timeout(EVICTED_WITHIN):
            await self._empty.wait()
        processor = time.process_time() - self._used
        await self._cache.gone()
        return {"processor": processor, "times": self._times}

    async def close(self) -> str:
        await self._stack.aclose()
        return "closed"


async def _serve(urls: Urls, asked: IO[str], answers: IO[str]) -> None:
    process = _Process(urls)
    while line := await asyncio.to_thread(asked.readline):
        command, *arguments = line.rstrip("\n").split("\t")
        print(json.dumps(await getattr(process, command)(*arguments)), file=answers, flush=True)


def _fork(urls: Urls, others: list[IO[str]]) -> tuple[IO[str], IO[str]]:
    """One more process; what it reads and what it writes."""
    (asked, ask), (answer, answers) = os.pipe(), os.pipe()
    if os.fork():
        os.close(asked)
        os.close(answers)
        return os.fdopen(ask, "w"), os.fdopen(answer)
    try:
        for theirs in others:  # else nobody sees the end of its input
            theirs.close()
        for mine in (ask, answer):
            os.close(mine)
        uvloop.run(_serve(urls, os.fdopen(asked), os.fdopen(answers, "w")))
    except BaseException as error:
        print(f"{error!r}", file=sys.stderr)
        raise
    finally:
        os._exit(0)


def _main() -> None:
    size, *urls = sys.argv[1:]
    processes: list[tuple[IO[str], IO[str]]] = []
    for _ in range(int(size)):
        processes.append(_fork(Urls(*urls), [end for process in processes for end in process]))
    for line in sys.stdin:
        answers, together = [], AT_A_TIME if line.startswith("open") else len(processes)
        for at in range(0, len(processes), together):
            some = processes[at : at + together]
            for ask, _ in some:
                with suppress(BrokenPipeError):
                    print(line, end="", file=ask, flush=True)
            answers += [json.loads(answer.readline() or "null") for _, answer in some]
        print(json.dumps(answers), flush=True)
    for ask, _ in processes:
        with suppress(BrokenPipeError):
            ask.close()
    for _ in processes:
        os.wait()


if __name__ == "__main__":
    _main()
