"""The in-process bus keeps the contract of every bus."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from buses import stop
from recorder import Recorder
from waiting import Eventually

from cacheinval.bus import Bus, memory, receiving
from cacheinval.bus.memory import EventBus
from cacheinval.errors import PublishError

Run = Callable[[EventBus, Recorder], "asyncio.Task[None]"]


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    """Subscribes a receiver in the background, until the test ends."""
    tasks = []

    def start(bus: EventBus, receiver: Recorder) -> "asyncio.Task[None]":
        task = asyncio.create_task(bus.run(receiver))
        tasks.append(task)
        return task

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_everybody_receives_everything_in_order(run: Run, eventually: Eventually) -> None:
    bus: Bus = (event_bus := EventBus())
    receivers = [Recorder() for _ in range(3)]
    for receiver in receivers:
        run(event_bus, receiver)
    await eventually(lambda: all(receiver.ready for receiver in receivers))
    channel = await bus.open_channel()
    sent = [b"%d" % number for number in range(1000)]
    for body in sent:
        await channel.send(body)
    await eventually(lambda: all(receiver.bodies == sent for receiver in receivers))
    assert [receiver.told for receiver in receivers] == [["joined"]] * 3


async def test_what_is_sent_while_a_receiver_joins_waits_for_it(run: Run, eventually: Eventually) -> None:
    bus, receiver = EventBus(), Recorder()
    receiver.may_join.clear()
    run(bus, receiver)
    await eventually(receiver.joining.is_set)
    await (await bus.open_channel()).send(b"early")
    assert receiver.begun == []
    receiver.may_join.set()
    await eventually(lambda: receiver.bodies == [b"early"])


async def test_a_receiver_that_fails_is_lost_and_joins_again(
    run: Run, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    bus, receiver = EventBus(), Recorder()
    receiver.failure = ValueError("no")
    run(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    await channel.send(b"1")
    await eventually(lambda: receiver.told == ["joined", "lost: receiving failed: no", "joined"])
    receiver.failure = None
    await channel.send(b"2")
    await eventually(lambda: receiver.bodies == [b"2"])
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "receiving failed, starting over reason=ValueError('no')"
    ]


async def test_a_receiver_that_cancels_itself_is_lost_and_joins_again(
    run: Run, eventually: Eventually
) -> None:
    class CancelsItself(Recorder):
        async def receive(self, deliveries):  # type: ignore[no-untyped-def]
            raise asyncio.CancelledError

    bus, receiver = EventBus(), CancelsItself()
    run(bus, receiver)
    await eventually(lambda: receiver.ready)
    await (await bus.open_channel()).send(b"1")
    await eventually(lambda: receiver.told == ["joined", "lost: receiving was cancelled", "joined"])


async def test_a_wrong_number_of_judgements_is_a_failure(run: Run, eventually: Eventually) -> None:
    class Forgetful(Recorder):
        async def receive(self, deliveries):  # type: ignore[no-untyped-def]
            return []

    bus, receiver = EventBus(), Forgetful()
    run(bus, receiver)
    await eventually(lambda: receiver.ready)
    await (await bus.open_channel()).send(b"1")
    await eventually(lambda: "lost: receiving failed: 1 messages were received, 0 judged" in receiver.told)


async def test_a_receiver_that_does_not_join_in_time_is_lost(
    run: Run, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "JOIN_WITHIN", 0.05)
    bus, receiver = EventBus(), Recorder()
    receiver.may_join.clear()
    run(bus, receiver)
    await eventually(
        lambda: receiver.told == ["lost: receiving failed: the receiver could not join within 0.05 s"]
    )
    receiver.may_join.set()
    await eventually(lambda: receiver.told[1:] == ["joined"])


async def test_an_eviction_that_cannot_be_cancelled_holds_nobody_up(
    run: Run, eventually: Eventually, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stubborn(Recorder):
        async def receive(self, deliveries):  # type: ignore[no-untyped-def]
            self.begun += deliveries
            while not self.open.is_set():
                with suppress(asyncio.CancelledError):
                    await self.open.wait()
            return [None] * len(deliveries)

    monkeypatch.setattr(receiving, "FINISH_WITHIN", 0.05)
    monkeypatch.setattr(receiving, "CANCEL_WITHIN", 0.05)
    bus, receiver = EventBus(), Stubborn()
    receiver.open.clear()
    task = run(bus, receiver)
    await eventually(lambda: receiver.ready)
    await (await bus.open_channel()).send(b"1")
    await eventually(lambda: receiver.begun)
    async with asyncio.timeout(30):
        await stop(task)
    assert [record.message for record in caplog.records] == ["an eviction cannot be cancelled"]
    receiver.open.set()


async def test_too_many_waiting_messages_are_a_gap(
    run: Run, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ROOM", 10)
    bus, receiver = EventBus(), Recorder()
    receiver.open.clear()
    run(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    await channel.send(b"in hand")
    await eventually(lambda: receiver.begun)
    for _ in range(11):
        await channel.send(b"too much")
    assert receiver.told == ["joined", "lost: more than 10 messages wait"]
    receiver.open.set()
    await eventually(lambda: receiver.told[2:] == ["joined"])
    assert receiver.bodies == []


async def test_stopping_finishes_what_is_in_hand(run: Run, eventually: Eventually) -> None:
    bus, receiver = EventBus(), Recorder()
    receiver.open.clear()
    task = run(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    await channel.send(b"in hand")
    await eventually(lambda: receiver.begun)
    task.cancel()
    await eventually(lambda: receiver.told == ["joined", "lost: stopped"])
    await channel.send(b"too late")
    receiver.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert receiver.bodies == [b"in hand"]
    assert bus.state["consumer"] == "idle"


async def test_malformed_messages_are_counted(run: Run, eventually: Eventually) -> None:
    bus, receiver = EventBus(), Recorder(lambda body: "bad" if body == b"bad" else None)
    run(bus, receiver)
    await eventually(lambda: receiver.ready)
    channel = await bus.open_channel()
    for body in (b"good", b"bad", b"good"):
        await channel.send(body)
    await eventually(lambda: len(receiver.bodies) == 3)
    await eventually(lambda: (bus.state["deliveries"], bus.state["rejected"]) == (3, 1))


async def test_questions_are_answered_by_everybody(run: Run, eventually: Eventually) -> None:
    class Answers(Recorder):
        async def receive(self, deliveries):  # type: ignore[no-untyped-def]
            for delivery in deliveries:
                await bus.answer(delivery, b"answer to " + delivery.body)
            return await super().receive(deliveries)

    bus = EventBus()
    receivers = [Answers(), Answers()]
    for receiver in receivers:
        run(bus, receiver)
    await eventually(lambda: all(receiver.ready for receiver in receivers))
    assert await bus.ask(b"who?", 0.05) == [b"answer to who?"] * 2
    async with asyncio.timeout(30):
        assert await bus.ask(b"who?", 600, lambda answers: len(answers) == 2) == [b"answer to who?"] * 2
    await bus.answer(receivers[0].begun[0], b"too late")  # nobody waits for it any more: no error


async def test_channels_have_origins_of_their_own_and_can_be_closed() -> None:
    bus = EventBus()
    one, other = await bus.open_channel(), await bus.open_channel()
    assert one.origin != other.origin
    await one.close()
    with pytest.raises(PublishError, match="closed"):
        await one.send(b"x")
    await other.send(b"nobody is there: no error")
    assert (bus.state["confirmed"], bus.state["unrouted"]) == (1, 1)


async def test_one_namespace_is_one_bus_while_anybody_holds_it() -> None:
    bus = EventBus.of("shop")
    assert EventBus.of("shop") is bus
    assert EventBus.of("stock") is not bus
    del bus
    gc.collect()
    assert not any(memory._buses.values())  # nothing is left behind


def test_another_event_loop_has_another_bus() -> None:
    async def bus() -> EventBus:
        return EventBus.of("shop")

    assert asyncio.run(bus()) is not asyncio.run(bus())
    gc.collect()
    assert not memory._buses


async def test_what_asks_is_answered_to_its_own_channel(run: Run, eventually: Eventually) -> None:
    bus, receiver = EventBus(), Recorder()
    run(bus, receiver)
    await eventually(lambda: receiver.ready)
    heard: list[tuple[str, bytes]] = []
    asking, other = await bus.open_channel(), await bus.open_channel()
    for channel in (asking, other):
        await channel.listen(lambda message, body: heard.append((message, body)))
    await asking.send(b"stale?", "m1")
    await asking.send(b"no question")
    await eventually(lambda: len(receiver.begun) == 2)
    question, statement = receiver.begun
    await bus.answer(question, b"evicted")
    await bus.answer(statement, b"nobody asked")
    assert heard == [("m1", b"evicted")]
    await asking.close()
    await bus.answer(question, b"too late")
    assert heard == [("m1", b"evicted")]
