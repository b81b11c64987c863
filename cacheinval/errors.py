"""Every error that cacheinval raises on purpose. The first line of each docstring is the default message."""

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
    """Something went wrong in cacheinval.

    >>> try:
    ...     client.pool
    ... except CacheinvalError as error:
    ...     print(type(error).__name__)
    NoDatabaseError
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").partition("\n")[0])


class ConfigurationError(CacheinvalError):
    """A setting has a value that cannot be used.

    >>> Settings(cache_ttl=0)
    Traceback (most recent call last):
    cacheinval.errors.ConfigurationError: CACHEINVAL_CACHE_TTL=0: accepted: greater than 0
    """


class InvalidKeyError(CacheinvalError, ValueError):
    """A key or tag must have 1 to 512 bytes of UTF-8 without NUL.

    >>> await client.invalidate("")
    Traceback (most recent call last):
    cacheinval.errors.InvalidKeyError: key '' is empty; accepted: 1 to 512 bytes of UTF-8 without NUL
    """


class MalformedMessageError(CacheinvalError, ValueError):
    """A message could not be understood.

    >>> from cacheinval.messages import decode
    >>> decode(b'{"v": 1, "kind": "invalidate"}')
    Traceback (most recent call last):
    cacheinval.errors.MalformedMessageError: an invalidate needs at least one of `keys`, `tags` and `all: true`
    """


class BusError(CacheinvalError):
    """The broker could not be used.

    >>> alone = Settings(broker_url="amqp://127.0.0.1:1/", database_url="")
    >>> async with Client(alone, subscribe=False) as client:
    ...     try:
    ...         await client.ask_instances()
    ...     except BusError as error:
    ...         print(error)
    the broker cannot be reached (CACHEINVAL_BROKER_URL): ...
    """


class PublishError(BusError):
    """The broker did not confirm a message in time; the message may still arrive.

    >>> alone = Settings(broker_url="amqp://127.0.0.1:1/", database_url="", publish_timeout=0.1)
    >>> async with Client(alone, subscribe=False) as client:
    ...     await client.invalidate("rate:EUR")
    Traceback (most recent call last):
    cacheinval.errors.PublishError: not confirmed: the broker cannot be reached (CACHEINVAL_BROKER_URL): ...
    """

    refused = False
    """Whether the broker was reached, and would not have it: the exchange is missing, of another type, or not permitted."""


class BlockedError(PublishError):
    """The broker blocks publishers (an alarm: memory or disk)."""


class SubscriptionError(BusError):
    """The subscription to the broker ended."""


class DatabaseError(CacheinvalError):
    """The database could not be used.

    >>> Client().pool
    Traceback (most recent call last):
    cacheinval.errors.DatabaseError: the client has not been entered: `async with Client(…) as client:`
    """


class NoDatabaseError(DatabaseError):
    """This needs a database: set CACHEINVAL_DATABASE_URL, or hand a pool to the Client.

    >>> client.pool
    Traceback (most recent call last):
    cacheinval.errors.NoDatabaseError: This needs a database: set CACHEINVAL_DATABASE_URL, or hand a pool to the Client.
    """


class SchemaMissingError(DatabaseError):
    """The schema `cacheinval` is missing or too old in this database: run `cacheinval schema apply`.

    >>> await client.invalidate("price:abc-123")
    Traceback (most recent call last):
    cacheinval.errors.SchemaMissingError: The schema `cacheinval` is missing or too old in this database: run `cacheinval schema apply`.
    """


class CacheError(CacheinvalError):
    """A cache could not be used.

    >>> async def load():
    ...     return await client.cache.get_or_set("price:abc-123", load)  # waits for itself
    >>> await client.cache.get_or_set("price:abc-123", load)
    Traceback (most recent call last):
    cacheinval.errors.CacheError: the factory of 'price:abc-123' reads 'price:abc-123', and that of ... depends on ...
    """


class EvictionError(CacheError):
    """An eviction could not be completed; the entry may still be there."""


class SandboxError(CacheinvalError):
    """A private server could not be started.

    >>> from cacheinval.sandbox import Sandbox
    >>> Sandbox(["mysql"])
    Traceback (most recent call last):
    cacheinval.errors.SandboxError: unknown service 'mysql': there are rabbitmq, postgres, redis, memcached
    """
