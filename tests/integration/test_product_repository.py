"""Products in a real Postgres: versions that only grow, whoever writes, and whatever else happens at the same time."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from typing import Any

import asyncpg
import pytest

from cacheinval.errors import DatabaseError
from cacheinval.products import Product, ProductRepository, repository
from cacheinval.products.repository import apply_schema
from cacheinval.sandbox import Postgres


class Database:
    """What the repository needs of a client, and no outbox."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    async def fetchrow(
        self, query: str, *args: Any, invalidate: Sequence[str] = (), timeout: float | None = None
    ) -> Any:
        return await self.pool.fetchrow(query, *args, timeout=timeout)


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Any]:
    async with asyncpg.create_pool(database_url, min_size=0, max_size=12) as pool:
        async with pool.acquire() as connection:
            await apply_schema(connection)
        yield pool


@pytest.fixture
def products(pool: Any) -> ProductRepository:
    return ProductRepository(Database(pool))


ONE = Decimal(1)


class TestSchema:
    async def test_any_number_may_make_it_at_once(self, database_url: str) -> None:
        async def make() -> None:
            connection = await asyncpg.connect(database_url)
            try:
                await apply_schema(connection)
            finally:
                await connection.close()

        await asyncio.gather(*(make() for _ in range(10)))
        await make()

    async def test_the_table_has_its_four_columns(self, pool: Any) -> None:
        columns = await pool.fetch(
            "SELECT column_name, data_type, is_nullable FROM information_schema.columns"
            " WHERE table_name = 'products' ORDER BY ordinal_position"
        )
        assert [tuple(column) for column in columns] == [
            ("id", "text", "NO"),
            ("name", "text", "NO"),
            ("price", "numeric", "NO"),
            ("version", "bigint", "NO"),
        ]

    async def test_a_table_that_was_there_before_is_taken_over(self, database_url: str) -> None:
        async with asyncpg.create_pool(database_url, min_size=0) as pool:
            await pool.execute(
                "CREATE TABLE products"
                " (id text PRIMARY KEY, name text NOT NULL, price numeric NOT NULL, version bigint NOT NULL);"
                "INSERT INTO products VALUES ('old', 'n', 1.50, 7)"
            )
            async with pool.acquire() as connection:
                await apply_schema(connection)
            products = ProductRepository(Database(pool))
            assert await products.get("old") == Product("old", "n", Decimal("1.50"), 7)
            changed, created = await products.put("old", "n", ONE)
            assert (changed.version, created) == (8, False)

    async def test_a_role_without_a_right_is_told_what_to_grant(self, database_url: str) -> None:
        connection = await asyncpg.connect(database_url)
        role = f"nobody_{database_url.rpartition('/')[2]}"
        try:
            await connection.execute(f"CREATE ROLE {role}; REVOKE CREATE ON SCHEMA public FROM PUBLIC")
            await connection.execute(f"SET ROLE {role}")
            with pytest.raises(DatabaseError, match="may not make the table products") as refused:
                await apply_schema(connection)
            *_, make = str(refused.value).rpartition("or run: ")
            assert make == f"GRANT CREATE ON SCHEMA public TO {role}"
            await connection.execute("RESET ROLE")
            await apply_schema(connection)
            await connection.execute(f"SET ROLE {role}")
            with pytest.raises(DatabaseError, match="may not use the table products") as refused:
                await apply_schema(connection)
            with pytest.raises(DatabaseError, match="permission denied for table products"):
                await ProductRepository(Database(connection)).put("a", "n", ONE)
            *_, use = str(refused.value).rpartition("Let its owner run: ")
            await connection.execute(f"RESET ROLE; {use}; SET ROLE {role}")
            await apply_schema(connection)
            await connection.execute("INSERT INTO products VALUES ('a', 'n', 1, 1); DELETE FROM products")
            await connection.execute(
                "RESET ROLE; DROP TABLE products, product_tombstones;"
                f"DROP FUNCTION product_version_next, product_version_kept; {make}; SET ROLE {role}"
            )
            await apply_schema(connection)
        finally:
            await connection.execute(f"RESET ROLE; DROP OWNED BY {role} CASCADE; DROP ROLE {role}")
            await connection.close()


class TestProducts:
    @pytest.mark.parametrize(
        "price",
        ["19.990", "0.1000000000000000055511151231257827", "0", "0.00", "1" + "0" * 400, "9" * 131_072],
    )
    async def test_a_price_comes_back_digit_for_digit(self, products: ProductRepository, price: str) -> None:
        put, _ = await products.put("a", "n", Decimal(price))
        got = await products.get("a")
        assert got == put
        assert f"{put.price:f}" == f"{got.price:f}" == price

    async def test_any_id_and_name(self, products: ProductRepository) -> None:
        for text in ("🦊" * 200, "a/b", "..", "\n", "'; DROP TABLE products", "\U0010ffff"):
            put, created = await products.put(text, text, ONE)
            assert (put, created) == (Product(text, text, ONE, 1), True)
            assert await products.get(text) == put

    async def test_what_is_not_there(self, products: ProductRepository) -> None:
        assert await products.get("a") is None
        assert await products.delete("a") is False


class TestVersions:
    async def test_each_change_is_one_more_over_a_deletion_too(self, products: ProductRepository) -> None:
        seen = [await products.put("a", "n", ONE), await products.put("a", "n", ONE)]
        assert await products.delete("a")
        seen += [await products.put("a", "n", ONE), await products.put("a", "n", ONE)]
        assert [(product.version, created) for product, created in seen] == [
            (1, True),
            (2, False),
            (3, True),
            (4, False),
        ]

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE products SET price = 2",
            "UPDATE products SET price = 2, version = version + 1",
            "UPDATE products SET price = 2, version = 0",
            "DELETE FROM products; INSERT INTO products VALUES ('a', 'n', 1, 0)",
            "TRUNCATE products; INSERT INTO products VALUES ('a', 'n', 1, 1)",
            "UPDATE products SET id = 'b'; INSERT INTO products VALUES ('a', 'n', 1, 1)",
            "INSERT INTO products VALUES ('b', 'n', 1, 1); UPDATE products SET id = 'c' WHERE id = 'a';"
            "UPDATE products SET id = 'a' WHERE id = 'b'",
        ],
    )
    async def test_whoever_else_writes(self, products: ProductRepository, pool: Any, statement: str) -> None:
        await products.put("a", "n", ONE)
        await products.put("a", "n", ONE)
        await pool.execute(statement)
        assert await pool.fetchval("SELECT version FROM products WHERE id = 'a'") == 3
        assert (await products.put("a", "n", ONE))[0].version == 4

    async def test_a_version_of_ones_own_may_be_ahead(self, products: ProductRepository, pool: Any) -> None:
        await pool.execute("INSERT INTO products VALUES ('a', 'n', 1, 41)")
        assert (await products.put("a", "n", ONE))[0].version == 42

    async def test_thousands_may_be_inserted_at_once(self, pool: Any) -> None:
        # A lock of its own for each of them would exhaust the server's lock table.
        tag = await pool.execute(
            "INSERT INTO products SELECT 'p' || n, 'n', 1, 1 FROM generate_series(1, 20000) AS n"
        )
        assert tag == "INSERT 0 20000"

    @pytest.mark.parametrize("ids", [1, 3])
    async def test_writers_at_the_same_time(self, products: ProductRepository, ids: int) -> None:
        versions: dict[str, list[int]] = {f"p{number}": [] for number in range(ids)}
        made, deleted = Counter[str](), Counter[str]()

        async def work(number: int) -> None:
            for step in range(60):
                product_id = f"p{(number + step) % ids}"
                if (number + step // ids) % 2:
                    product, created = await products.put(product_id, "n", Decimal(step))
                    versions[product_id].append(product.version)
                    made[product_id] += created
                else:
                    gone = await products.delete(product_id)
                    deleted[product_id] += gone

        await asyncio.gather(*(work(number) for number in range(12)))
        for product_id, seen in versions.items():
            assert sorted(seen) == list(range(1, len(seen) + 1))  # none twice, none left out
            there = await products.get(product_id) is not None
            assert made[product_id] == deleted[product_id] + there
            assert deleted[product_id] > 5  # the test has tested something

    async def test_a_deletion_under_way_is_waited_for(self, products: ProductRepository, pool: Any) -> None:
        await products.put("a", "n", ONE)
        await products.put("a", "n", ONE)
        async with pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("DELETE FROM products")
            putting = asyncio.create_task(products.put("a", "n", ONE))
            await _somebody_waits(pool)
            await transaction.commit()
            product, created = await putting
        assert (product.version, created) == (3, True)

    async def test_what_was_made_and_deleted_meanwhile_is_noticed(
        self, products: ProductRepository, pool: Any
    ) -> None:
        async with pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("INSERT INTO products VALUES ('a', 'n', 1, 0)")
            await connection.execute("UPDATE products SET price = 2")
            # It has chosen version 1 before it waits for the row of the other, and finds that gone.
            putting = asyncio.create_task(products.put("a", "n", ONE))
            await _somebody_waits(pool)
            await connection.execute("DELETE FROM products")
            await transaction.commit()
            product, created = await putting
        assert (product.version, created) == (3, True)


async def _somebody_waits(pool: Any) -> None:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncio.timeout(60):
        while not await pool.fetchval(query):
            await asyncio.sleep(0.01)


class TestOutages:
    async def test_a_table_that_is_not_there_yet(self, database_url: str) -> None:
        async with asyncpg.create_pool(database_url, min_size=0) as pool:
            products = ProductRepository(Database(pool))
            with pytest.raises(DatabaseError):
                await products.get("a")
            with pytest.raises(DatabaseError):
                await products.put("a", "n", ONE)

    async def test_a_database_that_is_down(self) -> None:
        async with asyncpg.create_pool("postgresql://postgres@127.0.0.1:1/x", min_size=0) as pool:
            with pytest.raises(DatabaseError):
                await ProductRepository(Database(pool)).get("a")

    async def test_a_database_that_has_stopped_answering(
        self, own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(repository, "STATEMENT_TIMEOUT", 0.5)
        pool = await asyncpg.create_pool(own_postgres.url, min_size=0)
        products = ProductRepository(Database(pool))
        async with pool.acquire() as connection:
            await apply_schema(connection)
        assert await products.get("a") is None
        own_postgres.pause()
        try:
            async with asyncio.timeout(60):
                with pytest.raises(DatabaseError, match="TimeoutError"):
                    await products.get("a")
        finally:
            own_postgres.resume()
        assert await products.get("a") is None
        pool.terminate()
