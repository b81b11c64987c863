"""Loads in the background, which nobody waits for: of what is past its ttl, and of hot keys that were evicted."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable
from contextvars import Context
from functools import partial
from typing import Any

from cacheinval.coherence.warming import Hot, Warming
from cacheinval.tasks import STOP_TIMEOUT

__all__ = ["Reloads", "Warmer", "WarmingCounters"]

MOST_WARMING = 4
"""Keys that are warmed at a time, so that most places are left to those who wait for theirs."""

TRY_LATER = 0.05
MAY_NOT_YET = 1.0
"""Seconds for which warming is put off where all of that run, and where what it stores would not be served."""

Failed = Callable[[str, Exception], None]


class Reloads:
    """Owns the tasks of reloads, at most one of a key, and sees how they end.

    Args:
        failed: told the key and the error of a reload that failed.
        most: how many there are at a time, whether they run or wait for a place.
    """

    def __init__(self, failed: Failed, most: int) -> None:
        self._failed = failed
        self._most = most
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._closed = False

    def start(self, key: str, reload: Callable[[], Coroutine[Any, Any, object]]) -> bool:
        """Begins to run `reload`; False where one of `key` runs already, or too many do."""
        if key in self._tasks or self.full or self._closed:
            return False
        task = self._tasks[key] = asyncio.create_task(reload(), name=f"cacheinval reload of {key}")
        task.add_done_callback(partial(self._ended, key))
        return True

    def _ended(self, key: str, task: "asyncio.Task[object]") -> None:
        del self._tasks[key]
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._failed(key, error)

    @property
    def full(self) -> bool:
        """Whether no other one may begin."""
        return len(self._tasks) >= self._most

    def __len__(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Cancels what runs, and waits until it has ended, for at most `STOP_TIMEOUT` seconds; nothing starts any more."""
        self._closed = True
        tasks = set(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_TIMEOUT)


class WarmingCounters:
    """What warming did, counted since the start."""

    __slots__ = ("failures", "loads", "needless", "stored")

    def __init__(self) -> None:
        self.loads = self.stored = self.failures = self.needless = 0


class Warmer:
    """Loads again, in the background and a few at a time, what `plan` says.

    Args:
        plan: which keys, and when.
        load: loads a hot key; whether the value was stored, None where somebody else loads it already.
        is_fresh: whether a read of a key would be a hit.
        may_begin: whether what is stored now would be served.
        failed: told the key and the error of a load that failed; it is not tried again before somebody has read the key.
    """

    def __init__(
        self,
        plan: Warming,
        load: Callable[[Hot], Coroutine[Any, Any, bool | None]],
        *,
        is_fresh: Callable[[str], bool],
        may_begin: Callable[[], bool],
        failed: Failed,
    ) -> None:
        self.counters = WarmingCounters()
        self.plan = plan
        self._load, self._is_fresh, self._may_begin, self._failed = load, is_fresh, may_begin, failed
        self._loads = Reloads(self._count_failure, MOST_WARMING)
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def state(self) -> dict[str, int]:
        """For `/status`."""
        return {"hot": self.plan.hot, "waiting": self.plan.waiting, "running": len(self._loads)}

    def evicted(self, keys: Iterable[str], tags: Collection[str], everything: bool) -> None:
        """These were evicted just now."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # nothing can be loaded
            return
        self.plan.evicted(keys, tags, everything, loop.time())
        self._wake(loop)

    def _wake(self, loop: asyncio.AbstractEventLoop, earliest: float = 0.0) -> None:
        """Sees to it that `_begin` is called when the next key is due."""
        if self.plan.next_at is None or self._closed:
            return
        at = max(self.plan.next_at, earliest)
        if self._timer is not None:
            if self._timer.when() <= at:
                return
            self._timer.cancel()
        # In a context of its own: what evicts may be part of a load, or of a transaction.
        self._timer = loop.call_at(at, self._begin, loop, context=Context())

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        if not self._may_begin():
            self._wake(loop, now + MAY_NOT_YET)
            return
        while not self._loads.full and (hot := self.plan.take(now)) is not None:
            if self._is_fresh(hot.key):
                self.counters.needless += 1
            elif self._loads.start(hot.key, partial(self._warm, hot, loop)):
                self.plan.begun(hot.key, now)
            else:
                self.plan.put_off(hot, now + TRY_LATER)
        self._wake(loop, now + TRY_LATER if self._loads.full else now)

    async def _warm(self, hot: Hot, loop: asyncio.AbstractEventLoop) -> None:
        self.counters.loads += 1
        stored = await self._load(hot)
        if stored is None:
            self.counters.loads -= 1
            self.counters.needless += 1
        elif stored:
            self.counters.stored += 1
        else:  # evicted again meanwhile, for one
            self.plan.put_off(hot, loop.time())
            self._wake(loop)

    def _count_failure(self, key: str, error: Exception) -> None:
        self.counters.failures += 1
        self._failed(key, error)

    async def close(self) -> None:
        """Ends what runs; nothing starts any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._loads.close()
