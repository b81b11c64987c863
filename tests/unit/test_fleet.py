"""How an instance answers whoever asks how it is."""

import asyncio
from typing import Any

import pytest
from waiting import Eventually

from cacheinval import fleet
from cacheinval.errors import PublishError
from cacheinval.fleet import Respondent
from cacheinval.messages import Ask

ASK = Ask(v=1)


class Bus:
    """Takes answers; while `open` is not set, it keeps them waiting."""

    def __init__(self) -> None:
        self.begun = self.sent = 0
        self.open = asyncio.Event()
        self.fails = False

    async def answer(self, delivery: Any, body: bytes) -> None:
        self.begun += 1
        await self.open.wait()
        if self.fails:
            raise PublishError("blocked")
        self.sent += 1


async def test_answers_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch, eventually: Eventually) -> None:
    """While the broker blocks publishers, whoever asks goes on asking."""
    monkeypatch.setattr(fleet, "MOST_ANSWERS", 10)
    bus: Any = Bus()
    auditor: Any = None

    async def status(evictions: float | None) -> dict[str, Any]:
        return {}

    respondent = Respondent("one", lambda: bus, status, auditor, asyncio.create_task)
    for _ in range(15):
        respondent.answer(None, ASK)
    await eventually(lambda: bus.begun == 10)
    bus.open.set()
    await eventually(lambda: bus.sent == 10)
    assert bus.begun == 10
    respondent.answer(None, ASK)
    await eventually(lambda: bus.sent == 11)
    bus.fails = True
    respondent.answer(None, ASK)
    await eventually(lambda: bus.begun == 12)
    assert bus.sent == 11
