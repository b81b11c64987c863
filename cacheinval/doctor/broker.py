"""What can be seen of the broker over AMQP alone, as the user that the settings name."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed
from aiormq.abc import AbstractChannel as UnderlayChannel
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource
from pamqp.commands import Basic
from pamqp.common import FieldTable

from cacheinval.bus.connecting import Broker, explain, is_away, is_blocked, place, within
from cacheinval.bus.consuming import DEAD_LETTER_QUEUE
from cacheinval.bus.rabbitmq import RabbitBus
from cacheinval.bus.wire import Connection
from cacheinval.coherence.registration import Registered
from cacheinval.doctor.checking import Checks
from cacheinval.doctor.findings import (
    BROKER_HERE,
    Finding,
    failed,
    lacking,
    of_dead_letters,
    of_lost_nodes,
    of_refusal,
    of_refusals,
    of_unreachable_broker,
    ok,
    warning,
)
from cacheinval.doctor.stream import READ_WITHIN, of_stream
from cacheinval.errors import MalformedMessageError
from cacheinval.fleet import status_in
from cacheinval.messages import MESSAGE_TYPE, Ask, Probe, Tick, decode, encode
from cacheinval.settings import Settings, addresses
from cacheinval.verdict import remedies

__all__ = ["BrokerSeen", "HeardTick"]

CONNECT_WITHIN = 8.0  # seconds
ANSWER_WITHIN = 4.0
CONFIRM_WITHIN = 5.0
LOOK_EVERY = 0.2
ANSWERS_WITHIN = 1.5
_T = TypeVar("_T")

DEPENDENT = ("exchange", "dead letters", "permissions", "round trip", "ticks", "instances")


class HeardTick(NamedTuple):
    """A tick, and how old it was by the clock here when it was heard."""

    age: float
    source: str | None


class BrokerSeen:
    """The checks of the broker; `checks` is told what they find.

    Args:
        settings: how the broker is reached, and as whom.
    """

    def __init__(self, settings: Settings, checks: Checks) -> None:
        self._settings = settings
        self._checks = checks
        self._broker = Broker(settings)
        self._url = settings.broker_url
        self._connect_within = CONNECT_WITHIN * len(
            addresses(self._url)
        )  # one node after the other may be silent
        self._connection: Connection | None = None
        self._heard: asyncio.Queue[bytes] = asyncio.Queue()
        self._refused: dict[str, str] = {}  # by permission, in the words of the broker
        self._blocked = False
        self._listens = False  # whether what is published here could be heard
        self.awaited_tick = False
        """Whether a tick was waited for, and could be heard."""
        self.answered: list[dict[str, Any]] | None = None
        """What instances told of themselves; None if they could not be asked."""

    async def examine(self) -> HeardTick | None:
        """Runs the checks, those of which each needs the one before it; returns the first tick that is heard."""
        if not await self._checks.run("broker", 2 * self._connect_within, self._reach):
            self._not_checked(0)
            return None
        if not await self._checks.run("exchange", ANSWER_WITHIN, self._exchange):
            self._not_checked(1)
            return None
        if self._settings.bus == "stream":  # which has no dead letters: what nobody understands stays in it
            await self._checks.run("stream", ANSWER_WITHIN + READ_WITHIN, self._stream)
        else:
            await self._checks.run("dead letters", ANSWER_WITHIN, self._dead_letters)
        done = await self._checks.run("permissions", 2 * ANSWER_WITHIN, self._listen)
        deadline = 2 * CONFIRM_WITHIN + ANSWER_WITHIN
        done &= await self._checks.run("round trip", deadline, self._round_trip)
        if self._refused:
            self._checks.add(of_refusals(self._url, self._refused))
        elif done:
            self._checks.add(ok("permissions", "all that an instance and a relay need"))
        if self._blocked:
            self._not_checked(3)
            return None
        self.awaited_tick = self._listens
        self._checks.not_checked(
            ("round trip",) if self.awaited_tick else ("round trip", "ticks"), BROKER_HERE
        )
        _, tick = await asyncio.gather(
            self._checks.run("instances", ANSWERS_WITHIN + 2 * CONNECT_WITHIN, self._ask),
            self._tick() if self.awaited_tick else _none(),
        )
        return tick

    def _not_checked(self, start: int) -> None:
        self._checks.not_checked(DEPENDENT[start:], BROKER_HERE)

    def _is_refused(self, error: ChannelAccessRefused, needed: Mapping[str, str]) -> None:
        reason = explain(error)
        self._refused.setdefault(lacking(reason, needed), reason)

    async def close(self) -> None:
        """Leaves the broker; what was made for the examination goes with the connection."""
        if self._connection is not None:
            await self._broker.leave(self._connection)
        await self._broker.close()

    async def _reach(self) -> list[Finding]:
        try:
            self._connection = await within(self._connect_within, self._broker.connect("doctor"))
        except Exception as error:
            return [of_unreachable_broker(self._broker.url, explain(error))]
        assert self._connection.transport is not None
        server = self._connection.transport.connection.server_properties
        reached = ok("broker", f"{_told(server, 'product')} {_told(server, 'version')} at {self._broker.url}")
        return [reached, *of_lost_nodes(await self._broker.unreachable("doctor"))]

    async def _exchange(self) -> Finding:
        name = self._broker.exchange
        channel = await self._channel()
        try:
            await channel.declare_exchange(name, passive=True)
        except ChannelNotFoundEntity:
            return failed(
                "exchange",
                f"{name} is missing: nobody has subscribed since it went, and nothing can be published",
                remedies.NO_EXCHANGE,
            )
        try:
            # It is there, so that this makes nothing, and only compares.
            await channel.declare_exchange(name, ExchangeType.FANOUT, durable=True)
        except ChannelPreconditionFailed as error:
            return failed(
                "exchange",
                f"{name} is no durable fanout: {explain(error)}",
                remedies.delete("exchange", name, remedies.vhost_of(self._url)),
            )
        except ChannelAccessRefused as error:
            return of_refusal(self._url, explain(error), {"exchange": "configure"})
        await channel.close()
        return ok("exchange", f"{name} is a durable fanout")

    async def _stream(self) -> Finding:
        assert self._connection is not None
        return await of_stream(
            await self._channel(), self._broker.stream, self._url, place(self._connection.url)
        )

    async def _dead_letters(self) -> list[Finding]:
        name, found = self._broker.dead_letters, list[Finding]()
        channel = await self._channel()
        try:
            await channel.declare_exchange(name, passive=True)
            queue = await channel.declare_queue(name, passive=True)
            found = [of_dead_letters(self._url, name, queue.declaration_result.message_count or 0)]
            await channel.declare_queue(name, durable=True, arguments=DEAD_LETTER_QUEUE)
            await channel.close()
        except ChannelNotFoundEntity as error:
            remedy = "start that node" if is_away(error) else "the next instance that subscribes makes it"
            remedy += "; until then what is malformed is dropped"
            return [warning("dead letters", explain(error), remedy)]
        except ChannelPreconditionFailed as error:
            remedy = f"`rabbitmqctl delete_queue -p {remedies.vhost_of(self._url)} {name}` once it is empty: instances make it as it has to be"
            return [*found, warning("dead letters", f"set up differently: {explain(error)}", remedy)]
        except ChannelAccessRefused as error:
            self._is_refused(error, {"queue": "configure"})
        return found

    async def _listen(self) -> list[Finding]:
        """Subscribes as an instance does, but with a queue of its own that nobody misses, to learn all that is refused."""
        ear = await self._declare()
        if ear is not None:
            bound = await self._permitted(partial(self._bind, ear), {"queue": "write", "exchange": "read"})
            consumed = await self._permitted(partial(self._consume, ear), {"queue": "read"})
            self._listens = bound is not None and consumed is not None
        if self._settings.cache_is_external:
            await self._may_use_durable()
        return []

    async def _permitted(
        self, trying: Callable[[UnderlayChannel], Awaitable[_T]], needed: Mapping[str, str]
    ) -> _T | None:
        """What comes of it; None where the broker refuses it, which ends the channel that was used for it alone."""
        try:
            return await trying(await (await self._channel()).get_underlay_channel())
        except ChannelAccessRefused as error:
            self._is_refused(error, needed)
            return None

    async def _declare(self) -> str | None:
        async def declare(channel: UnderlayChannel, dead_letters: str | None = None) -> str | None:
            arguments: FieldTable = {} if dead_letters is None else {"x-dead-letter-exchange": dead_letters}
            return (await channel.queue_declare(exclusive=True, auto_delete=True, arguments=arguments)).queue

        try:
            channel = await (await self._channel()).get_underlay_channel()
            return await declare(channel, self._broker.dead_letters)
        except ChannelAccessRefused as error:
            # A queue that hands on its dead letters takes three permissions: whether it is the first, one without tells.
            ear = await self._permitted(declare, {"queue": "configure"})
            if ear is not None:
                self._is_refused(error, {"queue": "read", "exchange": "write"})
            return ear

    async def _bind(self, ear: str, channel: UnderlayChannel) -> object:
        return await channel.queue_bind(ear, self._broker.exchange)

    async def _consume(self, ear: str, channel: UnderlayChannel) -> object:
        async def hear(message: DeliveredMessage) -> None:
            self._heard.put_nowait(message.body)

        return await channel.basic_consume(ear, hear, no_ack=True)

    async def _may_use_durable(self) -> None:
        """Looks at the queue of the cache outside the process; 405 or not, that it answers is enough."""
        name = f"{self._broker.exchange}.{self._settings.instance_id}"
        channel = await self._channel()
        try:
            await channel.declare_queue(name, passive=True)
        except (ChannelNotFoundEntity, ChannelLockedResource):
            return
        except ChannelAccessRefused as error:
            self._is_refused(error, {"queue": "configure"})

    async def _round_trip(self) -> list[Finding]:
        """Publishes to both exchanges, and waits for what was published to come back."""
        exchange, probe = self._broker.exchange, secrets.token_hex(8)
        properties = Basic.Properties(content_type="application/json", message_type=MESSAGE_TYPE)
        body, began = encode(Probe(v=1, id=probe)), time.monotonic()
        channel = await self._confirming()
        refused_before = len(self._refused)
        problem = await self._published(channel.basic_publish(body, exchange=exchange, properties=properties))
        if problem is not None:
            return [problem]
        found = []
        if self._listens and len(self._refused) == refused_before:
            try:
                async with asyncio.timeout(CONFIRM_WITHIN):
                    while not _is_probe(await self._heard.get(), probe):
                        pass
            except TimeoutError:
                text = f"a message did not come back within {CONFIRM_WITHIN:g} s"
                return [
                    failed(
                        "round trip",
                        text,
                        "see whether the broker is overloaded (`rabbitmq-diagnostics status`)",
                    )
                ]
            took = (time.monotonic() - began) * 1e3
            found.append(ok("round trip", f"no alarm; a message came back after {took:.0f} ms"))
        # As answers are sent, but by a name that no queue has.
        sending = (await self._confirming()).basic_publish(b"", routing_key=secrets.token_hex(16))
        problem = await self._published(sending)
        return found if problem is None else [*found, problem]

    async def _confirming(self) -> UnderlayChannel:
        return await (await self._channel(confirms=True)).get_underlay_channel()

    async def _published(self, sending: Coroutine[Any, Any, object]) -> Finding | None:
        """Why it was not confirmed; None if it was, or was refused."""
        assert self._connection is not None
        publishing = asyncio.ensure_future(sending)
        end = time.monotonic() + CONFIRM_WITHIN
        try:
            while not (await asyncio.wait({publishing}, timeout=LOOK_EVERY))[0]:
                if is_blocked(self._connection):
                    self._blocked = True
                    return failed(
                        "alarms",
                        "the broker blocks publishers: an alarm, of memory or disk",
                        remedies.broker("the broker blocks publishers", self._url),
                    )
                if time.monotonic() > end:
                    remedy = "see whether the broker is overloaded (`rabbitmq-diagnostics status`)"
                    return failed("round trip", f"no confirm within {CONFIRM_WITHIN:g} s", remedy)
            publishing.result()
        except ChannelAccessRefused as error:
            self._is_refused(error, {"exchange": "write"})
        finally:
            publishing.cancel()
            publishing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return None

    async def _tick(self) -> HeardTick | None:
        """The first tick that is heard within three intervals."""
        try:
            async with asyncio.timeout(3 * self._settings.tick_interval):
                while True:
                    message = _understood(await self._heard.get())
                    if isinstance(message, Tick):
                        return HeardTick(time.time() - message.as_of, message.source)
        except TimeoutError:
            return None

    async def _ask(self) -> list[Finding]:
        asked, arrivals = time.time(), list[float]()

        def note(bodies: Sequence[bytes]) -> bool:
            arrivals.append(time.time())
            return False

        bus = RabbitBus(self._settings)
        try:
            bodies = await bus.ask(encode(Ask(v=1)), ANSWERS_WITHIN, note)
        except Exception as error:
            reason = explain(error)
            remedy = remedies.broker(reason, self._url)
            return [
                failed("instances", f"they cannot be asked: {reason}", remedy, (*BROKER_HERE, "round trip"))
            ]
        finally:
            await bus.close()
        told = ((status_in(body), arrived) for body, arrived in zip(bodies, arrivals, strict=True))
        self.answered = [
            status | {"asked": asked, "arrived": arrived} for status, arrived in told if status is not None
        ]
        return []

    async def look_for_queues(self, silent: Sequence[Registered]) -> list[Finding]:
        """What can be seen of the queues of those that do not answer."""
        found = []
        for one in silent:
            if one.session:  # the broker has named the queue, and only its own connection may look at it
                continue
            name = f"{self._broker.exchange}.{one.id}"
            channel = await self._channel()
            try:
                queue = (await channel.declare_queue(name, passive=True)).declaration_result
            except ChannelLockedResource:
                continue
            except ChannelNotFoundEntity as error:
                if is_away(error):
                    found.append(warning("queues", explain(error), f"start that node; {one.id} starts empty"))
                    continue
                text = f"{name} is gone: what was published meanwhile is a gap for {one.id}"
                found.append(
                    warning("queues", text, f"restart {one.id}: it makes its queue, and starts empty")
                )
            else:
                if queue.consumer_count:
                    text = f"{name} is consumed, so {one.id} runs and does not answer"
                    step = f"see the log of {one.id}: it hangs, or its cache cannot evict"
                else:
                    text = f"{name} holds {queue.message_count} messages: {one.id} catches up when it is back"
                    step = f"start {one.id} within 24 h of its end, or it starts empty"
                found.append(warning("queues", text, step))
                await channel.close()
        return found

    async def _channel(self, *, confirms: bool = False) -> AbstractChannel:
        assert self._connection is not None
        channel = self._connection.channel(publisher_confirms=confirms)
        await within(ANSWER_WITHIN, channel.initialize())
        return channel


async def _none() -> None:
    return None


def _told(properties: Any, name: str) -> str:
    value = properties.get(name, "")
    return value.decode() if isinstance(value, bytes) else str(value)


def _understood(body: bytes) -> Any:
    try:
        return decode(body)
    except MalformedMessageError:
        return None


def _is_probe(body: bytes, id_: str) -> bool:
    message = _understood(body)
    return isinstance(message, Probe) and message.id == id_
