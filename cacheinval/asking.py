"""Waiting for the others: a write's question, what is answered to it, and what this instance answers to others'."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from cacheinval import logs
from cacheinval.coherence.receipts import Question, Receipt, check_wait
from cacheinval.coherence.registration import Registered
from cacheinval.errors import BusError

__all__ = ["Answering", "Asking"]

log = logging.getLogger("cacheinval.asking")

COUNT_AGAIN = 1.0
"""Seconds after which those who have left meanwhile are looked for, while somebody is missing."""

COUNT_RETRY = 0.2
CANCEL_WITHIN = 1.0

MOST_ANSWERS = 10_000
"""Answers that may wait to be sent; of what comes beyond, the oldest are given up, and count as missing."""

ANSWERS_AT_ONCE = 100


class _Answer(msgspec.Struct):
    id: str
    session: str = ""


_decoder = msgspec.json.Decoder(_Answer)


class Asking:
    """The questions of one client's writes that are still open.

    Args:
        count: who is registered, in a snapshot taken after it is called; raises DatabaseError. None without a database.
        max_clock_skew: seconds.
        me: id and session of this instance, as they are registered; None for a client that is no instance.
    """

    def __init__(
        self,
        count: Callable[[], Awaitable[Sequence[Registered]]] | None,
        max_clock_skew: float,
        me: tuple[str, str] | None,
    ) -> None:
        self._count = count
        self._max_clock_skew = max_clock_skew
        self._me = me
        self._open: dict[Question, asyncio.Event] = {}
        self._asked: dict[str, list[Question]] = {}  # by message

    @contextmanager
    def about(self, wait: float | None) -> Iterator[Question | None]:
        """A question that is open within this block; None where nobody wants to wait.

        Raises:
            ValueError: nobody can wait that long.
        """
        if wait is None:
            yield None
            return
        question = Question(check_wait(wait), self._max_clock_skew)
        self._open[question] = asyncio.Event()
        try:
            yield question
        finally:
            del self._open[question]
            for message in question.messages:
                self._asked[message].remove(question)
                if not self._asked[message]:
                    del self._asked[message]

    async def receipt(self, question: Question) -> Receipt:
        """Waits until all have evicted, at most `question.wait` seconds from now, and says how it stands then."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + question.wait
        counting = asyncio.create_task(self._keep_counting(question, deadline))
        try:
            while not question.complete(now := loop.time()) and now < deadline:
                await self._changed(question, min(deadline, question.next_change(now)))
        finally:
            counting.cancel()
            await asyncio.wait({counting}, timeout=CANCEL_WITHIN)
        return question.receipt(loop.time())

    async def _changed(self, question: Question, until: float) -> None:
        changed = self._open[question]
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await changed.wait()
        changed.clear()

    async def _keep_counting(self, question: Question, deadline: float) -> None:
        if self._count is None:
            question.uncounted("there is no database")
            return
        while True:
            pause = COUNT_AGAIN
            try:
                async with asyncio.timeout_at(deadline):
                    question.counted(await self._count())
            except (
                Exception
            ) as error:  # whatever it is: the write is committed, and its caller is not to be told otherwise
                question.uncounted(str(error) or f"the database did not answer within {question.wait:g} s")
                pause = COUNT_RETRY
            self._wake(question)
            await asyncio.sleep(pause)

    # What the writer, the publisher and the bus tell

    def sent(self, question: Question, messages: Collection[str]) -> None:
        """`messages`, which are about to be sent, hold what `question` is about."""
        if question in self._open:
            question.sent(messages)
            for message in messages:
                self._asked.setdefault(message, []).append(question)

    def committed(self, question: Question, *, evicted_here: bool, names_something: bool = True) -> None:
        """The write is known to be committed.

        Args:
            evicted_here: every cache of this client has evicted since.
            names_something: False where it does not say itself what is stale.
        """
        question.committed(asyncio.get_running_loop().time(), names_something=names_something)
        if evicted_here and self._me is not None:
            question.evicted(self._me)

    def left(self, question: Question, reason: str) -> None:
        """The broker did not confirm what `question` is about."""
        question.left(reason)

    def answered(self, message: str, body: bytes) -> None:
        """An instance says that it has evicted what `message` says; what cannot be understood is no answer."""
        questions = self._asked.get(message)
        if not questions:
            return
        try:
            answer = _decoder.decode(body)
        except msgspec.DecodeError as error:
            logs.event(log, logging.DEBUG, "an answer cannot be understood", reason=error)
            return
        for question in questions:
            question.answered((answer.id, answer.session), message)
            self._wake(question)

    def _wake(self, question: Question) -> None:
        event = self._open.get(question)
        if event is not None:
            event.set()


class Answering:
    """Tells whoever waits that this instance has evicted, beside the receiving and never in its way.

    Args:
        send: sends a body to whoever sent a delivery; raises BusError.
        me: id and session of this instance, as they are registered.
    """

    def __init__(self, send: Callable[[Any, bytes], Awaitable[None]], me: tuple[str, str]) -> None:
        self._send = send
        self._body = msgspec.json.encode(_Answer(*me))
        self._waiting: deque[Any] = deque(maxlen=MOST_ANSWERS)
        self._something = asyncio.Event()

    def evicted(self, deliveries: Sequence[Any]) -> None:
        """What these say has been evicted, in every cache."""
        self._waiting.extend(deliveries)
        self._something.set()

    async def run(self) -> None:
        """Answers until cancelled."""
        while True:
            await self._something.wait()
            self._something.clear()
            while self._waiting:
                some = [self._waiting.popleft() for _ in range(min(len(self._waiting), ANSWERS_AT_ONCE))]
                await asyncio.gather(*map(self._answer, some))

    async def _answer(self, delivery: Any) -> None:
        try:
            await self._send(delivery, self._body)
        except (BusError, TimeoutError) as error:
            logs.event(log, logging.DEBUG, "an eviction could not be answered", reason=error)
