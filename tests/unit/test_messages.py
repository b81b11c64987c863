"""The wire format: whatever is sent can be read, and whatever cannot be understood is said to be so."""

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cacheinval.errors import InvalidKeyError, MalformedMessageError
from cacheinval.messages import (
    MAX_BODY_SENT,
    Ask,
    Audit,
    Beat,
    Invalidate,
    Probe,
    Tick,
    Unknown,
    check_names,
    decode,
    encode,
    split,
)

DEEP = "[" * 100_000 + "]" * 100_000
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=128)
# Names that JSON makes longest: control characters take six bytes each, four-byte letters four.
LONG_NAMES = st.builds(
    lambda letter, length: letter * (length // len(letter.encode())),
    st.sampled_from(["a", '"', "\\", "\n", "\x01", "\x7f", "é", "\u2028", "漢", "😀", "\U000e0001"]),
    st.integers(4, 512),
)
VERSIONS = st.none() | st.integers(-(2**63), 2**63 - 1)


def body(**fields: Any) -> bytes:
    return json.dumps({"v": 1, "kind": "invalidate", **fields}).encode()


MALFORMED = {
    "nothing": b"",
    "not JSON": b"product:1",
    "half a message": body(keys=["a"])[:-1],
    "more after it": body(keys=["a"]) + b"{}",
    "a byte order mark": b"\xef\xbb\xbf" + body(keys=["a"]),
    "UTF-16": body(keys=["a"]).decode().encode("utf-16"),
    "wrong UTF-8 in a key": b'{"v":1,"kind":"invalidate","keys":["\xff"]}',
    "wrong UTF-8 in a field that is ignored": b'{"v":1,"kind":"invalidate","keys":["a"],"x":"\xc3"}',
    "half of a surrogate pair": b'{"v":1,"kind":"invalidate","keys":["\\ud800"]}',
    "null": b"null",
    "a list": b"[1]",
    "a number": b"1",
    "no v": b'{"kind":"invalidate","keys":["a"]}',
    "v of a later protocol": body(v=2, keys=["a"]),
    "v as text": body(v="1", keys=["a"]),
    "v is true": body(v=True, keys=["a"]),
    "a later v and an unknown kind": body(v=2, kind="news"),
    "no kind": b'{"v":1,"keys":["a"]}',
    "kind is a number": body(kind=7),
    "nothing to invalidate": body(),
    "empty lists": body(keys=[], tags=[], all=False),
    "keys is a string": body(keys="a"),
    "keys is null": body(keys=None, all=True),
    "a key that is a number": body(keys=[1]),
    "a key that is null": body(keys=[None]),
    "an empty key": body(keys=["a", ""]),
    "an empty tag": body(tags=[""]),
    "NUL in a key": body(keys=["a\0b"]),
    "NUL in a tag": body(tags=["\0"]),
    "a key of 513 bytes": body(keys=["k" * 513]),
    "a key of 129 letters of four bytes": body(keys=["😀" * 129]),
    "a tag of 513 bytes": body(tags=["t" * 513]),
    "fewer versions than keys": body(keys=["a", "b"], versions=[1]),
    "more versions than keys": body(keys=["a"], versions=[1, 2]),
    "versions without keys": body(tags=["t"], versions=[1]),
    "a version that is text": body(keys=["a"], versions=["1"]),
    "a version that is no integer": body(keys=["a"], versions=[1.5]),
    "a version of 65 bits": body(keys=["a"], versions=[2**63]),
    "all is text": body(all="true"),
    "all is a number": body(all=1),
    "seq is 0": body(keys=["a"], origin="o", seq=0),
    "seq is text": body(keys=["a"], origin="o", seq="1"),
    "seq is no integer": body(keys=["a"], origin="o", seq=1.5),
    "origin is empty": body(keys=["a"], origin="", seq=1),
    "origin is a number": body(keys=["a"], origin=1, seq=1),
    "origin of 129 letters": body(keys=["a"], origin="o" * 129, seq=1),
    "at is text": body(keys=["a"], at="now"),
    "at is not finite": b'{"v":1,"kind":"invalidate","keys":["a"],"at":1e999}',
    "NaN": b'{"v":1,"kind":"invalidate","keys":["a"],"at":NaN}',
    "10,001 keys": body(keys=["a"] * 10_001),
    "10,001 keys and tags": body(keys=["a"] * 5_000, tags=["b"] * 5_001),
    "100,000 keys": body(keys=["a"] * 100_000),
    "more than 2 MiB": body(keys=["a"], padding="x" * (2 << 20)),
    "nested too deeply": body(keys=["a"])[:-1] + b',"x":' + DEEP.encode() + b"}",
    "nested too deeply, of an unknown kind": b'{"v":1,"kind":"news","x":' + DEEP.encode() + b"}",
    "a tick without origin": body(kind="tick", seq=1, as_of=1.0),
    "a tick without as_of": body(kind="tick", origin="o", seq=1),
    "a beat without seq": body(kind="beat", origin="o"),
    "a probe without id": body(kind="probe"),
    "an audit of nothing": body(kind="audit", sample=0),
    "an audit of text": body(kind="audit", sample="7"),
    "an audit that looks back": body(kind="audit", delay=-1),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str) -> None:
    with pytest.raises(MalformedMessageError) as caught:
        decode(MALFORMED[name])
    assert 10 < len(str(caught.value)) < 400


def test_reasons_name_what_is_wrong() -> None:
    for name, words in {
        "v of a later protocol": "version 2 is not known; accepted: 1",
        "wrong UTF-8 in a key": "not UTF-8",
        "NUL in a key": "contains NUL",
        "a key of 513 bytes": "has 513 bytes",
        "10,001 keys": "10001 keys and tags; accepted: at most 10000",
        "nothing to invalidate": "at least one of",
        "a version that is text": "$.versions[0]",
    }.items():
        with pytest.raises(MalformedMessageError, match=words.replace("$", r"\$").replace("[", r"\[")):
            decode(MALFORMED[name])


@pytest.mark.parametrize(
    ("sent", "understood"),
    [
        (body(keys=["a"]), Invalidate(v=1, keys=["a"])),
        (body(tags=["t"]), Invalidate(v=1, tags=["t"])),
        (body(all=True), Invalidate(v=1, all=True)),
        (body(keys=["a"], versions=[None]), Invalidate(v=1, keys=["a"], versions=[None])),
        (body(keys=["a"], versions=[]), Invalidate(v=1, keys=["a"])),
        (body(keys=["a"], origin=None, seq=None, at=None), Invalidate(v=1, keys=["a"])),
        (body(keys=["a"], at=1), Invalidate(v=1, keys=["a"], at=1.0)),
        (body(keys=["a"], news={"x": [1]}, z="\0"), Invalidate(v=1, keys=["a"])),
        (body(keys=["k" * 512, "😀" * 128]), Invalidate(v=1, keys=["k" * 512, "😀" * 128])),
        (body(keys=["\u0001\n\u2028 \x7f"]), Invalidate(v=1, keys=["\u0001\n\u2028 \x7f"])),
        (body(keys=["a"] * 10_000), Invalidate(v=1, keys=["a"] * 10_000)),
        (body(kind="news", keys=3), Unknown("news")),
        (b' {"kind" : "probe" , "id" : "x" , "v" : 1 }\n', Probe(v=1, id="x")),
        (
            body(kind="tick", origin="o", seq=3, as_of=2, source="s", seqs={"p": 4}),
            Tick(v=1, origin="o", seq=3, as_of=2.0, source="s", seqs={"p": 4}),
        ),
    ],
)
def test_understood(sent: bytes, understood: object) -> None:
    assert decode(sent) == understood


def test_the_body_is_the_documented_json() -> None:
    message = Invalidate(
        v=1, origin="6b1f", seq=41, at=1.5, keys=["product:abc-123"], versions=[8], tags=["products"]
    )
    assert json.loads(encode(message)) == {
        "v": 1,
        "kind": "invalidate",
        "origin": "6b1f",
        "seq": 41,
        "at": 1.5,
        "keys": ["product:abc-123"],
        "versions": [8],
        "tags": ["products"],
    }
    assert json.loads(encode(Ask(v=1))) == {"v": 1, "kind": "ask"}
    assert json.loads(encode(Audit(v=1, sample=7, delay=2.5))) == {
        "v": 1,
        "kind": "audit",
        "sample": 7,
        "delay": 2.5,
    }


@given(
    keys=st.lists(st.tuples(NAMES, VERSIONS), max_size=20),
    tags=st.lists(NAMES, max_size=5),
    everything=st.booleans(),
    origin=st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128),
    seq=st.none() | st.integers(1, 2**63 - 1),
    at=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    versioned=st.booleans(),
)
def test_round_trip(
    keys: list[tuple[str, int | None]],
    tags: list[str],
    everything: bool,
    origin: str | None,
    seq: int | None,
    at: float | None,
    versioned: bool,
) -> None:
    assume(keys or tags or everything)
    message = Invalidate(
        v=1,
        origin=origin,
        seq=seq,
        at=at,
        keys=[key for key, _ in keys],
        versions=[version for _, version in keys] if versioned else [],
        tags=tags,
        all=everything,
    )
    assert decode(encode(message)) == message
    for other in (
        Ask(v=1),
        Audit(v=1),
        Audit(v=1, sample=7, delay=0.5),
        Beat(v=1, origin="o", seq=1),
        Probe(v=1, id="i"),
    ):
        assert decode(encode(other)) == other


@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_any_bytes_are_understood_or_refused(sent: bytes) -> None:
    try:
        decode(sent)
    except MalformedMessageError:
        return
    json.loads(sent)


# Splitting

NAME_LISTS = st.builds(
    lambda names, times: (names * times)[:4_000],
    st.lists(NAMES | LONG_NAMES, min_size=1, max_size=12),
    st.integers(1, 400),
)


@settings(max_examples=60, deadline=None)
@given(
    keys=NAME_LISTS | st.just([]),
    tags=NAME_LISTS | st.just([]),
    versions=st.sampled_from(["no", "few", "all"]),
)
def test_split_keeps_the_limits_the_order_and_every_name(
    keys: list[str], tags: list[str], versions: str
) -> None:
    known: list[int | None] = [-(2**63)] * len(keys)
    if versions == "few":
        known = [None if n % 3 else n for n in range(len(keys))]
    messages = list(split(keys, tags, () if versions == "no" else known))
    for message in messages:
        assert 1 <= len(message.keys) + len(message.tags) <= 1_000
        stamped = Invalidate(
            v=1,
            origin="o" * 128,
            seq=2**63 - 1,
            at=1795391943.5121234,
            committed_at=1795391943.5121234,
            keys=message.keys,
            versions=message.versions,
            tags=message.tags,
        )
        sent = encode(stamped)
        assert len(sent) <= MAX_BODY_SENT
        assert decode(sent) == stamped
    assert [key for message in messages for key in message.keys] == keys
    assert [tag for message in messages for tag in message.tags] == tags
    if versions != "no":
        given_back = [version for m in messages for version in m.versions or [None] * len(m.keys)]
        assert given_back == known


def test_split_makes_no_more_messages_than_needed() -> None:
    assert [len(m.keys) for m in split([f"k{n}" for n in range(2_500)])] == [1_000, 1_000, 500]
    mixed = list(split(["k"] * 999, ["t"] * 2))
    assert [(len(m.keys), len(m.tags)) for m in mixed] == [(999, 1), (0, 1)]
    # 1 MiB holds 2,000 names of 512 bytes, control characters a sixth of that.
    assert len(list(split(["x" * 512] * 1_000))) == 1
    assert len(list(split(["\x01" * 512] * 1_000))) == 3


def test_everything_is_one_message_without_names() -> None:
    assert list(split(["a"] * 5_000, ["t"], everything=True)) == [Invalidate(v=1, all=True)]
    assert list(split()) == []


# Names


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "is empty"),
        ("a\0", "contains NUL"),
        ("k" * 513, "has 513 bytes"),
        ("é" * 257, "has 514 bytes"),
        ("\ud800", "cannot be written as UTF-8"),
        (7, "is a int, not a string"),
        (None, "not a string"),
        (b"k", "not a string"),
    ],
)
def test_names_that_could_never_be_invalidated(name: Any, why: str) -> None:
    with pytest.raises(InvalidKeyError, match=why) as caught:
        check_names(["good", name])
    assert len(str(caught.value)) < 250
    with pytest.raises(InvalidKeyError, match=r"^tag "):
        check_names([name], "tag")


@pytest.mark.parametrize("names", ["product:1", b"product:1"])
def test_one_string_is_no_list_of_names(names: Any) -> None:
    with pytest.raises(InvalidKeyError, match="must be a list of strings"):
        check_names(names)


@given(NAMES | LONG_NAMES)
def test_every_name_within_the_limits_can_be_sent(name: str) -> None:
    assert check_names([name]) == [name]
    (message,) = split([name], [name])
    assert decode(encode(message)) == message
