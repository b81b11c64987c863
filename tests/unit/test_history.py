"""The checker of the fault tests must see each lie, and no lie where there is none."""

from pathlib import Path

import pytest
from history import Checked, Evicted, Fault, History, Promised, Read, Seen, State, Tick, Write

STALENESS = 1.0
QUIET = 10.0
PROMISED = Promised(STALENESS, QUIET, {"a": 2, "b": 1}, ["one"])

# Version 1 of both, then `a` is written at 5; the instance hears of it at 5.1, and a tick of 5.2 at 5.3.
HONEST: list[Seen] = [
    Write("a", 0.9, 1, 1.0),
    Write("b", 0.9, 1, 1.0),
    Read("one", "a", 4.0, 4.1, 1, "miss"),
    Write("a", 4.9, 2, 5.0),
    Read("one", "a", 5.05, 5.06, 1, "hit"),
    Evicted("one", "a", 2, 5.1),
    Read("one", "a", 5.15, 5.16, 2, "miss"),
    Tick("one", 5.3, 5.2, extends=2.0),
    Read("one", "a", 6.5, 6.5, 2, "hit"),
    Write("a", 7.0, None, None),
    Read("one", "a", 10.1, 10.1, 2, "hit"),
    Read("one", "b", 10.2, 10.2, 1, "hit"),
]


def checked(*more: Seen, without: int | None = None, promised: Promised = PROMISED) -> Checked:
    history = History()
    for number, note in enumerate(HONEST):
        if number != without:
            history.note(note)
    for note in more:
        history.note(note)
    return history.check(promised)


def test_an_honest_history_is_in_order_and_counted() -> None:
    assert checked() == Checked(
        reads=6, hits=4, writes=3, unknown_writes=1, evictions=1, ticks=1, settled_hits=2
    )


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (Read("two", "a", 6.01, 6.02, 1, "hit"), "a hit staler than 1 s: two gave version 1 of a (hit)"),
        (Read("one", "a", 5.11, 5.12, 1, "hit"), "older than what was evicted: one gave version 1 of a"),
        (Read("one", "a", 5.11, 5.12, 1, "miss"), "older than what was evicted: one gave version 1 of a"),
        (Read("one", "a", 10.3, 10.3, 3, "miss"), "settled, and not what the database has"),
        (Read("one", "b", 10.3, 10.3, 0, "hit"), "settled, and not what the database has"),
        (Tick("two", 5.02, 5.01, extends=2.0), "a tick that was not true: two gave version 1 of a"),
    ],
)
def test_a_lie_is_seen(lie: Seen, said: str) -> None:
    deaf = Read(
        "two", "a", 5.5, 5.5, 1, "hit"
    )  # no lie by itself: nobody has told it, and it is young enough
    assert checked(deaf).breaches == []
    breaches = checked(deaf, lie).breaches
    assert len(breaches) >= 1
    assert any(breach.startswith(said) for breach in breaches), breaches


def test_an_order_of_versions_that_is_not_that_of_their_acknowledgements() -> None:
    late = Write("a", 5.5, 1, 9.0)  # version 1 was committed before 2, and its writer learned it long after
    assert checked(late).breaches == []
    assert checked(late, Read("two", "a", 9.9, 9.9, 1, "hit")).breaches != []


def test_what_nobody_promised_is_no_lie() -> None:
    # A miss loads what the database has, or had when the load began.
    assert checked(Read("two", "a", 8.0, 8.1, 1, "miss")).breaches == []
    # A write whose outcome nobody knows may not have happened, or have happened.
    unknown = Write("a", 7.5, 3, None)
    assert checked(unknown, Read("two", "a", 9.5, 9.5, 3, "hit")).breaches == []
    assert checked(unknown, Read("two", "a", 9.5, 9.5, 2, "hit")).breaches == []
    # It is published nevertheless, perhaps before anybody can see it, and its version may then be another write's.
    told = Evicted("one", "a", 3, 7.6)
    assert checked(unknown, told, Read("one", "a", 7.7, 7.7, 2, "miss")).breaches == []
    again = Write("a", 7.8, 3, 8.0)
    promised = Promised(STALENESS)
    early, late = Read("one", "a", 7.9, 7.9, 2, "miss"), Read("one", "a", 8.1, 8.1, 2, "miss")
    before = checked(unknown, told, again, promised=promised).breaches
    assert checked(unknown, told, again, early, promised=promised).breaches == before
    assert checked(unknown, told, again, late, promised=promised).breaches == before
    told_again = Evicted("one", "a", 3, 8.05)
    after = checked(unknown, told, again, told_again, promised=promised).breaches
    assert checked(unknown, told, again, told_again, early, promised=promised).breaches == after
    assert len(checked(unknown, told, again, told_again, late, promised=promised).breaches) == len(after) + 1
    # What was loaded before the first tick of a subscription is not proven by it, and served for a second at most.
    first = Tick("two", 5.5, 5.4, extends=5.4)
    assert checked(first, Read("two", "a", 5.6, 5.6, 1, "hit")).breaches == []
    # Without a bound only what was evicted counts, and what is settled.
    eventual = Promised(None, QUIET, PROMISED.truth, ["one"])
    assert checked(Read("two", "a", 9.9, 9.9, 1, "hit"), promised=eventual).breaches == []


def test_a_key_that_nobody_has_in_his_cache_again_is_said() -> None:
    assert checked(without=len(HONEST) - 1).breaches == [
        "settled, and never a hit: [('one', 'b')] and 1 in all"
    ]


def test_what_another_process_writes_is_followed_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "written.jsonl"
    with path.open("w", buffering=1) as sink:
        there, here = History(sink), History()
        for note in [*HONEST, Fault(3.0, "a fault"), State("one", 4.0, True, 1, 3.9)]:
            there.note(note)
        sink.write('{"type":"read","instance":"one"')  # killed in the middle of a line
    here.follow(path)
    here.follow(path)
    assert here.check(PROMISED) == checked()
    assert here.latest["one"].watermark == 3.9

    kept = here.keep(tmp_path / "kept.jsonl")
    assert History.kept(kept).check(PROMISED) == checked()
    assert History.kept(kept).faults == [Fault(3.0, "a fault")]
