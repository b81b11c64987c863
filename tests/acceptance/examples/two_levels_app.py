"""Prices with FastAPI, in each process and in a Redis that all share: `uvicorn two_levels_app:app`, with

CACHEINVAL_CACHE_URL=redis://…, CACHEINVAL_CACHE_LOCAL_ENTRIES=10000, and a CACHEINVAL_INSTANCE_ID for each process.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI, HTTPException, Request, Response

from cacheinval import Client


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Client]]:
    async with Client() as client:  # configured by CACHEINVAL_… variables
        yield {"client": client}


app = FastAPI(lifespan=lifespan)


@dataclass(
    frozen=True
)  # as it is shared within a process; Redis keeps it as JSON, and `model=` makes it again
class Price:
    price: int


@app.get("/prices/{product_id}")
async def get_price(product_id: str, request: Request, response: Response) -> int:
    client: Client = request.state.client

    async def load() -> Price | None:
        row = await client.pool.fetchrow("SELECT price FROM prices WHERE id = $1", product_id)
        return row and Price(row["price"])

    read = await client.cache.read(f"price:{product_id}", load, model=Price | None, stale_if_error=600)
    response.headers["x-cache"] = read.detail or read.outcome
    if read.value is None:
        raise HTTPException(404)
    return read.value.price


@app.put("/prices/{product_id}")
async def put_price(product_id: str, price: int, request: Request) -> None:
    change = "UPDATE prices SET price = $2 WHERE id = $1"
    await request.state.client.execute(change, product_id, price, invalidate=[f"price:{product_id}"])
