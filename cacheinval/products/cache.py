"""Reading products, through the cache."""

from collections.abc import Awaitable, Callable, Collection
from typing import Any, Protocol

from cacheinval.cache import Read
from cacheinval.products.model import PRODUCTS_TAG, Product, product_key

__all__ = ["ProductCache"]


class ReadThrough(Protocol):
    """The cache that this one stands on: `client.cache`."""

    async def read(
        self,
        key: str,
        factory: Callable[[], Awaitable[Any]],
        *,
        tags: Collection[str] = (),
        model: Any = None,
    ) -> Read: ...


class Source(Protocol):
    """Where products are read from on a miss."""

    async def get(self, product_id: str) -> Product | None: ...


class ProductCache:
    """Reads products from `cache`, and from `source` what the cache does not hold.

    That there is no such product is remembered too: whoever makes it names its key, as every change does.
    """

    def __init__(self, cache: ReadThrough, source: Source) -> None:
        self._cache = cache
        self._source = source

    async def get(self, product_id: str) -> Product | None:
        """The product, or None where there is none.

        Raises:
            DatabaseError: it is not in the cache, and the database could not be used.
        """
        product: Product | None = (await self.read(product_id)).value
        return product

    async def read(self, product_id: str) -> Read:
        """The same as `get`, with how the product was come by."""
        return await self._cache.read(
            product_key(product_id),
            lambda: self._source.get(product_id),
            tags=(PRODUCTS_TAG,),
            model=Product | None,
        )
