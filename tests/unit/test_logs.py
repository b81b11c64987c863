"""One line for each thing that happened, whatever is in it."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from cacheinval import logs

log = logging.getLogger("cacheinval.test")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where logs go; the loggers are as before when the test ends."""
    names = [None, "cacheinval", "aio_pika", "aiormq", "aiocache"]
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = logging.getLogger().handlers[:]
    yield io.StringIO()
    logging.getLogger().handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_text(stream: io.StringIO) -> None:
    logs.configure("INFO", "text", stream)
    logs.event(log, logging.INFO, "evicted", key="product:1", seq=3, latency_ms=1.25, origin=None)
    line = stream.getvalue()
    assert line.endswith(" INFO    cacheinval.test: evicted key=product:1 seq=3 latency_ms=1.25\n")
    assert line[:11].count("-") == 2
    assert line[23] == "Z"


def test_json(stream: io.StringIO) -> None:
    logs.configure("INFO", "json", stream)
    logs.event(log, logging.WARNING, "evicted", key="product:1 é\n", seq=3, origin=None, reason=OSError("x"))
    line = json.loads(stream.getvalue())
    assert line.pop("at").endswith("Z")
    assert line == {
        "level": "WARNING",
        "logger": "cacheinval.test",
        "event": "evicted",
        "key": "product:1 é\n",
        "seq": 3,
        "reason": "x",
    }


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    "key", ["a\nb", "a\r\nb", "\x1b[31m", "\x9b31m", "a\u2028b", "a\x85b", "a\0b", "a\u202eb"]
)
def test_no_key_can_break_the_line_or_drive_the_terminal(stream: io.StringIO, form: str, key: str) -> None:
    logs.configure("INFO", form, stream)
    logs.event(log, logging.INFO, "evicted", key=key)
    text = stream.getvalue()
    assert text.endswith("\n")
    assert text[:-1].isprintable()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ("é", "é"),
        ("é è", '"é è"'),
        ("", '""'),
        (0.0, "0"),
        (100.0, "100"),
        (0.12345, "0.123"),
        (True, "True"),
        (7, "7"),
    ],
)
def test_values_as_text(stream: io.StringIO, value: object, shown: str) -> None:
    logs.configure("INFO", "text", stream)
    logs.event(log, logging.INFO, "happened", field=value)
    assert stream.getvalue().rstrip("\n").endswith(f"happened field={shown}")


def test_what_others_log_is_one_json_object_as_well(stream: io.StringIO) -> None:
    logs.configure("INFO", "json", stream)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("other").exception("it %s", "failed")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["event"] == "it failed"
    assert "ValueError: boom" in json.loads(line)["exception"]


def test_levels(stream: io.StringIO) -> None:
    logs.configure("WARNING", "text", stream)
    logs.event(log, logging.INFO, "unheard")
    logging.getLogger("aio_pika.connection").error("unheard")
    logging.getLogger("other").info("unheard")
    logs.event(log, logging.WARNING, "heard")
    assert [line.rsplit(" ", 1)[-1] for line in stream.getvalue().splitlines()] == ["heard"]


def test_percent_signs_are_only_text(stream: io.StringIO) -> None:
    logs.configure("INFO", "text", stream)
    logs.event(log, logging.INFO, "happened", key="100%s")
    assert "key=100%s" in stream.getvalue()
