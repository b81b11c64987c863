"""Who has evicted and who has not; and waiting for them, without any server."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec
import pytest
from waiting import Eventually

from cacheinval import Receipt, asking
from cacheinval.asking import Answering, Asking
from cacheinval.coherence.receipts import Question, check_wait
from cacheinval.coherence.registration import Registered
from cacheinval.errors import DatabaseError, PublishError

ME = ("me", "s0")


def question(wait: float = 2.0) -> Question:
    one = Question(wait, 0.1)
    one.committed(100.0)
    one.sent(["m1", "m2"])
    return one


def instance(name: str, max_staleness: float | None = 5.0) -> Registered:
    return Registered(name, f"session of {name}", max_staleness)


def answer(one: Question, name: str, *messages: str) -> None:
    for message in messages:
        one.answered((name, f"session of {name}"), message)


class TestQuestion:
    def test_whoever_has_answered_every_message_has_evicted(self) -> None:
        one = question()
        one.counted([instance("a"), instance("b")])
        answer(one, "a", "m1", "m2")
        answer(one, "b", "m1")
        assert not one.complete(101)
        receipt = one.receipt(101)
        assert (receipt.confirmed, receipt.total, receipt.complete) == (1, 2, False)
        assert receipt.answered == ("a",)
        answer(one, "b", "m1", "m2", "m2")
        assert one.complete(101)
        assert one.receipt(101) == Receipt(2, 2, answered=("a", "b"))

    def test_nobody_counts_before_all_were_counted(self) -> None:
        one = question()
        answer(one, "a", "m1", "m2")
        assert not one.complete(1e9)
        one.uncounted("there is no database")
        assert one.receipt(101) == Receipt(1, None, answered=("a",), reason="there is no database")
        assert not one.receipt(101).complete

    def test_another_process_of_the_same_id_has_to_answer_too(self) -> None:
        one = question()
        one.counted([instance("a"), Registered("a", "another", 5.0)])
        answer(one, "a", "m1", "m2")
        assert one.receipt(101).confirmed == 1

    def test_whoever_is_not_registered_does_not_count(self) -> None:
        one = question()
        one.counted([instance("a")])
        answer(one, "b", "m1", "m2")
        assert one.receipt(101).confirmed == 0

    def test_nobody_there_is_complete(self) -> None:
        one = question()
        one.counted([])
        assert one.receipt(101).complete

    def test_answers_to_other_messages_do_not_count(self) -> None:
        one = question()
        one.counted([instance("a")])
        answer(one, "a", "m0", "m3")
        assert not one.complete(101)

    def test_the_writer_counts_as_soon_as_it_has_evicted(self) -> None:
        one = question()
        one.counted([Registered(*ME, None)])
        one.evicted(ME)
        assert one.complete(100)


class TestTime:
    def test_silence_is_safe_after_its_own_staleness_and_the_skew(self) -> None:
        one = question()
        one.counted([instance("a", 5.0), instance("b", 7.0)])
        assert one.next_change(101) == pytest.approx(105.1)
        assert not one.complete(105.09)
        assert one.receipt(105.2).by_time == ("a",)
        assert one.next_change(105.2) == pytest.approx(107.1)
        assert one.receipt(107.2) == Receipt(2, 2, by_time=("a", "b"))

    def test_it_is_never_safe_without_a_staleness(self) -> None:
        one = question()
        one.counted([instance("a", None)])
        assert one.next_change(101) == math.inf
        assert not one.complete(1e9)

    def test_the_same_where_nothing_was_published(self) -> None:
        one = question()
        one.left("no broker there")
        one.counted([instance("a")])
        assert one.complete(105.2)


class TestReasons:
    def test_silence(self) -> None:
        one = question()
        one.counted([instance("a", 5.0), instance("b", None)])
        answer(one, "b", "m2")
        assert dict(one.receipt(102.0).missing) == {
            "a": "no answer within 2 s; safe in 3.1 s (its max_staleness is 5 s)",
            "b": "1 of 2 answers within 2 s; it has no max_staleness: not safe until it answers",
        }

    def test_a_broker_that_is_away(self) -> None:
        one = question()
        one.left("no broker there")
        one.counted([instance("a", None)])
        ((_, why),) = one.receipt(102.0).missing
        assert why.startswith(
            "not published: no broker there; the relay will send it; it has no max_staleness"
        )

    def test_a_publisher_that_did_not_come_to_it(self) -> None:
        one = Question(2.0, 0.1)
        one.committed(100.0)
        one.counted([instance("a")])
        ((_, why),) = one.receipt(102.0).missing
        assert why.startswith("not published within 2 s; safe in")

    def test_a_write_that_names_nothing_itself(self) -> None:
        one = Question(2.0, 0.1)
        one.committed(100.0, names_something=False)
        one.counted([instance("a"), instance("b", None)])
        assert dict(one.receipt(102.0).missing) == {
            "a": "this write names nothing itself, so nobody is asked; safe in 3.1 s (its max_staleness is 5 s)",
            "b": "this write names nothing itself, so nobody is asked; it has no max_staleness: "
            "nothing says when it is safe",
        }


class TestLeaving:
    def test_whoever_has_left_meanwhile_need_not_answer(self) -> None:
        one = question()
        one.counted([instance("a"), instance("b")])
        one.counted([instance("a")])
        answer(one, "a", "m1", "m2")
        assert one.receipt(101) == Receipt(1, 1, answered=("a",))

    def test_whoever_came_meanwhile_has_nothing_to_evict(self) -> None:
        one = question()
        one.counted([instance("a")])
        one.counted([instance("a"), instance("b")])
        assert one.receipt(101).total == 1


@pytest.mark.parametrize("wait", [0, -1, math.inf, math.nan])
def test_nobody_can_wait_like_that(wait: float) -> None:
    with pytest.raises(ValueError, match="accepted: seconds, more than 0 and finite"):
        check_wait(wait)


def body(name: str) -> bytes:
    return msgspec.json.encode({"id": name, "session": f"session of {name}"})


Count = Callable[[], Awaitable[Sequence[Registered]]]


def counting(*instances: Registered) -> Count:
    async def count() -> Sequence[Registered]:
        return instances

    return count


class TestAsking:
    async def test_it_ends_with_the_last_answer(self) -> None:
        asks = Asking(counting(instance("a"), instance("b")), 0.1, ME)
        with asks.about(30.0) as one:
            assert one is not None
            asks.committed(one, evicted_here=False)
            asks.sent(one, ["m"])
            waiting = asyncio.create_task(asks.receipt(one))
            for name in "ab":
                await asyncio.sleep(0)
                assert not waiting.done()
                asks.answered("m", body(name))
            async with asyncio.timeout(20):
                assert (await waiting).complete

    async def test_it_ends_when_the_last_one_is_safe(self) -> None:
        asks = Asking(counting(instance("a", 0.1)), 0.01, ME)
        with asks.about(30.0) as one:
            assert one is not None
            asks.committed(one, evicted_here=False)
            async with asyncio.timeout(20):
                assert (await asks.receipt(one)).by_time == ("a",)

    async def test_it_ends_in_its_time(self) -> None:
        asks = Asking(counting(instance("a", None)), 0.1, ME)
        with asks.about(0.05) as one:
            assert one is not None
            asks.committed(one, evicted_here=True)
            receipt = await asks.receipt(one)
        assert (receipt.confirmed, receipt.total) == (0, 1)

    async def test_a_write_that_names_nothing_waits_for_everybody_s_time(self) -> None:
        asks = Asking(counting(Registered(*ME, 0.1), instance("a", 0.1)), 0.01, ME)
        with asks.about(30.0) as one:
            assert one is not None
            asks.committed(one, evicted_here=False, names_something=False)
            async with asyncio.timeout(20):
                assert await asks.receipt(one) == Receipt(2, 2, by_time=("a", "me"))

    async def test_a_database_that_is_away_is_asked_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(asking, "COUNT_RETRY", 0.001)
        attempts = 0

        async def count() -> Sequence[Registered]:
            nonlocal attempts
            attempts += 1
            if attempts < 3:
                raise DatabaseError("the database cannot be used")
            return [Registered(*ME, None)]

        asks = Asking(count, 0.1, ME)
        with asks.about(30.0) as one:
            assert one is not None
            asks.committed(one, evicted_here=True)
            async with asyncio.timeout(20):
                assert (await asks.receipt(one)).complete

    async def test_a_defect_in_counting_does_not_look_like_a_write_that_failed(self) -> None:
        async def count() -> Sequence[Registered]:
            raise LookupError("what a pity")

        asks = Asking(count, 0.1, ME)
        with asks.about(0.05) as one:
            assert one is not None
            asks.committed(one, evicted_here=True)
            receipt = await asks.receipt(one)
        assert (receipt.total, receipt.reason) == (None, "what a pity")

    async def test_whoever_leaves_while_all_wait_for_it_is_waited_for_no_more(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(asking, "COUNT_AGAIN", 0.001)
        there = [instance("a", None)]

        async def count() -> Sequence[Registered]:
            return list(there)

        asks = Asking(count, 0.1, ME)
        with asks.about(30.0) as one:
            assert one is not None
            asks.committed(one, evicted_here=True)
            waiting = asyncio.create_task(asks.receipt(one))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            there.clear()
            async with asyncio.timeout(20):
                assert (await waiting).complete

    async def test_cancelled_it_leaves_nothing_behind(self) -> None:
        asks = Asking(counting(instance("a")), 0.1, ME)

        async def ask() -> None:
            with asks.about(30.0) as one:
                assert one is not None
                asks.committed(one, evicted_here=True)
                asks.sent(one, ["m"])
                await asks.receipt(one)

        waiting = asyncio.create_task(ask())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert len(asyncio.all_tasks()) == 1
        asks.answered("m", body("a"))
        assert not asks._asked
        assert not asks._open

    @pytest.mark.parametrize("said", [b"", b"{", b"[]", b'{"id": 1}', b"\xff"])
    async def test_what_cannot_be_understood_is_no_answer(self, said: bytes) -> None:
        asks = Asking(counting(instance("a")), 0.1, ME)
        with asks.about(30.0) as one:
            assert one is not None
            asks.sent(one, ["m"])
            asks.answered("m", said)
            asks.answered("another", body("a"))
            one.counted([instance("a")])
            assert not one.complete(0)

    async def test_two_writes_in_one_message_are_both_answered(self) -> None:
        asks = Asking(counting(instance("a")), 0.1, ME)
        with asks.about(30.0) as one, asks.about(30.0) as other:
            assert one is not None
            assert other is not None
            for each in (one, other):
                each.counted([instance("a")])
                asks.sent(each, ["m"])
            asks.answered("m", body("a"))
            assert one.complete(0)
            assert other.complete(0)


@dataclass
class Delivery:
    name: str


class TestAnswering:
    async def test_it_answers_beside_and_goes_on_after_failures(self, eventually: Eventually) -> None:
        sent: list[tuple[str, bytes]] = []

        async def send(delivery: Delivery, said: bytes) -> None:
            if delivery.name == "fails":
                raise PublishError("no broker there")
            sent.append((delivery.name, said))

        answering = Answering(send, ME)
        task = asyncio.create_task(answering.run())
        answering.evicted([Delivery("one"), Delivery("fails"), Delivery("two")])
        await eventually(lambda: len(sent) == 2)
        assert [name for name, _ in sent] == ["one", "two"]
        assert msgspec.json.decode(sent[0][1]) == {"id": "me", "session": "s0"}
        answering.evicted([Delivery("three")])
        await eventually(lambda: len(sent) == 3)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])

    async def test_what_waits_is_bounded(
        self, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
    ) -> None:
        monkeypatch.setattr(asking, "MOST_ANSWERS", 150)
        busy = most = done = 0

        async def send(delivery: Delivery, said: bytes) -> None:
            nonlocal busy, most, done
            busy += 1
            most = max(most, busy)
            await asyncio.sleep(0)
            busy -= 1
            done += 1

        answering = Answering(send, ME)
        answering.evicted([Delivery(str(n)) for n in range(1_000)])
        task = asyncio.create_task(answering.run())
        await eventually(lambda: done == 150)
        assert most == asking.ANSWERS_AT_ONCE
        task.cancel()
        await asyncio.wait([task])
