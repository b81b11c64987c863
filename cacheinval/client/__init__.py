"""The client that services embed: the one place where the parts are put together."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypeVar, overload

import asyncpg

from cacheinval.asking import Answering, Asking
from cacheinval.audit import AuditReport, Loaders
from cacheinval.backends.attached import AttachedCache
from cacheinval.bus import Bus, Channel
from cacheinval.cache import CoherentCache
from cacheinval.cache.decorating import Cached, cached, invalidates
from cacheinval.cache.versions import VersionOf
from cacheinval.client.caches import Caches
from cacheinval.client.connections import Connections
from cacheinval.client.parts import check, make_auditor, make_cache, make_coherence
from cacheinval.client.status import Status
from cacheinval.client.subscriber import Subscriber
from cacheinval.client.unrecorded import Unrecorded
from cacheinval.clock import Clock
from cacheinval.coherence.receipts import Receipt
from cacheinval.coherence.registration import Registered
from cacheinval.errors import (
    CacheinvalError,
    DatabaseError,
    InvalidKeyError,
)
from cacheinval.fleet import Outlook, Respondent, ask_instances, silent_among
from cacheinval.outbox import Outbox, apply_schema
from cacheinval.outbox.instances import Database, Instances, Registrar
from cacheinval.outbox.looking import look
from cacheinval.outbox.pool import (
    CONNECT_TIMEOUT,
)
from cacheinval.outbox.refusals import find_out
from cacheinval.outbox.relay import Relay
from cacheinval.outbox.session import LOST
from cacheinval.overview import Overview
from cacheinval.publisher import Publisher
from cacheinval.receiver import Instance
from cacheinval.recent import Recent, RecentEvictions
from cacheinval.settings import Settings
from cacheinval.tasks import Tasks
from cacheinval.tracing import Tracing, tracing
from cacheinval.transactions import Invalidations, Transaction
from cacheinval.writes import Writes

if TYPE_CHECKING:
    from aiocache.base import BaseCache

    from cacheinval.transactions import AnyConnection
    from cacheinval.writes import Pool

__all__ = ["Client"]

P = ParamSpec("P")
T = TypeVar("T")

# What leaving takes at most, in seconds: with the tasks' time to stop within the 10 s that a supervisor grants.
FLUSH_TIMEOUT = 1.0

FIRST_JOIN_TIMEOUT = 3.0


class Client:
    """Reads through a cache that stays honest, and changes the database so that every other cache does.

    Use it as `async with Client() as client:`. It can be made, and its decorators used, before it is entered; until
    then nothing is known of others' changes, and what is cached is served for a second at most.

    >>> settings = Settings(broker_url="memory://", database_url="")  # no servers; `Client()` takes the environment's
    >>> async with Client(settings) as client:
    ...     await client.wait_ready(timeout=5)
    ...     print(client.state)
    ready

    Args:
        settings: from the environment if None.
        pool: your own asyncpg pool of at least two connections (the relay keeps one), used and never closed; without one the client makes a pool from `DATABASE_URL`.
            The registration is renewed through it, too (without it by a connection of its own): with `max_staleness`,
            a pool that has no connection free for two thirds of the lease (PROTOCOL.md) costs the cache, and so makes
            each read a load, until one is. Leave one or two more than your loads and writes can occupy.
        bus: who carries messages; chosen by `BROKER_URL` if None.
        subscribe: False for a client that only writes, or only relays.

    Raises:
        ConfigurationError: the settings do not fit together.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        pool: "Pool | None" = None,
        bus: Bus | None = None,
        subscribe: bool = True,
    ) -> None:
        self.settings = settings = settings or Settings()
        check(settings, pool, subscribe=subscribe)
        self._clock, self._tasks = Clock(), Tasks()
        self._subscribe = subscribe
        self._connections = Connections(settings.database_url, pool)
        self._has_database = has_database = self._connections.exist
        self._subscriber = Subscriber(bus, settings)

        self._coherence = make_coherence(settings, has_database=has_database)
        loaders = Loaders(among=settings.cache_max_entries)
        cache, keeper = make_cache(settings, self._coherence, self._clock, loaders)
        self.cache: CoherentCache = cache
        self.auditor = make_auditor(settings, cache, loaders)
        self._caches = Caches(cache, self._coherence, self._clock.now, self._tasks.aside)

        # A cache outside the process alone is the same one when the next process takes over.
        ends_with_process = not settings.cache_is_external or settings.cache_local_entries
        session = secrets.token_hex(8) if ends_with_process else ""
        me = Registered(settings.instance_id, session, settings.max_staleness)
        count = self._instances(lambda: self.pool).count if has_database else None
        self._asking = Asking(count, settings.max_clock_skew, (me.id, me.session) if subscribe else None)
        self._answering = Answering(self._subscriber.answer, (me.id, me.session))

        self._outbox = Outbox(settings.namespace)
        self.publisher = Publisher(
            self._open_channel,
            self._delete_rows if has_database else None,
            self._coherence,
            settings.publish_timeout,
            settings.tick_interval,
            self._asking,
        )
        self._writes = Writes(
            lambda: self.pool,
            self._outbox,
            self.publisher,
            self._caches.evict,
            self._asking,
            self._tasks.aside,
        )
        unrecorded = Unrecorded(self.publisher, self._caches.evict, self._asking, settings.publish_timeout)
        self._invalidate = (self._writes if has_database else unrecorded).invalidate
        self.relay = self._make_relay()

        self._recent = RecentEvictions()
        self._respondent = Respondent(
            me.id, lambda: self.bus, self._answer_status, self.auditor, self._tasks.aside
        )
        self.instance = Instance(
            self._coherence,
            self._clock,
            self._caches.all,
            self._subscriber.publish_probe,
            self._respondent.answer,
            self._subscriber.resubscribe,
            keeper=keeper,
            tick_interval=settings.tick_interval,
            max_clock_skew=settings.max_clock_skew,
            confirm=self._answering.evicted,
            recent=self._recent,
        )
        self._registrar = Registrar(
            self._instances(lambda: self._connections.registering),
            me,
            self._coherence.registration,
            self._clock.now,
            self._may_register,
            self.instance.registered,
        )
        self._status = Status(
            settings=settings,
            clock=self._clock,
            coherence=self._coherence,
            cache=cache,
            caches=self._caches,
            auditor=self.auditor,
            outbox=self._outbox,
            publisher=self.publisher,
            instance=self.instance,
            respondent=self._respondent,
            registrar=self._registrar if subscribe and has_database else None,
            relay=self.relay,
            bus=lambda: self.bus,
        )
        self.outlook = Outlook(
            lambda: self.bus,
            self.status,
            self._recently_evicted,
            self._overview if has_database else None,
            instance=subscribe,
        )
        self._stack = AsyncExitStack()
        self._tracing: Tracing | None = None

    # Life

    async def __aenter__(self) -> Self:
        if self._status.started_at is not None:
            raise CacheinvalError("a Client can be entered once; make another one")
        self._status.started_at = time.time()
        self._trace()
        # Entered in this order, left in the reverse one: what feeds others stops before what it feeds.
        async with AsyncExitStack() as stack:
            await self._connections.open(stack)
            stack.push_async_callback(self.cache.close)
            stack.push_async_callback(
                self.bus.close
            )  # made here, so that its own settings are refused at start
            stack.push_async_callback(self._tasks.stop_all)
            stack.push_async_callback(self.publisher.flush, FLUSH_TIMEOUT)
            stack.push_async_callback(
                self._tasks.stop, "subscription", "gaps", "watch", "source", "audit", "relay", "answers"
            )
            self._tasks.start("publisher", self.publisher.run)
            if self._has_database:
                self._tasks.start("outbox", self.publisher.delete_confirmed)
                self._tasks.start("refusals", partial(find_out, self._outbox, lambda: self.pool))
            else:
                self._tasks.start("outbox", self.publisher.beat)
            if self.relay is not None:
                self._tasks.start("relay", self.relay.run)
            if self._subscribe:
                self._tasks.start("gaps", self.instance.begin_epochs_put_off)
                self._tasks.start("watch", self.instance.watch)
                self._tasks.start("answers", self._answering.run)
                if self.settings.audit_interval:
                    self._tasks.start("audit", self.auditor.run)
                if self._has_database:
                    learn_source = self._connections.learn_source
                    self._tasks.start("source", partial(learn_source, self._coherence.proof.trust_only))
                    self._tasks.start("registration", self._registrar.run)
                    stack.push_async_callback(self._registrar.leave)
                    stack.push_async_callback(self._tasks.stop, "registration")
                stay_subscribed = partial(self._subscriber.stay_subscribed, self.instance)
                self._tasks.start("subscription", stay_subscribed, self.instance.lost)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    # Reading

    def cached(
        self,
        key: str,
        *,
        ttl: float | None = None,
        tags: Collection[str] = (),
        model: Any = None,
        version: VersionOf | None = None,
        primary: Callable[..., Awaitable[Any]] | None = None,
        skip_if: Callable[[Any], object] | None = None,
        copy: bool | Callable[[Any], Any] = False,
        stale_if_error: float | None = None,
        stale_while_revalidate: float | None = None,
        ttl_jitter: float | None = None,
    ) -> Callable[[Callable[P, Awaitable[T]]], Cached[P, T]]:
        """Decorates a coroutine function: its results are cached under `key`, a template of its arguments.

        >>> @client.cached("price:{product_id}", ttl=60, tags=["prices of:{shop}"], skip_if=lambda price: price is None)
        ... async def price_of(product_id: str, shop: str) -> int | None:
        ...     return 99
        >>> await price_of("abc-123", shop="here")
        99
        >>> price_of.key("abc-123", shop="here")
        'price:abc-123'
        >>> await price_of.invalidate("abc-123", shop="here")  # evicts it everywhere
        >>> await price_of.refresh("abc-123", shop="here")  # loads it now, and stores it here: others hear nothing of it
        99

        On methods, `self` is no part of the key, and so `key` and `invalidate` leave it out (unless the template names it):
        `await service.price_of.invalidate("abc-123")`. To refresh, name the class: `await Prices.price_of.refresh(service,
        "abc-123")`.

        Args:
            key: for example `"product:{product_id}"`; every name in braces is an argument.
            tags: templates, too. They are made of arguments alone, since an eviction of a tag has to concern loads in
                flight, of which the result is not known yet.
            ttl, model, version, stale_if_error, stale_while_revalidate, ttl_jitter: as in `CoherentCache.get_or_set`.
            primary: a coroutine function of the same arguments that reads the primary. It says that the decorated one
                reads a replica, which may lag.
            skip_if: takes the result; where it is true that is returned, but not stored, nor is what is built from it; if
                it was refreshed, what was stored before is dropped here. Without it every result is stored, `None` too.
            copy: True: every caller gets a deep copy of what is stored, or what this callable makes of it. Otherwise callers
                share one object, and nobody may change it: return what cannot be changed (a tuple, a frozen dataclass or
                model).

        Raises:
            InvalidKeyError: a template names something that is no argument.
            TypeError: what is decorated is no coroutine function.
        """

        if version is not None or primary is not None:
            self._coherence.loads.compare_versions()
        return cached(
            self.cache,
            self._evict_by_name,
            key,
            ttl=ttl,
            tags=tags,
            model=model,
            version=version,
            primary=primary,
            skip_if=skip_if,
            copy=copy,
            stale_if_error=stale_if_error,
            stale_while_revalidate=stale_while_revalidate,
            ttl_jitter=ttl_jitter,
        )

    def attach(self, cache: "BaseCache", *, may_flush_all: bool = False) -> None:
        """Keeps an aiocache cache of yours honest, too: keys are evicted from it, and no more than that.

        >>> from aiocache import SimpleMemoryCache
        >>> yours = SimpleMemoryCache()
        >>> client.attach(yours)
        >>> await yours.set("price:abc-123", 99)
        True
        >>> await client.invalidate("price:abc-123")
        >>> print(await yours.get("price:abc-123"))
        None

        Args:
            cache: aiocache's memory, Redis (with a namespace) or Memcached cache.
            may_flush_all: allows flushing a whole Memcached server where everything has to go.

        Raises:
            ConfigurationError: everything in it could not be dropped without harm to others.
        """
        self._caches.attach(AttachedCache(cache, may_flush_all=may_flush_all))

    # Writing

    @property
    def pool(self) -> "Pool":
        """The asyncpg pool.

        >>> await client.pool.fetchval("SELECT price FROM prices WHERE id = $1", "abc-123")
        99

        Raises:
            NoDatabaseError: there is no database.
        """
        return self._connections.pool

    def transaction(
        self, *, wait: float | None = None, **options: Any
    ) -> AbstractAsyncContextManager[Transaction]:
        """A database transaction; what it invalidates is evicted here and published when it has committed.

        Reads of `client.cache` within it go past the cache, so that they see its changes.

        >>> async with client.transaction(wait=5.0) as tx:
        ...     await tx.execute("UPDATE prices SET price = 109 WHERE id = $1", "abc-123")
        ...     tx.invalidate("price:abc-123", tags=["prices"])
        'UPDATE 1'
        >>> tx.receipt.complete  # nobody's cache has it any more
        True

        Args:
            wait: seconds; leaving the block then takes until every instance has evicted, at most that long, and
                `tx.receipt` says who has. The write is committed either way. That is of what `tx.invalidate` names:
                where it names nothing nobody is asked, and all are safe by their `max_staleness` only.
            options: as in asyncpg's `Connection.transaction`.

        Raises:
            SchemaMissingError: `cacheinval schema apply` has not been run.
            NoDatabaseError: there is no database.
            ValueError: `wait` is not more than 0, or not finite.
        """
        if wait is None:
            return self._writes.transaction(**options)
        return self._transaction_and_receipt(wait, options)

    @asynccontextmanager
    async def _transaction_and_receipt(
        self, wait: float, options: dict[str, Any]
    ) -> AsyncIterator[Transaction]:
        with self._asking.about(wait) as question:
            async with self._writes.transaction(question, **options) as tx:
                yield tx
            if question is not None:
                tx.receipt = await self._asking.receipt(question)

    async def execute(
        self,
        query: str,
        *args: Any,
        invalidate: Collection[str] = (),
        tags: Collection[str] = (),
        timeout: float | None = None,
    ) -> str:
        """Executes a statement and records what it makes stale, in one round trip where that is possible.

        >>> await client.execute("UPDATE prices SET price = 109 WHERE id = $1", "abc-123", invalidate=["price:abc-123"])
        'UPDATE 1'

        Args:
            invalidate, tags: keys and tags that are evicted everywhere when it has committed.
            timeout: seconds.

        Returns:
            The statement's command tag, for example `UPDATE 1`.

        Raises:
            InvalidKeyError: a key or tag is not 1 to 512 bytes of UTF-8 without NUL.
            SchemaMissingError: `cacheinval schema apply` has not been run.
            NoDatabaseError: there is no database.
            asyncpg.PostgresError: what the statement itself raises.
        """
        result: str = await self._statement("execute", query, args, invalidate, tags, timeout)
        return result

    async def fetch(
        self,
        query: str,
        *args: Any,
        invalidate: Collection[str] = (),
        tags: Collection[str] = (),
        timeout: float | None = None,
    ) -> list[asyncpg.Record]:
        """The same as `execute`, for a statement that returns rows.

        >>> rows = await client.fetch("UPDATE prices SET price = price + 1 RETURNING id, price", tags=["prices"])
        >>> [(row["id"], row["price"]) for row in rows]
        [('abc-123', 100)]
        """
        result: list[asyncpg.Record] = await self._statement("fetch", query, args, invalidate, tags, timeout)
        return result

    async def fetchrow(
        self,
        query: str,
        *args: Any,
        invalidate: Collection[str] = (),
        tags: Collection[str] = (),
        timeout: float | None = None,
    ) -> asyncpg.Record | None:
        """The same as `execute`, for a statement that returns at most one row.

        >>> change = "UPDATE prices SET price = price + 1 WHERE id = $1 RETURNING price"
        >>> row = await client.fetchrow(change, "abc-123", invalidate=["price:abc-123"])
        >>> row["price"]
        100
        """
        result: asyncpg.Record | None = await self._statement(
            "fetchrow", query, args, invalidate, tags, timeout
        )
        return result

    async def _statement(
        self,
        method: Literal["execute", "fetch", "fetchrow"],
        query: str,
        args: Sequence[Any],
        invalidate: Collection[str],
        tags: Collection[str],
        timeout: float | None,
    ) -> Any:
        invalidations = Invalidations()
        invalidations.add(invalidate, tags)
        if invalidations:
            return await self._writes.statement(method, query, args, invalidations, timeout)
        return await getattr(self.pool, method)(query, *args, timeout=timeout)

    async def record(self, connection: "AnyConnection", *keys: str, tags: Collection[str] = ()) -> None:
        """Records an invalidation inside a transaction that you run yourself; the relay publishes it to everyone.

        >>> async with client.pool.acquire() as connection, connection.transaction():
        ...     await connection.execute("UPDATE prices SET price = 109 WHERE id = 'abc-123'")
        ...     await client.record(connection, "price:abc-123")
        'UPDATE 1'

        Raises:
            InvalidKeyError: a key or tag is not 1 to 512 bytes of UTF-8 without NUL.
            SchemaMissingError: `cacheinval schema apply` has not been run.
        """
        invalidations = Invalidations()
        invalidations.add(keys, tags)
        if invalidations:
            invalidations.warn_if_large()
            rows = self._outbox.rows(invalidations.keys, tags=invalidations.tags, publish_here=False)
            await self._outbox.record(connection, rows)

    @overload
    async def invalidate(
        self, *keys: str, tags: Collection[str] = (), everything: bool = False, wait: None = None
    ) -> None: ...

    @overload
    async def invalidate(
        self, *keys: str, tags: Collection[str] = (), everything: bool = False, wait: float
    ) -> Receipt: ...

    async def invalidate(
        self, *keys: str, tags: Collection[str] = (), everything: bool = False, wait: float | None = None
    ) -> Receipt | None:
        """Evicts these everywhere, for a change that is not in this database.

        With a database it returns when the outbox row is committed: the relay sends it, whatever becomes of the broker.

        >>> await client.invalidate("rate:EUR", tags=["reports"])  # the rate was changed in somebody else's service

        Called within `client.transaction()` it does so at once, and they are evicted once more when that commits: what is
        loaded in between is what was there before. For the transaction's own changes `tx.invalidate` is enough.

        Args:
            wait: seconds; it then returns when every instance has evicted, or after that long, with a receipt that says
                who has. Without a database nobody knows how many there are: it waits all that time, and says who answered.

        Raises:
            PublishError: without a database: the broker did not confirm it. It may have arrived nevertheless.
            InvalidKeyError: a key or tag is not 1 to 512 bytes of UTF-8 without NUL.
            ValueError: `wait` is not more than 0, or not finite.
        """
        invalidations = Invalidations()
        invalidations.add(keys, tags, everything=everything)
        if not invalidations:
            raise InvalidKeyError(
                "nothing to invalidate; accepted: at least one key or tag, or everything=True"
            )
        tx = self._writes.running
        if tx is not None:
            tx.invalidations.merge(invalidations)
        with self._asking.about(wait) as question:
            await self._invalidate(invalidations, question)
            return None if question is None else await self._asking.receipt(question)

    def invalidates(
        self, *keys: str, tags: Collection[str] = ()
    ) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
        """Decorates a coroutine function that changes what is cached: when it has returned, these are evicted everywhere.

        >>> @client.invalidates("price:{product_id}", tags=["prices of:{shop}"])
        ... async def set_price(product_id: str, shop: str, price: int) -> None:
        ...     ...

        Called within `client.transaction()` it is as `tx.invalidate`: recorded in that transaction, and evicted when it
        commits. **Anywhere else it is weaker than that**: if the function commits a change of its own, and the process dies
        or the call is cancelled before the eviction is recorded, or the function raises although it has committed, then
        nobody hears of the change. So this is for changes that are not in this database; of those that are, record the
        eviction with the change: `tx.invalidate`, `client.execute(…, invalidate=…)`, or `cacheinval.track` in SQL.

        Args:
            keys: templates of the arguments, as in `cached`. They are filled in before the function runs.
            tags: templates, too.

        Raises:
            InvalidKeyError: a template names something that is no argument, or there is none.
            TypeError: what is decorated is no coroutine function.

        What the decorated function raises beside its own errors is what `invalidate` raises.
        """
        if not keys and not tags:
            raise InvalidKeyError("nothing to invalidate; accepted: at least one template of a key or tag")
        return invalidates(self._evict_by_name, keys, tags)

    async def _evict_by_name(self, keys: Collection[str], tags: Collection[str]) -> None:
        tx = self._writes.running
        if tx is not None:
            tx.invalidate(*keys, tags=tags)
        else:
            await self.invalidate(*keys, tags=tags)

    async def apply_schema(self) -> None:
        """Makes or updates the schema `cacheinval`; safe to call from any number of processes at once.

        >>> await client.apply_schema()  # as `cacheinval schema apply` does
        >>> await client.invalidate("price:abc-123")

        Raises:
            DatabaseError: it could not be done, and why.
        """
        try:
            async with self.pool.acquire(timeout=CONNECT_TIMEOUT) as connection:
                await apply_schema(connection)
        except LOST as error:
            raise DatabaseError(
                f"the database cannot be used: {str(error) or 'no answer in time'}"
            ) from error

    def _trace(self) -> None:
        system = "memory" if self.settings.broker_url.startswith("memory:") else "rabbitmq"
        exchange = f"cacheinval.{self.settings.namespace}"
        self._tracing = tracing(system, exchange, self.settings.instance_id)
        self.publisher.tracing = self.instance.tracing = self._outbox.tracing = self._tracing
        if self.relay is not None:
            self.relay.trace(self._tracing)

    # What the parts ask for

    @property
    def bus(self) -> Bus:
        """Who carries messages.

        >>> client.bus.state["consumer"]
        'connected'
        """
        return self._subscriber.bus

    def _instances(self, database: Callable[[], Database]) -> Instances:
        return Instances(database, self.settings.namespace, self.settings.max_clock_skew)

    async def _overview(self) -> Overview:
        return await look(lambda: self.pool, self.settings.namespace)

    def _make_relay(self) -> Relay | None:
        if not self._has_database or self.settings.relay == "off":
            return None
        return Relay(
            self._connections.connect_relay,
            self._open_channel,
            namespace=self.settings.namespace,
            tick_interval=self.settings.tick_interval,
            publish_timeout=self.settings.publish_timeout,
            max_clock_skew=self.settings.max_clock_skew,
        )

    async def _delete_rows(self, rows: Sequence[Any], confirmed: Mapping[str, int]) -> None:
        await self._outbox.delete(self.pool, rows, confirmed)

    async def _open_channel(self) -> Channel:
        if self._subscribe and not self.instance.ever_joined:
            # The first subscription makes the exchange; a write in the first milliseconds need not be told that it is missing.
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_JOIN_TIMEOUT):
                    await self.instance.trusted.wait()
        return await self.bus.open_channel()

    def _may_register(self) -> bool:
        # Of two processes with one id the second hears nothing, and is not to be counted as the first one.
        return not self.settings.cache_is_external or self._coherence.subscribed

    async def _answer_status(self, evictions: float | None) -> dict[str, Any]:
        status = self.status()  # first, for it says when it was
        depth = await self.bus.depth()
        if depth is not None:
            status["queue_depth"] = depth
        if evictions is not None:
            status["evictions"] = self._recently_evicted(evictions)
        return status

    def _recently_evicted(self, seconds: float) -> Recent:
        return self._recent.told(seconds, self._clock.now())

    # How it is doing

    @property
    def state(self) -> Literal["starting", "ready", "suspect"]:
        """`suspect` from the moment that something may have been missed until everything has been made good.

        >>> client.state
        'ready'
        """
        return self._status.state

    @property
    def ready(self) -> bool:
        """Whether what is cached can be relied on.

        >>> client.ready
        True
        """
        return self._coherence.suspect is None

    @property
    def reason(self) -> str | None:
        """Why the client is not ready.

        >>> async with Client(client.settings) as other:
        ...     print(other.reason)
        not subscribed yet
        """
        return self._coherence.suspect

    @property
    def watermark_age(self) -> float | None:
        """Seconds since the moment up to which every commit is known to be evicted here; None before the first tick.

        >>> print(client.watermark_age)  # without a database nobody sends ticks
        None
        """
        return self._status.watermark_age

    async def wait_ready(self, timeout: float) -> None:
        """Waits until what is cached can be relied on.

        >>> await client.wait_ready(timeout=5)
        >>> client.ready
        True

        Raises:
            TimeoutError: not within `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            await self.instance.trusted.wait()

    def status(self) -> dict[str, Any]:
        """What `/status` shows: JSON types, and never a secret.

        `queue_depth` counts the messages that have arrived and are not evicted yet; in what `ask_instances` gives it also
        counts those that wait in the broker.

        >>> status = client.status()
        >>> status["id"], status["state"], status["cache"]["entries"]
        ('shop-1', 'ready', 0)
        """
        return self._status.told()

    def stats(self) -> dict[str, Any]:
        """Every counter, by part; numbers since the start of this process.

        >>> client.stats()["cache"]["hits"]
        0
        """
        return self._status.counters()

    async def ask_instances(self, wait: float = 1.0) -> list[dict[str, Any]]:
        """The status of every instance of the namespace that answers within `wait` seconds, by id.

        >>> [(instance["id"], instance["state"]) for instance in await client.ask_instances(wait=0.5)]
        [('shop-1', 'ready')]

        Raises:
            PublishError: the broker cannot be reached, or nobody has ever subscribed in this namespace.
        """
        return await ask_instances(self.bus, wait)

    async def silent_instances(self, answered: Collection[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Those that are registered in the database and are not among `answered`, what `ask_instances` gave.

        Of each the same names are given as `ask_instances` gives, but only `id`, `state` (`silent`) and `reason` are known.
        One that has only just registered is left out.

        >>> await client.silent_instances(await client.ask_instances(wait=0.5))
        []

        Raises:
            DatabaseError: who is registered cannot be told.
        """
        if not self._has_database:
            return []
        return silent_among(await self._instances(lambda: self.pool).registered(), answered)

    async def audit(self, sample: int = 100, delay: float | None = None) -> AuditReport:
        """Compares up to `sample` cached entries, at random, with what their loaders read now; evicts nothing.

        What differs is looked at again later, and is only then called inconsistent. Compared are entries whose keys were
        loaded here: the loaders of at most 1,000 keys are remembered. One audit runs at a time; another one waits.

        >>> async def load():
        ...     return 99
        >>> await client.cache.get_or_set("price:abc-123", load)
        99
        >>> report = await client.audit(sample=10)
        >>> report.checked, report.inconsistent
        (1, 0)

        Args:
            sample: how many entries, at most 1,000.
            delay: seconds between the two looks. If None it is one more than the rules allow an entry to be stale, which
                is `max_staleness` + `max_clock_skew`, or 1 where `max_staleness` is not set; it is never less than that,
                nor more than 600.
        """
        return await self.auditor.audit(sample, delay)
