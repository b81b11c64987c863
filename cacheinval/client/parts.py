"""The parts of a client that its settings decide about."""

from typing import TYPE_CHECKING

from cacheinval.audit import Auditor, Loaders
from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.backends.proof import KeptProof
from cacheinval.backends.serializing import serializer
from cacheinval.backends.servers import connect
from cacheinval.backends.shared import SharedEntries
from cacheinval.cache import CoherentCache, InProcessCache, Policies, SharedCache, TwoLevels
from cacheinval.clock import Clock
from cacheinval.coherence import SUSPECT_AGE, Coherence
from cacheinval.coherence.registration import Registration
from cacheinval.errors import ConfigurationError
from cacheinval.settings import Settings

if TYPE_CHECKING:
    from cacheinval.writes import Pool

__all__ = ["check", "make_auditor", "make_cache", "make_coherence"]


def check(settings: Settings, pool: "Pool | None", *, subscribe: bool) -> None:
    """Refuses what does not fit together.

    Raises:
        ConfigurationError: which, and what is accepted.
    """
    if subscribe and settings.cache_is_external and "instance_id" not in settings.model_fields_set:
        raise ConfigurationError(
            "CACHEINVAL_INSTANCE_ID is not set: accepted: a name that stays the same over restarts, as "
            "CACHEINVAL_CACHE_URL names a cache outside the process"
        )
    if pool is not None and settings.relay == "auto" and pool.get_max_size() < 2:
        raise ConfigurationError(
            "pool: max_size 1 leaves nothing beside the relay, which keeps one connection; accepted: at least 2, or "
            "CACHEINVAL_RELAY=off"
        )
    if settings.cache_is_external and not settings.cache_local_entries:
        for policy in ("stale_if_error", "stale_while_revalidate", "warm_keys"):
            if asked := getattr(settings, policy):
                raise ConfigurationError(
                    f"CACHEINVAL_{policy.upper()}={asked:g}: accepted: 0, as CACHEINVAL_CACHE_URL names a cache "
                    "outside the process, unless CACHEINVAL_CACHE_LOCAL_ENTRIES keeps some in front of it"
                )


def make_coherence(settings: Settings, *, has_database: bool) -> Coherence:
    """The rules of an instance that begins."""
    registration = Registration(
        settings.max_staleness,
        settings.max_clock_skew,
        required=has_database and settings.max_staleness is not None,
        outlives=settings.cache_is_external,
    )
    coherence = Coherence(
        settings.max_staleness,
        settings.max_clock_skew,
        gap_interval=0 if settings.cache_is_external else None,
        max_replica_lag=settings.max_replica_lag,
        registration=registration,
        in_front=settings.cache_local_entries > 0,
    )
    if has_database:
        coherence.proof.await_source()
    return coherence


def make_cache(
    settings: Settings, coherence: Coherence, clock: Clock, loaders: Loaders
) -> tuple[CoherentCache, KeptProof | None]:
    """The cache, and what keeps the proof state with it where it is outside the process."""
    parts = (
        coherence,
        clock,
        settings.cache_ttl,
        loaders.remember,
        settings.max_concurrent_loads,
        Policies(
            settings.cache_ttl_jitter,
            settings.stale_if_error,
            settings.stale_while_revalidate,
            settings.warm_keys,
            settings.warm_interval,
        ),
    )
    if not settings.cache_is_external:
        return InProcessCache(BoundedMemoryCache(settings.cache_max_entries), *parts), None
    entries = SharedEntries(
        connect(settings.cache_url),
        settings.namespace,
        serializer(settings.cache_serializer),
        settings.cache_compress_above,
        settings.instance_id,
        coherence.marks,
    )
    keeper = KeptProof(entries, settings.instance_id, coherence.marks)
    shared = SharedCache(entries, *parts)
    if not settings.cache_local_entries:
        return shared, keeper
    return TwoLevels(BoundedMemoryCache(settings.cache_local_entries), shared, *parts), keeper


def make_auditor(settings: Settings, cache: CoherentCache, loaders: Loaders) -> Auditor:
    """Compares no sooner than the rules allow an entry to be stale."""
    if settings.max_staleness is None:
        least_delay = SUSPECT_AGE
    else:
        least_delay = settings.max_staleness + settings.max_clock_skew
    return Auditor(cache, loaders, least_delay=least_delay, interval=settings.audit_interval)
