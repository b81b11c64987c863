"""The acts that are the same with any bus: without invalidation, polling, events."""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from decimal import Decimal

from cacheinval.demo.page import Page, good, milliseconds, plural, poor
from cacheinval.demo.stage import (
    CATALOGUE,
    LAMP,
    Reader,
    Stage,
    Wrong,
    new_price,
    wrong_at_the_end,
    wrong_prices,
)
from cacheinval.demo.waiting import meanwhile, until

__all__ = ["events", "polling", "without_invalidation"]

POLL_INTERVAL = 0.5
READ_INTERVAL = 0.02


async def without_invalidation(stage: Stage, page: Page, seconds: float) -> list[Wrong]:
    """Act 1: readers serve the old price for as long as nobody tells them. Returns what is wrong at its end."""
    page.act(
        1,
        "Without invalidation",
        f"Each reader has the {LAMP} in its cache. Somebody changes its price in the database and tells nobody.",
    )
    for reader in stage.readers:
        await reader.read(LAMP)
    price = new_price()
    await stage.change_and_tell_nobody(LAMP, price)
    with page.busy("reading"):
        served = await asyncio.gather(*(_read_for(seconds, reader) for reader in stage.readers))
    page.table(
        ("READER", "DATABASE", "READER SERVES", "READS", "OLD PRICE"),
        [
            (
                reader.name,
                str(price),
                (good if prices[-1] == price else poor)(prices[-1]),
                str(len(prices)),
                poor(sum(each != price for each in prices)),
            )
            for reader, prices in zip(stage.readers, served, strict=True)
        ],
    )
    began = time.monotonic()
    await stage.tell(LAMP)
    wrong = await wrong_at_the_end(stage, [LAMP])
    took = milliseconds(time.monotonic() - began)
    page.say(
        f"So it would go on until the entries' time is up ({stage.ttl:g} s). Then somebody told them, and "
        + ("not every reader listened." if wrong else f"{took} later all of them served the new price.")
    )
    return wrong


async def _read_for(seconds: float, reader: Reader) -> list[Decimal]:
    prices, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        prices.append(await reader.read(LAMP))
        await asyncio.sleep(READ_INTERVAL)
    return prices


class Polling:
    """A reader that hears of no change, and asks the database for all that it holds again and again."""

    def __init__(self, name: str, stage: Stage) -> None:
        self.name = name
        self.prices: dict[str, Decimal] = {}
        self.seen_at: dict[Decimal, float] = {}
        self.queries = self.in_vain = self.rows = 0
        self._stage = stage

    async def run(self, pause: float) -> None:
        """Fills its cache, and polls from `pause` seconds later until cancelled."""
        self.prices.update(await self._stage.prices(CATALOGUE))
        await asyncio.sleep(pause)
        while True:
            await self._poll()
            await asyncio.sleep(POLL_INTERVAL)

    async def _poll(self) -> None:
        prices = await self._stage.prices(CATALOGUE)
        changed = {price for product_id, price in prices.items() if self.prices[product_id] != price}
        self.queries += 1
        self.in_vain += not changed
        self.rows += len(prices)
        self.seen_at.update(dict.fromkeys(changed, time.monotonic()))
        self.prices.update(prices)


async def polling(stage: Stage, page: Page, seconds: float, changes: int) -> list[Wrong]:
    """Act 2: what it costs to ask again and again, and how late it is. Returns what is wrong at its end."""
    page.act(
        2,
        "Polling",
        f"Three readers of another kind hold {len(CATALOGUE)} products each and ask the database for them every "
        f"{POLL_INTERVAL:g} s. The service changes {plural(changes, 'price')}.",
    )
    pollers = [Polling(f"polling-{number}", stage) for number in (1, 2, 3)]
    # Not all at once: as readers do that were started at different times.
    runs = [poller.run(number / len(pollers) * POLL_INTERVAL) for number, poller in enumerate(pollers)]
    committed_at: dict[Decimal, float] = {}

    async def begun() -> bool:
        return all(poller.prices for poller in pollers)

    async def seen() -> bool:
        return all(committed_at.keys() <= poller.seen_at.keys() for poller in pollers)

    began = time.monotonic()
    with page.busy("polling"):
        async with meanwhile(*runs):
            await until(begun, "the polling readers hold all products")
            for product_id in random.sample(CATALOGUE, changes):
                await asyncio.sleep(seconds / changes * random.uniform(0.5, 1.5))
                price = new_price()
                await stage.put(product_id, price)
                committed_at[price] = time.monotonic()
            await until(seen, "the polling readers have seen every change")
    _show_polling(page, pollers, committed_at, time.monotonic() - began)
    truth = await stage.prices(CATALOGUE)
    wrong = wrong_prices(truth, {poller.name: poller.prices for poller in pollers})
    return wrong + await wrong_at_the_end(stage, CATALOGUE)


def _show_polling(
    page: Page, pollers: Sequence[Polling], committed_at: Mapping[Decimal, float], took: float
) -> None:
    # A poll may see a change before its writer hears that it is committed.
    late = [
        [max(0.0, poller.seen_at[price] - at) for price, at in committed_at.items()] for poller in pollers
    ]
    page.table(
        ("READER", "QUERIES", "IN VAIN", "ROWS READ", "LATE ON AVERAGE", "AT WORST"),
        [
            (
                poller.name,
                str(poller.queries),
                poor(poller.in_vain),
                str(poller.rows),
                milliseconds(sum(seconds) / len(seconds)),
                poor(milliseconds(max(seconds))),
            )
            for poller, seconds in zip(pollers, late, strict=True)
        ],
    )
    queries = plural(sum(poller.queries for poller in pollers), "query", "queries")
    page.say(
        f"{queries} in {took:.1f} s for {plural(len(committed_at), 'change')}, and still up to "
        f"{milliseconds(max(map(max, late)))} late. To be less late is to ask more often, and each reader more asks "
        "as much again."
    )


async def events(stage: Stage, page: Page, bus: str) -> list[Wrong]:
    """Act 3: one change, told to everyone by `bus`. Returns what is wrong at its end."""
    page.act(
        3,
        "Events",
        f"The service changes the price of the {LAMP} once. {bus} tells every reader which key to evict.",
    )
    loads, heard = [], []
    for reader in stage.readers:
        await reader.read(LAMP)
        loads.append(await reader.loads())
        heard.append(len(await reader.latencies(LAMP)))

    async def evicted() -> bool:
        latencies = [len(await reader.latencies(LAMP)) for reader in stage.readers]
        return all(now > before for now, before in zip(latencies, heard, strict=True))

    price = new_price()
    await stage.put(LAMP, price)
    await until(evicted, "every reader has evicted the product")
    rows, latencies, queries = [], [], []
    for reader, loads_before, heard_before in zip(stage.readers, loads, heard, strict=True):
        latencies.append((await reader.latencies(LAMP))[heard_before])
        served = await reader.read(LAMP)
        queries.append(await reader.loads() - loads_before)
        shown = (good if served == price else poor)(served)
        rows.append((reader.name, good(milliseconds(latencies[-1])), str(price), shown, str(queries[-1])))
    page.table(("READER", "COMMIT TO EVICTION", "DATABASE", "READER SERVES", "QUERIES"), rows)
    page.say(
        f"{plural(sum(queries), 'query', 'queries')}, one for each reader's next read, and at most "
        f"{milliseconds(max(latencies))} late. Until the next change there is nothing to ask."
    )
    return await wrong_at_the_end(stage, [LAMP])
