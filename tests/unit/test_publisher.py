"""Publishing: together what waits together, in order, at once, and nothing deleted that was not confirmed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import pytest
from waiting import Eventually

from cacheinval import pace
from cacheinval import publisher as publishing
from cacheinval.coherence import Coherence
from cacheinval.errors import PublishError
from cacheinval.messages import Beat, Invalidate, Probe, decode
from cacheinval.pace import Pace
from cacheinval.publisher import Publisher, Unpublished


@dataclass
class Broker:
    """Opens channels, while `opens` is set, and notes what each has sent; while `confirms` is not set, it confirms nothing."""

    sent: list[Invalidate] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    beats: list[Beat] = field(default_factory=list)
    opens: asyncio.Event = field(default_factory=asyncio.Event)
    confirms: asyncio.Event = field(default_factory=asyncio.Event)
    refuses: bool = False
    fails: bool = False
    channels: "list[Channel]" = field(default_factory=list)
    attempts: int = 0
    deleted: list[UUID] = field(default_factory=list)
    noted: list[dict[str, int]] = field(default_factory=list)
    deletes: bool = True
    asked: list[str | None] = field(default_factory=list)
    listeners: list[Callable[[str, bytes], None]] = field(default_factory=list)

    async def open_channel(self) -> "Channel":
        self.attempts += 1
        if self.refuses:
            raise PublishError("no broker there")
        await self.opens.wait()
        self.channels.append(Channel(self, f"origin{len(self.channels)}"))
        return self.channels[-1]

    async def delete(self, rows: Sequence[UUID], confirmed: dict[str, int]) -> None:
        if not self.deletes:
            raise OSError("no database there")
        self.deleted += rows
        self.noted.append(confirmed)


@dataclass
class Channel:
    broker: Broker
    origin: str
    closed: bool = False

    async def listen(self, answered: Callable[[str, bytes], None]) -> None:
        self.broker.listeners.append(answered)

    async def send(self, body: bytes, correlation_id: str | None = None) -> None:
        message = decode(body)
        if isinstance(message, Probe):
            self.broker.probes.append(message)
        elif isinstance(message, Beat):
            self.broker.beats.append(message)
        else:
            assert isinstance(message, Invalidate)
            self.broker.sent.append(message)
            self.broker.asked.append(correlation_id)
        await self.broker.confirms.wait()
        if self.broker.fails:
            raise PublishError("refused")

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
async def broker() -> Broker:
    broker = Broker()
    broker.opens.set()
    broker.confirms.set()
    return broker


@pytest.fixture
def coherence() -> Coherence:
    coherence = Coherence()
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    return coherence


Make = Callable[..., Awaitable[Publisher]]


@pytest.fixture
async def make(broker: Broker, coherence: Coherence, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    monkeypatch.setattr(publishing, "BACKOFF_FIRST", 0.01)
    tasks = []

    async def make(timeout: float = 5.0) -> Publisher:
        publisher = Publisher(broker.open_channel, broker.delete, coherence, timeout)
        tasks.extend(asyncio.create_task(run()) for run in (publisher.run, publisher.delete_confirmed))
        await asyncio.sleep(0)
        return publisher

    yield make
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)


def gathers_for(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Whatever is published from now on, whether much comes or little."""
    monkeypatch.setattr(Pace, "gather", lambda self, now: seconds)


def write(*keys: str, rows: int = 0, **fields: object) -> Unpublished:
    return Unpublished(keys=list(keys), rows=[uuid4() for _ in range(rows)], **fields)  # type: ignore[arg-type]


async def test_a_write_is_published_confirmed_and_deleted(make: Make, broker: Broker) -> None:
    publisher = await make()
    one = write("a", tags=["t"], versions=[8], rows=2, committed_at=5.0)
    publisher.submit(one)
    assert await publisher.flush(5)
    (message,) = broker.sent
    assert (message.keys, message.tags, message.versions) == (["a"], ["t"], [8])
    assert (message.origin, message.seq, message.committed_at) == ("origin0", 1, 5.0)
    assert message.at is not None
    assert broker.deleted == one.rows
    assert (publisher.counters.confirmed_writes, publisher.counters.deleted_rows) == (1, 2)


async def test_rows_gather_before_they_are_deleted_and_whoever_flushes_does_not_wait_for_more(
    make: Make, broker: Broker, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "DELETE_AFTER", 600.0)
    publisher = await make()
    writes = [write(f"k{n}", rows=1) for n in range(3)]
    for number, one in enumerate(writes, 1):
        publisher.submit(one)
        await eventually(lambda number=number: publisher.counters.confirmed_writes == number)
    assert not broker.deleted
    assert await publisher.flush(5)
    assert broker.deleted == [row for one in writes for row in one.rows]
    assert broker.noted == [{"origin0": 3}]


async def test_numbers_go_up_by_one_on_one_channel(make: Make, broker: Broker) -> None:
    publisher = await make()
    for n in range(5):
        publisher.submit(write(f"k{n}"))
        assert await publisher.flush(5)
    assert [message.seq for message in broker.sent] == [1, 2, 3, 4, 5]
    assert len(broker.channels) == 1


async def test_what_comes_while_a_confirm_is_awaited_goes_out_together(
    make: Make, broker: Broker, eventually: Eventually
) -> None:
    publisher = await make()
    broker.confirms.clear()
    publisher.submit(write("first", rows=1, committed_at=9.0))
    await eventually(lambda: len(broker.sent) == 1)
    for n in range(100):
        publisher.submit(write(f"k{n % 10}", tags=["t"], versions=[n], rows=1, committed_at=float(n)))
    assert len(broker.sent) == 1
    assert broker.deleted == []
    broker.confirms.set()
    assert await publisher.flush(5)
    first, second = broker.sent
    assert first.keys == ["first"]
    assert second.keys == [f"k{n}" for n in range(10)]
    assert second.versions == list(range(90, 100)), "of several versions of a key the highest counts"
    assert second.tags == ["t"]
    assert second.committed_at == 0.0, "latency counts from the oldest commit"
    assert len(broker.deleted) == 101


async def test_what_comes_while_many_come_gathers_for_a_moment(
    make: Make, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = await make()
    publisher.submit(write("a"))
    assert await publisher.flush(5)
    monkeypatch.setattr(pace, "BUSY", 0.0)
    monkeypatch.setattr(pace, "PLENTY", 0.1)  # of which some are left after minutes
    monkeypatch.setattr(pace, "GATHER_MOST", 0.05)
    for key in ("b", "c"):
        publisher.submit(write(key))
        await asyncio.sleep(0.005)
    assert await publisher.flush(5)
    assert [message.keys for message in broker.sent] == [["a"], ["b", "c"]]


async def test_the_pace_is_that_of_what_is_published(
    make: Make, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    class Told(Pace):
        def published(self, writes: int, now: float) -> None:
            told.append((writes, now))

    monkeypatch.setattr(publishing, "Pace", Told)
    publisher = await make()
    for together in (3, 1, 2):
        for n in range(together):
            publisher.submit(write(f"k{n}"))
        assert await publisher.flush(5)
    assert [writes for writes, _ in told] == [3, 1, 2]
    assert told[0][1] < told[1][1] < told[2][1] <= asyncio.get_running_loop().time()


async def test_a_write_that_is_alone_waits_for_nobody(
    make: Make, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "GATHER_MOST", 60.0)
    publisher = await make()
    for key in ("a", "b"):
        publisher.submit(write(key))
        assert await publisher.flush(5)
    assert [message.keys for message in broker.sent] == [["a"], ["b"]]


async def test_nothing_gathers_while_a_writer_waits_for_it(
    make: Make, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = await make()
    publisher.submit(write("a"))
    assert await publisher.flush(5)
    gathers_for(monkeypatch, 60.0)
    for waiting in ({"confirmed": asyncio.get_running_loop().create_future()}, {"question": object()}):
        publisher.submit(write("b", **waiting))
        assert await publisher.flush(5)
    assert len(broker.sent) == 3


async def test_whoever_waits_ends_a_gathering_that_has_begun(
    make: Make, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = await make()
    publisher.submit(write("a"))
    assert await publisher.flush(5)
    gathers_for(monkeypatch, 60.0)
    publisher.submit(write("b"))
    assert not await publisher.flush(0.05)
    publisher.submit(write("c", question=object()))
    assert await publisher.flush(5)
    assert [message.keys for message in broker.sent] == [["a"], ["b", "c"]]


async def test_everything_makes_the_names_needless(make: Make, broker: Broker) -> None:
    publisher = await make()
    for one in (write("a", rows=1), write(everything=True, rows=1), write("b", tags=["t"], rows=1)):
        publisher.submit(one)
    assert await publisher.flush(5)
    (message,) = broker.sent
    assert message.all
    assert message.keys == message.tags == []
    assert len(broker.deleted) == 3


async def test_a_batch_of_many_messages_keeps_its_order(make: Make, broker: Broker) -> None:
    publisher = await make()
    keys = [f"k{n}" for n in range(5_500)]
    publisher.submit(write(*keys[:3_000], rows=1))
    publisher.submit(write(*keys[3_000:], rows=1))
    assert await publisher.flush(5)
    assert [message.seq for message in broker.sent] == [1, 2, 3, 4, 5, 6]
    assert [key for message in broker.sent for key in message.keys] == keys
    assert publisher.counters.confirmed_messages == 6


async def test_one_message_of_a_batch_that_fails_keeps_the_rows_of_all(make: Make, broker: Broker) -> None:
    publisher = await make()
    sent = Channel.send

    async def fail_second(self: Channel, body: bytes) -> None:
        await sent(self, body)
        if len(broker.sent) == 2:
            raise PublishError("refused")

    broker.confirms.set()
    Channel.send = fail_second  # type: ignore[method-assign]
    try:
        publisher.submit(write(*[f"k{n}" for n in range(2_500)], rows=1))
        assert await publisher.flush(5)
    finally:
        Channel.send = sent  # type: ignore[method-assign]
    assert len(broker.sent) == 2  # nothing more is begun after a failure
    assert broker.deleted == []
    assert broker.channels[0].closed


# Failures


@pytest.mark.parametrize("how", ["refused", "no confirm", "no channel"])
async def test_what_is_not_confirmed_is_left_to_the_relay(
    make: Make, broker: Broker, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(publishing, "BACKOFF_FIRST", 60.0)
    publisher = await make(timeout=0.05)
    broker.refuses, broker.fails = how == "no channel", how == "refused"
    if how == "no confirm":
        broker.confirms.clear()
    publisher.submit(write("a", rows=1))
    assert await publisher.flush(5)
    assert broker.deleted == []
    assert publisher.failing
    assert (publisher.counters.failures, publisher.counters.left_to_relay) == (1, 1)
    assert publisher.counters.confirmed_writes == 0
    assert all(channel.closed for channel in broker.channels)


async def test_a_new_channel_is_a_new_origin_that_counts_from_one(
    make: Make, broker: Broker, eventually: Eventually
) -> None:
    publisher = await make()
    publisher.submit(write("a"))
    assert await publisher.flush(5)
    broker.fails = True
    publisher.submit(write("b"))
    assert await publisher.flush(5)
    broker.fails = False
    await eventually(lambda: not publisher.failing)
    publisher.submit(write("c", rows=1))
    assert await publisher.flush(5)
    *before, last = [(message.origin, message.seq) for message in broker.sent]
    assert before == [("origin0", 1), ("origin0", 2)]
    assert last == (broker.channels[-1].origin, 1)
    assert len(broker.channels) > 1
    assert len(broker.deleted) == 1


async def test_while_the_broker_is_away_writes_are_left_at_once_and_it_is_asked_rarely(
    make: Make, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "BACKOFF_FIRST", 60.0)
    publisher = await make()
    broker.refuses = True
    for _ in range(20):
        publisher.submit(write("a", rows=1))
        assert await publisher.flush(5)
    assert broker.attempts == 1
    assert publisher.counters.left_to_relay == 20
    assert broker.deleted == []


@pytest.mark.parametrize("how", ["refused", "no confirm", "no channel"])
async def test_who_failed_finds_out_without_another_write_that_it_can_publish_again(
    make: Make, broker: Broker, eventually: Eventually, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    caplog.set_level("INFO")
    publisher = await make(timeout=0.05 if how == "no confirm" else 5.0)
    broker.refuses, broker.fails = how == "no channel", how == "refused"
    if how == "no confirm":
        broker.confirms.clear()
    publisher.submit(write("a", rows=1))
    await eventually(lambda: broker.attempts >= 4)
    assert publisher.failing
    assert publisher.problem is not None
    assert publisher.counters.failures == 1, "of writes"
    broker.refuses = broker.fails = False
    broker.confirms.set()
    await eventually(lambda: not publisher.failing)
    assert publisher.problem is None
    assert [message.keys for message in broker.sent] == ([] if how == "no channel" else [["a"]])
    assert all(channel.closed for channel in broker.channels[:-1])
    said = [line.partition(" reason=")[0] for line in caplog.messages]
    assert said == ["publishing failed", "publishing again"]

    attempts = broker.attempts
    publisher.submit(write("b", rows=1))
    assert await publisher.flush(5)
    last = broker.sent[-1]
    assert (last.keys, last.origin, last.seq) == (["b"], broker.channels[-1].origin, 1)
    assert broker.noted == [{last.origin: 1}]
    assert broker.attempts == attempts, "on the channel that is known to work"


async def test_while_it_fails_it_tries_less_and_less_often(
    make: Make, broker: Broker, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(publishing, "BACKOFF_MOST", 0.05)
    monkeypatch.setattr(
        publishing.random, "uniform", lambda least, most: pauses.append(publisher._pause) or most
    )
    publisher = await make()
    broker.refuses = True
    publisher.submit(write("a", rows=1))
    await eventually(lambda: len(pauses) >= 5)
    assert pauses[:5] == [0.01, 0.02, 0.04, 0.05, 0.05]


@pytest.mark.parametrize("how", ["no channel", "no confirm"])
async def test_while_a_probe_hangs_writes_are_left_at_once(
    make: Make, broker: Broker, eventually: Eventually, how: str
) -> None:
    publisher = await make(timeout=600.0)
    publisher._asking = asking = Asking()
    broker.refuses = True
    publisher.submit(write("a", rows=1))
    await eventually(lambda: publisher.failing)
    hangs = broker.opens if how == "no channel" else broker.confirms
    hangs.clear()
    broker.refuses = False
    known = broker.attempts
    await eventually(lambda: broker.attempts > known)
    for question in ("q", "r"):
        publisher.submit(write("b", rows=1, question=question))
        assert await publisher.flush(60)
    assert asking.given_up == dict.fromkeys(("q", "r"), "the broker cannot be reached")
    assert publisher.counters.left_to_relay == 3
    assert publisher.failing

    hangs.set()
    await eventually(lambda: not publisher.failing)
    later = write("c", rows=1)
    publisher.submit(later)
    assert await publisher.flush(60)
    assert [(message.keys, message.origin, message.seq) for message in broker.sent] == [(["c"], "origin0", 1)]
    assert broker.deleted == later.rows
    assert broker.attempts == known + 1, "one probe, and its channel"


async def failing(
    broker: Broker, coherence: Coherence, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> tuple[Publisher, "asyncio.Task[None]"]:
    """A publisher without a database that is refused, and what runs it."""
    monkeypatch.setattr(publishing, "BACKOFF_FIRST", 0.01)
    publisher = Publisher(broker.open_channel, None, coherence, 60.0)
    running = asyncio.create_task(publisher.run())
    broker.refuses = True
    publisher.submit(write("a"))
    await eventually(lambda: publisher.failing)
    return publisher, running


async def test_a_defect_of_its_probe_ends_it_and_when_it_is_started_again_it_probes_on(
    broker: Broker, coherence: Coherence, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, running = await failing(broker, coherence, eventually, monkeypatch)
    publisher._open_channel = None  # type: ignore[assignment]
    await asyncio.wait([running], timeout=60)
    assert isinstance(running.exception(), TypeError)
    publisher._open_channel, broker.refuses = broker.open_channel, False
    running = asyncio.create_task(publisher.run())
    await eventually(lambda: not publisher.failing)
    running.cancel()
    await asyncio.wait([running])


async def test_who_stops_while_it_tries_leaves_no_channel_open(
    broker: Broker, coherence: Coherence, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, running = await failing(broker, coherence, eventually, monkeypatch)
    broker.confirms.clear()
    broker.refuses = False
    await eventually(lambda: broker.probes)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert [channel.closed for channel in broker.channels] == [True]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_channel_on_which_nothing_was_published_yet_has_no_number_to_say_again(
    broker: Broker, coherence: Coherence, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "BACKOFF_FIRST", 0.01)
    monkeypatch.setattr(publishing, "BEATS", 1_000_000)
    looks, sleep = 0, asyncio.sleep

    async def count(delay: float) -> None:
        nonlocal looks
        looks += delay == publisher._tick_interval
        await sleep(delay)

    monkeypatch.setattr(asyncio, "sleep", count)
    publisher = Publisher(broker.open_channel, None, coherence, 60.0, tick_interval=0.004)
    tasks = [asyncio.create_task(run()) for run in (publisher.run, publisher.beat)]
    publisher.submit(write("a"))
    await eventually(lambda: broker.beats)
    broker.fails = True
    publisher.submit(write("b"))
    await eventually(lambda: publisher.failing)
    broker.fails = False
    await eventually(lambda: not publisher.failing)
    known = looks
    await eventually(lambda: looks >= known + 2)  # it has looked whether to beat
    publisher.submit(write("c"))
    await eventually(lambda: broker.beats[-1].origin != "origin0")
    assert {beat.seq for beat in broker.beats} == {1}
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_rows_that_cannot_be_deleted_are_no_failure_of_the_publish(make: Make, broker: Broker) -> None:
    publisher = await make()
    broker.deletes = False
    publisher.submit(write("a", rows=1))
    assert await publisher.flush(5)
    assert publisher.counters.confirmed_writes == 1
    assert publisher.counters.deleted_rows == 0
    broker.deletes = True
    later = write("b", rows=1)
    publisher.submit(later)
    assert await publisher.flush(5)
    assert broker.deleted == later.rows


async def test_the_numbers_of_rows_that_could_not_be_deleted_are_noted_with_the_next(
    make: Make, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "ROWS_AT_ONCE", 1)
    publisher = await make()
    noted: list[dict[str, int]] = []

    async def fails_at_first(rows: Sequence[UUID], confirmed: dict[str, int]) -> None:
        noted.append(confirmed)
        if len(noted) == 1:
            raise OSError("no database there")

    publisher._delete_rows = fails_at_first
    publisher.submit(write("a", rows=2))
    assert await publisher.flush(5)
    assert noted == [{"origin0": 1}, {"origin0": 1}]


# Without a database the writer waits for the confirm itself


async def test_an_idle_channel_notes_its_number_again(
    make: Make, broker: Broker, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr(publishing, "NOTE_AGAIN", 0.01)
    publisher = await make()
    publisher.submit(write("a", rows=1))
    await eventually(lambda: len(broker.noted) >= 3)
    assert broker.noted[:3] == [{"origin0": 1}] * 3
    broker.confirms.clear()
    publisher.submit(write("b", rows=1))
    await eventually(lambda: len(broker.sent) == 2)
    known = len(broker.noted)
    await asyncio.sleep(0.05)  # number 2 is not confirmed, nor is 1 the last
    assert broker.noted[known:] == []
    broker.confirms.set()
    await eventually(lambda: broker.noted[-1] == {"origin0": 2})


async def test_who_waits_for_the_confirm_learns_of_it(make: Make, broker: Broker) -> None:
    publisher = await make()
    confirmed = asyncio.get_running_loop().create_future()
    publisher.submit(write("a", confirmed=confirmed))
    await asyncio.wait_for(confirmed, 5)
    assert publisher.counters.left_to_relay == 0


async def test_who_waits_for_the_confirm_is_told_why_it_failed_and_each_time_tried(
    make: Make, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "BACKOFF_FIRST", 60.0)
    publisher = await make()
    broker.refuses = True
    for _ in range(2):
        confirmed = asyncio.get_running_loop().create_future()
        publisher.submit(write("a", confirmed=confirmed))
        with pytest.raises(PublishError, match="not confirmed: no broker there"):
            await asyncio.wait_for(confirmed, 5)
    broker.refuses = False
    confirmed = asyncio.get_running_loop().create_future()
    publisher.submit(write("a", confirmed=confirmed))
    await asyncio.wait_for(confirmed, 5)
    assert not publisher.failing
    assert publisher.counters.left_to_relay == 0


async def test_who_waits_for_the_confirm_tries_though_a_probe_hangs(
    make: Make, broker: Broker, eventually: Eventually
) -> None:
    publisher = await make(timeout=600.0)
    broker.refuses = True
    publisher.submit(write("a", rows=1))
    await eventually(lambda: publisher.failing)
    broker.confirms.clear()
    broker.refuses = False
    await eventually(lambda: broker.probes)
    broker.confirms = asyncio.Event()
    broker.confirms.set()  # of what is sent from now on
    confirmed = asyncio.get_running_loop().create_future()
    publisher.submit(write("b", confirmed=confirmed))
    await asyncio.wait_for(confirmed, 60)
    assert not publisher.failing
    assert [channel.closed for channel in broker.channels] == [True, False]
    assert (broker.sent[-1].origin, broker.sent[-1].seq) == ("origin1", 1)


async def test_who_waits_when_it_stops_is_told(
    broker: Broker, coherence: Coherence, eventually: Eventually
) -> None:
    publisher = Publisher(broker.open_channel, None, coherence, 5.0)
    broker.confirms.clear()
    running = asyncio.create_task(publisher.run())
    waiting = [asyncio.get_running_loop().create_future() for _ in range(2)]
    publisher.submit(write("in flight", confirmed=waiting[0]))
    await eventually(lambda: broker.sent)
    publisher.submit(write("behind it", confirmed=waiting[1]))
    running.cancel()
    await asyncio.wait([running])
    for confirmed in waiting:
        with pytest.raises(PublishError, match="stopped"):
            await asyncio.wait_for(confirmed, 5)
    assert broker.channels[0].closed


# Bounds and the end


async def test_what_waits_is_bounded(
    make: Make, broker: Broker, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr(publishing, "MAX_WAITING", 10)
    publisher = await make()
    broker.confirms.clear()
    publisher.submit(write("in flight"))
    await eventually(lambda: broker.sent)
    for n in range(20):
        publisher.submit(write(f"k{n}", rows=1))
    assert publisher.waiting == 5  # a write counts as its names and one more
    assert publisher.counters.left_to_relay == 15
    broker.confirms.set()
    assert await publisher.flush(5)
    assert len(broker.deleted) == 5
    large = write(*[f"k{n}" for n in range(100)], rows=1)
    publisher.submit(large)  # alone it may be larger than the bound
    assert await publisher.flush(5)
    assert large.rows[0] in broker.deleted


async def test_flush_says_whether_it_got_there(make: Make, broker: Broker, eventually: Eventually) -> None:
    publisher = await make()
    assert await publisher.flush(0.01)
    broker.confirms.clear()
    publisher.submit(write("a"))
    assert not await publisher.flush(0.02)
    broker.confirms.set()
    assert await publisher.flush(5)


async def test_flush_waits_until_the_rows_are_deleted(make: Make, broker: Broker) -> None:
    publisher = await make()
    gate = asyncio.Event()
    delete = broker.delete

    async def slow(rows: Sequence[UUID], confirmed: dict[str, int]) -> None:
        await gate.wait()
        await delete(rows, confirmed)

    publisher._delete_rows = slow
    publisher.submit(write("a", rows=1))
    assert not await publisher.flush(0.05)
    gate.set()
    assert await publisher.flush(5)
    assert len(broker.deleted) == 1


# Echoes


async def test_the_echo_is_expected_only_where_all_of_a_message_was_evicted_here(
    make: Make, broker: Broker, coherence: Coherence, eventually: Eventually
) -> None:
    publisher = await make()
    publisher.submit(write("a", evicted_here=True))
    assert await publisher.flush(5)
    publisher.submit(write("b", evicted_here=True))
    publisher.submit(write("c", evicted_here=False))
    assert await publisher.flush(5)
    first, second = broker.sent
    assert coherence.received(first, 1.0) is None
    eviction = coherence.received(second, 1.0)
    assert eviction is not None
    assert eviction.keys == ["b", "c"]


async def test_after_a_failure_no_echo_is_expected(make: Make, broker: Broker, coherence: Coherence) -> None:
    publisher = await make()
    broker.fails = True
    publisher.submit(write("a", evicted_here=True))
    assert await publisher.flush(5)
    eviction = coherence.received(broker.sent[0], 1.0)  # it arrives nevertheless, and late
    assert eviction is not None
    assert eviction.keys == ["a"]


# Asking the others


@dataclass
class Asking:
    """Notes what it is told."""

    asked: dict[str, list[str]] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)

    def sent(self, question: str, messages: Sequence[str]) -> None:
        self.asked[question] = list(messages)

    def left(self, question: str, reason: str) -> None:
        self.given_up[question] = reason

    def answered(self, message: str, body: bytes) -> None: ...


async def test_a_write_that_waits_asks_in_each_of_its_messages(make: Make, broker: Broker) -> None:
    publisher = await make()
    publisher._asking = asking = Asking()
    publisher.submit(write("a"))
    assert await publisher.flush(5)
    assert (broker.asked, broker.listeners) == ([None], [])

    publisher.submit(write(*[f"k{n}" for n in range(2_500)], question="q"))
    assert await publisher.flush(5)
    assert sorted(asking.asked["q"]) == ["origin0.2", "origin0.3", "origin0.4"]
    assert broker.asked[1:] == [f"origin0.{message.seq}" for message in broker.sent[1:]]
    assert broker.listeners == [asking.answered]

    publisher.submit(write("b", question="r"))
    assert await publisher.flush(5)
    assert asking.asked["r"] == ["origin0.5"]
    assert len(broker.listeners) == 1, "once for a channel"


async def test_writes_that_go_out_together_ask_together(make: Make, broker: Broker) -> None:
    publisher = await make()
    publisher._asking = asking = Asking()
    broker.confirms.clear()
    publisher.submit(write("first"))
    await asyncio.sleep(0.01)
    for one in (write("a", question="q"), write("b"), write("c", question="r")):
        publisher.submit(one)
    broker.confirms.set()
    assert await publisher.flush(5)
    assert broker.asked == [None, "origin0.2"]
    assert asking.asked == {"q": ["origin0.2"], "r": ["origin0.2"]}


async def test_a_write_that_is_left_to_the_relay_is_told_why(make: Make, broker: Broker) -> None:
    publisher = await make()
    publisher._asking = asking = Asking()
    broker.refuses = True
    publisher.submit(write("a", question="q"))
    assert await publisher.flush(5)
    assert asking.given_up == {"q": "no broker there"}
    assert asking.asked == {}


async def test_a_new_channel_listens_anew(make: Make, broker: Broker, eventually: Eventually) -> None:
    publisher = await make()
    publisher._asking = Asking()
    broker.fails = True
    publisher.submit(write("a", question="q"))
    assert await publisher.flush(5)
    broker.fails = False

    def publish() -> bool:
        publisher.submit(write("b", question="r"))
        return len(broker.listeners) == 2

    await eventually(publish)
    assert await publisher.flush(5)
    assert len(broker.listeners) == 2
