"""Finding out whether the outbox refuses rows: nothing is claimed that was not answered, and no suspicion is forgotten."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import asyncpg
import pytest
from waiting import Eventually

from cacheinval.outbox import Outbox, instances, refusals

DENIED = asyncpg.InsufficientPrivilegeError("permission denied for table outbox")


class Pool:
    """Answers as it is told."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer: Exception | None = None
        self.meanwhile: Callable[[], Awaitable[object] | None] = lambda: None

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> str:
        self.asked += 1
        awaited = self.meanwhile()
        if awaited is not None:
            await awaited
        if self.answer is not None:
            raise self.answer
        return "EXPLAIN"


@pytest.fixture
def outbox() -> Outbox:
    return Outbox("shop")


@pytest.fixture
async def pool(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    monkeypatch.setattr(refusals, "PAUSE", 0.01)
    pool = Pool()
    finding_out = asyncio.create_task(refusals.find_out(outbox, lambda: pool))
    yield pool
    finding_out.cancel()
    await asyncio.wait([finding_out])
    assert finding_out.cancelled()


@pytest.mark.parametrize(
    "problem",
    [
        OSError("no route"),
        TimeoutError(),
        asyncpg.TooManyConnectionsError("sorry"),
        asyncpg.InterfaceError("closed"),
    ],
    ids=lambda problem: type(problem).__name__,
)
async def test_where_nobody_answers_nothing_is_claimed_and_it_asks_again(
    outbox: Outbox, pool: Pool, eventually: Eventually, problem: Exception
) -> None:
    pool.answer = problem
    outbox.explain(DENIED)
    await eventually(lambda: pool.asked >= 3)
    assert outbox.refused is None
    pool.answer = DENIED
    await eventually(lambda: outbox.refused)
    pool.answer, refused = problem, outbox.refused
    known = pool.asked
    await eventually(lambda: pool.asked >= known + 2)
    assert outbox.refused == refused
    pool.answer = None
    await eventually(lambda: outbox.refused is None)
    assert not outbox.suspected.is_set()


async def test_a_pool_that_hangs_is_asked_again(
    outbox: Outbox, pool: Pool, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "ANSWER_WITHIN", 0.01)
    pool.meanwhile = asyncio.Event().wait
    outbox.explain(DENIED)
    await eventually(lambda: pool.asked >= 3)
    assert outbox.refused is None


async def test_what_is_suspected_while_it_asks_is_asked_after_that(
    outbox: Outbox, pool: Pool, eventually: Eventually
) -> None:
    def write_that_fails() -> None:
        pool.meanwhile = lambda: None
        outbox.explain(DENIED)

    pool.meanwhile = write_that_fails
    outbox.explain(DENIED)
    await eventually(lambda: pool.asked == 2)
    await eventually(lambda: not outbox.suspected.is_set())


async def test_a_row_that_was_written_needs_no_question(
    outbox: Outbox, pool: Pool, eventually: Eventually
) -> None:
    pool.answer = DENIED
    outbox.explain(DENIED)
    await eventually(lambda: outbox.refused)
    outbox.took_rows()
    assert outbox.refused is None
    assert not outbox.suspected.is_set()


async def test_whoever_is_not_answered_not_even_that_it_was_cancelled_keeps_no_later_suspicion_waiting(
    outbox: Outbox, pool: Pool, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a connection of a pool is given back only when the server has answered."""
    monkeypatch.setattr(refusals, "ANSWER_WITHIN", 0.01)
    monkeypatch.setattr(instances, "CANCEL_WITHIN", 0.01)
    thawed = asyncio.Event()

    async def frozen() -> None:
        while not thawed.is_set():
            with suppress(asyncio.CancelledError):
                await thawed.wait()

    pool.meanwhile = frozen
    try:
        for number in (1, 2, 3):
            outbox.suspected.set()
            await eventually(lambda number=number: pool.asked == number)
        assert outbox.refused is None
    finally:
        thawed.set()
