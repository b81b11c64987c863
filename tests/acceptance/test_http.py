"""The HTTP interface of `cacheinval serve`, byte for byte, over a socket and into a real Postgres."""

import asyncio
import json
from collections.abc import AsyncIterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from running import Process, Started

IDS = [
    *(
        "a/b",
        "/",
        "//",
        "/a",
        "a/",
        ".",
        "..",
        "../..",
        "/products/",
        "a?b=c",
        "a#b",
        "%",
        "%2F",
        "a+b",
        "a b",
    ),
    *(
        "ü",
        "産品",
        "🦊",
        "e\u0301",
        "\u202e",
        "\ufeff",
        "\U0010ffff",
        "\n",
        "a\n",
        "a\nb",
        "\r\n",
        "\t",
        "\x7f",
        "'",
        '"',
    ),
    *("x" * 200, "é" * 200, "🦊" * 200),
]
NO_IDS = [
    *("", "%00", "a%00b", "x" * 201, quote("🦊" * 201), "%", "%2", "%zz"),
    *("%FF", "%C3", "%E2%82", "%C0%AF", "%ED%A0%80", "%ED%B0%80", "%F5%80%80%80"),
]


class Answer:
    """What the server answered."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Service:
    """A product service, asked with exactly these bytes: a client library would tidy up the path."""

    def __init__(self, process: Process) -> None:
        self.process = process

    async def ask(self, method: str, target: str, body: Any = None, **headers: str) -> Answer:
        """`target` is percent-encoded already; `body` is bytes, or made JSON."""
        return await asyncio.to_thread(self._ask, method, target, body, headers)

    def _ask(self, method: str, target: str, body: Any, headers: dict[str, str]) -> Answer:
        address = urlsplit(self.process.url)
        connection = HTTPConnection(str(address.hostname), address.port or 0, timeout=15)
        try:
            content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, target, content, headers)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()


@pytest.fixture
async def service(started: Started, database_url: str, namespace: str) -> AsyncIterator[Service]:
    process = await started.start_http(
        "serve", broker_url="memory://", database_url=database_url, namespace=namespace, http_port=0
    )
    await started.until(process, "ready")
    yield Service(process)
    assert "Traceback" not in process.said
    assert not [line for line in process.log if line["level"] in ("WARNING", "ERROR")]


async def test_a_product_is_made_read_changed_and_deleted(service: Service) -> None:
    async def read() -> tuple[int, str, Any]:
        answer = await service.ask("GET", "/products/abc-123")
        return answer.status, answer.headers["cache-status"], answer.json

    unknown = {"detail": "there is no product 'abc-123'"}
    assert await read() == (404, "cacheinval; fwd=miss; stored", unknown)
    assert await read() == (404, "cacheinval; hit", unknown)

    made = await service.ask("PUT", "/products/abc-123", {"name": "Kettle", "price": "19.990"})
    product = {"id": "abc-123", "name": "Kettle", "price": "19.990", "version": 1}
    assert (made.status, made.json) == (201, product)
    assert made.headers["content-type"] == "application/json"
    assert await read() == (200, "cacheinval; fwd=miss; stored", product)
    assert await read() == (200, "cacheinval; hit", product)
    head = await service.ask("HEAD", "/products/abc-123")
    assert (head.status, head.body, head.headers["cache-status"]) == (200, b"", "cacheinval; hit")

    changed = await service.ask(
        "PUT", "/products/abc-123", {"id": "abc-123", "name": "K", "price": 5, "version": 99}
    )
    product = {"id": "abc-123", "name": "K", "price": "5", "version": 2}
    assert (changed.status, changed.json) == (200, product)
    assert await read() == (200, "cacheinval; fwd=miss; stored", product)

    deleted = await service.ask("DELETE", "/products/abc-123")
    assert (deleted.status, deleted.body) == (204, b"")
    assert await read() == (404, "cacheinval; fwd=miss; stored", unknown)
    again = await service.ask("DELETE", "/products/abc-123")
    assert (again.status, again.json) == (404, unknown)
    remade = await service.ask("PUT", "/products/abc-123", {"name": "K", "price": 5})
    assert (remade.status, remade.json["version"]) == (201, 3)


async def test_any_unicode_is_an_id(service: Service) -> None:
    for number, product_id in enumerate(IDS):
        target = "/products/" + quote(product_id, safe="")
        made = await service.ask("PUT", target, {"id": product_id, "name": product_id, "price": number})
        assert (made.status, made.json["id"], made.json["name"]) == (201, product_id, product_id), product_id
    for number, product_id in enumerate(IDS):  # each is its own, in the cache as well
        target = "/products/" + quote(product_id, safe="")
        for status in ("cacheinval; fwd=miss; stored", "cacheinval; hit"):
            got = await service.ask("GET", target)
            assert (got.status, got.json["id"], got.json["price"]) == (200, product_id, str(number))
            assert got.headers["cache-status"] == status
    for product_id in IDS:
        target = "/products/" + quote(product_id, safe="")
        assert (await service.ask("DELETE", target)).status == 204
        assert (await service.ask("GET", target)).status == 404


async def test_a_path_is_taken_as_it_was_sent(service: Service) -> None:
    await service.ask("PUT", "/products/a/../b//", {"name": "n", "price": 1})
    assert (await service.ask("GET", "/products/a%2F%2E%2E%2Fb%2f%2F?c=d")).json["id"] == "a/../b//"


async def test_what_is_no_id_is_refused(service: Service) -> None:
    for encoded in NO_IDS:
        for method, body in (("GET", None), ("PUT", {"name": "n", "price": 1}), ("DELETE", None)):
            answer = await service.ask(method, "/products/" + encoded, body)
            assert answer.status == 422, encoded
            assert [problem["loc"] for problem in answer.json["detail"]] == [["path", "id"]]


@pytest.mark.parametrize("as_string", [True, False])
async def test_a_price_is_never_rounded(service: Service, as_string: bool) -> None:
    prices = {
        "0.1000000000000000055511151231257827": "0.1000000000000000055511151231257827",
        "19.990": "19.990",
        "109.99": "109.99",
        "1e400": "1" + "0" * 400,
        "1E-7": "0.0000001",
        "12345678901234567890123.00": "12345678901234567890123.00",
        "9" * 60_000: "9" * 60_000,
        "1e131071": "1" + "0" * 131_071,
        "1e-16383": "0." + "0" * 16_382 + "1",
        "-0.00": "0.00",
        "0e99": "0",
    }
    for written, price in prices.items():
        body = '{"name": "n", "price": %s}' % (f'"{written}"' if as_string else written)
        put = await service.ask("PUT", "/products/a", body.encode())
        got = await service.ask("GET", "/products/a")
        assert put.json["price"] == got.json["price"] == price


async def test_what_is_invalid_is_refused_by_name(service: Service) -> None:
    bodies: dict[bytes, list[str]] = {
        b"": ["body"],
        b"{": ["body"],
        b"\xff\xfe": ["body"],
        b"[" * 60_000: ["body"],
        b"[]": ["body"],
        b'{"price": 1}': ["body", "name"],
        b'{"name": 5, "price": 1}': ["body", "name"],
        b'{"name": "", "price": 1}': ["body", "name"],
        b'{"name": "\\u0000", "price": 1}': ["body", "name"],
        b'{"name": "\\ud800", "price": 1}': ["body", "name"],
        b'{"name": "n"}': ["body", "price"],
        b'{"name": "n", "price": "one"}': ["body", "price"],
        b'{"name": "n", "price": true}': ["body", "price"],
        b'{"name": "n", "price": NaN}': ["body", "price"],
        b'{"name": "n", "price": "Infinity"}': ["body", "price"],
        b'{"name": "n", "price": -0.01}': ["body", "price"],
        b'{"name": "n", "price": 1e131072}': ["body", "price"],
        b'{"name": "n", "price": 1e-16384}': ["body", "price"],
        b'{"name": "n", "price": 1, "id": "b"}': ["body", "id"],
    }
    for body, field in bodies.items():
        answer = await service.ask("PUT", "/products/a", body)
        assert answer.status == 422, body[:60]
        assert [problem["loc"] for problem in answer.json["detail"]] == [field], body[:60]
    assert (await service.ask("PUT", "/products/a", b" " * 65_537)).status == 413
    assert (await service.ask("GET", "/products/a")).status == 404


async def test_methods_and_paths_that_are_not_there(service: Service) -> None:
    for method in ("POST", "PATCH", "OPTIONS"):
        answer = await service.ask(method, "/products/a")
        assert (answer.status, answer.headers["allow"]) == (405, "DELETE, GET, HEAD, PUT")
        assert "detail" in answer.json
    for path in ("/nothing", "/products", "/healthz/"):
        answer = await service.ask("GET", path)
        assert (answer.status, "detail" in answer.json) == (404, True)


async def test_concurrent_changes_of_a_new_product_make_it_once(service: Service) -> None:
    answers = await asyncio.gather(
        *(service.ask("PUT", "/products/a", {"name": "n", "price": number}) for number in range(12))
    )
    assert sorted(answer.status for answer in answers) == [200] * 11 + [201]
    assert sorted(answer.json["version"] for answer in answers) == list(range(1, 13))
    newest = max(answers, key=lambda answer: int(answer.json["version"]))
    assert newest.json == (await service.ask("GET", "/products/a")).json


async def test_monitoring(service: Service) -> None:
    await service.ask("PUT", "/products/a", {"name": "n", "price": 1})
    await service.ask("GET", "/products/a")
    await service.ask("GET", "/products/a")
    assert (await service.ask("GET", "/healthz")).json == {"status": "alive"}
    assert (await service.ask("GET", "/readyz")).json == {"status": "ready", "reason": None}
    status = (await service.ask("GET", "/status")).json
    assert (status["state"], status["ready"]) == ("ready", True)
    metrics = (await service.ask("GET", "/metrics")).body.decode().splitlines()
    assert "cacheinval_cache_hits_total 1.0" in metrics
    assert "cacheinval_cache_misses_total 1.0" in metrics
    assert (await service.ask("POST", "/metrics")).status == 405
    assert set((await service.ask("GET", "/openapi.json")).json["paths"]) == {"/products/{id}"}
