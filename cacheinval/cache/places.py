"""Places for loaders: so many run at a time, and further ones wait for their turn."""

import asyncio
from collections.abc import Hashable

__all__ = ["Places"]


class Places:
    """A number of places, given to those who wait in the order in which they came.

    Args:
        most: how many there are.
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: dict[Hashable, asyncio.Future[bool]] = {}

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def take(self) -> bool:
        """Takes a place if one is free."""
        if self._free:
            self._free -= 1
            return True
        return False

    async def wait(self, who: Hashable) -> bool:
        """Waits until `who` may go on; returns whether that takes a place, which is then to be given back."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[who] = turn
        try:
            return await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.result():
                self.give_back()  # cancelled between its turn and its waking
            raise
        finally:
            self._waiting.pop(who, None)

    def admit(self, who: Hashable) -> None:
        """Lets `who`, if it waits, go on without a place: somebody who has one waits for it."""
        turn = self._waiting.pop(who, None)
        if turn is not None and not turn.done():
            turn.set_result(False)

    def give_back(self) -> None:
        """Gives a place to the next who waits."""
        while self._waiting:
            turn = self._waiting.pop(next(iter(self._waiting)))
            if not turn.done():
                turn.set_result(True)
                return
        self._free += 1
