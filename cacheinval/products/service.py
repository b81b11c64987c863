"""Changing products."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Protocol

from cacheinval.products.model import Product, product_key

__all__ = ["ProductService"]


class Repository(Protocol):
    """Where products are kept. Each change also makes the keys in `invalidate` stale, everywhere."""

    async def put(
        self, product_id: str, name: str, price: Decimal, *, invalidate: Sequence[str]
    ) -> tuple[Product, bool]: ...

    async def delete(self, product_id: str, *, invalidate: Sequence[str]) -> bool: ...


class ProductService:
    """Changes products, and says with each change which key is stale. It knows of no cache."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def put(self, product_id: str, name: str, price: Decimal) -> tuple[Product, bool]:
        """Makes the product, or changes it; returns it as it is now, and whether it is new.

        Raises:
            DatabaseError: the database could not be used; the change may have been made.
        """
        return await self._repository.put(product_id, name, price, invalidate=[product_key(product_id)])

    async def delete(self, product_id: str) -> bool:
        """Deletes the product; returns whether there was one.

        Raises:
            DatabaseError: the database could not be used; the change may have been made.
        """
        return await self._repository.delete(product_id, invalidate=[product_key(product_id)])
