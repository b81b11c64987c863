"""What an instance does with what arrives: it evicts first and answers afterwards, whatever fails in between."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import pytest
from waiting import Eventually

from cacheinval import coherence as rules
from cacheinval import latencies, receiver
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence, Eviction, ProofState
from cacheinval.errors import BlockedError, CacheError, EvictionError, PublishError
from cacheinval.messages import Ask, Audit, Invalidate, Probe, decode, encode
from cacheinval.receiver import Instance


@dataclass(frozen=True)
class Delivery:
    body: bytes
    reply_to: str | None = None
    offset: int | None = None


class Cache:
    """Notes what it is told to evict; while `down`, it fails, and while `open` is not set, it waits."""

    def __init__(self) -> None:
        self.evicted: list[Eviction] = []
        self.attempts = 0
        self.down = False
        self.open = asyncio.Event()
        self.open.set()

    async def evict(self, eviction: Eviction) -> None:
        self.attempts += 1
        await self.open.wait()
        if self.down:
            raise CacheError("the cache is down")
        self.evicted.append(eviction)

    @property
    def keys(self) -> list[str]:
        return [key for eviction in self.evicted for key in eviction.keys]

    @property
    def resets(self) -> int:
        return sum(eviction.everything for eviction in self.evicted)


class Keeper:
    """Keeps the proof state; while `down`, it fails; told to lose it, it has nothing."""

    def __init__(self) -> None:
        self.state: ProofState | None = None
        self.told: list[str] = []
        self.down = False
        self.lost = False

    async def restore(self) -> ProofState | None:
        return self._do("restore") or self.state

    async def keep(self, state: ProofState) -> bool:
        self._do("keep")
        if self.lost:
            self.state, self.lost = None, False
            return False
        self.state = state
        return True

    async def forget(self) -> None:
        self._do("forget")
        self.state = None

    def _do(self, what: str) -> None:
        self.told.append(what)
        if self.down:
            raise CacheError("the cache is down")


class SetClock(Clock):
    def __init__(self) -> None:
        self.time = 1000.0
        self.start, self.elapsed = 0.0, lambda: self.time


@dataclass
class House:
    """An instance with two caches, and what it asked for."""

    instance: Instance
    coherence: Coherence
    clock: SetClock
    caches: list[Cache]
    keeper: Keeper
    probes: list[bytes]
    asked: list[Delivery]


@pytest.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(receiver, "RETRY_FIRST", 0.001)
    monkeypatch.setattr(receiver, "RETRY_MOST", 0.004)
    monkeypatch.setattr(rules, "GAP_INTERVAL", 0.02)
    coherence, clock, caches, keeper = Coherence(), SetClock(), [Cache(), Cache()], Keeper()
    probes: list[bytes] = []
    asked: list[Delivery] = []

    async def publish_probe(body: bytes) -> None:
        probes.append(body)

    return House(
        Instance(
            coherence,
            clock,
            caches,
            publish_probe,
            lambda delivery, message: asked.append(delivery),
            lambda reason: None,
            keeper=keeper,
        ),
        coherence,
        clock,
        caches,
        keeper,
        probes,
        asked,
    )


@pytest.fixture
async def joined(house: House) -> House:
    await house.instance.joined(resumed=False)
    for cache in house.caches:
        cache.evicted.clear()
        cache.attempts = 0
    return house


@pytest.fixture
async def gaps(joined: House) -> AsyncIterator[House]:
    """With the task that begins the epochs that were put off."""
    task = asyncio.create_task(joined.instance.begin_epochs_put_off())
    yield joined
    assert not task.done()
    task.cancel()
    await asyncio.wait([task])


def invalidate(*keys: str, seq: int | None = None, **fields: object) -> Delivery:
    origin = None if seq is None else "o"
    return Delivery(encode(Invalidate(v=1, origin=origin, seq=seq, keys=list(keys), **fields)))  # type: ignore[arg-type]


BAD = Delivery(b"not JSON")


# Joining


async def test_joining_clears_every_cache_before_it_is_ready(house: House) -> None:
    first, second = house.caches
    second.open.clear()
    joining = asyncio.create_task(house.instance.joined(resumed=False))
    while not second.attempts:
        await asyncio.sleep(0)
    assert first.resets == 1
    assert not house.instance.trusted.is_set()
    second.open.set()
    await joining
    assert second.resets == 1
    assert house.instance.trusted.is_set()
    assert house.instance.ever_joined
    assert house.coherence.suspect is None


async def test_a_subscription_that_is_lost_while_it_joins_is_not_trusted(house: House) -> None:
    house.caches[0].open.clear()
    joining = asyncio.create_task(house.instance.joined(resumed=False))
    await asyncio.sleep(0)
    house.instance.lost("cut")
    house.caches[0].open.set()
    await joining
    assert not house.instance.trusted.is_set()
    assert house.coherence.suspect == "cut"


async def test_lost_is_suspect_at_once(joined: House) -> None:
    joined.instance.lost("connection cut")
    assert not joined.instance.trusted.is_set()
    assert joined.coherence.suspect == "connection cut"


async def test_resumed_it_clears_nothing_and_waits_for_its_own_marker(joined: House) -> None:
    joined.instance.lost("cut")
    await joined.instance.joined(resumed=True)
    (probe,) = joined.probes
    assert not joined.instance.trusted.is_set()
    await joined.instance.receive([invalidate("a"), Delivery(encode(Probe(v=1, id="another's")))])
    assert not joined.instance.trusted.is_set()
    await joined.instance.receive([invalidate("b"), Delivery(probe)])
    assert joined.instance.trusted.is_set()
    assert joined.caches[0].keys == ["a", "b"]
    assert joined.caches[0].resets == 0


async def test_each_resumption_has_a_marker_of_its_own(joined: House) -> None:
    for _ in range(2):
        joined.instance.lost("cut")
        await joined.instance.joined(resumed=True)
    first, second = joined.probes
    assert first != second
    await joined.instance.receive([Delivery(first)])
    assert not joined.instance.trusted.is_set()
    await joined.instance.receive([Delivery(second)])
    assert joined.instance.trusted.is_set()


async def test_a_marker_that_could_not_be_published_is_published_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Receiving goes on meanwhile: what waits in the queue is evicted."""
    monkeypatch.setattr(receiver, "MARKER_AGAIN", 0.01)
    attempts: list[bytes] = []

    async def fail_at_first(body: bytes) -> None:
        attempts.append(body)
        if len(attempts) == 1:
            raise PublishError("no broker")

    instance = Instance(
        Coherence(),
        Clock(),
        [],
        fail_at_first,
        lambda delivery, message: None,
        lambda reason: None,
        tick_interval=0.02,
    )
    await instance.joined(resumed=True)
    assert len(attempts) == 1
    watching = asyncio.create_task(instance.watch())
    async with asyncio.timeout(30):
        while len(attempts) < 2:
            await asyncio.sleep(0.005)
    watching.cancel()
    assert not instance.trusted.is_set()
    await instance.receive([Delivery(attempts[1])])
    assert instance.trusted.is_set()


async def test_who_asks_while_nothing_can_be_evicted_is_answered_once_and_at_once(
    joined: House, eventually: Eventually
) -> None:
    """Behind the eviction the question would wait for as long, and nobody would learn why."""
    instance, asked = joined.instance, Delivery(encode(Ask(v=1)), reply_to="here")
    instance.overhear([asked])
    assert not joined.asked, "it has its turn in a moment"
    joined.caches[0].down = True
    receiving = asyncio.create_task(instance.receive([invalidate("a")]))
    await eventually(lambda: not instance.trusted.is_set())
    joined.clock.time += 100
    audit = Delivery(encode(Audit(v=1)), reply_to="there")  # which would find what cannot be evicted
    others = [Delivery(b"{"), invalidate("b"), Delivery(encode(Ask(v=1))), asked, audit]
    instance.overhear(others)
    assert joined.asked == [asked]
    assert not joined.coherence.silent(joined.clock.time, 3), "that it cannot evict is no silence"
    assert joined.coherence.suspect == "eviction failed: the cache is down"
    joined.caches[0].down = False
    await receiving
    await instance.receive(others)
    assert joined.asked == [asked, audit]
    await instance.receive([asked])
    assert joined.asked == [asked, audit, asked]


async def test_what_was_answered_before_its_turn_is_forgotten_with_the_subscription(
    joined: House, eventually: Eventually
) -> None:
    asked = Delivery(encode(Ask(v=1)), reply_to="here")
    joined.caches[0].down = True
    receiving = asyncio.create_task(joined.instance.receive([invalidate("a")]))
    await eventually(lambda: not joined.instance.trusted.is_set())
    joined.instance.overhear([asked])
    receiving.cancel()
    await asyncio.wait({receiving})
    joined.instance.lost("closed")
    joined.caches[0].down = False
    await joined.instance.receive([asked])
    assert joined.asked == [asked, asked]


async def test_silence_in_an_alarm_is_a_doubt_and_no_reason_to_subscribe_anew() -> None:
    subscribed_anew: list[str] = []

    async def blocked(body: bytes) -> None:
        raise BlockedError

    coherence = Coherence()
    instance = Instance(
        coherence, SetClock(), [], blocked, lambda delivery: None, subscribed_anew.append, tick_interval=0.01
    )
    await instance.joined(resumed=False)
    assert instance.trusted.is_set()
    instance._clock.time += 1
    watching = asyncio.create_task(instance.watch())
    async with asyncio.timeout(30):
        while instance.trusted.is_set():
            await asyncio.sleep(0.005)
    watching.cancel()
    assert coherence.suspect == "silence: The broker blocks publishers (an alarm: memory or disk)."
    epoch = coherence.epoch
    await instance.receive([invalidate("a")])  # the alarm is over
    assert instance.trusted.is_set()
    assert coherence.epoch == epoch
    assert subscribed_anew == []


# Reading a stream


def at(offset: int, delivery: Delivery) -> Delivery:
    """The same, from this place of a stream."""
    return replace(delivery, offset=offset)


@pytest.fixture
async def reading(house: House) -> House:
    """An instance that has joined, and read the first message of a stream."""
    house.instance._keeper = None
    await house.instance.joined(resumed=False)
    await house.instance.receive([at(0, invalidate("first", seq=1))])
    for cache in house.caches:
        cache.evicted.clear()
    return house


async def test_reading_on_it_clears_nothing_and_waits_for_its_own_marker(reading: House) -> None:
    assert reading.instance.position == 0
    reading.instance.lost("cut")
    await reading.instance.joined(resumed=True)
    assert not reading.instance.trusted.is_set()
    (probe,) = reading.probes
    await reading.instance.receive([at(0, invalidate("first", seq=1)), at(1, invalidate("a", seq=2))])
    assert (reading.caches[0].keys, reading.caches[0].resets) == (["a"], 0)
    assert not reading.instance.trusted.is_set()
    await reading.instance.receive([at(2, Delivery(probe))])
    assert reading.instance.trusted.is_set()


async def test_what_was_not_evicted_is_read_again(reading: House) -> None:
    reading.caches[0].open.clear()
    receiving = asyncio.create_task(reading.instance.receive([at(1, invalidate("a", seq=2))]))
    while not reading.caches[0].attempts:
        await asyncio.sleep(0)
    assert reading.instance.position == 0
    receiving.cancel()
    await asyncio.wait({receiving})
    reading.instance.lost("cut")
    assert reading.instance.position == 0


async def test_a_place_that_the_stream_does_not_have_is_forgotten(reading: House) -> None:
    await reading.instance.renewing()
    assert reading.instance.position is None


async def test_what_cannot_be_understood_is_told_with_its_place(
    reading: House, caplog: pytest.LogCaptureFixture
) -> None:
    assert await reading.instance.receive([at(1, BAD)]) != [None]
    assert "malformed message in the stream" in caplog.text
    assert "offset=1" in caplog.text
    assert reading.caches[0].resets == 1


@pytest.mark.parametrize(("probed", "kept"), [("published", False), ("refused", False), ("not sent", True)])
async def test_silence_gives_the_place_up_where_the_broker_can_be_reached(
    reading: House, monkeypatch: pytest.MonkeyPatch, probed: str, kept: bool
) -> None:
    """The exchange may have been deleted, and made again without the stream: that would go on without a gap."""
    monkeypatch.setattr(receiver, "PROBE_TIMEOUT", 0.01)
    subscribed_anew = asyncio.Event()
    instance = reading.instance

    async def publish(body: bytes) -> None:
        if probed != "published":
            error = PublishError(probed)
            error.refused = probed == "refused"
            raise error

    instance._publish_probe = publish
    instance._resubscribe = lambda reason: subscribed_anew.set()
    instance._tick_interval = 0.01
    reading.clock.time += 1
    watching = asyncio.create_task(instance.watch())
    async with asyncio.timeout(30):
        await subscribed_anew.wait()
    watching.cancel()
    assert instance.position == (0 if kept else None)


@pytest.mark.parametrize("at_once", [True, False])
async def test_what_fails_is_not_read_a_second_time(reading: House, at_once: bool) -> None:
    instance = reading.instance
    instance._caches = reading.caches[:1]

    def fail(eviction: object) -> bool:
        raise RuntimeError("it always does")

    if at_once:
        reading.caches[0].evict_now = fail
        with pytest.raises(RuntimeError):
            instance.receive_now([at(1, invalidate("a", seq=2))])
    else:
        instance._evict = fail
        with pytest.raises(RuntimeError):
            await instance.receive([at(1, invalidate("a", seq=2))])
    assert instance.position is None


# Receiving


async def test_it_answers_when_every_cache_has_evicted(joined: House) -> None:
    joined.caches[1].open.clear()
    receiving = asyncio.create_task(joined.instance.receive([invalidate("a"), invalidate("b", "a")]))
    while not joined.caches[1].attempts:
        await asyncio.sleep(0)
    assert joined.caches[0].keys == ["a", "b"]
    assert not receiving.done()
    joined.caches[1].open.set()
    assert await receiving == [None, None]
    assert joined.caches[1].keys == ["a", "b"]


async def test_the_rules_know_before_the_caches_do(joined: House) -> None:
    load = joined.coherence.loads.begin("a", 1000.0)
    joined.caches[0].open.clear()
    receiving = asyncio.create_task(joined.instance.receive([invalidate("a")]))
    while not joined.caches[0].attempts:
        await asyncio.sleep(0)
    assert not joined.coherence.loads.may_store(load)
    joined.caches[0].open.set()
    await receiving


async def test_everybody_else_has_his_turn_while_much_is_received(
    joined: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = invalidate("a"), invalidate("b"), invalidate("c")
    monkeypatch.setattr(receiver, "PORTION", len(a.body) + len(b.body))
    seen: list[list[str]] = []

    async def look() -> None:
        while True:
            seen.append(joined.caches[0].keys)
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    await asyncio.sleep(0)
    assert await joined.instance.receive([a, b, c]) == [None] * 3
    looking.cancel()
    # Whatever has been understood has been evicted whenever somebody else runs.
    assert seen == [[], ["a", "b"]]
    assert joined.caches[0].keys == ["a", "b", "c"]


async def test_tags_and_all_are_passed_on(joined: House) -> None:
    await joined.instance.receive([Delivery(encode(Invalidate(v=1, tags=["t"])))])
    assert joined.caches[0].evicted == [Eviction([], ["t"])]
    await joined.instance.receive([Delivery(encode(Invalidate(v=1, all=True)))])
    assert joined.caches[0].resets == 1


async def test_what_cannot_be_understood_is_told_and_is_a_gap(
    joined: House, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cacheinval.receiver"):
        answers = await joined.instance.receive([invalidate("a"), BAD, invalidate("b")])
    assert answers[0] is answers[2] is None
    assert "JSON" in (answers[1] or "")
    assert joined.caches[0].resets == 1
    assert joined.instance.counters.malformed == 1
    assert caplog.text.count("malformed message dead-lettered") == 1


async def test_unknown_kinds_are_acknowledged_and_evict_nothing(joined: House) -> None:
    assert await joined.instance.receive([Delivery(b'{"v":1,"kind":"news"}')]) == [None]
    assert joined.caches[0].attempts == 0
    assert joined.coherence.counters.unknown_messages == 1


async def test_an_echo_evicts_nothing(joined: House) -> None:
    joined.coherence.expect_echo("o", 1)
    assert await joined.instance.receive([invalidate("a", seq=1)]) == [None]
    assert joined.caches[0].keys == []
    assert await joined.instance.receive([invalidate("a", seq=1)]) == [None]
    assert joined.caches[0].keys == ["a"]


async def test_a_question_is_answered_where_there_is_an_address(joined: House) -> None:
    for question in (Ask(v=1), Audit(v=1)):
        body = encode(question)
        await joined.instance.receive([Delivery(body, reply_to="here"), Delivery(body)])
        assert [delivery.reply_to for delivery in joined.asked] == ["here"]
        joined.asked.clear()


async def test_latency_is_counted_from_the_commit(joined: House) -> None:
    await joined.instance.receive(
        [invalidate("a", at=999.9, committed_at=999.0), invalidate("b", at=999.996)]
    )
    counters = joined.instance.counters
    seen = dict(zip(latencies.BUCKETS, counters.latencies, strict=False))
    assert seen[1.0] == seen[0.005] == 1
    assert sum(counters.latencies) == 2
    assert counters.latency_sum == pytest.approx(1.004)
    await joined.instance.receive([invalidate("a", at=2000.0), invalidate("a", at=1.0), invalidate("a")])
    assert counters.latencies[0] == counters.latencies[-1] == 1  # clocks that differ count as no time at all


async def test_one_line_for_each_message(joined: House, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cacheinval.receiver"):
        await joined.instance.receive([invalidate("a", "b", seq=1, at=999.9)])
    (record,) = caplog.records
    assert record.getMessage() == "evicted key=a keys=2 origin=o seq=1 latency_ms=100"


# A cache that fails


async def test_an_eviction_that_fails_is_tried_again_before_it_answers(
    joined: House, eventually: Eventually
) -> None:
    joined.caches[1].down = True
    receiving = asyncio.create_task(joined.instance.receive([invalidate("a")]))
    await eventually(lambda: joined.caches[1].attempts > 4)
    assert not receiving.done()
    assert not joined.instance.trusted.is_set()
    assert joined.coherence.suspect == "eviction failed: the cache is down"
    joined.caches[1].down = False
    assert await receiving == [None]
    assert joined.instance.trusted.is_set()
    assert joined.caches[1].keys == ["a"]
    assert joined.instance.counters.retries > 3


async def test_failures_are_told_once(
    joined: House, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    joined.caches[1].down = True
    with caplog.at_level(logging.INFO, "cacheinval.receiver"):
        receiving = asyncio.create_task(joined.instance.receive([invalidate("a")]))
        await eventually(lambda: joined.caches[1].attempts > 6)
        joined.caches[1].down = False
        await receiving
    assert caplog.text.count("eviction failed, retrying") == 1
    assert caplog.text.count("evicting again") == 1


async def test_after_its_limit_it_gives_up_without_an_answer(
    joined: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "RETRY_LIMIT", 0.02)
    joined.caches[0].down = True
    with pytest.raises(EvictionError, match=r"not evicted within 0.02 s: the cache is down"):
        await joined.instance.receive([invalidate("a")])


@pytest.mark.parametrize("how", ["given up", "cancelled"])
async def test_a_new_subscription_is_trusted_after_an_eviction_that_never_succeeded(
    joined: House, monkeypatch: pytest.MonkeyPatch, eventually: Eventually, how: str
) -> None:
    joined.caches[0].down = True
    if how == "given up":
        monkeypatch.setattr(receiver, "RETRY_LIMIT", 0.01)
    receiving = asyncio.create_task(joined.instance.receive([invalidate("a")]))
    await eventually(lambda: joined.caches[0].attempts > 0)
    if how == "cancelled":
        receiving.cancel()
    await asyncio.wait([receiving])
    assert receiving.cancelled() or isinstance(receiving.exception(), EvictionError)
    joined.instance.lost("receiving failed")
    assert joined.coherence.suspect
    joined.caches[0].down = False
    await joined.instance.joined(resumed=False)
    assert joined.coherence.suspect is None
    assert joined.instance.trusted.is_set()


async def test_a_gap_that_could_not_be_evicted_is_not_forgotten_when_its_message_comes_again(
    gaps: House, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """A durable queue brings the message back, by then as a duplicate, which is no gap."""
    monkeypatch.setattr(receiver, "RETRY_LIMIT", 0.01)
    await gaps.instance.receive([invalidate("a", seq=1)])
    gaps.caches[0].down = True
    with pytest.raises(EvictionError):
        await gaps.instance.receive([invalidate("a", seq=3)])
    gaps.instance.lost("receiving failed")
    await gaps.instance.joined(resumed=True)
    gaps.caches[0].down = False
    await gaps.instance.receive([invalidate("a", seq=3), Delivery(gaps.probes[0])])
    gaps.clock.time += 2
    await eventually(lambda: gaps.instance.trusted.is_set())
    assert gaps.caches[0].resets == gaps.caches[1].resets == 1


async def test_a_queue_that_is_new_is_cleared_even_if_the_first_attempt_failed(
    gaps: House, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """The first attempt made the durable queue, so the second one finds it."""
    monkeypatch.setattr(receiver, "RETRY_LIMIT", 0.01)
    gaps.instance.lost("queue deleted")
    gaps.caches[1].down = True
    with pytest.raises(EvictionError):
        await gaps.instance.joined(resumed=False)
    gaps.instance.lost("receiving failed")
    gaps.caches[1].down = False
    await gaps.instance.joined(resumed=True)
    await gaps.instance.receive([Delivery(gaps.probes[0])])
    gaps.clock.time += 2
    await eventually(lambda: gaps.instance.trusted.is_set())
    # For the gap that was put off, and because the first attempt had left nothing kept.
    assert gaps.caches[1].resets == 2


# What is kept with a cache outside the process


async def test_the_proof_is_kept_after_the_eviction_and_before_the_answer(joined: House) -> None:
    joined.caches[1].open.clear()
    receiving = asyncio.create_task(joined.instance.receive([invalidate("a", seq=7)]))
    while not joined.caches[1].attempts:
        await asyncio.sleep(0)
    assert joined.keeper.state is not None
    assert joined.keeper.state.seqs == {}
    joined.caches[1].open.set()
    assert await receiving == [None]
    assert joined.keeper.state.seqs == {"o": 7}


async def test_what_cannot_be_kept_is_not_answered(joined: House, eventually: Eventually) -> None:
    joined.keeper.down = True
    receiving = asyncio.create_task(joined.instance.receive([invalidate("a", seq=7)]))
    await eventually(lambda: joined.keeper.told.count("keep") > 2)
    assert not receiving.done()
    assert not joined.instance.trusted.is_set()
    joined.keeper.down = False
    assert await receiving == [None]
    assert joined.instance.trusted.is_set()


async def test_a_new_queue_begins_with_nothing_kept(joined: House) -> None:
    await joined.instance.receive([invalidate("a", seq=7)])
    joined.instance.lost("the queue expired")
    await joined.instance.renewing()
    assert joined.keeper.state is None
    await joined.instance.joined(resumed=False)
    assert joined.keeper.state is not None
    assert joined.keeper.state.seqs == {}


async def test_a_queue_is_resumed_where_nothing_was_kept(house: House) -> None:
    await house.instance.joined(resumed=True)
    assert [cache.resets for cache in house.caches] == [1, 1]
    assert house.keeper.state is not None, "the next process would clear again"
    assert not house.instance.trusted.is_set()
    await house.instance.receive([Delivery(house.probes[0])])
    assert house.instance.trusted.is_set()


async def test_a_cache_that_lost_what_was_kept_is_cleared(joined: House) -> None:
    joined.keeper.lost = True
    assert await joined.instance.receive([invalidate("a", seq=7)]) == [None]
    assert [cache.resets for cache in joined.caches] == [1, 1]
    assert joined.coherence.counters.gap_reasons == {"the cache lost what it kept": 1}
    assert joined.keeper.state is not None
    assert joined.keeper.state.seqs == {"o": 7}
    assert joined.instance.trusted.is_set()


# Gaps


async def test_a_flood_of_malformed_messages_costs_one_epoch_a_second(
    gaps: House, eventually: Eventually
) -> None:
    for _ in range(50):
        await gaps.instance.receive([BAD] * 20)
    assert gaps.caches[0].resets == 1
    assert not gaps.instance.trusted.is_set()
    epoch = gaps.coherence.epoch
    gaps.clock.time += 1.01
    await eventually(lambda: gaps.instance.trusted.is_set())
    assert gaps.caches[0].resets == gaps.caches[1].resets == 2
    assert gaps.coherence.epoch == epoch + 1


async def test_an_epoch_that_was_put_off_is_tried_until_it_succeeds(
    gaps: House, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr(receiver, "RETRY_LIMIT", 0.005)
    await gaps.instance.receive([BAD])
    await gaps.instance.receive([BAD])
    gaps.caches[1].down = True

    def goes_on() -> bool:
        gaps.clock.time += 0.5
        return gaps.coherence.epoch > epoch + 2  # one for each attempt

    epoch = gaps.coherence.epoch
    await eventually(goes_on)
    assert not gaps.instance.trusted.is_set()
    gaps.caches[1].down = False
    gaps.clock.time += 1.01
    await eventually(lambda: gaps.instance.trusted.is_set())
    assert gaps.caches[1].resets == 2


async def test_the_marker_is_the_one_that_was_published(joined: House) -> None:
    await joined.instance.joined(resumed=True)
    probe = decode(joined.probes[0])
    assert isinstance(probe, Probe)
    assert len(probe.id) >= 16


async def test_every_delivery_has_its_answer(joined: House) -> None:
    deliveries: Sequence[Delivery] = [BAD, invalidate("a"), BAD, Delivery(b""), invalidate("b")]
    answers = await joined.instance.receive(deliveries)
    assert [answer is None for answer in answers] == [False, True, False, False, True]


# At once, where nothing has to wait


class QuickCache(Cache):
    """A cache in this process."""

    def evict_now(self, eviction: Eviction) -> None:
        self.evicted.append(eviction)


@pytest.fixture
async def quick() -> House:
    """An instance with one cache, in this process, that has joined."""
    coherence, clock, caches = Coherence(), SetClock(), [QuickCache()]
    asked: list[Delivery] = []

    async def publish_probe(body: bytes) -> None: ...

    instance = Instance(
        coherence,
        clock,
        caches,
        publish_probe,
        lambda delivery, message: asked.append(delivery),
        lambda reason: None,
        confirm=asked.extend,
    )
    await instance.joined(resumed=False)
    caches[0].evicted.clear()
    return House(instance, coherence, clock, list(caches), Keeper(), [], asked)


async def test_at_once_it_does_the_same(quick: House) -> None:
    load = quick.coherence.loads.begin("b", 0.0)
    asking = Delivery(invalidate("a", seq=1).body, reply_to="me")
    answers = quick.instance.receive_now(
        [asking, invalidate("b", seq=2), Delivery(b'{"v": 1, "kind": "new"}')]
    )
    assert answers == [None, None, None]
    assert quick.caches[0].keys == ["a", "b"]
    assert not quick.coherence.loads.may_store(load)
    assert quick.asked == [asking]
    counters = quick.instance.counters
    assert (counters.messages, counters.evictions) == (3, 2)  # joining is one, too


async def test_at_once_a_gap_is_one_as_well(quick: House) -> None:
    answers = quick.instance.receive_now([BAD, invalidate("a", seq=1), invalidate("b", seq=3)])
    assert answers is not None
    assert [answer is None for answer in answers] == [False, True, True]
    assert quick.caches[0].resets == 1
    assert not quick.instance.trusted.is_set()  # the second gap within a second is put off
    assert quick.coherence.gap_due_at is not None
    assert quick.instance._gap_put_off.is_set()


async def test_what_may_have_to_wait_is_not_begun_at_once(
    quick: House, joined: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert joined.instance.receive_now([invalidate("a")]) is None  # its caches are elsewhere
    few, more = [invalidate("a", seq=1)], [invalidate("a", seq=1), invalidate("b", seq=2)]
    monkeypatch.setattr(receiver, "PORTION", len(few[0].body))
    assert quick.instance.receive_now(more) is None  # others are to have their turn
    quick.instance._keeper = Keeper()
    assert quick.instance.receive_now(few) is None  # what it proves is to be kept
    quick.instance._keeper = None
    quick.instance._caches.append(Cache())  # type: ignore[attr-defined]
    assert quick.instance.receive_now(few) is None  # attached
    del quick.instance._caches[1]  # type: ignore[attr-defined]
    assert quick.instance.counters.messages == 0
    assert not quick.caches[0].evicted
    assert quick.instance.receive_now(few) == [None]


# Answering whoever waits


@pytest.fixture
async def asked(house: House) -> list[Delivery]:
    """What was confirmed so far by `instance`, which is the same as the house's but for that."""
    confirmed: list[Delivery] = []
    house.instance._confirm = confirmed.extend
    await house.instance.joined(resumed=False)
    return confirmed


def asking(*keys: str, seq: int, origin: str = "o") -> Delivery:
    return Delivery(encode(Invalidate(v=1, origin=origin, seq=seq, keys=list(keys))), "back")


async def test_who_asks_is_told_when_every_cache_has_evicted(house: House, asked: list[Delivery]) -> None:
    house.caches[1].open.clear()
    one = asking("a", seq=1)
    receiving = asyncio.create_task(house.instance.receive([one, invalidate("b", seq=2)]))
    while "a" not in house.caches[0].keys:
        await asyncio.sleep(0)
    assert asked == []
    house.caches[1].open.set()
    await receiving
    assert asked == [one]


async def test_who_asks_is_told_also_of_what_had_been_evicted_before(
    house: House, asked: list[Delivery]
) -> None:
    one = asking("a", seq=1)
    house.coherence.expect_echo("o", 1)
    await house.instance.receive([one])
    await house.instance.receive([one])
    assert asked == [one, one]


async def test_who_asks_is_not_told_of_what_could_not_be_evicted(
    house: House, asked: list[Delivery], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "RETRY_LIMIT", 0.01)
    house.caches[0].down = True
    with pytest.raises(EvictionError):
        await house.instance.receive([asking("a", seq=1)])
    assert asked == []


async def test_what_is_no_invalidation_is_not_confirmed(house: House, asked: list[Delivery]) -> None:
    await house.instance.receive(
        [Delivery(encode(Probe(v=1, id="x")), "back"), Delivery(b"not JSON", "back"), asking("a", seq=1)]
    )
    assert asked == [asking("a", seq=1)]


async def test_an_instance_that_is_not_registered_is_suspect_where_that_counts(joined: House) -> None:
    joined.instance.registered("the database is away")
    assert joined.instance.trusted.is_set()
    joined.coherence.registration.required = True
    joined.instance.registered("the database is away")
    assert joined.coherence.suspect == "the database is away"
    assert not joined.instance.trusted.is_set()
    joined.instance.registered(None)
    assert joined.instance.trusted.is_set()
