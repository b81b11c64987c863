"""Prices over HTTP with Litestar: `uvicorn litestar_app:app`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from litestar import Litestar, get, put
from litestar.datastructures import State
from litestar.di import Provide
from litestar.exceptions import NotFoundException

from cacheinval import Client


@asynccontextmanager
async def with_client(app: Litestar) -> AsyncIterator[None]:
    async with Client() as app.state.client:  # configured by CACHEINVAL_… variables
        yield


async def of_app(state: State) -> Client:
    return state.client


@get("/prices/{product_id:str}")
async def get_price(product_id: str, client: Client) -> int:
    async def load() -> int | None:
        return await client.pool.fetchval("SELECT price FROM prices WHERE id = $1", product_id)

    price = await client.cache.get_or_set(f"price:{product_id}", load, ttl=300)
    if price is None:
        raise NotFoundException
    return price


@put("/prices/{product_id:str}")
async def put_price(product_id: str, price: int, client: Client) -> None:
    change = "UPDATE prices SET price = $2 WHERE id = $1"
    await client.execute(change, product_id, price, invalidate=[f"price:{product_id}"])


app = Litestar([get_price, put_price], lifespan=[with_client], dependencies={"client": Provide(of_app)})
