"""One line for each thing that happened, as text or JSON, with its particulars as `name=value`."""

import json
import logging
import sys
import time
from typing import Any, TextIO

__all__ = ["configure", "event"]

_FIELDS = "cacheinval"


def event(logger: logging.Logger, level: int, text: str, **fields: Any) -> None:
    """Logs `text` and its particulars in one line; fields that are None are left out."""
    if not logger.isEnabledFor(level):
        return
    known = {name: value for name, value in fields.items() if value is not None}
    line = " ".join([text, *(f"{name}={_plain(value)}" for name, value in known.items())])
    logger.log(level, "%s", line, extra={_FIELDS: {"event": text, **known}}, stacklevel=2)


def configure(level: str, form: str, stream: TextIO | None = None) -> None:
    """Sends what `cacheinval` logs to `stream` (stderr): `form` is `text` or `json`, `level` a name of logging's."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("cacheinval").setLevel(level)
    for noisy in ("aio_pika", "aiormq", "aiocache"):  # a lost connection is told once, by our own supervisor
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    text = str(value)
    return text if text.isprintable() and " " not in text and text else _json(text)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    # JSON escapes line feeds, but not all that can break a line or drive a terminal.
    return text if text.isprintable() else json.dumps(value, default=str)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 (logging's own name)
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


class _Json(_Text):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, _FIELDS, None) or {"event": record.getMessage()}
        line = {"at": self.formatTime(record), "level": record.levelname, "logger": record.name, **fields}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _json(line)
