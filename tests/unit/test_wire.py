"""The short way in and out of a connection: what is taken out of its bytes, and what is left for aiormq."""

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.commands import Basic, Channel, Connection
from pamqp.common import FieldTable
from pamqp.frame import marshal
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from cacheinval.bus import Delivery
from cacheinval.bus import wire as wires
from cacheinval.bus.wire import Splitter, Wire
from cacheinval.tracing import headers_of

Arrived = list[tuple[int, Delivery]]


def delivered(
    tag: int,
    delivery: Delivery,
    *,
    channel: int = 1,
    most: int = 131_064,
    others: Iterable[bytes] = (),
    headers: FieldTable | None = None,
) -> list[bytes]:
    """The frames of one delivery, with `others` behind the first of them."""
    properties = Basic.Properties(
        content_type="application/json",
        message_id="1",
        reply_to=delivery.reply_to,
        correlation_id=delivery.correlation_id,
        headers={**(headers or {}), **(headers_of(delivery.contexts) or {})} or None,
    )
    body = delivery.body
    frames: list[Frame | ContentHeader | ContentBody] = [
        Basic.Deliver("ctag1.f00", tag, delivery.redelivered, "cacheinval.default", ""),
        ContentHeader(body_size=len(body), properties=properties),
        *(ContentBody(body[at : at + most]) for at in range(0, len(body), most)),
    ]
    first, *rest = (marshal(frame, channel) for frame in frames)
    return [first, *others, *rest]


HEARTBEAT = marshal(Heartbeat(), 0)
BLOCKED = marshal(Connection.Blocked("low on memory"), 0)
QOS_OK = marshal(Basic.QosOk(), 1)
CONFIRM = marshal(Basic.Ack(7), 2)
RETURNED = [
    marshal(frame, 2)
    for frame in (
        Basic.Return(312, "NO_ROUTE", "", "x"),
        ContentHeader(body_size=2, properties=Basic.Properties(message_id="7")),
        ContentBody(b"{}"),
    )
]

deliveries = st.builds(
    Delivery,
    body=st.binary(max_size=40),
    reply_to=st.none() | st.just("amq.rabbitmq.reply-to.g1"),
    correlation_id=st.none() | st.just("origin.1"),
    redelivered=st.booleans(),
    contexts=st.sampled_from([(), ("00-1-2-01",), ("00-1-2-01 vendor=a", "00-3-4-01")]),
)
other = st.sampled_from([HEARTBEAT, BLOCKED, QOS_OK, CONFIRM, b"".join(RETURNED)])


@given(
    st.lists(deliveries | other, max_size=8),
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
    st.integers(1, 30),
)
def test_deliveries_are_taken_and_all_else_is_left_however_the_bytes_come(
    story: list[Delivery | bytes], sizes: list[int], most: int
) -> None:
    data, expected, rest = b"", [], b""
    for part in story:
        if isinstance(part, Delivery):
            data += b"".join(delivered(len(expected) + 1, part, most=most))
            expected.append((len(expected) + 1, part))
        else:
            data += part
            rest += part
    arrived: Arrived = []
    splitter = Splitter(arrived.extend)
    left, at, turn = b"", 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        left += splitter.split(data[at : at + size])
        at, turn = at + size, turn + 1
    assert arrived == expected
    assert left == rest


def test_frames_of_other_channels_come_in_between() -> None:
    arrived: Arrived = []
    delivery = Delivery(b"body", "to", "id", redelivered=True)
    others = [HEARTBEAT, *RETURNED]
    frames = delivered(1, delivery, most=3, others=others)
    assert Splitter(arrived.extend).split(b"".join(frames)) == b"".join(others)
    assert arrived == [(1, delivery)]


def test_what_comes_together_arrives_together() -> None:
    calls: list[Arrived] = []
    data = b"".join(frame for tag in (1, 2, 3) for frame in delivered(tag, Delivery(b"x")))
    Splitter(calls.append).split(data)
    assert calls == [[(tag, Delivery(b"x")) for tag in (1, 2, 3)]]


@pytest.mark.parametrize(
    ("headers", "offset"),
    [
        ({"x-stream-offset": 2**40}, 2**40),
        ({"x-stream-offset": 2**40 + 7, "other": "00-1"}, 2**40 + 7),
        ({"a": {"b": [1, "x-stream-offset"]}, "x-stream-offset": 2**40 + 1}, 2**40 + 1),
        ({"x-stream-offset": "7"}, None),
        ({"x-stream-offsets": 2**40}, None),
        ({"x-stream-off": 2**40}, None),
        (None, None),
    ],
)
@pytest.mark.parametrize("reply_to", [None, "me"])
def test_the_offset_is_taken_from_the_headers(
    headers: FieldTable | None, offset: int | None, reply_to: str | None
) -> None:
    for wanted in (True, False):
        arrived: Arrived = []
        frames = delivered(1, Delivery(b"body", reply_to), headers=headers)
        assert Splitter(arrived.extend, offsets=wanted).split(b"".join(frames)) == b""
        assert arrived == [(1, Delivery(b"body", reply_to, offset=offset if wanted else None))]


def test_an_offset_beside_what_cannot_be_read_is_taken_too() -> None:
    arrived: Arrived = []
    frames = b"".join(delivered(1, Delivery(b"body"), headers={"x-stream-offset": 2**40, "odd": "value"}))
    Splitter(arrived.extend, offsets=True).split(frames.replace(b"\x03oddS", b"\x03odd?"))
    assert arrived == [(1, Delivery(b"body", offset=2**40))]


def test_a_channel_that_is_closed_amid_a_delivery_says_so() -> None:
    arrived: Arrived = []
    first, *_ = delivered(1, Delivery(b"body"))
    closed = marshal(Channel.Close(404, "NOT_FOUND", 60, 20), 1)
    splitter = Splitter(arrived.extend)
    assert splitter.split(first + closed) == closed
    body = marshal(ContentBody(b"body"), 1)
    assert splitter.split(body) == body
    assert not arrived


@pytest.mark.parametrize(
    "data",
    [b"AMQP\x00\x00\x09\x01", b"HTTP/1.1 400 Bad Request\r\n\r\n", QOS_OK[:-1] + b"\x00" + QOS_OK],
    ids=["another version", "another protocol", "no end of a frame"],
)
def test_what_is_no_amqp_is_left_to_aiormq_for_good(data: bytes) -> None:
    arrived: Arrived = []
    splitter = Splitter(arrived.extend)
    after = b"".join(delivered(1, Delivery(b"body")))
    assert splitter.split(data) + splitter.split(after) == data + after
    assert not arrived


async def test_a_broker_that_does_nothing_but_deliver_counts_as_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It sends no heartbeats then, and aiormq, which does not see deliveries, would close the connection."""
    now = 100.0
    reader = wires._Reader(Splitter(lambda deliveries: None), asyncio.get_running_loop())
    monkeypatch.setattr(reader, "_now", lambda: now)
    reader._gave_at = now
    seen = []
    for _ in range(4):
        now += wires.SIGN_OF_LIFE / 2 + 0.01
        reader.feed_data(b"".join(delivered(1, Delivery(b"body"))))
        seen.append(bytes(reader._buffer))  # type: ignore[attr-defined]
    assert seen == [b"", HEARTBEAT, HEARTBEAT, 2 * HEARTBEAT]


async def test_a_handshake_that_comes_slowly_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    start = marshal(Connection.Start(), 0)
    reader = wires._Reader(Splitter(lambda deliveries: None), asyncio.get_running_loop())
    for part in (start[:5], start[5:]):
        monkeypatch.setattr(reader, "_gave_at", reader._now() - 2 * wires.SIGN_OF_LIFE)
        reader.feed_data(part)
    assert bytes(reader._buffer) == start  # type: ignore[attr-defined]


async def test_a_connection_that_is_gone_takes_nothing() -> None:
    with pytest.raises(ConnectionError):
        Wire().write(1, Basic.Ack(1))


def test_a_message_whose_properties_cannot_be_read_counts_and_is_not_answered() -> None:
    arrived: list[tuple[int, Delivery]] = []
    frames = b"".join(delivered(1, Delivery(b"{}", None, "origin.1", False)))
    assert frames.count(b"origin.1") == 1
    Splitter(arrived.extend).split(frames.replace(b"origin.1", b"\xff\xfeigin.1"))
    assert [(delivery.body, delivery.reply_to) for _, delivery in arrived] == [(b"{}", None)]
