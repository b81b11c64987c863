"""Comparing a cache with its source: who is accused, who is not, and that an audit leaves no trace."""

import asyncio
import gc
import logging
import random
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cacheinval import audit as auditing
from cacheinval.audit import Auditor, AuditReport, Comparison, Loaders, Verdict, verdict
from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.cache import InProcessCache
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence, Eviction

SAME, DIFFERENT, UNKNOWN, GONE = Comparison


class Source:
    """The source of truth; `loads` counts how often it was asked."""

    def __init__(self, value: Any = "true") -> None:
        self.value = value
        self.loads = 0

    async def __call__(self) -> Any:
        self.loads += 1
        return self.value


class House:
    """A cache with all that an audit of it needs, and no delay between two looks."""

    def __init__(self, room: int = 1000) -> None:
        self.coherence = Coherence()
        self.coherence.evict(self.coherence.joined_anew(0.0), 0.0)
        self.coherence.trust()
        self.backend = BoundedMemoryCache(room)
        self.loaders = Loaders()
        self.cache = InProcessCache(self.backend, self.coherence, Clock(), 300, self.loaders.remember)
        self.auditor = self.make_auditor()

    def make_auditor(self, least_delay: float = 0.0, interval: float = 0.0) -> Auditor:
        return Auditor(self.cache, self.loaders, least_delay=least_delay, interval=interval)

    async def read(self, key: str, source: Callable[[], Awaitable[Any]], *tags: str) -> Any:
        return await self.cache.get_or_set(key, source, tags=tags)

    def poison(self, key: str, value: Any = "lie") -> None:
        """Puts a wrong value into the cache, behind its back."""
        self.backend.look(key).value = value  # type: ignore[union-attr]

    def evict(self, *keys: str, tags: tuple[str, ...] = (), everything: bool = False) -> None:
        eviction = Eviction(keys, tags, everything)
        self.coherence.evict(eviction, self.cache._now())
        self.cache.evict_now(eviction)

    async def audit(self, sample: int = 1000, delay: float = 0.0) -> AuditReport:
        async with asyncio.timeout(30):
            return await self.auditor.audit(sample, delay)


@pytest.fixture
async def house() -> House:
    return House()


# The verdict


@pytest.mark.parametrize(
    ("first", "second", "judged"),
    [
        (SAME, None, Verdict.CONSISTENT),
        (UNKNOWN, None, Verdict.FAILED),
        (GONE, None, Verdict.SETTLING),
        (DIFFERENT, None, None),  # look again
        (DIFFERENT, SAME, Verdict.SETTLING),
        (DIFFERENT, GONE, Verdict.SETTLING),
        (DIFFERENT, UNKNOWN, Verdict.FAILED),
        (DIFFERENT, DIFFERENT, Verdict.INCONSISTENT),
    ],
)
def test_only_what_differs_at_both_looks_is_accused(
    first: Comparison, second: Comparison | None, judged: Verdict | None
) -> None:
    assert verdict(first, second) is judged


# What is found


async def test_what_is_as_its_source_is_consistent(house: House) -> None:
    sources = {f"k{n}": Source([n]) for n in range(5)}
    for key, source in sources.items():
        await house.read(key, source)
        source.value = list(source.value)  # equal, and not the same object
    assert await house.audit() == AuditReport(checked=5, consistent=5)
    assert [source.loads for source in sources.values()] == [2] * 5


@pytest.mark.parametrize("value", [None, 0, "", []])
async def test_false_values_are_compared_like_others(house: House, value: Any) -> None:
    await house.read("k", Source(value))
    assert await house.audit() == AuditReport(checked=1, consistent=1)
    house.poison("k")
    assert (await house.audit()).inconsistent == 1


async def test_a_lie_is_inconsistent_and_stays_where_it_is(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    for key in ("lie", "truth"):
        await house.read(key, Source())
    house.poison("lie")
    with caplog.at_level(logging.INFO, "cacheinval.audit"):
        report = await house.audit()
    assert report == AuditReport(checked=2, consistent=1, inconsistent=1, examples=("lie",))
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert error.getMessage() == "inconsistent entry key=lie"
    assert await house.read("lie", Source()) == "lie", "an audit observes"
    assert (await house.audit()).inconsistent == 1, "and says so again"
    assert house.auditor.counters.inconsistent == 2


async def test_at_most_ten_are_named_and_all_are_counted(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(25):
        await house.read(f"k{n}", Source())
        house.poison(f"k{n}")
    report = await house.audit()
    assert report.inconsistent == 25
    assert len(set(report.examples)) == 10
    assert sum(record.levelno == logging.ERROR for record in caplog.records) == 10


async def test_a_changed_source_is_no_accusation_while_the_invalidation_is_in_flight(house: House) -> None:
    async def load() -> str:
        # What a write does to other instances: it is visible first, and evicted a moment later.
        asyncio.get_running_loop().call_soon(house.evict, "k")
        return "new"

    await house.read("k", Source("old"))
    house.loaders.remember("k", load)
    assert await house.audit(delay=0.02) == AuditReport(checked=1, settling=1)


async def differs_at_first(house: House) -> "asyncio.Task[AuditReport]":
    """An audit that has seen `k` differ from its source, and waits."""
    source = Source("old")
    await house.read("k", source, "t")
    source.value = "new"
    auditing = asyncio.create_task(house.audit(delay=0.05))
    async with asyncio.timeout(30):
        while source.loads < 2:
            await asyncio.sleep(0)
    return auditing


@pytest.mark.parametrize(
    "change",
    [
        lambda house: house.evict("k"),
        lambda house: house.evict(tags=("t",)),
        lambda house: house.evict(everything=True),
        lambda house: house.backend.drop(["k"]),
    ],
    ids=["key", "tag", "everything", "dropped"],
)
async def test_what_is_no_longer_served_was_settling(house: House, change: Callable[[House], None]) -> None:
    auditing = await differs_at_first(house)
    change(house)
    assert await auditing == AuditReport(checked=1, settling=1)


async def test_what_is_replaced_was_settling_even_by_the_same_wrong_value(house: House) -> None:
    auditing = await differs_at_first(house)
    house.evict("k")
    await house.read("k", Source("old"))
    assert await auditing == AuditReport(checked=1, settling=1)


async def test_what_an_instance_in_doubt_does_not_serve_was_settling(house: House) -> None:
    auditing = await differs_at_first(house)
    house.backend.look("k").load_started -= 2  # type: ignore[union-attr]
    house.coherence.lost("a test")
    assert await auditing == AuditReport(checked=1, settling=1)


async def test_a_source_that_comes_back_was_settling(house: House) -> None:
    answers = iter(["passing", "old"])

    async def load() -> str:
        return next(answers)

    await house.read("k", Source("old"))
    house.loaders.remember("k", load)
    assert await house.audit() == AuditReport(checked=1, settling=1)


async def test_nothing_is_accused_sooner_than_the_rules_allow_it_to_be_stale(house: House) -> None:
    await house.read("k", Source())
    house.poison("k")
    house.auditor = house.make_auditor(least_delay=0.2)
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert (await house.audit(delay=0.0)).inconsistent == 1
    assert loop.time() - began >= 0.2
    assert house.auditor.state["delay"] == 1.2


async def test_a_delay_has_a_bound(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "LONGEST_DELAY", 0.01)
    await house.read("k", Source())
    house.poison("k")
    assert (await house.audit(delay=1e9)).inconsistent == 1


# Loaders that fail


async def raise_error() -> Any:
    raise OSError("the database is down")


async def hang() -> Any:
    await asyncio.Event().wait()


async def be_cancelled_by_a_library() -> Any:
    raise asyncio.CancelledError


@pytest.mark.parametrize("loader", [raise_error, hang, be_cancelled_by_a_library])
async def test_a_loader_that_fails_accuses_nobody(
    house: House, monkeypatch: pytest.MonkeyPatch, loader: Callable[[], Awaitable[Any]]
) -> None:
    monkeypatch.setattr(auditing, "LOAD_TIMEOUT", 0.02)
    for n in range(10):
        await house.read(f"k{n}", Source())
        house.loaders.remember(f"k{n}", loader)
    await house.read("truth", Source())
    assert await house.audit() == AuditReport(checked=11, consistent=1, failed=10)


@pytest.mark.parametrize("loader", [raise_error, hang])
async def test_nor_does_one_that_fails_at_the_second_look(
    house: House, monkeypatch: pytest.MonkeyPatch, loader: Callable[[], Awaitable[Any]]
) -> None:
    monkeypatch.setattr(auditing, "LOAD_TIMEOUT", 0.02)
    loads = 0

    async def load() -> Any:
        nonlocal loads
        loads += 1
        return "new" if loads == 1 else await loader()

    await house.read("k", Source("old"))
    house.loaders.remember("k", load)
    assert await house.audit() == AuditReport(checked=1, failed=1)


async def test_values_without_an_equality_are_not_compared(house: House) -> None:
    async def load() -> object:
        return object()

    await house.read("k", load)
    assert await house.audit() == AuditReport(checked=1, failed=1)


async def test_values_whose_comparison_fails_are_not_compared(house: House) -> None:
    class Strange:
        def __eq__(self, other: object) -> bool:
            raise ValueError("ambiguous")

    await house.read("k", Source(Strange()))
    house.poison("k", Strange())
    assert await house.audit() == AuditReport(checked=1, failed=1)


async def test_what_its_turn_does_not_come_for_is_not_judged(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = await differs_at_first(house)
    monkeypatch.setattr(auditing, "LOOKS_BEGIN_WITHIN", -1.0)
    assert await audit == AuditReport(checked=1, failed=1)
    assert await house.audit() == AuditReport()


# What it costs


async def test_it_counts_as_no_read_and_stores_nothing(house: House) -> None:
    await house.read("k", Source())
    await house.read("k", Source())
    before = {name: getattr(house.cache.counters, name) for name in house.cache.counters.__slots__}
    entry, source = house.backend.look("k"), Source()
    house.loaders.remember("k", source)
    house.poison("k")
    await house.audit()
    assert source.loads == 3
    assert house.backend.look("k") is entry
    assert {name: getattr(house.cache.counters, name) for name in before} == before
    assert not house.coherence.loads._loads


async def test_entries_stay_as_recently_used_as_they_were() -> None:
    house = House(room=2)
    await house.read("first", Source())
    await house.read("second", Source())
    house.loaders.forget(dict(entry for entry in house.loaders.shuffled() if entry[0] == "second"))
    assert await house.audit() == AuditReport(checked=1, consistent=1)
    await house.read("third", Source())
    assert house.backend.look("first") is None
    assert house.backend.look("second") is not None


async def test_loaders_that_read_other_keys_read_their_source_too(house: House) -> None:
    part = Source("true part")

    async def whole() -> str:
        return f"whole of {await house.read('part', part)}"

    async def lie() -> str:
        return "lie"

    await house.read("part", lie)
    assert await house.read("whole", whole) == "whole of lie"
    house.loaders.remember("part", part)
    report = await house.audit()
    assert (report.checked, report.inconsistent) == (2, 2)
    assert sorted(report.examples) == ["part", "whole"]
    assert house.backend.look("part").value == "lie"  # type: ignore[union-attr]


async def test_a_few_loads_run_at_once_and_never_more(house: House) -> None:
    running, most = 0, 0

    async def load() -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return "true"

    for n in range(40):
        await house.read(f"k{n}", load)
    most = 0
    assert (await house.audit()).consistent == 40
    assert most == auditing.LOADS_AT_ONCE


async def test_no_more_than_the_sample_is_loaded(house: House) -> None:
    source = Source()
    for n in range(40):
        await house.read(f"k{n}", source)
    source.loads = 0
    assert await house.audit(sample=7) == AuditReport(checked=7, consistent=7)
    assert source.loads == 7


async def test_a_sample_has_a_bound(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "MOST_ENTRIES", 5)
    for n in range(10):
        await house.read(f"k{n}", Source())
    assert (await house.audit(sample=10**9)).checked == 5


async def test_only_what_is_cached_is_compared_and_the_rest_forgotten(house: House) -> None:
    gone = Source()
    for n in range(20):
        await house.read(f"gone{n}", gone)
    house.evict(everything=True)
    for n in range(3):
        await house.read(f"k{n}", Source())
    gone.loads = 0
    assert await house.audit(sample=3) == AuditReport(checked=3, consistent=3)
    assert await house.audit() == AuditReport(checked=3, consistent=3)
    assert gone.loads == 0
    assert len(house.loaders) == 3


async def test_one_audit_at_a_time(house: House) -> None:
    release, loads = asyncio.Event(), 0

    async def load() -> str:
        nonlocal loads
        loads += 1
        await release.wait()
        return "true"

    await house.read("k", Source())
    house.loaders.remember("k", load)
    audits = [asyncio.create_task(house.audit()) for _ in range(3)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert (loads, house.auditor.state["running"]) == (1, True)
    release.set()
    assert await asyncio.gather(*audits) == [AuditReport(checked=1, consistent=1)] * 3
    assert (loads, house.auditor.state["running"]) == (3, False)


@pytest.mark.parametrize("where", ["in a load", "between the looks"])
async def test_a_cancelled_audit_leaves_nothing_behind(house: House, where: str) -> None:
    before = asyncio.all_tasks()
    ended = asyncio.Event()

    async def load() -> str:
        try:
            if where == "in a load":
                await hang()
            return "new"
        finally:
            ended.set()

    source = Source("old")
    await house.read("k", source)
    house.loaders.remember("k", load)
    auditing = asyncio.create_task(house.auditor.audit(10, 600.0))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) > len(before)
    auditing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await auditing
    assert ended.is_set()
    assert asyncio.all_tasks() == before
    house.loaders.remember("k", source)
    assert await house.audit() == AuditReport(checked=1, consistent=1)


async def test_a_cancelled_audit_begins_no_other_load(house: House) -> None:
    begun = 0

    async def load() -> None:
        nonlocal begun
        begun += 1
        await hang()

    for n in range(20):
        await house.read(f"k{n}", Source())
        house.loaders.remember(f"k{n}", load)
    audit = asyncio.create_task(house.audit())
    while begun < auditing.LOADS_AT_ONCE:
        await asyncio.sleep(0)
    audit.cancel()
    await asyncio.wait([audit], timeout=5)
    assert audit.cancelled()
    assert begun == auditing.LOADS_AT_ONCE


async def test_it_runs_again_and_again(house: House, caplog: pytest.LogCaptureFixture) -> None:
    source = Source()
    for n in range(100):
        await house.read(f"k{n}", source)
    source.loads = 0
    auditor = house.make_auditor(interval=0.005)
    running = asyncio.create_task(auditor.run())
    async with asyncio.timeout(30):
        while auditor.counters.runs < 3:
            await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait([running])
    assert auditor.counters.checked == auditor.counters.consistent == source.loads == 20 * 3


# Whose loaders are known


class Loading:
    async def __call__(self) -> str:
        return "value"


def test_the_loaders_remembered_are_bounded_and_let_go() -> None:
    loaders = Loaders(most=10, among=1000)
    remembered = []
    for n in range(5_000):
        loader = Loading()
        remembered.append(weakref.ref(loader))
        loaders.remember(f"k{n}", loader)
    del loader
    gc.collect()
    assert len(loaders) == len(loaders.shuffled()) == sum(loader() is not None for loader in remembered) == 10


def test_they_are_a_sample_of_the_loads_of_late() -> None:
    random.seed(7)
    loaders = Loaders(most=200, among=2_000)
    for n in range(2_000):
        loaders.remember(str(n), Loading())
    halves = [int(key) < 1_000 for key, _ in loaders.shuffled()]
    assert 60 < sum(halves) < 140, "each load has the same chance"
    for n in range(2_000, 22_000):
        loaders.remember(str(n), Loading())
    assert sum(int(key) < 2_000 for key, _ in loaders.shuffled()) < 5, "and the old ones give way"


def test_a_key_has_its_latest_loader() -> None:
    loaders, first, second = Loaders(most=1, among=1), Loading(), Loading()
    loaders.remember("k", first)
    loaders.remember("k", second)
    assert [(key, loader.factory) for key, loader in loaders.shuffled()] == [("k", second)]
    loaders.forget({"k": auditing.Loader(second, None)})
    assert len(loaders) == 1, "loaded again meanwhile"
    loaders.remember("other", first)
    assert [key for key, _ in loaders.shuffled()] == ["other"]
    loaders.forget(dict(loaders.shuffled()))
    assert len(loaders) == 0


async def test_hits_and_loads_that_are_not_stored_are_not_remembered(house: House) -> None:
    remembered: list[str] = []
    house.cache._remember = lambda key, *_: remembered.append(key)
    for _ in range(3):
        await house.read("k", Source())

    async def evicted_meanwhile() -> str:
        house.evict("voided")
        return "old"

    await house.read("voided", evicted_meanwhile)
    assert remembered == ["k"]
