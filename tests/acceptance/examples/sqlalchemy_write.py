"""Sets a price with SQLAlchemy: `python sqlalchemy_write.py abc-123 109`."""

import asyncio
import os
import sys

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cacheinval.sqlalchemy import record_changes


class Base(DeclarativeBase): ...


class Price(Base):
    __tablename__ = "prices"
    id: Mapped[str] = mapped_column(primary_key=True)
    price: Mapped[int]


engine = create_async_engine(os.environ["CACHEINVAL_DATABASE_URL"].replace("://", "+asyncpg://"))
sessions = async_sessionmaker(engine)
record_changes(sessions, {Price: "price:{id}"}, namespace=os.environ["CACHEINVAL_NAMESPACE"])


async def main(product_id: str, price: int) -> None:
    async with sessions.begin() as session:
        (await session.get_one(Price, product_id)).price = price
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
