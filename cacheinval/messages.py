"""The wire format, both ways: UTF-8 JSON, validated on arrival and never sent wrong (PROTOCOL.md, "Messages")."""

from collections.abc import Generator, Iterable, Sequence
from typing import Annotated, Literal

import msgspec

from cacheinval.errors import InvalidKeyError, MalformedMessageError

__all__ = [
    "CONTENT_TYPE",
    "MESSAGE_TYPE",
    "Ask",
    "Audit",
    "Beat",
    "Invalidate",
    "Message",
    "Probe",
    "Tick",
    "Unknown",
    "check_names",
    "decode",
    "encode",
    "split",
]

CONTENT_TYPE = "application/json"
MESSAGE_TYPE = "cacheinval.v1"

MAX_NAME_BYTES = 512
MAX_KEYS_SENT = 1_000
MAX_BODY_SENT = 1 << 20
MAX_KEYS_ACCEPTED = 10_000
MAX_BODY_ACCEPTED = 2 << 20

Origin = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Seq = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
LastSeq = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Version = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True):
    v: Literal[1]


class Invalidate(_Message, tag="invalidate", frozen=True, kw_only=True):
    """Evict these keys, every entry with one of these tags, or all entries.

    `versions` is empty, or as long as `keys` (None where unknown). `origin` and `seq` number the messages of one
    publishing channel; programs that leave them out take part without gap detection. `at` is the wall clock time of
    publishing, in seconds; `committed_at` that of the oldest commit in it, where the publisher knows it.
    """

    origin: Origin | None = None
    seq: Seq | None = None
    at: float | None = None
    committed_at: float | None = None
    keys: list[str] = []
    versions: list[Version | None] = []
    tags: list[str] = []
    all: bool = False


class Tick(_Message, tag="tick", frozen=True, kw_only=True):
    """The relay's word that everything committed before `as_of` in the database `source` has been confirmed.

    `schema` names the schema `cacheinval` in it: another after that was dropped, with the rows that waited in it, and made
    again. `seqs` are the last confirmed numbers of other origins. A tick has no number of its own: `seq` is the last one that its
    origin has used, 0 for none.
    """

    v: Literal[1]
    origin: Origin
    seq: LastSeq
    as_of: float
    source: str | None = None
    schema: str | None = None
    seqs: dict[str, LastSeq] = {}


class Beat(_Message, tag="beat", frozen=True, kw_only=True):
    """The last number of a publisher that has no database to tell it."""

    v: Literal[1]
    origin: Origin
    seq: LastSeq


class Probe(_Message, tag="probe", frozen=True, kw_only=True):
    """A marker: whoever sees its own `id` come back has processed everything that was published before."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class Ask(_Message, tag="ask", frozen=True, kw_only=True):
    """Asks every instance for its status; each answers to the AMQP `reply_to` of the message.

    With `evictions` it asks besides what was evicted within so many seconds.
    """

    evictions: Annotated[float, msgspec.Meta(ge=0)] | None = None


class Audit(_Message, tag="audit", frozen=True, kw_only=True):
    """Asks every instance to compare up to `sample` entries with their source; each answers as to `Ask` when it is done.

    `delay` is how many seconds later it looks again at those that differ. What is more than an instance is willing to do
    is made less.
    """

    sample: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)] = 100
    delay: Annotated[float, msgspec.Meta(ge=0)] | None = None


class Unknown(msgspec.Struct, frozen=True):
    """A well-formed message of a kind that this version does not know: counted, acknowledged and ignored."""

    kind: str


class _Header(msgspec.Struct):
    v: int
    kind: str


Message = Invalidate | Tick | Beat | Probe | Ask | Audit
_KINDS = frozenset({"invalidate", "tick", "beat", "probe", "ask", "audit"})
_decoder = msgspec.json.Decoder(Message)
_header = msgspec.json.Decoder(_Header)
_encoder = msgspec.json.Encoder()


def check_names(names: Iterable[str], what: str = "key") -> list[str]:
    """The names as a list, each of 1 to 512 bytes of UTF-8 without NUL.

    Raises:
        InvalidKeyError: names the first one that is not, and why.
    """
    if isinstance(names, str | bytes):
        raise InvalidKeyError(
            f"{what}s must be a list of strings, not the single {type(names).__name__} {names!r}"
        )
    checked = list(names)
    for name in checked:
        problem = _name_problem(name)
        if problem:
            shown = f"{name[:80]!r}{'…' if len(name) > 80 else ''}" if isinstance(name, str) else repr(name)
            raise InvalidKeyError(
                f"{what} {shown} {problem}; accepted: 1 to {MAX_NAME_BYTES} bytes of UTF-8 without NUL"
            )
    return checked


def _name_problem(name: object) -> str | None:
    if not isinstance(name, str):
        return f"is a {type(name).__name__}, not a string"
    if not name:
        return "is empty"
    if "\0" in name:
        return "contains NUL"
    if len(name) * 4 <= MAX_NAME_BYTES and name.isascii():
        return None
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "cannot be written as UTF-8"
    return f"has {size} bytes" if size > MAX_NAME_BYTES else None


def encode(message: Message) -> bytes:
    """The AMQP body of `message`."""
    return _encoder.encode(message)


def decode(body: bytes) -> Message | Unknown:
    """What `body` says.

    Raises:
        MalformedMessageError: it cannot be understood, so it may have been an invalidation: a gap.
    """
    if len(body) > MAX_BODY_ACCEPTED:
        raise MalformedMessageError(f"the body has {len(body)} bytes; accepted: at most {MAX_BODY_ACCEPTED}")
    try:
        body.decode()  # msgspec does not look into the strings of fields that it skips
        message: Message = _decoder.decode(body)
    except UnicodeDecodeError as error:
        raise MalformedMessageError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise MalformedMessageError("the body is nested too deeply") from None
    except msgspec.DecodeError as error:
        return _unknown_kind(body, error)
    if isinstance(message, Invalidate):
        _check_invalidate(message, may_hold_nul=b"\\u0000" in body)
    return message


def _unknown_kind(body: bytes, error: Exception) -> Unknown:
    try:
        header = _header.decode(body)
    except RecursionError:
        raise MalformedMessageError("the body is nested too deeply") from None
    except msgspec.DecodeError:
        raise MalformedMessageError(str(error)) from None
    if header.v != 1:
        raise MalformedMessageError(f"version {header.v} is not known; accepted: 1")
    if header.kind not in _KINDS:
        return Unknown(header.kind)
    raise MalformedMessageError(str(error)) from None


def _check_invalidate(message: Invalidate, may_hold_nul: bool) -> None:
    keys, tags = message.keys, message.tags
    if not (keys or tags or message.all):
        raise MalformedMessageError("an invalidate needs at least one of `keys`, `tags` and `all: true`")
    if len(keys) + len(tags) > MAX_KEYS_ACCEPTED:
        raise MalformedMessageError(
            f"{len(keys) + len(tags)} keys and tags; accepted: at most {MAX_KEYS_ACCEPTED}"
        )
    if message.versions and len(message.versions) != len(keys):
        raise MalformedMessageError(
            f"{len(message.versions)} versions for {len(keys)} keys; accepted: one for each, or none"
        )
    for what, names in (("key", keys), ("tag", tags)):
        # Thousands of names arrive at once: a name of at most 128 characters has at most 512 bytes.
        if not may_hold_nul and "" not in names and max(map(len, names), default=0) * 4 <= MAX_NAME_BYTES:
            continue
        for name in names:
            problem = _name_problem(name)
            if problem:
                raise MalformedMessageError(f"{what} {name[:80]!r} {problem}")


def split(
    keys: Sequence[str] = (),
    tags: Sequence[str] = (),
    versions: Sequence[int | None] = (),
    everything: bool = False,
) -> Generator[Invalidate, None, None]:
    """As few messages as carry these names, each of at most 1000 names and 1 MiB; `everything` needs no names."""
    if everything:
        yield Invalidate(v=1, all=True)
        return
    known = versions if any(version is not None for version in versions) else ()
    start, total = 0, len(keys) + len(tags)
    while start < total:
        end = min(start + MAX_KEYS_SENT, total)
        few, few_tags = keys[start:end], tags[max(0, start - len(keys)) : max(0, end - len(keys))]
        fitting = _fitting([*few, *few_tags])
        few, few_tags = few[:fitting], few_tags[: max(0, fitting - len(few))]
        yield Invalidate(
            v=1, keys=list(few), tags=list(few_tags), versions=_worth_telling(known[start:end][: len(few)])
        )
        start += fitting


def _fitting(names: Sequence[str]) -> int:
    """How many of `names` go into one message; one at least."""
    room = MAX_BODY_SENT - 1024
    if (6 * max(map(len, names)) + 24) * len(names) < room:  # no character takes more than six bytes of JSON
        return len(names)
    size = 0
    for count, name in enumerate(names):
        size += len(_encoder.encode(name)) + 22  # with a comma, and its version with another
        if size > room and count:
            return count
    return len(names)


def _worth_telling(versions: Sequence[int | None]) -> list[int | None]:
    return list(versions) if any(version is not None for version in versions) else []
