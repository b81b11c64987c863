"""Prices over HTTP with FastAPI: `uvicorn fastapi_app:app`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request

from cacheinval import Client


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Client]]:
    async with Client() as client:  # configured by CACHEINVAL_… variables
        yield {"client": client}


def of_request(request: Request) -> Client:
    return request.state.client


app = FastAPI(lifespan=lifespan)
Cached = Annotated[Client, Depends(of_request)]


@app.get("/prices/{product_id}")
async def get_price(product_id: str, client: Cached) -> int:
    async def load() -> int | None:
        return await client.pool.fetchval("SELECT price FROM prices WHERE id = $1", product_id)

    price = await client.cache.get_or_set(f"price:{product_id}", load, ttl=300)
    if price is None:
        raise HTTPException(404)
    return price


@app.put("/prices/{product_id}")
async def put_price(product_id: str, price: int, client: Cached) -> None:
    change = "UPDATE prices SET price = $2 WHERE id = $1"
    await client.execute(change, product_id, price, invalidate=[f"price:{product_id}"])
