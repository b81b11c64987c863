"""What a product is, what its fields accept, and the key that it is cached under."""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from hashlib import sha256

__all__ = [
    "PRODUCTS_TAG",
    "Product",
    "check_product_id",
    "check_text",
    "exact_decimal",
    "exact_price",
    "product_key",
]

PRODUCTS_TAG = "products"
MAX_ID_LENGTH = 200

_MAX_KEY_BYTES = 512
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
# What a Postgres numeric holds. asyncpg stores a larger number as 0, without an error.
_DIGITS_BEFORE_POINT = 131_072
_DIGITS_AFTER_POINT = 16_383


@dataclass(frozen=True, slots=True)
class Product:
    """One product. `version` grows with every change, over a deletion too."""

    id: str
    name: str
    price: Decimal
    version: int


def product_key(product_id: str) -> str:
    """The cache key of a product: `product:{id}`.

    A key has at most 512 bytes, an id of 200 characters up to 800. Such an id is cached under its SHA-256, behind
    another prefix, so that it cannot collide with the key of another id.
    """
    key = f"product:{product_id}"
    if len(product_id) <= 126 or len(key.encode()) <= _MAX_KEY_BYTES:
        return key
    return f"product-sha256:{sha256(product_id.encode()).hexdigest()}"


def check_product_id(product_id: str) -> str:
    """`product_id` itself.

    Raises:
        ValueError: it is empty, too long, or not what Postgres can hold as text.
    """
    if not 1 <= len(product_id) <= MAX_ID_LENGTH:
        raise ValueError(f"must have 1 to {MAX_ID_LENGTH} characters, not {len(product_id)}")
    return check_text(product_id)


def check_text(text: str) -> str:
    """`text` itself.

    Raises:
        ValueError: it holds a NUL, or half of a surrogate pair, which no UTF-8 can express.
    """
    if "\0" in text:
        raise ValueError("must not contain NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain half of a surrogate pair") from None
    return text


def exact_decimal(text: str) -> Decimal:
    """The number that `text` writes, digit for digit; NaN where its exponent is beyond anything.

    Raises:
        ValueError: it is no decimal number as JSON writes one.
    """
    if not _NUMBER.fullmatch(text):
        raise ValueError("must be a decimal number, such as 19.99")
    try:
        return Decimal(text)
    except InvalidOperation:
        return Decimal("NaN")


def exact_price(value: object) -> Decimal:
    """`value`, a Decimal or its text, as a price that Postgres will give back digit for digit.

    Raises:
        ValueError: it is no number, not finite, below zero, or has more digits than a Postgres numeric.
    """
    if isinstance(value, str):
        value = exact_decimal(value)
    if not isinstance(value, Decimal):
        raise ValueError("must be a number, or a string that writes one")
    if not value.is_finite():
        raise ValueError("must be a finite number")
    if value < 0:
        raise ValueError("must not be negative")
    exponent = value.as_tuple().exponent
    assert isinstance(exponent, int)  # of a finite number
    if value and value.adjusted() >= _DIGITS_BEFORE_POINT:
        raise ValueError(f"must have at most {_DIGITS_BEFORE_POINT} digits before the point")
    if -exponent > _DIGITS_AFTER_POINT:
        raise ValueError(f"must have at most {_DIGITS_AFTER_POINT} digits after the point")
    if not value:
        return Decimal((0, (0,), min(exponent, 0)))  # without a sign, and 0e9 is 0
    return Decimal(f"{value:f}")  # 1e3 is 1000, as Postgres will say
