"""Where products are kept: in Postgres, or in this process for a first look without any server."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from decimal import Decimal
from importlib.resources import files
from typing import Any, Protocol

import asyncpg

from cacheinval.errors import DatabaseError
from cacheinval.products.model import Product

__all__ = ["MemoryProductRepository", "ProductRepository", "apply_schema"]

STATEMENT_TIMEOUT = 5.0
_ATTEMPTS = 10
_PAUSE = 0.005  # seconds, at most, for each attempt before
_SCHEMA_LOCK = 0x70726F64756374  # "product": a name for the advisory lock that nobody else is likely to take

_GET = "SELECT id, name, price, version FROM products WHERE id = $1"
# A trigger chooses the version (schema.sql). xmax is 0 in a row that was inserted, and not in one that was updated.
_PUT = """
INSERT INTO products (id, name, price, version) VALUES ($1, $2, $3, 0)
ON CONFLICT (id) DO UPDATE SET name = excluded.name, price = excluded.price
RETURNING id, name, price, version, xmax = 0 AS created
"""
_DELETE = "DELETE FROM products WHERE id = $1 RETURNING id"

# What a database does that is down, starting, ending, overloaded, or not set up yet.
_UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.TransactionRollbackError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.UndefinedTableError,
    asyncpg.InsufficientPrivilegeError,
)


_MAY_USE = """
SELECT bool_and(has_table_privilege(name, privilege))
FROM (VALUES ('products'), ('product_tombstones')) AS tables (name), unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS privilege
WHERE (name, privilege) <> ('product_tombstones', 'DELETE')
"""


async def apply_schema(connection: Any) -> None:
    """Makes the table `products` where it is missing; any number of processes may do this at once.

    Raises:
        DatabaseError: this role may not make it, or not use it; says which rights it needs.
        asyncpg.PostgresError: it could not be made.
    """
    role, place, may_create = await connection.fetchrow(
        "SELECT quote_ident(current_user), quote_ident(current_schema()), has_schema_privilege(current_schema(), 'CREATE')"
    )
    grants = (
        f"GRANT SELECT, INSERT, UPDATE ON products, product_tombstones TO {role}; "
        f"GRANT DELETE ON products TO {role}"
    )
    try:
        await _make_schema(connection)
    except asyncpg.InsufficientPrivilegeError as error:
        otherwise = "" if may_create else f"; or run: GRANT CREATE ON SCHEMA {place} TO {role}"
        raise DatabaseError(
            f"role {role} may not make the table products and its triggers: {error}. Start `cacheinval serve` once as a "
            f"role that may, and let it run: {grants}{otherwise}"
        ) from error
    if not await connection.fetchval(_MAY_USE):
        raise DatabaseError(f"role {role} may not use the table products. Let its owner run: {grants}")


async def _make_schema(connection: Any) -> None:
    if await _has_schema(connection):
        return
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _SCHEMA_LOCK)
        if not await _has_schema(connection):
            await connection.execute(files(__package__).joinpath("schema.sql").read_text("utf-8"))


async def _has_schema(connection: Any) -> bool:
    made: bool = await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_trigger"
        " WHERE tgrelid = to_regclass('products') AND tgname = 'product_version_kept')"
    )
    return made


class Database(Protocol):
    """What the repository needs of the `Client`."""

    @property
    def pool(self) -> Any: ...

    async def fetchrow(
        self, query: str, *args: Any, invalidate: Sequence[str] = (), timeout: float | None = None
    ) -> Any: ...


class ProductRepository:
    """Products in Postgres. A change and the record of what it makes stale are one statement, and one round trip."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, product_id: str) -> Product | None:
        """The product, or None where there is none.

        Raises:
            DatabaseError: the database could not be used.
        """
        async with self._connection() as connection:
            row = await connection.fetchrow(_GET, product_id)
        return None if row is None else Product(*row)

    async def put(
        self, product_id: str, name: str, price: Decimal, *, invalidate: Sequence[str] = ()
    ) -> tuple[Product, bool]:
        """Makes or changes the product; returns it as it is now, and whether it is new.

        Raises:
            DatabaseError: the database could not be used; the change may have been made.
        """
        row = await self._write(_PUT, product_id, name, price, invalidate=invalidate)
        return Product(*row[:4]), row["created"]

    async def delete(self, product_id: str, *, invalidate: Sequence[str] = ()) -> bool:
        """Deletes the product; returns whether there was one.

        Raises:
            DatabaseError: the database could not be used; the change may have been made.
        """
        return await self._write(_DELETE, product_id, invalidate=invalidate) is not None

    async def _write(self, statement: str, *args: Any, invalidate: Sequence[str]) -> Any:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with _database_errors():
                    return await self._database.fetchrow(
                        statement, *args, invalidate=invalidate, timeout=STATEMENT_TIMEOUT
                    )
            except DatabaseError as error:
                # Others made and deleted the same product in this very moment: nothing was changed yet.
                if attempt == _ATTEMPTS or not isinstance(error.__cause__, asyncpg.TransactionRollbackError):
                    raise
            await asyncio.sleep(random.uniform(0, _PAUSE * attempt))
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        pool = self._database.pool
        with _database_errors():
            async with asyncio.timeout(STATEMENT_TIMEOUT):
                connection = await pool.acquire()
                try:
                    yield connection
                except asyncio.CancelledError:
                    # Giving it back would wait, without a limit, for a server that may have stopped answering.
                    connection.terminate()
                    raise
                finally:
                    await pool.release(connection)


class Invalidations(Protocol):
    """What the repository without a database needs of the `Client`."""

    async def invalidate(self, *keys: str) -> None: ...


class MemoryProductRepository:
    """Products in this process, and nowhere else; the same interface, for `memory://` without a database."""

    def __init__(self, invalidations: Invalidations) -> None:
        self._invalidations = invalidations
        self._products: dict[str, Product] = {}
        self._versions: dict[str, int] = {}

    async def get(self, product_id: str) -> Product | None:
        """The product, or None where there is none."""
        return self._products.get(product_id)

    async def put(
        self, product_id: str, name: str, price: Decimal, *, invalidate: Sequence[str] = ()
    ) -> tuple[Product, bool]:
        """Makes or changes the product; returns it as it is now, and whether it is new."""
        created = product_id not in self._products
        version = self._versions[product_id] = self._versions.get(product_id, 0) + 1
        product = self._products[product_id] = Product(product_id, name, price, version)
        if invalidate:
            await self._invalidations.invalidate(*invalidate)
        return product, created

    async def delete(self, product_id: str, *, invalidate: Sequence[str] = ()) -> bool:
        """Deletes the product; returns whether there was one."""
        deleted = self._products.pop(product_id, None) is not None
        if deleted and invalidate:
            await self._invalidations.invalidate(*invalidate)
        return deleted


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except _UNAVAILABLE as error:
        raise DatabaseError(f"the database cannot be used now: {type(error).__name__}: {error}") from error
