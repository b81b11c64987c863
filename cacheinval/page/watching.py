"""Looking at the fleet for as long as somebody looks at the page: once a second, for any number of viewers."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from cacheinval.errors import BlockedError, DatabaseError, PublishError
from cacheinval.overview import Overview
from cacheinval.page.rendering import View, draw, unsure
from cacheinval.recent import Recent
from cacheinval.verdict.fleet import Fleet
from cacheinval.verdict.reports import Report, understand

__all__ = ["Watch", "Watched"]

log = logging.getLogger("cacheinval.page")

INTERVAL = 1.0
ANSWERS_WITHIN = 0.25
"""Seconds after a question when what has been answered is shown; later answers are shown with the next."""

LINGER = 3.0
"""Seconds for which the fleet is asked on when nobody looks any more: between a page and its stream, or two pages."""

ASK_WITHIN, END_WITHIN = 3.0, 2.0
COUNT_EVERY = 3.0
LEAST_EVICTIONS, MOST_EVICTIONS = 5.0, 60.0
"""Seconds for which instances are asked to tell their evictions: since they were heard last, within these bounds."""


class Inquiry(Protocol):
    """Asks everybody: see `fleet.Inquiry`."""

    async def ask(self, evictions: float) -> None: ...
    async def close(self) -> None: ...


class Watched(Protocol):
    """How one process sees the fleet, and itself: see `fleet.Outlook`."""

    @property
    def instance(self) -> bool: ...
    @property
    def status(self) -> Callable[[], dict[str, Any]]: ...
    @property
    def recent(self) -> Callable[[float], Recent]: ...
    @property
    def overview(self) -> Callable[[], Awaitable[Overview]] | None: ...
    def inquire(self, answered: Callable[[dict[str, Any]], None]) -> Inquiry: ...


class Watch:
    """The fleet as it is seen from here; nothing is asked, drawn or kept while nobody looks.

    Args:
        watched: asks, and says how this process is.
    """

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._viewers = 0
        self._left_at = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # that one, and those that have yet to end
        self._drawn = asyncio.Event()
        self.view: View | None = None
        """What was seen last; None where nobody looks, or nothing has been seen yet."""

    @contextmanager
    def viewing(self) -> Iterator[None]:
        """Within this block the fleet is looked at."""
        self._viewers += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="cacheinval page")
            self._tasks.add(self._looking)
            self._looking.add_done_callback(self._ended)
        try:
            yield
        finally:
            self._viewers -= 1
            self._left_at = time.monotonic()

    async def next(self) -> View:
        """What is seen next."""
        while True:
            await self._drawn.wait()
            if self.view is not None:
                return self.view

    async def close(self) -> None:
        """Looks no more."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2 * END_WITHIN)

    def _ended(self, looking: "asyncio.Task[None]") -> None:
        self._tasks.discard(looking)
        if not looking.cancelled() and (error := looking.exception()) is not None:
            log.error("the page cannot look at the fleet", exc_info=error)
        if self._looking is looking:
            self._looking = None

    async def _look(self) -> None:
        round_ = _Round(self._watched)
        try:
            while self._viewers or time.monotonic() - self._left_at < LINGER:
                try:
                    round_.begin()
                    await asyncio.sleep(ANSWERS_WITHIN)
                    self._show(round_.seen())
                except Exception:
                    log.exception("the page cannot show the fleet")
                    if self.view is not None:  # which must not go on to say that all are fresh
                        self._show(unsure(self.view))
                await asyncio.sleep(INTERVAL - ANSWERS_WITHIN)
        finally:
            # Whoever looks from now on begins anew, and need not wait for this end.
            self.view = self._looking = None
            await round_.end()

    def _show(self, view: View) -> None:
        self.view = view
        drawn, self._drawn = self._drawn, asyncio.Event()
        drawn.set()


class _Round:
    """Asks and counts, each at most once at a time and beside what is shown meanwhile."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._here = _here(watched.status())
        self._fleet = Fleet(self._here.id if watched.instance else None)
        self._depth: Any = None  # of the queue of this process, which the broker knows
        self._inquiry = watched.inquire(self._answered)
        self._asking: asyncio.Task[None] | None = None
        self._counting: asyncio.Task[None] | None = None
        self._count_at = 0.0

    def _answered(self, status: dict[str, Any]) -> None:
        if status.get("id") == self._fleet.own and self._is_this_one(status):
            self._depth = status.get("queue_depth")
        else:
            self._fleet.heard(status, time.time())

    def _is_this_one(self, status: Mapping[str, Any]) -> bool:
        report = understand(status)
        return report is not None and report.identity == self._here.identity

    def begin(self) -> None:
        """Asks everybody, unless an earlier question has not gone out yet."""
        if _idle(self._asking):
            self._asking = asyncio.create_task(self._ask())
        overview = self._watched.overview
        if overview is not None and time.monotonic() >= self._count_at and _idle(self._counting):
            self._counting = asyncio.create_task(self._count(overview))

    async def _ask(self) -> None:
        problem: str | None = None
        try:
            async with asyncio.timeout(ASK_WITHIN):
                await self._inquiry.ask(self._wanted())
        except TimeoutError:
            broker = _here(self._watched.status()).broker
            blocked = broker is not None and broker.publisher == "blocked"
            problem = (
                str(BlockedError()) if blocked else f"the broker does not answer within {ASK_WITHIN:g} s"
            )
        except PublishError as error:
            problem = str(error)
        except Exception as error:
            log.exception("the fleet cannot be asked")
            problem = repr(error)
        self._fleet.asked(problem, time.time())

    def _wanted(self) -> float:
        return min(LEAST_EVICTIONS + self._fleet.unheard(time.time()), MOST_EVICTIONS)

    async def _count(self, overview: Callable[[], Awaitable[Overview]]) -> None:
        try:
            self._fleet.looked(await overview(), time.time())
        except DatabaseError as error:
            self._fleet.looked(str(error), time.time())
        except Exception as error:
            log.exception("who is registered cannot be told")
            self._fleet.looked(repr(error), time.time())
        self._count_at = time.monotonic() + COUNT_EVERY

    def seen(self) -> View:
        """What is known by now, and of this process itself whatever the broker does."""
        now, status = time.time(), self._watched.status()
        self._here = _here(status)
        if self._watched.instance:
            status["evictions"] = self._watched.recent(MOST_EVICTIONS)
            if self._fleet.problem is None and self._depth is not None:
                status["queue_depth"] = self._depth
            self._fleet.heard(status, now)
        self._fleet.forget(now)
        return draw(self._fleet, self._here, now)

    async def end(self) -> None:
        """Asks no more."""
        tasks = {task for task in (self._asking, self._counting) if task is not None and not task.done()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=END_WITHIN)
        with suppress(TimeoutError):
            async with asyncio.timeout(END_WITHIN):
                await self._inquiry.close()


def _idle(task: "asyncio.Task[None] | None") -> bool:
    return task is None or task.done()


def _here(status: Mapping[str, Any]) -> Report:
    report = understand(status)
    assert report is not None, "a process understands itself"
    return report
