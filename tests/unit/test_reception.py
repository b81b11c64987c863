"""Deliveries are received in their order, at once where that can be, and never before the receiver has joined."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from recorder import Recorder
from waiting import Eventually

from cacheinval.bus import Delivery
from cacheinval.bus.receiving import Reception


class Quick(Recorder):
    """A receiver that need not wait, unless it is told that it has to."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = False
        self.at_once: list[bytes] = []

    def receive_now(self, deliveries: Sequence[Delivery]) -> list[str | None] | None:  # type: ignore[override]
        if self.waits:
            return None
        if self.failure is not None:
            raise self.failure
        self.at_once += [delivery.body for delivery in deliveries]
        self.bodies += [delivery.body for delivery in deliveries]
        return [None] * len(deliveries)


class Scene:
    def __init__(self, receiver: Quick) -> None:
        self.receiver = receiver
        self.settled = 0
        self.reception = Reception(receiver, self._settle, receiver.lost)

    def _settle(self, problems: Sequence[str | None]) -> None:
        self.settled += len(problems)

    def take(self, *bodies: bytes) -> None:
        self.reception.take([Delivery(body) for body in bodies])


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene(Quick())
    running = asyncio.create_task(scene.reception.run(lambda: asyncio.sleep(0)))
    await asyncio.sleep(0)
    yield scene
    running.cancel()
    await asyncio.wait({running})


async def test_what_arrives_is_received_and_settled_at_once(scene: Scene, eventually: Eventually) -> None:
    await eventually(lambda: scene.receiver.ready)
    await asyncio.sleep(0)
    scene.take(b"1", b"2")
    assert scene.receiver.at_once == [b"1", b"2"]
    assert scene.settled == 2


async def test_nothing_is_received_before_it_has_joined() -> None:
    scene = Scene(Quick())
    scene.receiver.may_join.clear()
    running = asyncio.create_task(scene.reception.run(lambda: asyncio.sleep(0)))
    await scene.receiver.joining.wait()
    scene.take(b"early")
    assert not scene.receiver.bodies
    scene.receiver.may_join.set()
    while not scene.settled:
        await asyncio.sleep(0)
    assert scene.receiver.told == ["joined"]
    assert scene.receiver.begun  # by the task, for it waited
    running.cancel()
    await asyncio.wait({running})


async def test_nothing_overtakes_what_is_in_hand_or_waits(scene: Scene, eventually: Eventually) -> None:
    receiver = scene.receiver
    await eventually(lambda: receiver.ready)
    receiver.waits = True
    receiver.open.clear()
    scene.take(b"1")
    receiver.waits = False
    scene.take(b"2")  # the task has not even begun with the first one
    await eventually(lambda: receiver.begun)
    scene.take(b"3")  # and now it has it in hand
    assert not receiver.bodies
    receiver.open.set()
    await eventually(lambda: scene.settled == 3)
    assert receiver.bodies == [b"1", b"2", b"3"]
    assert not receiver.at_once


async def test_a_failure_at_once_ends_it_and_settles_nothing(scene: Scene, eventually: Eventually) -> None:
    await eventually(lambda: scene.receiver.ready)
    await asyncio.sleep(0)
    scene.receiver.failure = ValueError("no")
    scene.take(b"1")
    assert scene.reception.ended == "receiving failed: no"
    assert scene.receiver.told == ["joined", "lost: receiving failed: no"]
    scene.receiver.failure = None
    scene.take(b"2")
    assert not scene.receiver.bodies
    assert not scene.settled


async def test_what_waits_is_overheard_and_what_need_not_wait_is_not(
    scene: Scene, eventually: Eventually
) -> None:
    receiver = scene.receiver
    await eventually(lambda: receiver.ready)
    await eventually(lambda: scene.reception._idle)
    scene.take(b"1")
    receiver.waits = True
    receiver.open.clear()
    scene.take(b"2")
    await eventually(lambda: receiver.begun)
    scene.take(b"3")
    scene.reception.put(Delivery(b"4"))
    assert receiver.overheard == [b"3", b"4"]
    scene.reception.end("closed")
    scene.take(b"5")
    assert receiver.overheard == [b"3", b"4"], "nobody will receive what comes now"
