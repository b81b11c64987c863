"""A receiver for tests of buses: it notes what it is told, and can be made to wait, to fail, or to refuse."""

import asyncio
from collections.abc import Callable, Sequence

from cacheinval.bus import Delivery


class Recorder:
    """`told` is the story in order: "joined", "resumed", "lost: why"; `bodies` is what was received to the end."""

    def __init__(self, judge: Callable[[bytes], str | None] = lambda body: None) -> None:
        self.told: list[str] = []
        self.renewals = 0
        self.position: int | None = None
        self.begun: list[Delivery] = []
        self.bodies: list[bytes] = []
        self.overheard: list[bytes] = []
        self.failure: Exception | None = None
        self.joining = asyncio.Event()
        self.open = asyncio.Event()  # while it is not set, `receive` waits
        self.open.set()
        self.may_join = asyncio.Event()  # while it is not set, `joined` waits
        self.may_join.set()
        self._judge = judge

    @property
    def ready(self) -> bool:
        return bool(self.told) and not self.told[-1].startswith("lost")

    async def renewing(self) -> None:
        assert not self.ready
        self.renewals += 1

    async def joined(self, *, resumed: bool) -> None:
        self.joining.set()
        await self.may_join.wait()
        self.told.append("resumed" if resumed else "joined")

    def lost(self, reason: str) -> None:
        self.told.append(f"lost: {reason}")

    async def receive(self, deliveries: Sequence[Delivery]) -> list[str | None]:
        self.begun += deliveries
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        self.bodies += [delivery.body for delivery in deliveries]
        return [self._judge(delivery.body) for delivery in deliveries]

    def overhear(self, deliveries: Sequence[Delivery]) -> None:
        self.overheard += [delivery.body for delivery in deliveries]

    def receive_now(self, deliveries: Sequence[Delivery]) -> None:
        """It may have to wait."""
