"""Sets a price with SQLAlchemy's Core, and records it by hand: `python sqlalchemy_function.py abc-123 109`."""

import asyncio
import os
import sys

from sqlalchemy import column, func, select, table, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

engine = create_async_engine(os.environ["CACHEINVAL_DATABASE_URL"].replace("://", "+asyncpg://"))
prices = table("prices", column("id"), column("price"))


async def main(product_id: str, price: int) -> None:
    async with AsyncSession(engine) as session, session.begin():  # both or neither
        await session.execute(update(prices).where(prices.c.id == product_id).values(price=price))
        keys, namespace = [f"price:{product_id}"], os.environ["CACHEINVAL_NAMESPACE"]
        await session.execute(select(func.cacheinval.invalidate(keys, None, [], namespace)))
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
