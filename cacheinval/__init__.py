"""Keeps the caches of asyncio services honest: commit to Postgres, publish to RabbitMQ, evict everywhere.

The examples in the docstrings are as at the prompt of `python -m asyncio`, where `client` is a `Client` that has been
entered, and which has, where there is a database, a table `prices (id text, price int)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cacheinval.audit import AuditReport
    from cacheinval.cache import CoherentCache, Read
    from cacheinval.client import Client
    from cacheinval.coherence.receipts import Receipt
    from cacheinval.errors import (
        BlockedError,
        BusError,
        CacheError,
        CacheinvalError,
        ConfigurationError,
        DatabaseError,
        EvictionError,
        InvalidKeyError,
        MalformedMessageError,
        NoDatabaseError,
        PublishError,
        SandboxError,
        SchemaMissingError,
        SubscriptionError,
    )
    from cacheinval.settings import Settings
    from cacheinval.transactions import Transaction

__all__ = [
    "AuditReport",
    "Client",
    "CoherentCache",
    "Read",
    "Receipt",
    "Settings",
    "Transaction",
    "BlockedError",
    "BusError",
    "CacheError",
    "CacheinvalError",
    "ConfigurationError",
    "DatabaseError",
    "EvictionError",
    "InvalidKeyError",
    "MalformedMessageError",
    "NoDatabaseError",
    "PublishError",
    "SandboxError",
    "SchemaMissingError",
    "SubscriptionError",
]

_HOMES = {
    "AuditReport": "audit",
    "Client": "client",
    "CoherentCache": "cache",
    "Read": "cache",
    "Receipt": "coherence.receipts",
    "Settings": "settings",
    "Transaction": "transactions",
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: a command line that prints its help needs neither the broker's client nor the
    # database's (PEP 562).
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
