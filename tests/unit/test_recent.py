"""What an instance remembers of its evictions, and tells whoever asks."""

import asyncio
from typing import Any

import msgspec
import pytest
from waiting import Eventually

from cacheinval import recent
from cacheinval.client import Client
from cacheinval.messages import Invalidate
from cacheinval.recent import RecentEvictions
from cacheinval.settings import Settings


def message(seq: int, **fields: Any) -> Invalidate:
    return Invalidate(v=1, origin="o", seq=seq, at=9.0, **fields)


class TestRemembering:
    def test_it_tells_what_is_younger_the_oldest_first(self) -> None:
        kept = RecentEvictions()
        for seq in range(1, 5):
            kept.note(message(seq, keys=[f"k{seq}"]), float(seq))
        told = kept.told(2.5, 4.0)
        assert (told.since, told.until) == (1.5, 4.0)
        assert [(one.seq, one.at, one.keys) for one in told.told] == [
            (2, 2.0, ["k2"]),
            (3, 3.0, ["k3"]),
            (4, 4.0, ["k4"]),
        ]

    def test_it_says_from_when_on_it_tells_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recent, "MOST_TOLD", 3)
        kept = RecentEvictions()
        for seq in range(1, 10):
            kept.note(message(seq, keys=["k"]), float(seq))
        told = kept.told(60.0, 9.0)
        assert ([one.seq for one in told.told], told.since) == ([7, 8, 9], 7.0)

    def test_what_it_has_forgotten_it_does_not_claim_to_tell(self) -> None:
        kept = RecentEvictions()
        for seq in range(recent.MOST_KEPT + 50):
            kept.note(message(seq + 1, keys=["k"]), float(seq))
        now = float(recent.MOST_KEPT + 49)
        assert kept.told(1e9, now).since == now - recent.MOST_TOLD + 1
        assert recent.MOST_TOLD < recent.MOST_KEPT

    def test_few_names_are_told_and_those_not_whole(self) -> None:
        kept = RecentEvictions()
        kept.note(message(1, keys=["k" * 512] * 1000, tags=["t"]), 1.0)
        kept.note(message(2, keys=["a"], tags=["b", "c", "d"]), 1.0)
        kept.note(message(3, all=True), 1.0)
        many, mixed, everything = kept.told(9, 1.0).told
        assert (len(many.keys), many.tags, many.more) == (3, [], 998)
        assert {len(key) for key in many.keys} == {recent.NAME_LENGTH}
        assert (mixed.keys, mixed.tags, mixed.more) == (["a"], ["b", "c"], 1)
        assert (everything.all, everything.more) == (True, 0)

    def test_an_answer_stays_small(self) -> None:
        kept = RecentEvictions()
        for seq in range(1000):
            kept.note(message(seq + 1, keys=["\N{GRINNING FACE}" * 128] * 1000), 1.0)
        assert len(msgspec.json.encode(kept.told(60, 1.0))) < 64_000


class TestInstances:
    async def test_each_tells_of_others_writes_its_own_and_its_epochs(
        self, namespace: str, eventually: Eventually
    ) -> None:
        settings = Settings(broker_url="memory://", database_url="", namespace=namespace)
        answers: list[dict[str, Any]] = []
        other = settings.model_copy(update={"instance_id": "other"})
        async with Client(settings) as writer, Client(other) as reader:
            await writer.wait_ready(30)
            await reader.wait_ready(30)
            await writer.invalidate("key", tags=["tag"])
            inquiry = writer.outlook.inquire(answers.append)

            async def told() -> bool:
                answers.clear()
                await inquiry.ask(60)
                await asyncio.sleep(0.01)
                return len(answers) == 2 and all(len(answer["evictions"]["told"]) == 2 for answer in answers)

            await eventually(told)
            await inquiry.close()
        by_id = {answer["id"]: answer["evictions"]["told"] for answer in answers}
        (epoch, own), (_, others) = by_id[writer.settings.instance_id], by_id[reader.settings.instance_id]
        assert (epoch["all"], epoch["reason"]) == (True, "new subscription")
        assert (own["own"], own["keys"], own["tags"]) == (True, ["key"], ["tag"])
        assert "own" not in others
        assert (others["origin"], others["seq"]) == (own["origin"], own["seq"])
        assert others["at"] >= others["committed_at"]

    async def test_nobody_is_told_who_did_not_ask_for_it(self, namespace: str) -> None:
        settings = Settings(broker_url="memory://", database_url="", namespace=namespace)
        async with Client(settings) as client:
            await client.wait_ready(30)
            (status,) = await client.ask_instances(0.05)
        assert "evictions" not in status
