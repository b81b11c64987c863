"""Every error that cacheinval raises on purpose. The docstring of each is its default message."""

__all__ = [
    "CacheinvalError",
    "ConfigurationError",
    "InvalidKeyError",
    "MalformedMessageError",
    "BusError",
    "PublishError",
    "BlockedError",
    "SubscriptionError",
    "DatabaseError",
    "NoDatabaseError",
    "SchemaMissingError",
    "CacheError",
    "EvictionError",
    "SandboxError",
]


class CacheinvalError(Exception):
    """Something went wrong in cacheinval."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)


class ConfigurationError(CacheinvalError):
    """A setting has a value that cannot be used."""


class InvalidKeyError(CacheinvalError, ValueError):
    """A key or tag must have 1 to 512 bytes of UTF-8 without NUL."""


class MalformedMessageError(CacheinvalError, ValueError):
    """A message could not be understood."""


class BusError(CacheinvalError):
    """The broker could not be used."""


class PublishError(BusError):
    """The broker did not confirm a message in time; the message may still arrive."""


class BlockedError(PublishError):
    """The broker blocks publishers (an alarm: memory or disk)."""


class SubscriptionError(BusError):
    """The subscription to the broker ended."""


class DatabaseError(CacheinvalError):
    """The database could not be used."""


class NoDatabaseError(DatabaseError):
    """This needs a database: set CACHEINVAL_DATABASE_URL, or hand a pool to the Client."""


class SchemaMissingError(DatabaseError):
    """The schema `cacheinval` is missing or too old in this database: run `cacheinval schema apply`."""


class CacheError(CacheinvalError):
    """A cache could not be used."""


class EvictionError(CacheError):
    """An eviction could not be completed; the entry may still be there."""


class SandboxError(CacheinvalError):
    """A private server could not be started."""
