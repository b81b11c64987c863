"""Invalidations of a client that has no database to record them in."""

import asyncio
from collections.abc import Callable

from cacheinval.asking import Asking
from cacheinval.coherence import Eviction
from cacheinval.coherence.receipts import Question
from cacheinval.errors import PublishError
from cacheinval.publisher import Publisher, Unpublished
from cacheinval.transactions import Invalidations

__all__ = ["Unrecorded"]


class Unrecorded:
    """What is said is safe once the broker has confirmed it, and not before.

    Args:
        evict: evicts in every cache of this client; None when it has, or what ends when it has been tried.
        publish_timeout: seconds; twice of it is waited for the confirm.
    """

    def __init__(
        self,
        publisher: Publisher,
        evict: Callable[[Eviction], "asyncio.Future[None] | None"],
        asking: Asking,
        publish_timeout: float,
    ) -> None:
        self._publisher, self._evict, self._asking = publisher, evict, asking
        self._timeout = 2 * publish_timeout

    async def invalidate(self, invalidations: Invalidations, question: Question | None) -> None:
        """Evicts here, publishes, and waits for the confirm.

        Raises:
            PublishError: the broker did not confirm it. It may have arrived nevertheless.
        """
        invalidations.warn_if_large()
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        evicting = self._evict(
            Eviction(invalidations.keys, invalidations.tags, invalidations.everything, reason="own write")
        )
        if question is not None:
            self._asking.committed(question, evicted_here=evicting is None)
        tracing = self._publisher.tracing
        self._publisher.submit(
            Unpublished(
                keys=invalidations.keys,
                tags=invalidations.tags,
                everything=invalidations.everything,
                evicted_here=evicting is None,
                confirmed=confirmed,
                question=question,
                context=tracing.current() if tracing is not None else None,
            )
        )
        if evicting is not None:
            await asyncio.shield(evicting)
        try:
            async with asyncio.timeout(self._timeout):
                await confirmed
        except TimeoutError:
            raise PublishError(
                f"the broker did not confirm within {self._timeout:g} s (twice CACHEINVAL_PUBLISH_TIMEOUT); the message "
                "may still arrive"
            ) from None
