"""Publishing what is left in the outbox, by one leader for a database and namespace (PROTOCOL.md, "Writing").

Leadership is an advisory lock, and only spares work: with two leaders everything is published twice, with none later.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from uuid import UUID

from cacheinval import logs
from cacheinval.errors import DatabaseError, PublishError
from cacheinval.outbox.sending import Channel, Sender
from cacheinval.outbox.session import LOST, Session
from cacheinval.outbox.ticks import Ticks
from cacheinval.tracing import Tracing

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Relay", "State"]

log = logging.getLogger("cacheinval.relay")
_T = TypeVar("_T")

POLL_INTERVAL = 0.075
CONNECT_TIMEOUT = 10.0
CLOSE_TIMEOUT = 2.0
PAUSES = (0.2, 5.0)  # seconds: the first and the longest between two attempts
PATIENCE = (5.0, 300.0)
"""Seconds that a leader waits for the broker before it lets others try: at first, and at most."""
FORGET_EVERY = 60  # ticks
COUNT_EVERY = 5.0  # seconds; for whoever looks at the metrics, and nothing else
MOST_ORIGINS = 20_000  # that are told in a tick, which would be too large a message with many more
REASONS_SAID = 5
TOO_MANY_CHANNELS = "too many channels were opened within an hour to tell of each"

State = Literal["starting", "disconnected", "unready", "standby", "leader", "blocked", "stopped"]
_TEXTS: dict[State, tuple[int, str]] = {
    "disconnected": (logging.WARNING, "the relay has no database"),
    "unready": (logging.ERROR, "the relay cannot use the database"),
    "standby": (logging.INFO, "another relay leads, standing by"),
    "leader": (logging.INFO, "leading the relay"),
    "blocked": (logging.ERROR, "the outbox waits for the broker"),
}


class Relay:
    """Publishes rows of the outbox that nobody else has, and deletes them when the broker has confirmed.

    Args:
        connect: opens a session of the relay's own, directly to the primary (no pooler in between).
        open_channel: opens a publishing channel, which becomes the relay's own; raises PublishError.
        namespace: whose rows are relayed.
        tick_interval: seconds; a standby tries this often, and takes over from a frozen leader after 2.5 times this.
        publish_timeout: seconds for a message to be confirmed.
        max_clock_skew: seconds by which this host's clock and the database's may differ; no ticks while it is more.
    """

    def __init__(
        self,
        connect: "Callable[[], Awaitable[Connection]]",
        open_channel: Callable[[], Awaitable[Channel]],
        *,
        namespace: str,
        tick_interval: float = 1.0,
        publish_timeout: float = 5.0,
        max_clock_skew: float = 0.1,
    ) -> None:
        self._connect = connect
        self._namespace = namespace
        self._tick_interval = tick_interval
        self._poll_interval = min(POLL_INTERVAL, tick_interval / 2)
        self._max_clock_skew = max_clock_skew
        self._sender = Sender(open_channel, publish_timeout)
        self._ticks = Ticks(tick_interval)
        self._clocks_differ: str | None = None
        self._no_ticks: str | None = None
        self._pauses = _Pauses()
        self._patience = PATIENCE[0]
        self._state: State = "starting"
        self._since = time.time()
        self._reason: str | None = None
        self._said: set[str | None] = set()
        self._oldest: float | None = None
        self._rows: int | None = None
        self._count_at = 0.0
        self._errors = 0

    def trace(self, tracing: Tracing | None) -> None:
        """From now on there are spans of what is published for writes that were traced; None: not from here."""
        self._sender.tracing = tracing

    @property
    def leads(self) -> bool:
        """Whether this is the one that relays, be it that it waits for the broker just now."""
        return self._state in ("leader", "blocked")

    @property
    def state(self) -> dict[str, Any]:
        """For status: what the relay is doing, since when (seconds since 1970) and why.

        `oldest_row_age`, in seconds, is that of the oldest row that is due and not published yet; `rows` is how many the
        outbox holds, counted every five seconds and no further than 100,000. Both are None where this does not lead.
        `no_ticks`: why it sends no ticks although it leads.
        """
        age = None if self._oldest is None else max(0.0, time.time() - self._oldest)
        return {
            "state": self._state,
            "since": self._since,
            "reason": self._reason,
            "oldest_row_age": age,
            "rows": self._rows,
            "no_ticks": self._clocks_differ or self._no_ticks,
        }

    @property
    def counters(self) -> dict[str, int]:
        """Numbers since the start."""
        return {
            "published_rows": self._sender.published_rows,
            "published_messages": self._sender.published_messages,
            "bad_rows": self._sender.bad_rows,
            "ticks": self._sender.ticks,
            "errors": self._errors,
        }

    async def run(self) -> None:
        """Leads, or stands by to lead, until cancelled; whatever happens to database and broker."""
        try:
            while True:
                try:
                    await self._session()
                except DatabaseError as error:
                    self._failed("unready", str(error))
                except LOST as error:
                    self._failed("disconnected", _describe(error))
                else:
                    await asyncio.sleep(
                        2 * self._tick_interval
                    )  # it let go of the lead: others try every tick
                    continue
                await asyncio.sleep(self._pauses.next())
        finally:
            self._enter("stopped")

    async def _session(self) -> None:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            session = Session(await self._connect(), self._namespace)
        try:
            await session.prepare(1.5 * self._tick_interval)
            while not await session.lead():
                self._enter("standby")
                self._pauses.start_over()
                await asyncio.sleep(self._tick_interval)
            await self._lead(session)
        finally:
            self._ticks = Ticks(self._tick_interval)
            try:
                await session.close()  # first of all, since it frees the lock
            finally:
                await self._sender.close()

    async def _lead(self, session: Session) -> None:
        """Relays; returns to let others try, one of whom may reach the broker that this one cannot."""
        leading_since = time.monotonic()
        while True:
            try:
                more = await self._round(session)
            except PublishError as error:
                self._failed("blocked", str(error))
                if time.monotonic() - leading_since > self._patience:
                    self._patience = min(2 * self._patience, PATIENCE[1])
                    return
                await self._meanwhile(session, asyncio.sleep(self._pauses.next()))
                continue
            self._enter("leader")
            self._pauses.start_over()
            leading_since, self._patience = time.monotonic(), PATIENCE[0]
            if not more:
                await self._tick(session)
                await asyncio.sleep(self._poll_interval)

    async def _round(self, session: Session) -> bool:
        """Publishes and deletes what is due; returns whether there is probably more of it."""
        await self._look(session)
        if time.monotonic() >= self._count_at:
            self._rows = await session.count()
            self._count_at = time.monotonic() + COUNT_EVERY
        rows = await session.due()
        self._oldest = min((row["recorded_at"] for row in rows), default=None)
        if self._state in ("starting", "standby", "disconnected"):
            self._enter("leader")
        if not rows:
            return False
        before = self._sender.published_messages
        confirmed: list[UUID] = []
        failure = await self._meanwhile(session, self._sender.publish(rows, confirmed))
        # Each was seen in the table before its publish began.
        await session.delete(confirmed, self._sender.confirmed)
        self._ticks.confirmed(confirmed)
        if failure is not None:
            raise failure
        self._oldest = None
        return self._sender.published_messages > before + 1

    async def _look(self, session: Session) -> None:
        """Begins a tick, when it is time for one: notes what it waits for."""
        if not self._ticks.due(time.monotonic()):
            return
        look = await session.look()
        apart = max(look.took[0] - look.as_of, look.as_of - look.took[1])
        if apart > self._max_clock_skew:
            if self._clocks_differ is None:
                logs.event(
                    log, logging.ERROR, "no ticks: this clock and the database's differ", seconds=apart
                )
                # By how much at first: words that change with each look would be said again with each.
                self._clocks_differ = f"this clock and the database's differ by {apart:.1f} s"
            self._ticks.put_off(time.monotonic())
            return
        self._clocks_differ = None
        self._ticks.begin(look, time.monotonic())

    async def _tick(self, session: Session) -> None:
        """Sends the tick, once every row that it waits for has been confirmed, by this relay or by its client."""
        wanted = self._ticks.wanted
        if wanted is None:
            return
        self._ticks.left(*await session.left(wanted))
        told = self._ticks.take()
        if told is None:
            return
        look, confirmed = told
        seqs = confirmed.seqs
        if len(seqs) > MOST_ORIGINS:
            if self._no_ticks != TOO_MANY_CHANNELS:
                text = "no ticks: too many channels were opened within an hour to tell of each"
                logs.event(log, logging.ERROR, text, channels=len(seqs), accepted=MOST_ORIGINS)
            self._no_ticks = TOO_MANY_CHANNELS
            await session.forget_old_origins()
            return
        failure = await self._meanwhile(session, self._sender.tick(look.as_of, look.source, confirmed))
        if failure is not None:
            # Nothing waits for the broker: nobody may ever have subscribed, or the next row says what is wrong. The age of
            # their watermarks tells those who rely on it.
            self._errors += 1
        self._no_ticks = None if failure is None else str(failure)
        if failure is None and self._sender.ticks % FORGET_EVERY == 0:
            await session.forget_old_origins()

    async def _meanwhile(self, session: Session, work: Coroutine[Any, Any, _T]) -> _T:
        """Awaits `work`, and uses the session often enough to keep it, and with it the leadership."""
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait({task}, timeout=self._tick_interval / 2))[0]:
                await session.keep()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=CLOSE_TIMEOUT)

    def _failed(self, state: State, reason: str) -> None:
        self._errors += 1
        self._enter(state, reason)

    def _enter(self, state: State, reason: str | None = None) -> None:
        """Notes the state and says it once; what an operator has to put right, for each of a few reasons."""
        if state != self._state:
            self._state, self._since = state, time.time()
            self._said.clear()
            if not self.leads:
                self._oldest = self._rows = self._clocks_differ = self._no_ticks = None
                self._count_at = 0.0
        self._reason = reason
        most = REASONS_SAID if state in ("unready", "blocked") else 1
        if state in _TEXTS and reason not in self._said and len(self._said) < most:
            self._said.add(reason)
            level, text = _TEXTS[state]
            logs.event(log, level, text, namespace=self._namespace, reason=reason)


class _Pauses:
    """Growing seconds between attempts; the jitter keeps many processes from trying in step."""

    def __init__(self) -> None:
        self._next = PAUSES[0]

    def next(self) -> float:
        pause, self._next = self._next, min(self._next * 2, PAUSES[1])
        return pause * random.uniform(0.5, 1)

    def start_over(self) -> None:
        self._next = PAUSES[0]


def _describe(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
