"""The reference application, without servers: the model, the repository in memory, and HTTP over ASGI."""

import json
import logging
from collections.abc import Awaitable, Callable, Collection
from decimal import Decimal
from typing import Any
from urllib.parse import quote, unquote

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from cacheinval.cache import Read
from cacheinval.errors import DatabaseError, PublishError
from cacheinval.messages import check_names
from cacheinval.monitoring import PATHS, Monitoring, Readiness
from cacheinval.products import (
    MemoryProductRepository,
    Product,
    ProductCache,
    ProductService,
    product_key,
)
from cacheinval.products.http import MAX_BODY, create_app
from cacheinval.products.model import check_product_id, exact_price

LONG = "9" * 131_072
NO_PRICES = [
    *("", " 1", "1 ", "1_000", "٣", "1.", ".5", "+1", "0x10", "one"),
    *("NaN", "Infinity", "-Infinity", "sNaN", "-1", "-1e-9"),
    *(LONG + "9", "1e131072", "1e-16384", "1e999999999", "1e99999999999999999999", "1e-99999999999999999999"),
]
IDS = [
    *("a/b", "/", "//", "/a", "a/", ".", "..", "../..", "./a", "products/x", "/products/"),
    *("a?b=c", "a#b", "%", "%2F", "%00", "a b", "a+b", "a;b", "~"),
    *("ü", "産品", "🦊", "e\u0301", "\u202e", "\ufeff", "\u2028", "\ufffd", "\U0010ffff"),
    *("\n", "a\n", "a\nb", "\r\n", "\t", "\x7f", "x" * 200, "é" * 200, "🦊" * 200),
]
NO_IDS = [
    *("", "%00", "a%00b", "x" * 201, quote("🦊" * 201), "%", "%2", "%zz", "a%"),
    *("%FF", "%C3", "%E2%82", "%C0%AF", "%ED%A0%80", "%ED%B0%80", "%F5%80%80%80"),
]


class FakeCache:
    """Keeps whatever is read, until it is told otherwise."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.tags: dict[str, Collection[str]] = {}
        self.bypassing = False

    async def read(
        self,
        key: str,
        factory: Callable[[], Awaitable[Any]],
        *,
        tags: Collection[str] = (),
        model: Any = None,
    ) -> Read:
        check_names([key])
        if key in self.kept and not self.bypassing:
            return Read(self.kept[key], "hit", False)
        value = await factory()
        self.kept[key], self.tags[key] = value, tags
        return Read(value, "bypass" if self.bypassing else "miss", not self.bypassing)

    async def invalidate(self, *keys: str) -> None:
        for key in keys:
            self.kept.pop(key, None)


class Application:
    """The HTTP application over fakes, called as a server would call it."""

    def __init__(self) -> None:
        self.cache = FakeCache()
        self.repository = MemoryProductRepository(self.cache)
        self.service = ProductService(self.repository)
        monitoring = Monitoring(NothingObserved(), lambda: Readiness(True, "ready"))
        self.app = create_app(ProductCache(self.cache, self.repository), self.service, monitoring, PATHS)

    async def call(
        self, method: str, target: str | bytes, body: Any = None, *, raw: bytes | None = None
    ) -> "Answer":
        """`target` is percent-encoded already; `body` is made JSON, unless there is a `raw` one."""
        path = target.encode("ascii") if isinstance(target, str) else target
        content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path.decode("ascii")),  # as uvicorn does it: errors are replaced
            "raw_path": path,
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        return Answer(sent)


class Answer:
    """What the application sent."""

    def __init__(self, sent: list[Message]) -> None:
        self.status: int = sent[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in sent[1:])

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def fields(self) -> list[list[str]]:
        """The `loc` of each problem of a 422."""
        assert self.status == 422
        assert all(set(problem) == {"loc", "msg", "type"} for problem in self.json["detail"])
        return [problem["loc"] for problem in self.json["detail"]]


class NothingObserved:
    def status(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def application() -> Application:
    return Application()


class TestModel:
    @pytest.mark.parametrize(
        ("written", "price"),
        [
            ("19.990", "19.990"),
            ("0", "0"),
            ("0.00", "0.00"),
            ("-0.00", "0.00"),
            ("0e9", "0"),
            ("0e-2", "0.00"),
            ("1e3", "1000"),
            ("1.50E+1", "15.0"),
            ("007.5", "7.5"),
            ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
            ("1e400", "1" + "0" * 400),
            (LONG, LONG),
            ("1e131071", "1" + "0" * 131_071),
            ("1e-16383", "0." + "0" * 16_382 + "1"),
        ],
    )
    def test_a_price_keeps_every_digit(self, written: str, price: str) -> None:
        assert f"{exact_price(written):f}" == price
        assert f"{exact_price(Decimal(written)):f}" == price
        assert exact_price(written).as_tuple().exponent <= 0  # so that Postgres gives back the very same

    @pytest.mark.parametrize(
        "written",
        NO_PRICES,
    )
    def test_what_is_no_price_is_refused(self, written: str) -> None:
        with pytest.raises(ValueError, match=r"^must "):
            exact_price(written)

    @pytest.mark.parametrize(
        "value", [Decimal("NaN"), Decimal("Infinity"), Decimal("-Infinity"), 1.5, True, None, []]
    )
    def test_what_is_no_number_is_refused(self, value: object) -> None:
        with pytest.raises(ValueError, match=r"^must "):
            exact_price(value)

    @given(st.decimals(min_value=0, allow_nan=False, allow_infinity=False))
    def test_any_decimal_comes_back_equal(self, price: Decimal) -> None:
        assert exact_price(price) == price
        assert exact_price(f"{price:f}".removeprefix("-")) == price

    @given(st.text(min_size=1, max_size=200), st.text(min_size=1, max_size=200))
    def test_different_ids_have_different_keys_that_may_be_sent(self, one: str, other: str) -> None:
        for text in (one, other):
            try:
                check_product_id(text)
            except ValueError:
                return
        assert check_names([product_key(one), product_key(other)])
        assert (product_key(one) == product_key(other)) == (one == other)

    def test_a_key_is_the_id_wherever_it_fits(self) -> None:
        assert product_key("a/b c") == "product:a/b c"
        assert product_key("x" * 200) == "product:" + "x" * 200
        assert product_key("é" * 200) == "product:" + "é" * 200
        assert product_key("🦊" * 126) == "product:" + "🦊" * 126
        assert product_key("🦊" * 127).startswith("product-sha256:")

    def test_a_product_survives_the_json_of_an_external_cache(self) -> None:
        product = Product("a", "n", Decimal("19.990"), 2**62)
        again = msgspec.json.decode(msgspec.json.encode(product), type=Product | None)
        assert repr(again) == repr(product)


class TestMemoryRepository:
    async def test_versions_outlive_a_deletion(self) -> None:
        service = ProductService(MemoryProductRepository(FakeCache()))
        first, created = await service.put("a", "n", Decimal(1))
        assert (first.version, created) == (1, True)
        second, created = await service.put("a", "n", Decimal(2))
        assert (second.version, created) == (2, False)
        assert await service.delete("a")
        assert not await service.delete("a")
        third, created = await service.put("a", "n", Decimal(3))
        assert (third.version, created) == (3, True)

    async def test_a_change_names_its_key(self) -> None:
        told: list[tuple[str, ...]] = []

        class Told:
            async def invalidate(self, *keys: str) -> None:
                told.append(keys)

        service = ProductService(MemoryProductRepository(Told()))
        await service.put("a", "n", Decimal(1))
        await service.delete("a")
        await service.delete("a")
        assert told == [("product:a",), ("product:a",)]


class TestProducts:
    async def test_a_product_is_made_read_changed_and_deleted(self, application: Application) -> None:
        made = await application.call("PUT", "/products/abc-123", {"name": "Kettle", "price": "19.990"})
        assert (made.status, made.json) == (
            201,
            {"id": "abc-123", "name": "Kettle", "price": "19.990", "version": 1},
        )
        assert (await application.call("GET", "/products/abc-123")).json == made.json
        changed = await application.call(
            "PUT", "/products/abc-123", {"id": "abc-123", "name": "Kettle", "price": 5, "version": "any"}
        )
        assert (changed.status, changed.json["price"], changed.json["version"]) == (200, "5", 2)
        assert (await application.call("GET", "/products/abc-123")).json == changed.json
        deleted = await application.call("DELETE", "/products/abc-123")
        assert (deleted.status, deleted.body) == (204, b"")
        again = await application.call("DELETE", "/products/abc-123")
        gone = await application.call("GET", "/products/abc-123")
        assert again.status == gone.status == 404
        assert again.json == gone.json == {"detail": "there is no product 'abc-123'"}

    async def test_every_read_says_what_the_cache_did(self, application: Application) -> None:
        async def said(target: str) -> str:
            return (await application.call("GET", target)).headers["cache-status"]

        assert await said("/products/a") == "cacheinval; fwd=miss; stored"
        assert await said("/products/a") == "cacheinval; hit"
        await application.call("PUT", "/products/a", {"name": "n", "price": 1})
        assert await said("/products/a") == "cacheinval; fwd=miss; stored"
        application.cache.bypassing = True
        assert await said("/products/a") == "cacheinval; fwd=bypass"
        assert application.cache.tags["product:a"] == ("products",)

    async def test_head_is_get_without_its_body(self, application: Application) -> None:
        await application.call("PUT", "/products/a", {"name": "n", "price": 1})
        head = await application.call("HEAD", "/products/a")
        assert head.status == 200
        assert head.headers["cache-status"].startswith("cacheinval; ")

    @pytest.mark.parametrize("method", ["POST", "PATCH", "OPTIONS", "TRACE"])
    async def test_other_methods_are_refused(self, application: Application, method: str) -> None:
        answer = await application.call(method, "/products/a")
        assert answer.status == 405
        assert answer.headers["allow"] == "DELETE, GET, HEAD, PUT"
        assert "detail" in answer.json

    async def test_other_paths_are_unknown(self, application: Application) -> None:
        for target in ("/", "/products", "/product/a", "/%70roducts/a", "/healthz/"):
            answer = await application.call("GET", target)
            assert (answer.status, "detail" in answer.json) == (404, True), target

    async def test_monitoring_is_served_beside(self, application: Application) -> None:
        answer = await application.call("GET", "/healthz")
        assert (answer.status, answer.json) == (200, {"status": "alive"})
        assert (await application.call("POST", "/healthz")).headers["allow"] == "GET, HEAD"

    async def test_the_description_names_what_a_client_needs(self, application: Application) -> None:
        description = (await application.call("GET", "/openapi.json")).json
        operations = description["paths"]["/products/{id}"]
        assert set(operations) == {"get", "put", "delete"}
        assert operations["get"]["parameters"][0]["name"] == "id"
        assert operations["put"]["requestBody"]["required"]


class TestIds:
    @pytest.mark.parametrize(
        "product_id",
        IDS,
    )
    async def test_any_unicode_is_an_id(self, application: Application, product_id: str) -> None:
        target = "/products/" + quote(product_id, safe="")
        made = await application.call("PUT", target, {"id": product_id, "name": "n", "price": 1})
        assert (made.status, made.json["id"]) == (201, product_id)
        assert list(application.repository._products) == [product_id]
        assert (await application.call("GET", target)).json == made.json
        assert (await application.call("DELETE", target)).status == 204

    async def test_what_need_not_be_encoded_may_be_left_as_it_is(self, application: Application) -> None:
        await application.call("PUT", "/products/a/../b//", {"name": "n", "price": 1})
        assert (await application.call("GET", "/products/a%2F..%2Fb%2f%2F")).json["id"] == "a/../b//"

    @pytest.mark.parametrize(
        "encoded",
        NO_IDS,
    )
    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
    async def test_what_is_no_id_is_refused(
        self, application: Application, method: str, encoded: str
    ) -> None:
        answer = await application.call(method, "/products/" + encoded, {"name": "n", "price": 1})
        assert answer.fields == [["path", "id"]]
        assert not application.repository._products


class TestBodies:
    @pytest.mark.parametrize(
        ("number", "price"),
        [
            ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
            ("19.990", "19.990"),
            ("109.99", "109.99"),
            ("1e400", "1" + "0" * 400),
            ("12345678901234567890123", "12345678901234567890123"),
            ("1" + "0" * 5_000, "1" + "0" * 5_000),  # Python's own limit for int is 4300
            ("1E-7", "0.0000001"),
            ("-0.0", "0.0"),
        ],
    )
    async def test_a_number_is_never_rounded(self, application: Application, number: str, price: str) -> None:
        for written in (number, f'"{number}"'):
            raw = b'{"name": "n", "price": %s}' % written.encode()
            answer = await application.call("PUT", "/products/a", raw=raw)
            assert answer.json["price"] == price
        assert (await application.call("GET", "/products/a")).json["price"] == price

    @pytest.mark.parametrize(
        ("raw", "fields"),
        [
            (b"", [["body"]]),
            (b"{", [["body"]]),
            (b"\xff", [["body"]]),
            (b"\xef\xbb\xbf{}", [["body"]]),
            ('{"name": "n", "price": 1}'.encode("utf-16"), [["body"]]),
            (b"[" * 60_000, [["body"]]),
            (b"[]", [["body"]]),
            (b"null", [["body"]]),
            (b"1", [["body"]]),
            (b"{}", [["body", "name"], ["body", "price"]]),
            (b'{"price": 1}', [["body", "name"]]),
            (b'{"name": "n"}', [["body", "price"]]),
            (b'{"name": "", "price": 1}', [["body", "name"]]),
            (b'{"name": 5, "price": 1}', [["body", "name"]]),
            (b'{"name": null, "price": 1}', [["body", "name"]]),
            (b'{"name": "\\u0000", "price": 1}', [["body", "name"]]),
            (b'{"name": "\\ud800", "price": 1}', [["body", "name"]]),
            (b'{"name": "n", "price": null}', [["body", "price"]]),
            (b'{"name": "n", "price": true}', [["body", "price"]]),
            (b'{"name": "n", "price": []}', [["body", "price"]]),
            (b'{"name": "n", "price": "x"}', [["body", "price"]]),
            (b'{"name": "n", "price": NaN}', [["body", "price"]]),
            (b'{"name": "n", "price": -Infinity}', [["body", "price"]]),
            (b'{"name": "n", "price": "NaN"}', [["body", "price"]]),
            (b'{"name": "n", "price": "Infinity"}', [["body", "price"]]),
            (b'{"name": "n", "price": -1}', [["body", "price"]]),
            (b'{"name": "n", "price": 1e131072}', [["body", "price"]]),
            (b'{"name": "n", "price": 1e-16384}', [["body", "price"]]),
            (b'{"name": "n", "price": 1e99999999999999999999}', [["body", "price"]]),
            (b'{"name": "n", "price": 1, "id": "b"}', [["body", "id"]]),
            (b'{"name": "n", "price": 1, "id": 5}', [["body", "id"]]),
            (b'{"name": "n", "price": 1, "id": "\\ud800"}', [["body", "id"]]),
        ],
    )
    async def test_what_is_invalid_is_refused_by_name(
        self, application: Application, raw: bytes, fields: list[list[str]]
    ) -> None:
        answer = await application.call("PUT", "/products/a", raw=raw)
        assert answer.fields == fields
        assert not application.repository._products

    async def test_what_nobody_asked_for_is_ignored(self, application: Application) -> None:
        raw = b'{"name": "n", "price": 1, "version": 1e999, "more": "\\ud800", "\\ud800": [NaN]}'
        assert (await application.call("PUT", "/products/a", raw=raw)).json["version"] == 1

    async def test_a_body_has_a_limit(self, application: Application) -> None:
        raw = b'{"name": "%s", "price": 1}' % (b"n" * MAX_BODY)
        answer = await application.call("PUT", "/products/a", raw=raw)
        assert answer.status == 413
        assert str(MAX_BODY) in answer.json["detail"]


class TestOutages:
    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
    async def test_a_database_that_is_down_is_503_without_particulars(
        self,
        application: Application,
        method: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def down(*args: object, **kwargs: object) -> Any:
            raise DatabaseError("connection to 10.0.0.7 refused")

        caplog.set_level(logging.WARNING, "cacheinval.products")
        for name in ("get", "put", "delete"):
            monkeypatch.setattr(application.repository, name, down)
        for _ in range(3):
            answer = await application.call(method, "/products/a", {"name": "n", "price": 1})
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert answer.json == {"detail": "the database cannot be used now: try again"}
            assert answer.headers.get("cache-status") == ("cacheinval; fwd=miss" if method == "GET" else None)
        assert [record.message for record in caplog.records] == [
            f'answering 503 method={method} reason="connection to 10.0.0.7 refused"'
        ]

    async def test_without_a_database_the_broker_is_to_blame(
        self, application: Application, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def unconfirmed(*keys: str) -> None:
            raise PublishError

        monkeypatch.setattr(application.cache, "invalidate", unconfirmed)
        answer = await application.call("PUT", "/products/a", {"name": "n", "price": 1})
        assert answer.json == {"detail": "the broker cannot be used now: try again"}
