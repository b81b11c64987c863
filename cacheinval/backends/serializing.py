"""What becomes of a value in a cache outside the process, and of what is there in a value."""

import pickle
from typing import Any, Literal, Protocol

import msgspec
from pydantic import BaseModel

from cacheinval.errors import CacheError

__all__ = ["Serializer", "serializer"]


class Serializer(Protocol):
    """One way to write values; what it reads bears its name, and everything else counts as absent."""

    name: str

    def encode(self, value: Any) -> bytes:
        """`value` as bytes.

        Raises:
            CacheError: it has no such form.
        """

    def decode(self, written: bytes, model: Any) -> Any:
        """The value of type `model` (whatever the form has by itself if None) that `encode` wrote.

        Raises:
            CacheError: it is not such a value.
        """


def serializer(name: Literal["json", "msgpack", "pickle"]) -> Serializer:
    """The one that the setting `CACHE_SERIALIZER` names."""
    return _Pickle() if name == "pickle" else _Typed(name)


class _Typed:
    """JSON or MessagePack: types of their own, and what `model` makes of them."""

    def __init__(self, name: Literal["json", "msgpack"]) -> None:
        self.name: str = name
        self._format: Any = msgspec.json if name == "json" else msgspec.msgpack

    def encode(self, value: Any) -> bytes:
        try:
            written: bytes = self._format.encode(value, enc_hook=_plain)
            return written
        except (TypeError, ValueError, OverflowError) as error:
            raise CacheError(
                f"a cache outside the process keeps {self._called}; this value has no such form: {error} (accepted: "
                "its own types, dataclasses, pydantic models, msgspec structs, Decimal, dates, UUID; "
                "CACHEINVAL_CACHE_SERIALIZER names the form)"
            ) from error

    def decode(self, written: bytes, model: Any) -> Any:
        try:
            # 1.5 µs instead of 5.7 for a small model, beside the hook below.
            if self.name == "json" and isinstance(model, type) and issubclass(model, BaseModel):
                return model.model_validate_json(written)
            return self._format.decode(written, type=Any if model is None else model, dec_hook=_modelled)
        except (msgspec.DecodeError, TypeError, ValueError) as error:
            raise CacheError(
                f"this is not a {getattr(model, '__name__', 'value')} in {self._called}: {error}"
            ) from error

    @property
    def _called(self) -> str:
        return "JSON" if self.name == "json" else "MessagePack"


class _Pickle:
    """Any value, with its type. Reading it runs whatever whoever wrote it wants."""

    name: str = "pickle"

    def encode(self, value: Any) -> bytes:
        try:
            return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # whatever a class's own methods raise
            raise CacheError(f"this value cannot be pickled: {error}") from error

    def decode(self, written: bytes, model: Any) -> Any:
        try:
            return pickle.loads(written)  # noqa: S301 (asked for by name; the documentation says what it means)
        except Exception as error:  # a class that is gone, or of another version
            raise CacheError(f"this cannot be unpickled: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        # Under the names, and in the form, that validation takes.
        return value.model_dump(mode="json", by_alias=True, round_trip=True)
    raise TypeError(f"{type(value).__qualname__} is not supported")


def _modelled(kind: type, plain: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        # As JSON, so that a strict model too takes a date from a string.
        return kind.model_validate_json(msgspec.json.encode(plain))
    raise TypeError(f"{kind!r} is not supported")
