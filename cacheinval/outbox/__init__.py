"""The table of invalidations that are committed and not yet confirmed by the broker."""

from cacheinval.outbox.checkout import Checkout, Checkouts
from cacheinval.outbox.schema import SCHEMA_VERSION, apply_schema, schema_sql
from cacheinval.outbox.statements import combine, leaves_session
from cacheinval.outbox.writing import Outbox, Refusal, Row, explain

__all__ = [
    "Checkout",
    "Checkouts",
    "Outbox",
    "Refusal",
    "Row",
    "explain",
    "combine",
    "leaves_session",
    "SCHEMA_VERSION",
    "apply_schema",
    "schema_sql",
]
