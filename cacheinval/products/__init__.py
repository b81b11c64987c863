"""The reference application: products in Postgres, read through a cache, over HTTP.

`ProductService` changes products, `ProductCache` reads them; neither knows the other. What ties them together is that a
change names the key that it makes stale.
"""

from cacheinval.products.cache import ProductCache
from cacheinval.products.model import Product, product_key
from cacheinval.products.repository import MemoryProductRepository, ProductRepository
from cacheinval.products.service import ProductService

__all__ = [
    "MemoryProductRepository",
    "Product",
    "ProductCache",
    "ProductRepository",
    "ProductService",
    "product_key",
]
