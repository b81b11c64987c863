"""How rows of the outbox become messages."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheinval.messages import Invalidate, decode, encode
from cacheinval.outbox.batches import batches, stamped


def row(
    number: int = 1,
    keys: Sequence[Any] | None = ("a",),
    versions: Sequence[Any] | None = None,
    tags: Sequence[Any] | None = (),
    everything: bool = False,
    recorded_at: float = 0.0,
    context: str | None = None,
) -> dict[str, Any]:
    return {
        "id": UUID(int=number),
        "keys": None if keys is None else list(keys),
        "versions": None if versions is None else list(versions),
        "tags": None if tags is None else list(tags),
        "everything": everything,
        "recorded_at": recorded_at,
        "context": context,
    }


def test_rows_that_fit_are_one_message() -> None:
    (batch,) = batches([row(1, "ab", tags="t", recorded_at=5), row(2, "bc", tags="tu", recorded_at=3)])
    (message,) = batch.messages
    assert (message.keys, message.tags, message.versions, message.all) == (
        ["a", "b", "c"],
        ["t", "u"],
        [],
        False,
    )
    assert batch.ids == [UUID(int=1), UUID(int=2)]
    assert batch.oldest == 3


def test_of_two_versions_the_higher_counts_and_none_where_one_is_unknown() -> None:
    (batch,) = batches(
        [row(keys="abc", versions=[7, None, 1]), row(keys="abc", versions=[5, 2, None]), row(keys="d")]
    )
    (message,) = batch.messages
    assert dict(zip(message.keys, message.versions, strict=True)) == {"a": 7, "b": None, "c": None, "d": None}


def test_everything_keeps_the_versions() -> None:
    (batch,) = batches([row(keys=(), everything=True), row(keys="a", versions=[3])])
    assert [(message.all, message.keys, message.versions) for message in batch.messages] == [
        (True, [], []),
        (False, ["a"], [3]),
    ]


def test_many_rows_of_one_key_are_one_message() -> None:
    (batch,) = batches(row(number) for number in range(5_000))
    assert len(batch.ids) == 5_000
    assert [message.keys for message in batch.messages] == [["a"]]


def test_one_row_of_too_many_names_is_several_messages() -> None:
    found = list(batches([row(1), row(2, [f"k{n}" for n in range(2_500)]), row(3)]))
    assert [len(batch.ids) for batch in found] == [1, 1, 1]
    assert [len(message.keys) for message in found[1].messages] == [1_000, 1_000, 500]


def test_no_rows_no_batch() -> None:
    assert list(batches([])) == []


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (row(9, [None]), "is a NoneType, not a string"),
        (row(9, [["a"]]), "is a list"),
        (row(9, [""]), "is empty"),
        (row(9, ["x" * 513]), "has 513 bytes"),
        (row(9, ["ok"], tags=[None]), "tag None is a NoneType"),
        (row(9, ["a", "b"], versions=[1]), "its versions are not one for each of 2 keys"),
        (row(9, ["a"], versions=[[1]]), "its versions are not one for each of 1 keys"),
        (row(9, []), "it has neither keys nor tags"),
        (row(9, None, tags=None), "its names cannot be read"),
    ],
)
def test_a_row_that_cannot_be_said_is_everything(bad: dict[str, Any], problem: str) -> None:
    (batch,) = batches([row(1), bad, row(2, "b")])
    assert batch.ids == [UUID(int=1), UUID(int=9), UUID(int=2)]
    assert [(message.all, message.keys) for message in batch.messages] == [(True, []), (False, ["a", "b"])]
    (said,) = batch.bad
    assert said.startswith(f"row {UUID(int=9)}: ")
    assert problem in said


names = st.lists(st.one_of(st.sampled_from(["a", "b", "c"]), st.text(max_size=200), st.none()), max_size=5)
rows = st.builds(
    row,
    number=st.integers(1, 2**64),
    keys=names,
    versions=st.one_of(
        st.none(), st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), max_size=5)
    ),
    tags=names,
    everything=st.booleans(),
    recorded_at=st.floats(0, 1e10),
)


def test_the_contexts_of_a_batch_are_those_of_its_rows() -> None:
    full = range(1_000)
    rows = [
        row(1, context="one"),
        row(2),
        row(3, context="two"),
        row(4, context="one"),
        row(5, [f"k{n}" for n in full]),
        row(6, context="three"),
    ]
    assert [batch.contexts for batch in batches(rows)] == [["one", "two"], [], ["three"]]


@given(st.lists(rows, max_size=30, unique_by=lambda one: one["id"]))
def test_all_that_was_recorded_is_in_a_message_that_can_be_read(recorded: list[dict[str, Any]]) -> None:
    by_id = {one["id"]: one for one in recorded}
    ids: list[UUID] = []
    for batch in batches(recorded):
        sent = [
            stamped(message, origin="o", seq=seq, at=2.0, committed_at=batch.oldest)
            for seq, message in enumerate(batch.messages, 1)
        ]
        read = [decode(encode(message)) for message in sent]
        assert read == sent
        said = [message for message in read if isinstance(message, Invalidate)]
        assert len(said) == len(read) > 0
        for row_id in batch.ids:
            one = by_id[row_id]
            everything = any(message.all for message in said)
            keys, tags = {key for m in said for key in m.keys}, {tag for m in said for tag in m.tags}
            assert everything or (keys.issuperset(one["keys"]) and tags.issuperset(one["tags"]))
            assert batch.oldest <= one["recorded_at"]
        ids += batch.ids
    assert ids == [one["id"] for one in recorded]
