"""For how long names gather before they are published."""

import pytest

from cacheinval.pace import BUSY, GATHER_MOST, PLENTY, Pace


def gathered(rate: float, seconds: float = 1.0, together: int = 1) -> float:
    """What the next write waits for, where `rate` come in a second, each time so many together."""
    pace, now = Pace(), 100.0
    for number in range(int(rate * seconds / together)):
        now = 100.0 + number * together / rate
        pace.published(together, now)
    return pace.gather(now + together / rate)


def test_the_first_write_waits_for_nobody() -> None:
    assert Pace().gather(0.0) == 0.0


@pytest.mark.parametrize("rate", [1, 100, 200, 400])
def test_few_wait_for_nobody(rate: float) -> None:
    assert gathered(rate) == 0.0


def test_the_more_come_the_longer_they_wait() -> None:
    waits = [gathered(rate) for rate in (700, 1000, 1500, 2500, 10_000)]
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(GATHER_MOST * 700 / PLENTY, rel=0.1)
    assert waits[-1] == GATHER_MOST


def test_what_chance_brings_together_is_no_crowd() -> None:
    pace = Pace()
    for number in range(100):
        pace.published(1, 100.0 + number * 0.005)
    pace.published(4, 100.5)
    assert pace.gather(100.501) == 0.0


def test_a_crowd_is_soon_forgotten() -> None:
    pace = Pace()
    for number in range(1000):
        pace.published(8, 100.0 + number * 0.002)
    assert pace.gather(102.0) == GATHER_MOST
    assert pace.gather(102.1) == 0.0


def test_nothing_is_lost_where_a_crowd_comes_at_once() -> None:
    pace = Pace()
    pace.published(1000, 100.0)
    assert pace.gather(100.0) == GATHER_MOST
    assert pace._lately(101.0) < BUSY
