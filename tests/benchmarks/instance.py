"""One instance in a process of its own: python -m benchmarks.instance VARIANT NAMESPACE RABBITMQ_URL POSTGRES_URL

For each line of its input, a number, it takes as many keys into its cache and says "filled"; when all of them are evicted it
says at what time (that of `time.perf_counter`, which all processes share on Linux), and how much processor time that took.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import uvloop

from cacheinval import Client

from .fleet import LOOK_AGAIN, fill, gone, names, settings
from .peers import AioPika
from .servers import Urls

OURS = "cacheinval"


class _Cache(Protocol):
    async def fill(self, keys: list[str]) -> None: ...
    async def gone(self) -> None: ...


class _Ours:
    def __init__(self, client: Client) -> None:
        self._client = client

    async def fill(self, keys: list[str]) -> None:
        await fill(self._client, keys)

    async def gone(self) -> None:
        await gone(self._client)


class _Dictionary:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    async def fill(self, keys: list[str]) -> None:
        self.entries.update(dict.fromkeys(keys, "value"))

    async def gone(self) -> None:
        while self.entries:
            await asyncio.sleep(LOOK_AGAIN)


@asynccontextmanager
async def _subscribed(variant: str, namespace: str, urls: Urls) -> AsyncIterator[_Cache]:
    if variant == OURS:
        async with Client(settings(urls, namespace, relay="off")) as client:
            await client.wait_ready(30)
            yield _Ours(client)
    else:
        cache = _Dictionary()
        async with AioPika(urls) as peer:
            await peer.subscribe(cache.entries.__delitem__)
            yield cache


async def _main() -> None:
    variant, namespace, *urls = sys.argv[1:]
    async with _subscribed(variant, namespace, Urls(*urls)) as cache:
        print("subscribed", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            await cache.fill(names(int(line)))
            used = time.process_time()
            print("filled", flush=True)
            await cache.gone()
            print(time.perf_counter(), time.process_time() - used, flush=True)


if __name__ == "__main__":
    uvloop.run(_main())
