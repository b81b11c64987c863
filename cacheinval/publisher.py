"""Publishing what was committed: at once, together with whatever else waits, and never in the writer's way."""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

import msgspec

from cacheinval import logs
from cacheinval.coherence import Coherence, higher
from cacheinval.errors import PublishError
from cacheinval.latencies import Latencies
from cacheinval.messages import Beat, Invalidate, Probe, encode, split
from cacheinval.pace import Pace
from cacheinval.tracing import Tracing, together

__all__ = ["Publisher", "PublisherCounters", "Unpublished"]

log = logging.getLogger("cacheinval.publisher")

MAX_WAITING = 200_000
"""Names that may wait here; what comes beyond is left to the relay."""

BEATS = 10
"""Tick intervals after a publish for which its number is said again."""

BACKOFF_FIRST, BACKOFF_MOST = 0.2, 5.0
"""Seconds after a failure before which the broker is left alone, at first and at most."""

ROWS_AT_ONCE = 1_000

DELETE_AFTER = 0.1
"""Seconds for which confirmed rows gather before they are deleted, by one commit; well within the relay's grace."""

MESSAGES_IN_FLIGHT = 8

NOTE_AGAIN = 900.0
"""Seconds after which an idle channel notes its number again: the relay forgets what was silent for an hour."""


class Channel(Protocol):
    """One publishing channel's lifetime."""

    @property
    def origin(self) -> str: ...
    async def send(
        self, body: bytes, correlation_id: str | None = None, contexts: Sequence[str] = (), /
    ) -> None: ...
    async def listen(self, answered: Callable[[str, bytes], None]) -> None: ...
    async def close(self) -> None: ...


class Asking(Protocol):
    """Whose questions are published along with a write, and who is told what is answered."""

    def sent(self, question: Any, messages: Sequence[str]) -> None: ...
    def left(self, question: Any, reason: str) -> None: ...
    def answered(self, message: str, body: bytes) -> None: ...


@dataclass(slots=True)
class Unpublished:
    """What one write has to tell the others.

    `rows` are the outbox rows that may be deleted once this is confirmed; without rows in the outbox at all, `confirmed`
    is how the writer learns what became of it.
    """

    keys: Sequence[str] = ()
    tags: Sequence[str] = ()
    versions: Sequence[int | None] = ()
    everything: bool = False
    rows: Sequence[UUID] = ()
    evicted_here: bool = False
    committed_at: float = field(default_factory=time.time)
    confirmed: "asyncio.Future[None] | None" = None
    question: Any = None
    """What the writer wants to know of the others, if it waits for them."""
    context: str | None = None
    """That of the write, where it is traced."""

    @property
    def size(self) -> int:
        return len(self.keys) + len(self.tags) + 1


class PublisherCounters(Latencies):
    """What was published, and how long each publish took with its confirms, counted since the start."""

    __slots__ = (
        "confirmed_messages",
        "confirmed_writes",
        "deleted_rows",
        "failures",
        "left_to_relay",
        "timeouts",
    )

    def __init__(self) -> None:
        super().__init__()
        self.confirmed_writes = self.confirmed_messages = self.deleted_rows = 0
        self.failures = self.timeouts = self.left_to_relay = 0


class Publisher:
    """One channel to the broker, and the queue in front of it.

    While one publish awaits its confirm, further keys gather and go out together; at low load nothing waits.

    Args:
        open_channel: opens a publishing channel; raises PublishError.
        delete_rows: deletes confirmed rows of the outbox, and notes there the last confirmed number of each origin, so
            that ticks can tell it; None without a database.
        timeout: seconds for one publish, confirm included.
        asking: whose questions are asked; None if nobody has any.
    """

    def __init__(
        self,
        open_channel: Callable[[], Awaitable[Channel]],
        delete_rows: Callable[[Sequence[UUID], Mapping[str, int]], Awaitable[Any]] | None,
        coherence: Coherence,
        timeout: float,
        tick_interval: float = 1.0,
        asking: Asking | None = None,
    ) -> None:
        self.counters = PublisherCounters()
        self.tracing: Tracing | None = None
        """With it there are spans of what is published for writes that were traced."""
        self._open_channel = open_channel
        self._delete_rows = delete_rows
        self._coherence = coherence
        self._timeout = timeout
        self._tick_interval = tick_interval
        self._confirmed_seqs: dict[str, int] = {}
        self._sending = False
        self._beat_until = 0.0
        self._asking = asking
        self._channel: Channel | None = None
        self._listening: Channel | None = None
        self._seq = 0
        self.problem: str | None = None
        """Why the last publish failed, if it did."""
        self._probing: asyncio.Task[None] | None = None
        self._pause = BACKOFF_FIRST
        self._waiting: list[Unpublished] = []
        self._waiting_size = 0
        self._hurry = asyncio.Event()
        self._confirmed_rows: list[UUID] = []
        self._work = asyncio.Event()
        self._rows_to_delete = asyncio.Event()
        self._flushing = asyncio.Event()
        self._rows_deleted = asyncio.Event()
        self._rows_deleted.set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def failing(self) -> bool:
        """Whether the last publish failed; the outbox then waits for the relay."""
        return self.problem is not None

    @property
    def waiting(self) -> int:
        """Writes that wait to be published."""
        return len(self._waiting)

    def submit(self, unpublished: Unpublished) -> None:
        """Hands over what a write has committed; returns at once.

        What cannot wait here because too much does is left to the relay, which finds its rows in the outbox.
        """
        if self._waiting_size + unpublished.size > MAX_WAITING and self._waiting:
            self._leave(unpublished, "too many invalidations wait for the broker")
            return
        self._waiting.append(unpublished)
        self._waiting_size += unpublished.size
        if unpublished.confirmed is not None or unpublished.question is not None:
            self._hurry.set()
        self._idle.clear()
        self._work.set()

    async def run(self) -> None:
        """Publishes until cancelled."""
        now, pace = asyncio.get_running_loop().time, Pace()
        try:
            while True:
                self._see_to_probing()
                await self._work.wait()
                if gather := pace.gather(now()):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(gather):
                            await self._hurry.wait()  # until somebody waits for it
                self._work.clear()
                self._hurry.clear()
                batch, self._waiting, self._waiting_size = self._waiting, [], 0
                if batch:
                    pace.published(len(batch), now())
                    await self._publish(batch)
                if not self._waiting:
                    self._idle.set()
        finally:
            left, self._waiting, self._waiting_size = self._waiting, [], 0
            for one in left:
                self._leave(one, "stopped")
            self._idle.set()
            await self._stop_probing()
            await self._drop_channel()

    async def delete_confirmed(self) -> None:
        """Deletes confirmed rows from the outbox, some time later and many at a time, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(NOTE_AGAIN):
                    await self._rows_to_delete.wait()
            except TimeoutError:
                await self._note_again()
                continue
            self._rows_to_delete.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(DELETE_AFTER):
                    await self._flushing.wait()
            while self._confirmed_rows:
                rows = self._confirmed_rows[:ROWS_AT_ONCE]
                del self._confirmed_rows[: len(rows)]
                confirmed, self._confirmed_seqs = self._confirmed_seqs, {}
                await self._delete(rows, confirmed)
            self._rows_deleted.set()

    async def _note_again(self) -> None:
        if self._channel is not None and self._seq and not self._sending:
            await self._delete([], {self._channel.origin: self._seq})

    async def beat(self) -> None:
        """Without a database nobody else can say what was published: for a while the last number is said again.

        Runs until cancelled.
        """
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._tick_interval)
            if self._channel is None or not self._seq or self._sending or loop.time() > self._beat_until:
                continue
            with suppress(PublishError, TimeoutError):  # the next publish finds out, and says so
                async with asyncio.timeout(self._timeout):
                    await self._channel.send(encode(Beat(v=1, origin=self._channel.origin, seq=self._seq)))

    async def flush(self, timeout: float) -> bool:
        """Waits, for at most `timeout` seconds, until nothing waits to be published, and the rows of what is confirmed are
        deleted; returns whether that was reached."""
        self._flushing.set()
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
                await self._rows_deleted.wait()
        except TimeoutError:
            return False
        finally:
            self._flushing.clear()
        return True

    # While publishing fails. All this runs beside the queue: no write waits for a broker that hangs.

    def _see_to_probing(self) -> None:
        """Has it go on for as long as publishing fails; whatever has ended it is a defect, and raised here."""
        if self._probing is not None and self._probing.done():
            ended, self._probing = self._probing, None
            ended.result()
        if self.failing and self._probing is None:
            self._probing = asyncio.create_task(self._probe_until_confirmed())
            self._probing.add_done_callback(lambda _: self._work.set())

    async def _probe_until_confirmed(self) -> None:
        while self.failing:
            await asyncio.sleep(self._pause * random.uniform(0.5, 1))
            self._pause = min(self._pause * 2, BACKOFF_MOST)
            try:
                async with asyncio.timeout(self._timeout):
                    channel = await self._open_probed()
            except (PublishError, TimeoutError) as error:
                self.problem = self._described(error)
            else:
                self._channel, self._seq = channel, 0
                self._works()

    async def _open_probed(self) -> Channel:
        """A channel on which was confirmed what every receiver ignores: that says that the next write will be, too."""
        channel = await self._open_channel()
        try:
            await channel.send(encode(Probe(v=1, id=secrets.token_hex(8))))
        except BaseException:
            await channel.close()
            raise
        return channel

    async def _stop_probing(self) -> None:
        probing, self._probing = self._probing, None
        if probing is not None:
            probing.cancel()
            await asyncio.wait({probing})

    async def _publish(self, batch: list[Unpublished]) -> None:
        if self.failing:
            for one in batch:
                if one.confirmed is None:
                    self._leave(one, "the broker cannot be reached")
            batch = [one for one in batch if one.confirmed is not None]
            if not batch:
                return
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            self._sending = True
            async with asyncio.timeout(self._timeout):
                await self._stop_probing()  # this tries itself, and at once
                await self._send(batch)
        except (PublishError, TimeoutError) as error:
            # A channel keeps the same time, and says so itself.
            self.counters.timeouts += isinstance(error.__cause__ or error, TimeoutError)
            self.counters.failures += 1
            await self._failed(batch, self._described(error))
        except BaseException:
            for one in batch:
                self._leave(one, "stopped")
            raise
        else:
            self.counters.observe(loop.time() - began)
            self._succeeded(batch)
        finally:
            self._sending = False

    async def _send(self, batch: list[Unpublished]) -> None:
        if self._channel is None:
            self._channel = await self._open_channel()
            self._seq = 0
        at, committed_at = time.time(), min(one.committed_at for one in batch)
        evicted_here = all(one.evicted_here for one in batch)
        channel, messages = self._channel, list(split(*_together(batch)))
        contexts = [] if self.tracing is None else together(one.context for one in batch)
        questions = [one.question for one in batch if one.question is not None]
        if questions and self._asking is not None and self._listening is not channel:
            await channel.listen(self._asking.answered)
            self._listening = channel
        numbers = range(self._seq + 1, self._seq + 1 + len(messages))
        ids = self._ask(questions, [f"{channel.origin}.{seq}" for seq in numbers]) if questions else ()
        todo = ((message, asked) for message, *asked in zip(messages, *ids, strict=True))

        async def send_rest() -> None:
            try:
                for message, asked in todo:
                    # From here to the inside of `send` nothing awaits: messages go out in the order of their numbers.
                    message = self._stamp(channel, message, at, committed_at, evicted_here)
                    if self.tracing is None or not contexts:
                        await channel.send(encode(message), *asked)
                    else:
                        with self.tracing.publishing(contexts, message):
                            await channel.send(encode(message), asked[0] if asked else None, contexts)
                    self.counters.confirmed_messages += 1
            finally:
                todo.close()  # after a failure the other senders end with what they have in hand

        if len(messages) == 1:
            await send_rest()
            return
        # Of a hundred messages some go out at a time, as confirms come: others have their turn in between.
        senders = min(MESSAGES_IN_FLIGHT, len(messages))
        results = await asyncio.gather(*(send_rest() for _ in range(senders)), return_exceptions=True)
        for problem in filter(None, results):
            raise problem

    def _ask(self, questions: Sequence[Any], messages: Sequence[str]) -> Sequence[Sequence[str]]:
        """The correlation ids, one list of them, by which the messages ask for answers; none if nobody wants any."""
        if self._asking is None or not questions:
            return []
        for question in questions:
            # Whoever has evicted what all of them say, which may be other writes' as well, has evicted what this one says.
            self._asking.sent(question, messages)
        return [messages]

    def _stamp(
        self, channel: Channel, message: Invalidate, at: float, committed_at: float, evicted_here: bool
    ) -> Invalidate:
        self._seq += 1
        if evicted_here:
            self._coherence.expect_echo(channel.origin, self._seq)
        return msgspec.structs.replace(
            message, origin=channel.origin, seq=self._seq, at=at, committed_at=committed_at
        )

    def _described(self, error: PublishError | TimeoutError) -> str:
        return str(error) or f"no confirm within {self._timeout:g} s"

    def _works(self) -> None:
        if self.failing:
            self.problem = None
            logs.event(log, logging.INFO, "publishing again")
        self._pause = BACKOFF_FIRST

    def _succeeded(self, batch: list[Unpublished]) -> None:
        self._works()
        self.counters.confirmed_writes += len(batch)
        if self._channel is not None:
            self._confirmed_seqs[self._channel.origin] = self._seq
            self._beat_until = asyncio.get_running_loop().time() + BEATS * self._tick_interval
        for one in batch:
            self._confirmed_rows += one.rows
            if one.confirmed is not None and not one.confirmed.done():
                one.confirmed.set_result(None)
        if self._confirmed_rows:
            self._rows_deleted.clear()
            self._rows_to_delete.set()

    async def _failed(self, batch: list[Unpublished], reason: str) -> None:
        if not self.failing:
            logs.event(log, logging.ERROR, "publishing failed", reason=reason)
        self.problem = reason
        for one in batch:
            self._leave(one, reason)
        await self._drop_channel()

    def _leave(self, one: Unpublished, reason: str) -> None:
        self.counters.left_to_relay += one.confirmed is None
        if self._asking is not None and one.question is not None:
            self._asking.left(one.question, reason)
        if one.confirmed is not None and not one.confirmed.done():
            one.confirmed.set_exception(PublishError(f"not confirmed: {reason}"))
            one.confirmed.exception()  # seen, even where the writer has gone

    async def _drop_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            self._coherence.forget_echoes(channel.origin)
            await channel.close()

    async def _delete(self, rows: Sequence[UUID], confirmed: Mapping[str, int]) -> None:
        assert self._delete_rows is not None
        try:
            async with asyncio.timeout(self._timeout):
                await self._delete_rows(rows, confirmed)
        except (
            Exception
        ) as error:  # whatever the database says: the relay publishes them again, and deletes them
            logs.event(
                log, logging.WARNING, "confirmed rows stay in the outbox", rows=len(rows), reason=error
            )
            # They are to be noted with whatever is deleted next, whose numbers may be among them.
            self._confirmed_seqs = {**confirmed, **self._confirmed_seqs}
        else:
            self.counters.deleted_rows += len(rows)


def _together(batch: list[Unpublished]) -> tuple[list[str], list[str], list[int | None], bool]:
    """The names of all writes, each once; of two versions the higher, and none where one is unknown."""
    keys: dict[str, int | None] = {}
    tags: dict[str, None] = {}
    for one in batch:
        versions = one.versions or [None] * len(one.keys)
        for key, version in zip(one.keys, versions, strict=True):
            keys[key] = higher(keys.get(key, version), version)
        tags.update(dict.fromkeys(one.tags))
    return list(keys), list(tags), list(keys.values()), any(one.everything for one in batch)
