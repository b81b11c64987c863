"""How values are written for a cache outside the process, and what comes back."""

import dataclasses
import datetime
import pickle
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import pydantic
import pytest

from cacheinval.backends.serializing import Serializer, serializer
from cacheinval.errors import CacheError

NAMES = ("json", "msgpack", "pickle")


@dataclasses.dataclass
class Line:
    name: str
    price: Decimal


@dataclasses.dataclass
class Order:
    id: UUID
    at: datetime.datetime
    lines: list[Line]


class Part(pydantic.BaseModel):
    price: Decimal


class Product(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    id: int = pydantic.Field(alias="productId")
    day: datetime.date
    page: pydantic.HttpUrl = pydantic.HttpUrl("https://example.org/1")
    written: pydantic.Json[int] = 0
    parts: list[Part] = []


class Struct(msgspec.Struct):
    id: str
    product: Product


ORDER = Order(UUID(int=7), datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), [Line("a", Decimal("1.10"))])
PRODUCT = Product(
    productId=1, day=datetime.date(2026, 1, 2), written="3", parts=[Part(price=Decimal("1.10"))]
)


@pytest.fixture(params=NAMES)
def form(request: pytest.FixtureRequest) -> Serializer:
    return serializer(request.param)


def there_and_back(form: Serializer, value: Any, model: Any = None) -> Any:
    return form.decode(form.encode(value), model)


@pytest.mark.parametrize("value", [None, True, 0, 1.5, "漢字", [], {}, {"a": [1, None, "b\n"]}])
def test_plain_values(form: Serializer, value: Any) -> None:
    assert there_and_back(form, value) == value


@pytest.mark.parametrize(
    ("value", "model"),
    [
        (ORDER, Order),
        ([ORDER], list[Order]),
        ({"a": ORDER}, dict[str, Order]),
        (None, Order | None),
        (PRODUCT, Product),
        ([PRODUCT], list[Product]),
        ({"a": PRODUCT}, dict[str, Product]),
        (PRODUCT, Product | None),
        (None, Product | None),
        (Struct("a", PRODUCT), Struct),
        (Decimal("109.990"), Decimal),
    ],
    ids=repr,
)
def test_a_model_comes_back_as_it_was(form: Serializer, value: Any, model: Any) -> None:
    back = there_and_back(form, value, model)
    assert back == value
    assert type(back) is type(value)


def test_without_a_model_json_and_msgpack_give_types_of_their_own() -> None:
    for name in ("json", "msgpack"):
        assert there_and_back(serializer(name), (1, 2)) == [1, 2]
        assert there_and_back(serializer(name), PRODUCT)["productId"] == 1
    assert there_and_back(serializer("msgpack"), b"\xff\x00") == b"\xff\x00"
    assert there_and_back(serializer("pickle"), (1, {2})) == (1, {2})


class Unwilling:
    def __reduce__(self) -> Any:
        raise RuntimeError("I will not")


@pytest.mark.parametrize("value", [Unwilling(), [Unwilling()]], ids=["bare", "within"])
def test_a_value_that_has_no_such_form_is_refused(form: Serializer, value: Any) -> None:
    with pytest.raises(CacheError, match=r"has no such form|cannot be pickled"):
        form.encode(value)


@pytest.mark.parametrize("written", [b"", b"\xff\xfe", b"\xc1", b"{"])
def test_what_is_no_value_is_refused(form: Serializer, written: bytes) -> None:
    with pytest.raises(CacheError, match=r"this is not a Order|cannot be unpickled"):
        form.decode(written, Order)


@pytest.mark.parametrize("model", [Product, list[Product], Product | None, Order, Struct])
@pytest.mark.parametrize("name", ["json", "msgpack"])
def test_a_value_of_another_version_of_the_model_is_refused(name: str, model: Any) -> None:
    form = serializer(name)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="this is not a"):
        form.decode(form.encode({"title": "old"}), model)


def test_only_who_asked_for_it_unpickles() -> None:
    written = pickle.dumps("value")
    for name in ("json", "msgpack"):
        with pytest.raises(CacheError):
            serializer(name).decode(written, None)
