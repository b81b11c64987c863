"""What the acts play on: products, a service that changes them, readers that serve them, and who is right."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import count
from typing import Protocol

from cacheinval.demo.waiting import PATIENCE

__all__ = ["CATALOGUE", "LAMP", "Reader", "Stage", "Wrong", "new_price", "wrong_at_the_end", "wrong_prices"]

LAMP = "lamp"
CATALOGUE = tuple(f"product-{number:02}" for number in range(1, 31))

Prices = Mapping[str, Decimal]

_steps = count()


class Reader(Protocol):
    """An instance that reads products through its cache."""

    @property
    def name(self) -> str: ...

    async def read(self, product_id: str) -> Decimal:
        """The price that it serves."""

    async def loads(self) -> int:
        """How often it has asked the database so far."""

    async def latencies(self, product_id: str) -> Sequence[float]:
        """Seconds from commit to eviction, for each change of the product that it has heard of so far."""


class Stage(Protocol):
    """What the acts play on: a service that writes, readers, and the database between them."""

    @property
    def readers(self) -> Sequence[Reader]: ...

    @property
    def ttl(self) -> float:
        """Seconds that the readers keep an entry."""

    async def put(self, product_id: str, price: Decimal) -> None:
        """Changes a price by the service; returns when that is committed."""

    async def change_and_tell_nobody(self, product_id: str, price: Decimal) -> None:
        """Changes a price behind the service's back."""

    async def tell(self, product_id: str) -> None:
        """Has a product evicted everywhere, for a change that nobody was told of."""

    async def prices(self, product_ids: Sequence[str]) -> Prices:
        """What the database holds, by one query."""


def new_price() -> Decimal:
    """A price that no product has had before."""
    return Decimal("19.99") + Decimal(next(_steps)) / 100


@dataclass(frozen=True, slots=True)
class Wrong:
    """A price that a reader serves at the end of an act, and that is not the database's."""

    reader: str
    product_id: str
    served: Decimal | None
    price: Decimal

    def __str__(self) -> str:
        return f"{self.reader} serves {self.product_id} at {self.served}; the database says {self.price}"


def wrong_prices(truth: Prices, served: Mapping[str, Prices]) -> list[Wrong]:
    """Each price in `served` (by reader and product) that is not the one in `truth`, or is missing."""
    return [
        Wrong(reader, product_id, prices.get(product_id), price)
        for reader, prices in served.items()
        for product_id, price in truth.items()
        if prices.get(product_id) != price
    ]


async def wrong_at_the_end(stage: Stage, product_ids: Sequence[str]) -> list[Wrong]:
    """What readers still serve wrong after `PATIENCE` seconds; returns as soon as that is nothing."""
    end = time.monotonic() + PATIENCE
    while True:
        truth = await stage.prices(product_ids)
        served = await asyncio.gather(*(_serves(reader, product_ids) for reader in stage.readers))
        wrong = wrong_prices(truth, dict(zip((reader.name for reader in stage.readers), served, strict=True)))
        if not wrong or time.monotonic() > end:
            return wrong
        await asyncio.sleep(0.01)


async def _serves(reader: Reader, product_ids: Sequence[str]) -> Prices:
    return {product_id: await reader.read(product_id) for product_id in product_ids}
