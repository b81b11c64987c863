"""Publishing rows of the outbox through a channel of the relay's own."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol
from uuid import UUID

from cacheinval import logs
from cacheinval.errors import PublishError
from cacheinval.messages import Invalidate, Tick, encode
from cacheinval.outbox.batches import Batch, batches, stamped
from cacheinval.outbox.session import Confirmed
from cacheinval.tracing import Tracing

__all__ = ["Channel", "Sender"]

log = logging.getLogger("cacheinval.relay")

MESSAGES_IN_FLIGHT = 8


class Channel(Protocol):
    """One publishing channel; what is sent arrives in the order of the calls, which may overlap."""

    @property
    def origin(self) -> str: ...
    async def send(
        self, body: bytes, correlation_id: str | None = None, contexts: Sequence[str] = (), /
    ) -> None: ...
    async def close(self) -> None: ...


class Sender:
    """Keeps a channel for as long as it works, and numbers what goes through it.

    Args:
        open_channel: opens a publishing channel with an origin of its own; raises PublishError.
        publish_timeout: seconds for a message to be confirmed.
    """

    def __init__(self, open_channel: Callable[[], Awaitable[Channel]], publish_timeout: float) -> None:
        self._open_channel = open_channel
        # The bus has this deadline itself; this one is for a bus that fails to keep it.
        self._deadline = publish_timeout + 1
        self._channel: Channel | None = None
        self._seq = 0
        self._confirmed_to = 0  # with all that came before it
        self._confirmed_beyond: set[int] = set()
        self.confirmed: dict[str, int] = {}
        """The last number by origin up to which all were confirmed, as of the last publish."""
        self.published_rows = self.published_messages = self.bad_rows = self.ticks = 0
        self.tracing: Tracing | None = None
        """With it there are spans of what is published for writes that were traced."""

    async def publish(self, rows: Sequence[Mapping[str, Any]], confirmed: list[UUID]) -> PublishError | None:
        """Publishes all rows, and notes in `confirmed` which may be deleted; returns what went wrong first, if anything.

        Where something did, those are left out whose numbers come after the first that was not confirmed: with their
        deletion a number has to be noted, and that one must not claim what is missing.
        """
        self.confirmed = {}
        try:
            async with asyncio.timeout(self._deadline):
                channel = await self._opened()
        except TimeoutError:
            return PublishError(f"the broker gave no channel within {self._deadline:g} s")
        except PublishError as error:
            return error
        todo = batches(rows)
        sent: list[tuple[int, Batch]] = []
        senders = min(MESSAGES_IN_FLIGHT, len(rows))
        results = await asyncio.gather(
            *(self._send(channel, todo, sent) for _ in range(senders)), return_exceptions=True
        )
        self.confirmed = {channel.origin: self._confirmed_to}
        for last, batch in sent:
            if last <= self._confirmed_to:
                confirmed += batch.ids
        failures = [result for result in results if result is not None]
        if failures:
            await self.close()
        problem = None
        for failure in failures:
            # Nobody cancels a sender alone: that comes from within the channel, as it is torn down.
            if isinstance(failure, asyncio.CancelledError):
                failure = PublishError("the channel was torn down")
            if not isinstance(failure, PublishError):
                raise failure
            problem = problem or failure
        return problem

    async def _opened(self) -> Channel:
        if self._channel is None:
            self._channel = await self._open_channel()
            self._seq = self._confirmed_to = 0
            self._confirmed_beyond = set()
        return self._channel

    async def tick(self, as_of: float, source: str, confirmed: Confirmed) -> PublishError | None:
        """Says that all that was committed before `as_of` is confirmed; returns what went wrong, if anything."""
        try:
            async with asyncio.timeout(self._deadline):
                channel = await self._opened()
                known = {origin: seq for origin, seq in confirmed.seqs.items() if origin != channel.origin}
                await channel.send(
                    encode(
                        Tick(
                            v=1,
                            origin=channel.origin,
                            seq=self._seq,
                            as_of=as_of,
                            source=source,
                            schema=confirmed.schema,
                            seqs=known,
                        )
                    )
                )
        except (PublishError, TimeoutError) as error:
            await self.close()
            return (
                error if isinstance(error, PublishError) else PublishError("a tick was not confirmed in time")
            )
        self.ticks += 1
        return None

    async def close(self) -> None:
        """Gives the channel back; the next publish opens a new one. Never raises, and ends within seconds."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _send(
        self, channel: Channel, todo: Generator[Batch, None, None], sent: list[tuple[int, Batch]]
    ) -> None:
        try:
            for batch in todo:
                last = 0
                for message in batch.messages:
                    last = await self._send_one(channel, message, batch)
                sent.append((last, batch))
                self.published_rows += len(batch.ids)
                self._report_bad(batch)
        finally:
            todo.close()  # after a failure the other senders end with what they have in hand

    async def _send_one(self, channel: Channel, message: Invalidate, batch: Batch) -> int:
        self._seq += 1
        seq = self._seq
        # From here to the inside of `send` nothing awaits: messages go out in the order of their numbers.
        message = stamped(message, origin=channel.origin, seq=seq, at=time.time(), committed_at=batch.oldest)
        tracing = self.tracing if batch.contexts else None
        try:
            with tracing.publishing(batch.contexts, message) if tracing is not None else nullcontext():
                async with asyncio.timeout(self._deadline):
                    # The contexts go on also where this process makes no spans of its own.
                    await channel.send(encode(message), *((None, batch.contexts) if batch.contexts else ()))
        except TimeoutError:
            raise PublishError(
                f"the broker did not confirm within {self._deadline:g} s (CACHEINVAL_PUBLISH_TIMEOUT)"
            ) from None
        self.published_messages += 1
        self._confirmed_beyond.add(seq)
        while self._confirmed_to + 1 in self._confirmed_beyond:
            self._confirmed_to += 1
            self._confirmed_beyond.remove(self._confirmed_to)
        return seq

    def _report_bad(self, batch: Batch) -> None:
        if batch.bad:
            self.bad_rows += len(batch.bad)
            logs.event(
                log,
                logging.ERROR,
                "rows that no message can express: everything was invalidated instead",
                rows=len(batch.bad),
                first=batch.bad[0],
            )
