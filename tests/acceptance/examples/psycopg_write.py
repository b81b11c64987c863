"""Sets a price with psycopg 3: `python psycopg_write.py abc-123 109`."""

import os
import sys

import psycopg


def set_price(connection: psycopg.Connection, product_id: str, price: int) -> None:
    with connection.transaction():  # both or neither
        connection.execute("UPDATE prices SET price = %s WHERE id = %s", (price, product_id))
        connection.execute(
            "SELECT cacheinval.invalidate(%s, namespace => %s)",
            ([f"price:{product_id}"], os.environ["CACHEINVAL_NAMESPACE"]),
        )


if __name__ == "__main__":
    with psycopg.connect(os.environ["CACHEINVAL_DATABASE_URL"], autocommit=True) as opened:
        set_price(opened, sys.argv[1], int(sys.argv[2]))
