"""Prices over HTTP with aiohttp: `python -m aiohttp.web aiohttp_app:make_app`."""

from collections.abc import AsyncIterator

from aiohttp import web

from cacheinval import Client

CLIENT = web.AppKey("client", Client)


async def with_client(app: web.Application) -> AsyncIterator[None]:
    async with Client() as app[CLIENT]:  # configured by CACHEINVAL_… variables
        yield


async def get_price(request: web.Request) -> web.Response:
    client, product_id = request.app[CLIENT], request.match_info["product_id"]

    async def load() -> int | None:
        return await client.pool.fetchval("SELECT price FROM prices WHERE id = $1", product_id)

    price = await client.cache.get_or_set(f"price:{product_id}", load, ttl=300)
    if price is None:
        raise web.HTTPNotFound
    return web.json_response(price)


async def put_price(request: web.Request) -> web.Response:
    product_id, price = request.match_info["product_id"], int(request.query["price"])
    change = "UPDATE prices SET price = $2 WHERE id = $1"
    await request.app[CLIENT].execute(change, product_id, price, invalidate=[f"price:{product_id}"])
    return web.Response()


def make_app(arguments: list[str]) -> web.Application:
    app = web.Application()
    app.cleanup_ctx.append(with_client)
    app.add_routes([web.get("/prices/{product_id}", get_price), web.put("/prices/{product_id}", put_price)])
    return app
