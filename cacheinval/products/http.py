"""Products over HTTP (PROTOCOL.md, "HTTP"); needs the extra `cacheinval[http]`."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Iterable
from decimal import Decimal
from typing import Annotated, Any, Protocol
from urllib.parse import unquote_to_bytes

from fastapi import Depends, FastAPI, HTTPException, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from cacheinval import logs
from cacheinval.cache import Read
from cacheinval.errors import CacheinvalError, DatabaseError
from cacheinval.products.model import Product, check_product_id, check_text, exact_decimal, exact_price

__all__ = ["cache_status", "create_app"]

log = logging.getLogger("cacheinval.products")

MAX_BODY = 65_536
BODY_TIMEOUT = 10.0
RETRY_AFTER = 1
LOG_EVERY = 10.0  # seconds between lines that say the same of many requests

_PREFIX = "/products/"
_LONE_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class Cache(Protocol):
    """Reads products: a `ProductCache`."""

    async def read(self, product_id: str) -> Read: ...


class Service(Protocol):
    """Changes products: a `ProductService`."""

    async def put(self, product_id: str, name: str, price: Decimal) -> tuple[Product, bool]: ...
    async def delete(self, product_id: str) -> bool: ...


class ProductBody(BaseModel):
    """What a PUT says of a product."""

    model_config = ConfigDict(strict=True)

    id: str | None = None
    name: Annotated[str, Field(min_length=1), AfterValidator(check_text)]
    price: Annotated[Decimal, BeforeValidator(exact_price)]


def create_app(cache: Cache, service: Service, monitoring: ASGIApp, monitored: Iterable[str] = ()) -> FastAPI:
    """The HTTP application: products, and at the paths `monitored` the application `monitoring`."""
    app = FastAPI(title="cacheinval products", redirect_slashes=False, docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(CacheinvalError, _Unavailable())
    app.add_exception_handler(405, _not_allowed)
    for path in monitored:
        app.add_route(path, monitoring, include_in_schema=False)  # type: ignore[arg-type]  # any ASGI application will do

    product = f"{_PREFIX}{{id:anything}}"

    @app.head(product, include_in_schema=False)
    @app.get(product, summary="Read a product")
    async def get_product(product_id: ProductId) -> Response:
        read = await cache.read(product_id)
        headers = {"Cache-Status": cache_status(read)}
        if read.value is None:
            raise HTTPException(404, _unknown(product_id), headers)
        return JSONResponse(_as_json(read.value), headers=headers)

    @app.put(product, summary="Make or change a product", openapi_extra=_BODY_IN_SCHEMA)
    async def put_product(product_id: ProductId, request: Request) -> Response:
        body = _understand(await _read_body(request))
        if body.id is not None and body.id != product_id:
            raise _invalid_field("body", "id", "must be the id in the path, or be left out")
        changed, created = await service.put(product_id, body.name, body.price)
        return JSONResponse(_as_json(changed), 201 if created else 200)

    @app.delete(product, status_code=204, summary="Delete a product")
    async def delete_product(product_id: ProductId) -> Response:
        if not await service.delete(product_id):
            raise HTTPException(404, _unknown(product_id))
        return Response(status_code=204)

    return app


def cache_status(read: Read) -> str:
    """How a read was answered, as RFC 9211 writes it."""
    if read.outcome == "hit":
        return f"cacheinval; hit{f'; detail={read.detail}' if read.detail else ''}"
    return f"cacheinval; fwd={read.outcome}{'; stored' if read.stored else ''}"


def _as_json(product: Product) -> dict[str, Any]:
    return {
        "id": product.id,
        "name": product.name,
        "price": f"{product.price:f}",
        "version": product.version,
    }


class _Anything(Convertor[str]):
    """The rest of the path, whatever it holds: Starlette's own `path` ends at a line feed."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", _Anything())


def _product_id(
    request: Request, _: Annotated[str, Path(alias="id", description="1 to 200 characters, percent-encoded")]
) -> str:
    # The decoded path of ASGI has lost what was wrong with the encoding: read it as it was sent.
    _, prefix, encoded = request.scope["raw_path"].partition(_PREFIX.encode())
    if not prefix:
        raise HTTPException(404)
    if _LONE_PERCENT.search(encoded):
        raise _invalid_field("path", "id", "must be percent-encoded: % before two hexadecimal digits")
    try:
        return check_product_id(unquote_to_bytes(encoded).decode())
    except UnicodeDecodeError:
        raise _invalid_field("path", "id", "must be percent-encoded UTF-8") from None
    except ValueError as error:
        raise _invalid_field("path", "id", str(error)) from None


ProductId = Annotated[str, Depends(_product_id)]


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise HTTPException(413, f"the body must have at most {MAX_BODY} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_TIMEOUT:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body is incomplete") from None
    return bytes(body)


def _understand(body: bytes) -> ProductBody:
    try:
        # Numbers as decimals, digit for digit: a float would round them.
        said = json.loads(
            body.decode(), parse_float=exact_decimal, parse_int=exact_decimal, parse_constant=Decimal
        )
    except (ValueError, RecursionError):
        raise _invalid_field("body", None, "must be JSON in UTF-8") from None
    try:
        return ProductBody.model_validate(said)
    except ValidationError as error:
        raise RequestValidationError(
            [
                {
                    **problem,
                    "loc": ("body", *problem["loc"]),
                    "msg": problem["msg"].removeprefix("Value error, "),
                }
                for problem in error.errors()
            ]
        ) from None


def _invalid_field(where: str, field: str | None, message: str) -> RequestValidationError:
    location = (where,) if field is None else (where, field)
    return RequestValidationError([{"loc": location, "msg": message, "type": "value_error"}])


async def _invalid(request: Request, error: Exception) -> Response:
    """422 with the fields named, and without what was in them: that may be no JSON."""
    assert isinstance(error, RequestValidationError)
    problems = [
        {"loc": list(problem["loc"]), "msg": problem["msg"], "type": problem["type"]}
        for problem in error.errors()
    ]
    reading = request.method in ("GET", "HEAD")
    return JSONResponse(
        {"detail": problems}, 422, {"Cache-Status": "cacheinval; fwd=bypass"} if reading else None
    )


_BODY_IN_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["name", "price"],
                    "properties": {
                        "name": {"type": "string", "minLength": 1},
                        "price": {"anyOf": [{"type": "string"}, {"type": "number"}], "examples": ["19.99"]},
                        "id": {"type": "string"},
                    },
                }
            }
        },
    }
}


class _Unavailable:
    """503: the database, or what else a read or a change needs, is not there now."""

    def __init__(self) -> None:
        self._told_at = -LOG_EVERY

    async def __call__(self, request: Request, error: Exception) -> Response:
        now = time.monotonic()
        if now - self._told_at >= LOG_EVERY:
            self._told_at = now
            logs.event(log, logging.WARNING, "answering 503", method=request.method, reason=error)
        headers = {"Retry-After": str(RETRY_AFTER)}
        if request.method in ("GET", "HEAD"):
            headers["Cache-Status"] = "cacheinval; fwd=miss"
        what = "database" if isinstance(error, DatabaseError) else "broker"
        return JSONResponse({"detail": f"the {what} cannot be used now: try again"}, 503, headers)


async def _not_allowed(request: Request, error: Exception) -> Response:
    """405: each method of a product has a route of its own, and none knows the others."""
    assert isinstance(error, StarletteHTTPException)
    of_product = request.url.path.startswith(_PREFIX)
    headers = {"Allow": "DELETE, GET, HEAD, PUT"} if of_product else error.headers
    return JSONResponse({"detail": error.detail}, 405, headers)


def _unknown(product_id: str) -> str:
    return f"there is no product {product_id!r}"
