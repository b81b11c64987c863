"""The story in one process: the parts of the reference application on the in-process bus, without a server."""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from decimal import Decimal
from typing import Self

from cacheinval.bus.memory import EventBus
from cacheinval.client import Client
from cacheinval.demo.acts import events, polling, without_invalidation
from cacheinval.demo.page import Page
from cacheinval.demo.stage import CATALOGUE, LAMP, Wrong, new_price
from cacheinval.demo.waiting import PATIENCE
from cacheinval.products import MemoryProductRepository, ProductCache, ProductService, product_key
from cacheinval.settings import Settings

__all__ = ["MemoryStage", "tell"]

TTL = 300.0


class MemoryStage:
    """One service and three readers, each with a `Client` of its own, on one `EventBus`."""

    ttl = TTL

    def __init__(self) -> None:
        bus = EventBus()
        self._writer = Client(_settings("service"), bus=bus)
        self._repository = MemoryProductRepository(self._writer)
        self._service = ProductService(self._repository)
        self.readers = [MemoryReader(f"reader-{number}", bus, self._repository) for number in (1, 2, 3)]
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for client in (self._writer, *(reader.client for reader in self.readers)):
                await stack.enter_async_context(client)
                await client.wait_ready(PATIENCE)
            for product_id in (LAMP, *CATALOGUE):
                await self.put(product_id, new_price())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def put(self, product_id: str, price: Decimal) -> None:
        """See `stage.Stage`."""
        await self._service.put(product_id, product_id, price)

    async def change_and_tell_nobody(self, product_id: str, price: Decimal) -> None:
        """See `stage.Stage`."""
        await self._repository.put(product_id, product_id, price, invalidate=())

    async def tell(self, product_id: str) -> None:
        """See `stage.Stage`."""
        await self._writer.invalidate(product_key(product_id))

    async def prices(self, product_ids: Sequence[str]) -> Mapping[str, Decimal]:
        """See `stage.Stage`."""
        products = [await self._repository.get(product_id) for product_id in product_ids]
        return {product.id: product.price for product in products if product is not None}


class MemoryReader:
    """Reads through a cache of its own what the service changes."""

    def __init__(self, name: str, bus: EventBus, repository: MemoryProductRepository) -> None:
        self.name = name
        self.client = Client(_settings(name), bus=bus)
        self._products = ProductCache(self.client.cache, repository)
        self._latencies: list[float] = []

    async def read(self, product_id: str) -> Decimal:
        """See `stage.Reader`."""
        product = await self._products.get(product_id)
        assert product is not None, product_id
        return product.price

    async def loads(self) -> int:
        """See `stage.Reader`."""
        return self.client.cache.counters.loads

    async def latencies(self, product_id: str) -> Sequence[float]:
        """See `stage.Reader`; here of all products together, and the mean of those that came since the last look."""
        counters = self.client.instance.counters
        new = sum(counters.latencies) - len(self._latencies)
        if new:
            self._latencies += [(counters.latency_sum - sum(self._latencies)) / new] * new
        return self._latencies


async def tell(page: Page) -> list[Wrong]:
    """Tells acts 1 to 3; returns what was wrong at the end of each."""
    page.title(
        "cacheinval demo, in one process",
        "One ProductService writes, three ProductCaches read, and an EventBus carries the news from one to the others. "
        "Every figure is measured now.",
    )
    async with MemoryStage() as stage:
        wrong = await without_invalidation(stage, page, seconds=0.3)
        wrong += await polling(stage, page, seconds=1.2, changes=3)
        return wrong + await events(stage, page, "The EventBus")


def _settings(instance_id: str) -> Settings:
    # All that matters to the story is said here: it is the same whatever the environment says.
    return Settings(
        broker_url="memory://",
        database_url="",
        cache_url="memory://",
        cache_ttl=TTL,
        namespace="demo",
        instance_id=instance_id,
        max_staleness=None,
    )
