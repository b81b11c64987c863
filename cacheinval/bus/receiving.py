"""What lies between `joined` and `lost`, the same for every bus: deliveries, settled once they are evicted."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from cacheinval.bus import Delivery, Receiver
from cacheinval.errors import SubscriptionError
from cacheinval.logs import event

__all__ = ["LONGEST_PAUSE", "STOPPED", "Answers", "Reception", "pause"]

JOIN_WITHIN = 60.0  # seconds for the receiver to start a new epoch, which may clear a large cache
FINISH_WITHIN = 3.0  # seconds for evictions in hand when the process stops
CANCEL_WITHIN = 1.0  # seconds for evictions that are cancelled
STOPPED = "stopped"  # the reason when `run` was cancelled
SHORTEST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds between attempts to subscribe

_log = logging.getLogger("cacheinval.bus")

Settle = Callable[[Sequence[str | None]], None]


def pause(attempt: int) -> float:
    """How many seconds to wait after the failed attempt with this number, counted from 1."""
    return random.uniform(SHORTEST_PAUSE, min(LONGEST_PAUSE, SHORTEST_PAUSE * 2 ** min(attempt, 10)))


class Answers:
    """The answers to one question, as they arrive.

    Args:
        enough: called with those so far as each arrives; says whether nothing more is waited for.
    """

    def __init__(self, enough: Callable[[Sequence[bytes]], bool]) -> None:
        self._bodies: list[bytes] = []
        self._enough = enough
        self._complete = asyncio.Event()

    def add(self, body: bytes) -> None:
        """Takes one."""
        self._bodies.append(body)
        if self._enough(self._bodies):
            self._complete.set()

    async def wait(self, seconds: float) -> list[bytes]:
        """All that arrive within so many seconds, or until they are enough."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._complete.wait()
        return self._bodies


class Reception:
    """Hands deliveries to a receiver, from `joined` until something ends it; then it is not used again.

    Args:
        settle: told what the receiver made of the oldest deliveries that were not settled before, in order.
        lost: called once, at once, when it ends while `run` is running, with the reason.
    """

    def __init__(self, receiver: Receiver, settle: Settle, lost: Callable[[str], None]) -> None:
        self._receiver = receiver
        self._settle = settle
        self._lost = lost
        self._waiting: list[Delivery] = []
        self._idle = False  # joined, and nothing in hand
        self._something = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def waiting(self) -> int:
        """How many deliveries the receiver has not got yet."""
        return len(self._waiting)

    @property
    def ended(self) -> str | None:
        """Why this ended, if it did."""
        return self._ended.result() if self._ended.done() else None

    def put(self, delivery: Delivery) -> None:
        """Takes what arrived, to be received later."""
        self._keep([delivery])

    def take(self, deliveries: list[Delivery]) -> None:
        """Takes what arrived, and has it received at once where nothing is in hand and the receiver need not wait."""
        if self._idle and not self._waiting and not self._ended.done():
            try:
                problems = self._receiver.receive_now(deliveries)
                if problems is not None:
                    self._settle_all(problems, deliveries)
                    return
            except Exception as error:
                self._fail(error)
                return
        self._keep(deliveries)

    def _keep(self, deliveries: list[Delivery]) -> None:
        self._waiting += deliveries
        self._something.set()
        if not self._idle and not self._ended.done():
            self._receiver.overhear(deliveries)

    def end(self, reason: str, *, finish: bool = False) -> None:
        """Ends this for `reason`, unless it has ended; `finish` lets the receiver finish what it has in hand."""
        if self._ended.done():
            return
        self._ended.set_result(reason)
        self._something.set()
        if self._work is None:
            return
        if not finish and self._work is not asyncio.current_task():
            # Before anybody is told: what is in hand cannot be settled any more, and a `joined` under way must
            # not come to its end after `lost`.
            self._work.cancel()
        self._lost(reason)

    async def run(self, stop: Callable[[], Awaitable[Any]], *, resumed: bool = False) -> None:
        """Joins, and hands on deliveries until this ends.

        Cancelled, it ends gently: while `stop` sees to it that nothing more arrives, what the receiver has in
        hand is finished and settled.
        """
        work = self._work = asyncio.create_task(self._receive(resumed))
        try:
            either: set[asyncio.Future[Any]] = {work, self._ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            self.end("receiving was cancelled")
        except asyncio.CancelledError:
            self.end(STOPPED, finish=True)
            try:
                stopping = asyncio.ensure_future(stop())
                await asyncio.wait({work, stopping}, timeout=FINISH_WITHIN)
            finally:
                work.cancel()
            raise
        finally:
            _, unfinished = await asyncio.wait({work}, timeout=CANCEL_WITHIN)
            if unfinished:
                event(_log, logging.ERROR, "an eviction cannot be cancelled")

    async def _receive(self, resumed: bool) -> None:
        try:
            await self._join(resumed)
            while not self._ended.done():
                self._idle = True
                await self._something.wait()
                self._idle = False
                self._something.clear()
                if self._waiting and not self._ended.done():
                    batch, self._waiting = self._waiting, []
                    self._settle_all(await self._receiver.receive(batch), batch)
        except Exception as error:
            self._fail(error)

    def _settle_all(self, problems: Sequence[str | None], batch: Sequence[Delivery]) -> None:
        if len(problems) != len(batch):
            raise SubscriptionError(f"{len(batch)} messages were received, {len(problems)} judged")
        self._settle(problems)

    def _fail(self, error: Exception) -> None:
        event(_log, logging.ERROR, "receiving failed, starting over", reason=repr(error))
        _log.debug("receiving failed", exc_info=error)
        self.end(f"receiving failed: {str(error) or type(error).__name__}")

    async def _join(self, resumed: bool) -> None:
        try:
            async with asyncio.timeout(JOIN_WITHIN):
                await self._receiver.joined(resumed=resumed)
        except TimeoutError as error:
            raise SubscriptionError(f"the receiver could not join within {JOIN_WITHIN:g} s") from error
