"""What an instance knows of its row in the table, and what it may serve on the strength of that."""

import asyncio
import math

import pytest

from cacheinval.backends.memory import BoundedMemoryCache
from cacheinval.cache import InProcessCache
from cacheinval.clock import Clock
from cacheinval.coherence import Coherence
from cacheinval.coherence.registration import NOT_YET, SHORTEST_LEASE, Registration

SKEW = 0.1


def registration(**options: bool) -> Registration:
    return Registration(5.0, SKEW, required=True, **options)


def register(one: Registration, at: float, took: float = 0.0, since: float = math.inf) -> None:
    """Sent at `at`, executed at once, and answered `took` seconds later."""
    one.sending(at)
    one.answered(at, since, at + took)


class TestLease:
    @pytest.mark.parametrize(
        ("staleness", "lease"), [(None, SHORTEST_LEASE), (5.0, SHORTEST_LEASE), (60.0, 120.0)]
    )
    def test_it_outlasts_what_could_be_proven_anyway(self, staleness: float | None, lease: float) -> None:
        one = Registration(staleness, SKEW, required=True)
        assert one.lease == lease
        assert 2 / 3 * lease - 2 * SKEW > (staleness or 0)

    def test_it_is_renewed_every_third_of_it(self) -> None:
        one = registration()
        assert one.due(0)
        register(one, 100, took=1)
        assert not one.due(103.3)
        assert one.due(103.4)

    def test_a_failure_is_tried_again_after_its_pause(self) -> None:
        one = registration()
        register(one, 100)
        one.sending(104)
        one.failed("the database is away", 105, 0.5)
        assert not one.due(105.4)
        assert one.due(105.5)


class TestServing:
    def test_nothing_is_served_before_it_is_registered(self) -> None:
        assert not registration().covers(100, 100)

    def test_only_what_was_loaded_since_the_answer(self) -> None:
        one = registration()
        register(one, 100, took=1)
        assert not one.covers(101, 102)
        assert one.covers(101.1, 102)

    def test_not_after_the_lease_counted_from_the_sending_less_what_clocks_may_differ(self) -> None:
        one = registration()
        register(one, 100, took=1)
        assert one.covers(102, 109.7)
        assert not one.covers(102, 109.81)

    def test_a_renewal_in_time_keeps_what_was_loaded_before_it(self) -> None:
        one = registration()
        register(one, 100)
        register(one, 104, took=5)
        assert one.covers(101, 113)

    def test_one_that_was_answered_after_the_lease_does_not(self) -> None:
        one = registration()
        register(one, 100)
        register(one, 104, took=5.9)
        assert not one.covers(109, 111)
        assert one.covers(110, 111)

    def test_an_instance_that_has_left_serves_nothing(self) -> None:
        one = registration()
        register(one, 100)
        one.forget()
        assert not one.covers(101, 102)

    def test_where_it_is_not_required_everything_is_served(self) -> None:
        one = Registration(None, SKEW)
        assert one.covers(-1e9, 1e9)
        register(one, 100)
        one.forget()
        assert one.covers(-1e9, 1e9)


class TestClocks:
    @pytest.mark.parametrize("told", [98.8, 102.2, 3700.0])
    def test_a_database_of_another_time_registers_no_cache_that_outlives_its_process(
        self, told: float
    ) -> None:
        one = registration(outlives=True)
        register(one, 90, since=50)
        one.sending(99)
        one.answered(told, math.inf, 102)
        assert not one.covers(95, 102)
        assert "this clock and the database's differ by" in (one.problem(102) or "")
        assert not one.due(102.2)

    @pytest.mark.parametrize("apart", [-3600.0, 3600.0])
    def test_a_cache_in_the_process_goes_by_its_own_clock_alone(self, apart: float) -> None:
        one = registration()
        for sent in (100.0, 104.0):
            one.sending(sent)
            one.answered(sent + apart, math.inf, sent + 1)
        assert one.problem(105) is None
        assert not one.covers(101, 105)
        assert one.covers(101.1, 113.7)
        assert not one.covers(101.1, 113.81)

    def test_an_answer_that_comes_after_the_clock_was_set_counts_for_nothing(self) -> None:
        one = registration()
        one.sending(100)
        one.forget()
        one.answered(100, math.inf, 100)
        assert not one.covers(101, 102)
        assert one.due(0)


class TestTakenOver:
    """A cache outside the process holds what others loaded, by other clocks, in part before this process began."""

    def test_it_is_served_from_when_the_row_was_seen_by_everybody(self) -> None:
        one = registration(outlives=True)
        register(one, 100, since=50)
        assert not one.covers(50 + SKEW, 101)
        assert one.covers(50.2, 101)

    def test_not_before_a_second_statement_has_found_the_row(self) -> None:
        one = registration(outlives=True)
        register(one, 100)
        assert not one.covers(100.5, 101)
        assert one.due(100)
        register(one, 100.1, since=100.1)
        assert one.covers(100.5, 101)

    def test_an_answer_that_took_half_a_lease_may_have_left_a_hole(self) -> None:
        one = registration(outlives=True)
        register(one, 100, took=4.9, since=50)
        assert not one.covers(51, 105)
        assert one.covers(105.1, 106)

    def test_a_hole_of_this_process_is_not_forgotten(self) -> None:
        one = registration(outlives=True)
        register(one, 100, since=50)
        register(one, 104, took=6, since=50)
        assert not one.covers(109, 111)


class TestProblem:
    def test_it_says_why_nobody_waits_for_this_instance(self) -> None:
        one = Registration(None, SKEW)
        assert one.problem(100) == NOT_YET
        one.failed("no answer in time", 100, 1)
        assert one.problem(100) == "no answer in time"
        register(one, 101)
        assert one.problem(102) is None
        assert one.problem(111) == "the registration was not renewed in time"
        one.forget()
        assert one.problem(102) == "not registered any more"


class TestCoherence:
    def coherence(self) -> Coherence:
        coherence = Coherence(5.0, SKEW, registration=registration())
        coherence.evict(coherence.joined_anew(100), 100)
        coherence.trust()
        return coherence

    def test_one_that_is_not_registered_bypasses(self) -> None:
        coherence = self.coherence()
        load = coherence.loads.begin("k", 100)
        entry = load.entry(1, 1e9)
        assert not coherence.serving.may_serve(entry, 101)
        assert coherence.serving.bypassing(entry, 101)
        assert coherence.serving.bypassing(None, 101)
        assert coherence.loads.may_store(load)

    def test_it_serves_what_it_loaded_since(self) -> None:
        coherence = self.coherence()
        before = coherence.loads.begin("k", 100).entry(1, 1e9)
        register(coherence.registration, 101)
        coherence.settle("registration")
        after = coherence.loads.begin("k", 102).entry(1, 1e9)
        assert not coherence.serving.may_serve(before, 103)
        assert coherence.serving.bypassing(before, 103)
        assert coherence.serving.may_serve(after, 103)
        assert not coherence.serving.bypassing(after, 103)

    def test_a_load_is_given_only_to_readers_that_came_before_it(self) -> None:
        coherence = self.coherence()
        load = coherence.loads.begin("k", 100)
        assert coherence.loads.joinable("k", 101) is load, "one load of a key at a time"
        assert not coherence.loads.may_give(load, 100)
        assert coherence.loads.may_give(load, 99)
        register(coherence.registration, 99)
        assert coherence.loads.may_give(load, 101)

    def test_a_clock_that_was_set_drops_it(self) -> None:
        coherence = self.coherence()
        register(coherence.registration, 100)
        assert coherence.registration.covers(101, 102)
        coherence.clock_stepped(102)
        assert not coherence.registration.covers(101, 102)

    def test_until_it_is_registered_it_is_suspect(self) -> None:
        coherence = self.coherence()
        assert coherence.suspect == NOT_YET
        assert Coherence(5.0, SKEW).registration.covers(0, 1e9), "nobody else has to be"


class TestReading:
    """Readers of an instance that is not registered, each of whom must see what was committed before it came."""

    async def test_they_share_the_next_load_and_never_one_that_began_before_them(self) -> None:
        coherence = TestCoherence().coherence()
        clock = Clock()
        cache = InProcessCache(BoundedMemoryCache(10), coherence, clock, 60.0)
        running = most = loads = 0
        value = "old"
        may_end = asyncio.Event()

        async def load() -> str:
            nonlocal running, most, loads
            running, loads = running + 1, loads + 1
            most = max(most, running)
            seen = value
            await may_end.wait()
            await asyncio.sleep(0.001)
            running -= 1
            return seen

        first = asyncio.create_task(cache.get_or_set("k", load))
        await asyncio.sleep(0.001)
        value = "new"
        late = [asyncio.create_task(cache.get_or_set("k", load)) for _ in range(100)]
        await asyncio.sleep(0.001)
        assert loads == 1
        may_end.set()
        assert await first == "old"
        assert await asyncio.gather(*late) == ["new"] * 100
        assert (loads, most) == (2, 1)
