"""How far a stream has been read, and when reading it on proves that nothing was missed."""

from collections.abc import Iterator

import pytest

from cacheinval import coherence as rules
from cacheinval.coherence import Coherence, Eviction
from cacheinval.coherence.position import Position
from cacheinval.messages import Beat, Invalidate, Message, Probe, Tick, Unknown

ELSEWHERE, MISSING = "the stream does not go on where it was left", "messages missing in the stream"


def numbered(seq: int, origin: str = "o") -> Invalidate:
    return Invalidate(v=1, origin=origin, seq=seq, keys=["a"])


BARE = Invalidate(v=1, keys=["a"])
TICK = Tick(v=1, origin="r", seq=1, as_of=5.0)


def arrives(position: Position, offset: int, message: Message | Unknown | None) -> str | None:
    """What the rules make of it, and then it is evicted."""
    said = None if position.recognises(offset, message) else position.passes(offset, message)
    position.evicted()
    return said


@pytest.fixture
def position() -> Position:
    """One whose subscription has just begun."""
    position = Position()
    position.begin()
    return position


@pytest.mark.parametrize("message", [numbered(1), TICK])
def test_reading_goes_on_at_the_last_message_that_is_like_no_other(
    position: Position, message: Message
) -> None:
    assert arrives(position, 7, message) is None
    for offset, other in enumerate(
        [BARE, Probe(v=1, id="x"), Beat(v=1, origin="o", seq=1), Unknown("x"), None], 8
    ):
        assert arrives(position, offset, other) is None
    assert position.offset == 7


def test_it_is_no_place_to_go_on_at_before_it_is_evicted(position: Position) -> None:
    arrives(position, 7, numbered(1))
    assert position.passes(8, numbered(2)) is None
    assert position.offset == 7
    position.leave()  # and so it was not: the message has to come again
    position.evicted()
    assert position.offset == 7


def test_what_is_still_in_hand_when_the_subscription_is_lost_moves_nothing(position: Position) -> None:
    arrives(position, 7, numbered(1))
    position.leave()
    assert arrives(position, 90, numbered(2)) is None
    assert position.offset == 7


def test_the_message_that_was_there_is_recognised_and_what_follows_follows(position: Position) -> None:
    arrives(position, 7, numbered(1))
    arrives(position, 8, BARE)
    position.leave()
    position.begin()
    assert position.recognises(7, numbered(1))
    assert not position.recognises(8, BARE)
    assert arrives(position, 8, BARE) is None  # once more
    assert arrives(position, 9, numbered(2)) is None
    assert position.offset == 9


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (7, numbered(2)),
        (7, BARE),
        (7, None),
        (7, TICK),
        (7, numbered(1, "p")),
        (8, numbered(1)),
        (6, numbered(1)),
        (0, BARE),
    ],
)
def test_anything_else_in_its_place_is_a_gap(
    position: Position, offset: int, message: Message | None
) -> None:
    arrives(position, 7, numbered(1))
    position.leave()
    position.begin()
    assert not position.recognises(offset, message)
    assert position.passes(offset, message) == ELSEWHERE
    assert position.offset is None  # before that is evicted there is no place to go on at
    position.evicted()
    assert position.passes(offset + 1, numbered(8)) is None


@pytest.mark.parametrize("offset", [7, 6, 0, 10, 1000])
def test_a_jump_is_a_gap_also_backwards(position: Position, offset: int) -> None:
    arrives(position, 6, numbered(1))
    arrives(position, 7, numbered(2))
    assert position.passes(offset, numbered(3)) == MISSING
    assert position.offset is None
    position.evicted()
    assert position.offset == offset
    assert position.passes(offset + 1, numbered(4)) is None


def test_a_record_of_the_broker_takes_one_offset(position: Position) -> None:
    arrives(position, 7, numbered(1))
    assert arrives(position, 9, numbered(2)) is None
    assert arrives(position, 11, numbered(3)) is None


def test_whoever_begins_anew_takes_what_comes_first(position: Position) -> None:
    arrives(position, 7, numbered(1))
    position.forget()
    assert position.offset is None
    position.begin()
    assert arrives(position, 3, numbered(9)) is None


# The rules around it


def keys(eviction: Eviction | None) -> list[str]:
    """What has to go, where that is not everything."""
    assert eviction is not None
    assert not eviction.everything
    return list(eviction.keys)


@pytest.fixture
def coherence(monkeypatch: pytest.MonkeyPatch) -> Iterator[Coherence]:
    """One that has a position in the stream, and is trusted."""
    monkeypatch.setattr(rules, "GAP_INTERVAL", 0.0)
    coherence = Coherence()
    coherence.evict(coherence.joined_anew(0.0), 0.0)
    coherence.trust()
    assert coherence.received(numbered(1), 0.0, 0) is not None
    coherence.evicted(0.0)
    return coherence


def test_going_on_it_clears_nothing_and_waits_for_its_marker(coherence: Coherence) -> None:
    epoch = coherence.epoch
    coherence.lost("cut")
    coherence.continued("mine", 1.0)
    assert coherence.suspect == "catching up with the stream"
    assert coherence.received(numbered(1), 1.0, 0) is None
    assert keys(coherence.received(numbered(2), 1.0, 1)) == ["a"]
    assert coherence.received(Probe(v=1, id="mine"), 1.0, 2) is None
    assert coherence.suspect is not None  # what came before the marker is not evicted yet
    coherence.evicted(1.0)
    assert coherence.suspect is None
    assert (coherence.epoch, coherence.counters.gaps) == (epoch, 0)


def test_numbers_hold_while_it_was_away(coherence: Coherence) -> None:
    coherence.lost("cut")
    coherence.continued("mine", 1.0)
    coherence.received(numbered(1), 1.0, 0)
    gap = coherence.received(numbered(3), 1.0, 1)  # the stream has it all, and yet the exchange had not
    assert gap == Eviction(everything=True, reason="missing messages")


def test_a_stream_that_goes_on_elsewhere_is_one_gap_whatever_it_holds(coherence: Coherence) -> None:
    coherence.received(numbered(1, "p"), 0.5, 1)
    coherence.evicted(0.5)
    coherence.lost("cut")
    coherence.continued("mine", 1.0)
    gap = coherence.received(numbered(5), 1.0, 0)
    assert gap == Eviction(everything=True, reason=ELSEWHERE)
    assert keys(coherence.received(numbered(9, "p"), 1.0, 1)) == ["a"]
    assert coherence.counters.gap_reasons == {ELSEWHERE: 1}


def test_a_marker_behind_a_gap_counts(coherence: Coherence) -> None:
    coherence.lost("cut")
    coherence.continued("mine", 1.0)
    gap = coherence.received(Probe(v=1, id="mine"), 1.0, 0)
    assert gap is not None
    assert gap.everything
    coherence.evicted(1.0)
    assert coherence.suspect is None


def test_what_cannot_be_understood_is_a_gap_and_is_followed(coherence: Coherence) -> None:
    assert coherence.received(None, 1.0, 1) == Eviction(everything=True, reason="malformed message")
    assert keys(coherence.received(BARE, 1.0, 2)) == ["a"]


def test_who_begins_anew_forgets_the_position(coherence: Coherence) -> None:
    assert coherence.position.offset == 0
    coherence.joined_anew(1.0)
    assert coherence.position.offset is None


def test_what_is_still_in_hand_when_the_subscription_is_lost_is_evicted_and_moves_nothing(
    coherence: Coherence,
) -> None:
    coherence.lost("stopped")
    assert keys(coherence.received(numbered(2), 1.0, 90)) == ["a"]
    coherence.evicted(1.0)
    assert coherence.position.offset == 0


def test_a_tick_before_a_hole_proves_nothing_behind_it(coherence: Coherence) -> None:
    """Else it would be the baseline of the numbers that are forgotten with the hole, and the next one tell them as missed."""
    coherence.received(Tick(v=1, origin="r", seq=1, as_of=5.0, seqs={"o": 1}), 5.0, 1)
    assert coherence.received(numbered(9), 5.0, 90) == Eviction(everything=True, reason=MISSING)
    coherence.evicted(5.0)
    assert not coherence.proof.baselined
    later = Tick(v=1, origin="r", seq=2, as_of=6.0, seqs={"o": 9, "other": 4})
    assert coherence.received(later, 6.0, 91) is None
