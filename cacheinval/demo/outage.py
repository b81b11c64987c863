"""The act that needs a real broker: it is killed in the middle of a burst of updates, and comes back."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.text import Text

from cacheinval.demo.page import Page, good, milliseconds, poor
from cacheinval.demo.stage import CATALOGUE, Reader, Stage, Wrong, new_price, wrong_at_the_end
from cacheinval.demo.waiting import meanwhile, until
from cacheinval.errors import CacheinvalError

__all__ = ["Tally", "outage"]

UPDATE_INTERVAL, READ_INTERVAL = 0.02, 0.04
UPDATES_BEFORE, UPDATES_AFTER = 100, 50


class Broker(Protocol):
    """The server that is killed."""

    async def kill(self) -> None: ...
    async def start(self) -> None: ...


class SubscribedReader(Reader, Protocol):
    """A reader that knows when it has missed something."""

    async def trusts(self) -> bool:
        """Whether it can rely on what it has cached."""


@dataclass(frozen=True, slots=True)
class Tally:
    """How writes were told to the others, since the processes began."""

    published_at_once: int
    recovered: int
    """Rows that a relay found in the outbox, and published."""


class BrokerStage(Stage, Protocol):
    """A stage with a broker between the processes."""

    @property
    def readers(self) -> Sequence[SubscribedReader]: ...
    @property
    def broker(self) -> Broker: ...

    async def outbox_is_empty(self) -> bool:
        """Whether all that was recorded has been published."""

    async def tally(self) -> Tally:
        """How many writes were published, and how."""


class Burst:
    """Updates of all products, one after the other, until told to end."""

    def __init__(self, stage: BrokerStage) -> None:
        self.made = self.failed = 0
        self.slowest = 0.0
        self._stage = stage
        self._over = False
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Updates until `end` is called."""
        while not self._over:
            began = time.monotonic()
            try:
                await self._stage.put(CATALOGUE[self.made % len(CATALOGUE)], new_price())
            except CacheinvalError:
                self.failed += 1
            else:
                self.made += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            await asyncio.sleep(UPDATE_INTERVAL)
        self._ended.set()

    async def reach(self, number: int) -> None:
        """Waits until so many updates have been made."""

        async def reached() -> bool:
            return self.made >= number

        await until(reached, f"{number} updates were made")

    async def end(self) -> None:
        """Makes the update under way the last one, and waits for it."""
        self._over = True
        await self._ended.wait()


class Reads:
    """One reader's reads of products at random, and how many it answered."""

    def __init__(self, reader: SubscribedReader) -> None:
        self.answered = self.failed = 0
        self._reader = reader

    async def run(self) -> None:
        """Reads until cancelled."""
        while True:
            try:
                await self._reader.read(random.choice(CATALOGUE))
            except CacheinvalError:
                self.failed += 1
            else:
                self.answered += 1
            await asyncio.sleep(READ_INTERVAL)


async def outage(stage: BrokerStage, page: Page) -> list[Wrong]:
    """Act 4. Returns what is wrong at its end."""
    page.act(
        4,
        "The broker dies",
        f"RabbitMQ is killed with SIGKILL in the middle of a burst of updates of {len(CATALOGUE)} products, and is "
        "started again. The service goes on writing, and the readers go on reading.",
    )
    before = await stage.tally()
    burst, reads = Burst(stage), [Reads(reader) for reader in stage.readers]
    async with meanwhile(burst.run(), *(one.run() for one in reads)):
        with page.busy("updating prices"):
            await burst.reach(UPDATES_BEFORE)
        with page.busy("RabbitMQ is killed, and starts again"):
            await stage.broker.kill()
            died_at, made_before = time.monotonic(), burst.made
            await stage.broker.start()
            back_at, made_meanwhile = time.monotonic(), burst.made - made_before
        with page.busy("the readers join again"):
            joined = await asyncio.gather(*(_joins(reader, back_at) for reader in stage.readers))
            await burst.reach(burst.made + UPDATES_AFTER)
        await burst.end()
    with page.busy("the outbox is emptied"):
        await until(stage.outbox_is_empty, "the outbox is empty")
    wrong = await wrong_at_the_end(stage, CATALOGUE)
    after = await stage.tally()
    at_once, recovered = (
        after.published_at_once - before.published_at_once,
        after.recovered - before.recovered,
    )
    page.facts(
        [
            ("updates made", f"{burst.made:,}"),
            ("  of them while RabbitMQ was down", f"{made_meanwhile:,}"),
            ("  published at once", f"{at_once:,}"),
            ("  recovered from the outbox", f"{recovered:,}"),
            ("  published twice (harmless)", f"{max(0, at_once + recovered - burst.made):,}"),
            ("updates that failed", _bad_if_any(burst.failed)),
            ("slowest update", milliseconds(burst.slowest)),
            ("RabbitMQ was down for", f"{back_at - died_at:.1f} s"),
        ]
    )
    page.table(
        ("READER", "READS", "FAILED", "JOINED AGAIN AFTER", "OLD PRICES AT THE END"),
        [
            (
                reader.name,
                f"{one.answered:,}",
                _bad_if_any(one.failed),
                f"{seconds:.1f} s",
                _bad_if_any(sum(each.reader == reader.name for each in wrong)),
            )
            for reader, one, seconds in zip(stage.readers, reads, joined, strict=True)
        ],
    )
    if not wrong:
        page.say(
            "What could not be published waited in the outbox, where it was committed together with its change. A "
            "reader that loses its subscription relies on nothing that it has cached before."
        )
    return wrong


async def _joins(reader: SubscribedReader, back_at: float) -> float:
    await until(reader.trusts, f"{reader.name} has joined again")
    return time.monotonic() - back_at


def _bad_if_any(number: int) -> Text:
    return poor(number) if number else good(number)
