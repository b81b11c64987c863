"""What an instance does with what the bus delivers: understand, decide, evict, and only then answer."""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from cacheinval import logs
from cacheinval.clock import Clock
from cacheinval.coherence import INVALIDATED, Coherence, Eviction, ProofState
from cacheinval.errors import BlockedError, BusError, CacheError, EvictionError, MalformedMessageError
from cacheinval.latencies import Latencies
from cacheinval.messages import Ask, Audit, Invalidate, Message, Probe, Unknown, decode, encode
from cacheinval.recent import RecentEvictions
from cacheinval.tracing import Tracing

__all__ = ["Instance", "ReceiverCounters"]

log = logging.getLogger("cacheinval.receiver")

T = TypeVar("T")

SILENT_TICKS = 3
"""Tick intervals without any message after which a subscription has to prove that it hears."""

PROBE_TIMEOUT = 2.0
MARKER_AGAIN = 10.0
"""Seconds after which a marker is published again: it could not be, or somebody purged the queue that it was in."""

RETRY_FIRST, RETRY_MOST, RETRY_LIMIT = 0.05, 2.0, 30.0

PORTION = 32 << 10
"""Bytes of messages after which everything else in the process has its turn: two or three thousand names."""


class Delivery(Protocol):
    """One message as the bus hands it over."""

    @property
    def body(self) -> bytes: ...
    @property
    def reply_to(self) -> str | None: ...
    @property
    def contexts(self) -> Sequence[str]: ...
    @property
    def offset(self) -> int | None: ...


class Evictable(Protocol):
    """A cache, as far as it is to be kept honest."""

    async def evict(self, eviction: Eviction) -> None: ...


class Keeper(Protocol):
    """Where the proof state of a cache outside the process is kept: in that cache, with which it must be lost."""

    async def restore(self) -> ProofState | None:
        """What was kept last, if it is still there."""

    async def keep(self, state: ProofState) -> bool:
        """Keeps `state`; False if what was kept last is not there any more, and then nothing is kept."""

    async def forget(self) -> None:
        """From now on nothing is kept."""


class ReceiverCounters(Latencies):
    """What arrived, and how long after its commit it was evicted, counted since the start."""

    __slots__ = ("evictions", "malformed", "messages", "retries")

    def __init__(self) -> None:
        super().__init__()
        self.messages = self.malformed = self.evictions = self.retries = 0


class _Batch:
    """What several deliveries come to."""

    __slots__ = ("arrived_at", "asking", "evicted", "eviction", "own", "problems", "traced")

    def __init__(self) -> None:
        self.problems: list[str | None] = []
        self.eviction: Eviction | None = None
        self.evicted: list[Invalidate] = []
        self.own: list[Invalidate] = []
        self.asking: list[Delivery] = []
        self.traced: list[tuple[Delivery, Invalidate]] = []
        self.arrived_at = 0


class Instance:
    """The receiving side of one instance: what `bus.Receiver` asks for.

    Args:
        caches: whatever is to be evicted, the instance's own cache first.
        publish_probe: publishes a marker and returns when the broker has confirmed it.
        answer: called for each message that asks for this instance's status, or for an audit of it.
        confirm: called with those that ask to be told of their eviction, when it is done.
        resubscribe: ends the subscription, so that a new one is made.
        keeper: for a cache outside the process: keeps what must outlive this process together with it.
        tick_interval: seconds.
        max_clock_skew: seconds.
        recent: told what has been evicted.
    """

    def __init__(
        self,
        coherence: Coherence,
        clock: Clock,
        caches: Sequence[Evictable],
        publish_probe: Callable[[bytes], Awaitable[None]],
        answer: Callable[[Delivery, Ask | Audit], None],
        resubscribe: Callable[[str], None],
        *,
        keeper: Keeper | None = None,
        tick_interval: float = 1.0,
        max_clock_skew: float = 0.1,
        confirm: Callable[[Sequence[Delivery]], None] = lambda deliveries: None,
        recent: RecentEvictions | None = None,
    ) -> None:
        self.counters = ReceiverCounters()
        self.tracing: Tracing | None = None
        """With it there are spans of the evictions that traced writes cause."""
        self._coherence = coherence
        self._clock = clock
        self._caches = caches
        self._publish_probe = publish_probe
        self._answer = answer
        self._confirm = confirm
        self._recent = recent or RecentEvictions()
        self._resubscribe = resubscribe
        self._keeper = keeper
        self._tick_interval = tick_interval
        self._max_clock_skew = max_clock_skew
        self._refusal: str | None = None
        self._heard = asyncio.Event()
        self._marker_sent_at = 0.0
        self._gap_put_off = asyncio.Event()
        self._failing = 0  # evictions that are being retried
        self._answered: set[Delivery] = set()  # before their turn
        self.trusted = asyncio.Event()
        """Set while what is cached can be relied on."""
        self.ever_joined = False
        self.since = time.time()
        """Wall clock time of the last change between trusted and suspect."""

    @property
    def position(self) -> int | None:
        """See `bus.Receiver.position`."""
        return self._coherence.position.offset

    async def renewing(self) -> None:
        """See `bus.Receiver.renewing`."""
        self._coherence.position.forget()
        if self._keeper is not None:
            await self._keeper.forget()

    async def joined(self, *, resumed: bool) -> None:
        """See `bus.Receiver.joined`."""
        self._coherence.settle("silence")
        if not resumed:
            await self._insist(self.renewing)
            await self._evict(self._coherence.joined_anew(self._clock.now()))
            await self._keep()
            self._coherence.trust()
            self._note_trust()
            return
        marker = secrets.token_hex(8)
        if self.position is None:
            await self._resume(marker)
        else:
            self._coherence.continued(marker, self._clock.now())
        # What waits in the queue is to be evicted also while nothing can be published: see `watch`.
        with suppress(BusError, TimeoutError):
            await self._publish_probe(encode(Probe(v=1, id=marker)))
        self._marker_sent_at = self._clock.now()

    async def _resume(self, marker: str) -> None:
        state = None if self._keeper is None else await self._insist(self._keeper.restore)
        eviction = self._coherence.resumed(marker, self._clock.now(), state)
        if eviction is not None:
            await self._evict(eviction)
            await self._keep()

    async def _keep(self) -> None:
        """Keeps the proof state, before anything is acknowledged that it rests on."""
        keeper = self._keeper
        while keeper is not None and not await self._insist(
            lambda: keeper.keep(self._coherence.proof_state())
        ):
            # Emptied, or gone back to what it held before: entries may be there again that were evicted.
            eviction = self._coherence.gap("the cache lost what it kept", self._clock.now())
            if eviction is not None:
                await self._evict(eviction)

    def lost(self, reason: str) -> None:
        """See `bus.Receiver.lost`."""
        self._answered.clear()
        self._coherence.lost(reason)
        self._note_trust()

    async def receive(self, deliveries: Sequence[Delivery]) -> list[str | None]:
        """See `bus.Receiver.receive`."""
        try:
            return await self._receive(deliveries)
        except Exception:
            self._coherence.position.forget()  # what fails may always fail, and a stream would bring it back for ever
            raise

    async def _receive(self, deliveries: Sequence[Delivery]) -> list[str | None]:
        answers: list[str | None] = []
        for few in _portions(deliveries):
            if answers:
                await asyncio.sleep(0)  # between portions: nothing is understood by now and not yet evicted
            batch = self._judge(few)
            if batch.eviction:
                await self._evict(batch.eviction)
            self._coherence.evicted(self._clock.now())
            await self._keep()
            self._tell(batch)
            answers += batch.problems
        return answers

    def receive_now(self, deliveries: Sequence[Delivery]) -> list[str | None] | None:
        """See `bus.Receiver.receive_now`."""
        evict_now = getattr(self._caches[0], "evict_now", None)
        if (
            evict_now is None
            or len(self._caches) > 1
            or self._keeper is not None
            or not _is_portion(deliveries)
        ):
            return None
        try:
            batch = self._judge(deliveries)
            if batch.eviction:
                self._coherence.evict(batch.eviction, self._clock.now())
                self.counters.evictions += 1
                evict_now(batch.eviction)
                self._tell_epoch(batch.eviction)
            self._coherence.evicted(self._clock.now())
            self._tell(batch)
            return batch.problems
        except Exception:
            self._coherence.position.forget()  # as in `receive`
            raise

    def overhear(self, deliveries: Sequence[Delivery]) -> None:
        """See `bus.Receiver.overhear`: while nothing can be evicted nothing is received either, which is no silence, and
        whoever asks how it is is to learn of it."""
        if not self._failing:
            return
        self._coherence.heard(self._clock.now())
        for delivery in deliveries:
            if not delivery.reply_to:
                continue
            with suppress(MalformedMessageError):  # which is said when its turn comes
                message = decode(delivery.body)
                if isinstance(message, Ask):
                    self._answered.add(delivery)
                    self._answer(delivery, message)

    def _judge(self, deliveries: Sequence[Delivery]) -> "_Batch":
        """What the rules make of these; from here to the eviction nothing is awaited."""
        self._heard.set()
        self._coherence.settle("silence")
        now = self._clock.now()
        batch = _Batch()
        evictions: list[Eviction] = []
        for delivery in deliveries:
            message, problem = self._understand(delivery)
            batch.problems.append(problem)
            eviction = self._coherence.received(message, now, delivery.offset)
            if delivery.reply_to and isinstance(message, Invalidate):
                batch.asking.append(delivery)  # also where it had been evicted before
            if eviction is not None:
                evictions.append(eviction)
                if isinstance(message, Invalidate):
                    batch.evicted.append(message)
                    if self.tracing is not None and delivery.contexts:
                        batch.traced.append((delivery, message))
            elif isinstance(message, Invalidate):  # skipped: it had been evicted here before it was published
                batch.own.append(message)
        if batch.traced:
            batch.arrived_at = time.time_ns()
        if evictions:
            batch.eviction = evictions[0] if len(evictions) == 1 else Eviction.merged(evictions)
        return batch

    def _understand(self, delivery: Delivery) -> tuple[Message | Unknown | None, str | None]:
        self.counters.messages += 1
        try:
            message = decode(delivery.body)
        except MalformedMessageError as error:
            self.counters.malformed += 1
            logs.event(
                log,
                logging.WARNING,
                "malformed message dead-lettered"
                if delivery.offset is None
                else "malformed message in the stream",
                reason=error,
                bytes=len(delivery.body),
                offset=delivery.offset,
            )
            return None, str(error)
        if self._answered and delivery in self._answered:
            self._answered.discard(delivery)
        elif isinstance(message, Ask | Audit) and delivery.reply_to:
            self._answer(delivery, message)
        return message, None

    async def _evict(self, eviction: Eviction) -> None:
        """Evicts in every cache, again and again until it is done; the rules come first, so no load slips through."""
        self._coherence.evict(eviction, self._clock.now())
        self.counters.evictions += 1
        try:
            for cache in self._caches:
                await self._evict_in(cache, eviction)
        except BaseException:
            if eviction.everything:
                # Nothing may ask for it again: a message that comes again is a duplicate, a queue just made is found.
                self._coherence.put_off_gap(eviction.reason)
                self._gap_put_off.set()
            raise
        self._tell_epoch(eviction)

    def _tell_epoch(self, eviction: Eviction) -> None:
        if eviction.everything:
            if eviction.reason != INVALIDATED:
                self._recent.note_epoch(eviction.reason, self._clock.now())
            logs.event(log, logging.INFO, "new epoch", epoch=self._coherence.epoch, reason=eviction.reason)

    async def _evict_in(self, cache: Evictable, eviction: Eviction) -> None:
        await self._insist(lambda: cache.evict(eviction))

    async def _insist(self, operate: Callable[[], Awaitable[T]]) -> T:
        """What `operate` returns, tried again and again while a cache cannot be used."""
        try:
            return await operate()
        except CacheError as error:
            self._failing += 1
            self._coherence.doubt("eviction", f"eviction failed: {error}")
            self._note_trust()
            logs.event(log, logging.ERROR, "eviction failed, retrying", reason=error)
            try:
                result = await self._retry(operate)
                logs.event(log, logging.INFO, "evicting again")
                return result
            finally:
                # If it was given up, another doubt stands by now: the subscription starts over, or a gap is put off.
                self._failing -= 1
                if not self._failing:
                    self._coherence.settle("eviction")

    async def _retry(self, operate: Callable[[], Awaitable[T]]) -> T:
        loop = asyncio.get_running_loop()
        pause, give_up_at = RETRY_FIRST, loop.time() + RETRY_LIMIT
        while True:
            self.counters.retries += 1
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(pause * 2, RETRY_MOST)
            try:
                return await operate()
            except CacheError as error:
                if loop.time() > give_up_at:
                    raise EvictionError(f"not evicted within {RETRY_LIMIT:g} s: {error}") from error

    def registered(self, problem: str | None) -> None:
        """The registration of this instance begins to stand (None), or no longer does (why)."""
        if problem is None:
            self._coherence.settle("registration")
        elif self._coherence.registration.required:
            self._coherence.doubt("registration", problem)
        self._note_trust()

    def _note_trust(self) -> None:
        reason = self._coherence.suspect
        if (reason is None) == self.trusted.is_set():
            return
        self.since = time.time()
        if reason is None:
            self.ever_joined = True
            self.trusted.set()
            logs.event(log, logging.INFO, "ready", epoch=self._coherence.epoch)
        else:
            self.trusted.clear()
            level = logging.DEBUG if reason == "stopped" else logging.WARNING
            logs.event(log, level, "suspect", reason=reason)

    def _tell(self, batch: "_Batch") -> None:
        """Counts, answers and logs what has been done."""
        now = self._clock.now()
        for message in batch.own:
            self._recent.note(message, now, own=True)
        for message in batch.evicted:
            self._recent.note(message, now)
            since = message.committed_at or message.at
            latency = None if since is None else max(0.0, now - since)
            if latency is not None:
                self.counters.observe(latency)
            if log.isEnabledFor(logging.INFO):
                logs.event(
                    log,
                    logging.INFO,
                    "evicted everything" if message.all else "evicted",
                    **_named("key", message.keys),
                    **_named("tag", message.tags),
                    origin=message.origin,
                    seq=message.seq,
                    latency_ms=None if latency is None else latency * 1e3,
                )
        if self.tracing is not None:
            for delivery, message in batch.traced:
                self.tracing.evicted(delivery.contexts, message, batch.arrived_at)
        if batch.asking:
            self._confirm(batch.asking)
        self._note_trust()
        if self._coherence.gap_due_at is not None:
            self._gap_put_off.set()

    async def watch(self) -> None:
        """Runs until cancelled: notices silence, a clock that was set, and ticks that cannot be believed."""
        while True:
            await asyncio.sleep(self._tick_interval / 2)
            self._tell_refusal()
            await self._send_marker_again()
            if abs(self._clock.drift()) > self._max_clock_skew:
                await self._start_clock_over()
            silence = SILENT_TICKS * self._tick_interval
            if self._coherence.silent(self._clock.now(), silence):
                # Whoever probes first speaks for all: a probe is heard by every instance.
                await asyncio.sleep(random.uniform(0, self._tick_interval))
                if self._coherence.silent(self._clock.now(), silence):
                    await self._probe(silence)

    async def _send_marker_again(self) -> None:
        marker = self._coherence.marker
        if marker is None or self._clock.now() - self._marker_sent_at < MARKER_AGAIN:
            return
        with suppress(BusError, TimeoutError):
            await self._publish_probe(encode(Probe(v=1, id=marker)))
        self._marker_sent_at = self._clock.now()

    async def _probe(self, silence: float) -> None:
        deaf = True  # with a broker that can be reached
        self._heard.clear()
        try:
            await self._publish_probe(encode(Probe(v=1, id=secrets.token_hex(8))))
            async with asyncio.timeout(PROBE_TIMEOUT):
                await self._heard.wait()
        except BlockedError as error:
            # Nobody can publish, so a new subscription would hear no more than this one, and cost an epoch each time.
            self._coherence.doubt("silence", f"silence: {error}")
            self._note_trust()
            return
        except BusError as error:
            deaf = getattr(error, "refused", False)
            reason = f"silence, and a probe could not be published: {error}"
        except TimeoutError:
            reason = "silence: a probe was published and did not arrive"
        else:
            return
        if not self._heard.is_set() and self._coherence.silent(self._clock.now(), silence):
            self.lost(reason)
            if deaf:
                # A stream that nothing was put into for a while goes on where it was left, without what was lost.
                self._coherence.position.forget()
            self._resubscribe(reason)

    async def _start_clock_over(self) -> None:
        drift = self._clock.drift()
        self._clock.restart()
        eviction = self._coherence.clock_stepped(self._clock.now())
        logs.event(log, logging.WARNING, "the clock was set", seconds=drift)
        with suppress(EvictionError):  # then a gap is put off, and begins its epoch
            await self._evict(eviction)

    def _tell_refusal(self) -> None:
        refusal = self._coherence.proof.refused
        kind = None if refusal is None else refusal.partition(":")[0].partition(",")[0]
        if kind != self._refusal:
            self._refusal = kind
            if refusal is not None:
                logs.event(log, logging.ERROR, "a tick is not believed", reason=refusal)

    async def begin_epochs_put_off(self) -> None:
        """Runs until cancelled: gaps come at most once a second, and this begins the epochs of the others."""
        while True:
            await self._gap_put_off.wait()
            self._gap_put_off.clear()
            while (due_at := self._coherence.gap_due_at) is not None:
                await asyncio.sleep(max(0.0, due_at - self._clock.now()) + 0.001)
                eviction = self._coherence.take_due_gap(self._clock.now())
                if eviction is None:
                    continue
                with suppress(EvictionError):  # then it is put off once more
                    await self._evict(eviction)
                    self._coherence.gap_done()
                    self._note_trust()


def _is_portion(deliveries: Sequence[Delivery]) -> bool:
    return len(deliveries) == 1 or sum(len(delivery.body) for delivery in deliveries) <= PORTION


def _portions(deliveries: Sequence[Delivery]) -> Iterator[Sequence[Delivery]]:
    start, size = 0, 0
    for at, delivery in enumerate(deliveries):
        if at > start and size + len(delivery.body) > PORTION:
            yield deliveries[start:at]
            start, size = at, 0
        size += len(delivery.body)
    yield deliveries[start:]


def _named(what: str, names: Sequence[str]) -> dict[str, str | int]:
    if not names:
        return {}
    return {what: names[0]} if len(names) == 1 else {what: names[0], f"{what}s": len(names)}
