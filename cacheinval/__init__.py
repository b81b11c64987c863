"""Keeps the caches of asyncio services honest: commit to Postgres, publish to RabbitMQ, evict everywhere."""

from cacheinval.cache import CoherentCache, Read
from cacheinval.client import Client
from cacheinval.errors import (
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
from cacheinval.writes import Transaction

__all__ = [
    "Client",
    "CoherentCache",
    "Read",
    "Settings",
    "Transaction",
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
