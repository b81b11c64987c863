"""Asking every instance of a namespace how it is, once or again and again, and answering whoever asks."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from typing import Any

import msgspec

from cacheinval import logs
from cacheinval.audit import AuditAnswer, Auditor
from cacheinval.bus import Bus, Channel
from cacheinval.coherence.registration import Registered
from cacheinval.errors import PublishError
from cacheinval.messages import Ask, Audit, encode
from cacheinval.overview import Overview
from cacheinval.recent import Recent

__all__ = [
    "Inquiry",
    "Outlook",
    "Respondent",
    "ask_instances",
    "known_by_name",
    "silent_among",
    "silent_registered",
    "status_in",
]

MOST_ANSWERS = 100  # under way at a time

log = logging.getLogger("cacheinval.client")


async def ask_instances(bus: Bus, wait: float) -> list[dict[str, Any]]:
    """See `Client.ask_instances`."""
    answers = await bus.ask(encode(Ask(v=1)), wait)
    instances = [answer for body in answers if (answer := status_in(body)) is not None]
    return sorted(instances, key=lambda instance: str(instance["id"]))


def status_in(body: bytes) -> dict[str, Any] | None:
    """The status that `body` is; None if it is none."""
    try:
        status = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return None
    return status if {"id", "state"} <= status.keys() else None


def silent_among(
    registered: Iterable[Registered], answered: Collection[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """See `Client.silent_instances`."""
    return [
        known_by_name(one, "silent", "does not answer") for one in silent_registered(registered, answered)
    ]


def known_by_name(one: Registered, state: str, why: str) -> dict[str, Any]:
    """What can be told of an instance that tells nothing itself."""
    unknown = dict.fromkeys(("host", "version", "watermark_age"))
    return {"id": one.id, **unknown, "state": state, "reason": f"registered in the database, and {why}"}


def silent_registered(
    registered: Iterable[Registered], answered: Collection[Mapping[str, Any]]
) -> list[Registered]:
    """Those of `registered` that are not among `answered`."""
    heard = {(str(one["id"]), _session_of(one)) for one in answered}
    return [one for one in registered if (one.id, one.session) not in heard and (one.id, None) not in heard]


def _session_of(status: Mapping[str, Any]) -> str | None:
    registration = status.get("registration")
    session = registration.get("session") if isinstance(registration, Mapping) else None
    return session if isinstance(session, str) else None


class Inquiry:
    """Asks every instance again and again, over one channel that stays open meanwhile.

    Args:
        bus: carries the questions and the answers.
        answered: given each answer as it arrives, whichever question it answers.
    """

    def __init__(self, bus: Callable[[], Bus], answered: Callable[[dict[str, Any]], None]) -> None:
        self._bus = bus
        self._answered = answered
        self._channel: Channel | None = None

    async def ask(self, evictions: float) -> None:
        """Asks all for their status, and for what each has evicted within so many seconds.

        Raises:
            PublishError: the broker cannot be reached, or nobody has ever subscribed in this namespace.
        """
        try:
            if self._channel is None:
                self._channel = await self._bus().open_channel()
                await self._channel.listen(self._arrived)
            await self._channel.send(encode(Ask(v=1, evictions=evictions)), secrets.token_hex(8))
        except BaseException:
            await self.close()
            raise

    def _arrived(self, _: str, body: bytes) -> None:
        status = status_in(body)
        if status is not None:
            self._answered(status)

    async def close(self) -> None:
        """Gives the channel back, and with it what has not been answered yet. Never raises, and ends within seconds."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()


class Outlook:
    """How one process sees the fleet, and itself: all that a page for an operator needs of a client.

    Args:
        bus: carries questions and answers.
        status: what `status` shows.
        recent: what has been evicted here within so many seconds.
        overview: what the database knows of the namespace; raises DatabaseError. None without a database.
        instance: whether this process is an instance itself.
    """

    def __init__(
        self,
        bus: Callable[[], Bus],
        status: Callable[[], dict[str, Any]],
        recent: Callable[[float], Recent],
        overview: Callable[[], Awaitable[Overview]] | None,
        *,
        instance: bool,
    ) -> None:
        self.status, self.recent, self.overview, self.instance = status, recent, overview, instance
        self._bus = bus

    def inquire(self, answered: Callable[[dict[str, Any]], None]) -> Inquiry:
        """Asks nobody yet."""
        return Inquiry(self._bus, answered)


class Respondent:
    """One instance, as it answers.

    Args:
        bus: carries the answers.
        status: what `status` shows, and what has been evicted within so many seconds, if that is asked for.
        auditor: makes the audits that are asked for, one at a time.
        aside: runs a short task.
    """

    def __init__(
        self,
        instance_id: str,
        bus: Callable[[], Bus],
        status: Callable[[float | None], Awaitable[dict[str, Any]]],
        auditor: Auditor,
        aside: "Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]",
    ) -> None:
        self._id = instance_id
        self._bus = bus
        self._status = status
        self._auditor = auditor
        self._aside = aside
        self._audit: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self.problem: str | None = None
        """Why the last answer could not be sent, if it could not."""

    def answer(self, delivery: Any, message: Ask | Audit) -> None:
        """Answers beside whatever else goes on; returns at once."""
        if len(self._answering) >= MOST_ANSWERS:
            return  # nobody needs an answer that comes when so many others are still on their way
        if isinstance(message, Ask):
            self._begin(self._send_status(delivery, message))
        elif self._audit is None or self._audit.done():
            self._audit = self._begin(self._audit_for(delivery, message))
        else:  # whoever asks again and again must not make this instance load again and again
            self._begin(self._send(delivery, AuditAnswer(id=self._id)))

    def _begin(self, answer: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._aside(answer)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        return task

    async def _send_status(self, delivery: Any, message: Ask) -> None:
        await self._send(delivery, await self._status(message.evictions))

    async def _audit_for(self, delivery: Any, message: Audit) -> None:
        loaders = self._auditor.state["loaders"]
        try:
            report = await self._auditor.audit(message.sample, message.delay)
        except Exception:
            log.exception("an audit failed")
            return
        await self._send(delivery, AuditAnswer(id=self._id, loaders=loaders, report=report))

    async def _send(self, delivery: Any, answer: Any) -> None:
        try:
            await self._bus().answer(delivery, msgspec.json.encode(answer))
        except PublishError as error:
            self.problem = str(error)
            logs.event(log, logging.DEBUG, "answer not sent", reason=error)
        else:
            self.problem = None
