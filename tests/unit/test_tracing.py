"""Contexts as texts and headers, and that nothing is spent where nobody traces."""

import subprocess
import sys
from typing import Any

import pytest
from pamqp.commands import Basic
from pamqp.frame import marshal
from pamqp.header import ContentHeader

from cacheinval import tracing
from cacheinval.bus.wire import Splitter
from cacheinval.tracing import LONGEST, MOST, contexts_of, headers_of, together

ONE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TWO = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01"


class TestHeaders:
    @pytest.mark.parametrize(
        "contexts", [[], [ONE], [f"{ONE} vendor=a b,other=1"], [ONE, TWO], [ONE, f"{TWO} vendor=a"]]
    )
    def test_what_is_sent_arrives(self, contexts: list[str]) -> None:
        assert contexts_of(headers_of(contexts)) == tuple(contexts)

    def test_one_is_written_as_everybody_writes_it(self) -> None:
        assert headers_of([f"{ONE} vendor=a"]) == {"traceparent": ONE, "tracestate": "vendor=a"}
        assert headers_of([ONE]) == {"traceparent": ONE}
        assert headers_of([ONE, TWO]) == {"traceparents": [ONE, TWO]}

    @pytest.mark.parametrize(
        "headers",
        [
            *({"traceparent": value} for value in (None, 7, b"x", ["x"], "x" * (LONGEST + 1))),
            {"traceparent": ONE, "tracestate": "x" * LONGEST},
            *({"traceparents": value} for value in ([], [7, None, ["x"]], ["x" * (LONGEST + 1)])),
            {"traceparents": "no list"},
            {"tracestate": "alone=1"},
            None,
        ],
    )
    def test_whatever_else_is_there_is_none(self, headers: dict[str, Any] | None) -> None:
        assert contexts_of(headers) == ()

    def test_they_are_bounded(self) -> None:
        many = [f"{number:055}" for number in range(MOST + 9)]
        assert together([None, *many, *many, ""]) == many[:MOST]
        assert contexts_of({"traceparents": many}) == tuple(many[:MOST])


def delivery(headers: dict[str, Any] | None, *, reply_to: str | None = None) -> bytes:
    properties = Basic.Properties(headers=headers, reply_to=reply_to)
    return marshal(Basic.Deliver("c", 1, False, "e", ""), 1) + marshal(ContentHeader(0, 0, properties), 1)


class TestArriving:
    def arrive(self, data: bytes) -> Any:
        arrived: list[Any] = []
        Splitter(arrived.extend).split(data)
        ((_, one),) = arrived
        return one

    @pytest.mark.parametrize("reply_to", [None, "me"])
    @pytest.mark.parametrize("contexts", [(), (ONE,), (ONE, TWO)])
    def test_they_are_read_from_the_bytes(self, contexts: tuple[str, ...], reply_to: str | None) -> None:
        one = self.arrive(delivery(headers_of(contexts) or {"x-other": 1}, reply_to=reply_to))
        assert (one.contexts, one.reply_to) == (contexts, reply_to)

    def test_the_next_delivery_does_not_have_them(self) -> None:
        arrived: list[Any] = []
        Splitter(arrived.extend).split(delivery({"traceparent": ONE}) + delivery(None))
        assert [one.contexts for _, one in arrived] == [(ONE,), ()]

    def test_headers_that_cannot_be_read_do_no_harm(self) -> None:
        data = delivery({"traceparent": ONE})
        broken = data.replace(b"\x0btraceparentS", b"\x0btraceparent?")
        assert broken != data
        assert self.arrive(broken).contexts == ()

    def test_headers_that_name_no_context_are_not_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[object] = []
        monkeypatch.setattr("cacheinval.bus.wire._properties", read.append)
        assert self.arrive(delivery({"x-stream-offset": 7})).contexts == ()
        assert read == []


class TestWithoutTracing:
    def test_nobody_traces_who_has_set_no_provider(self) -> None:
        pytest.importorskip("opentelemetry.trace")
        assert tracing.tracing("rabbitmq", "cacheinval.shop", "one") is None

    def test_opentelemetry_need_not_be_installed(self) -> None:
        code = """if True:
            import asyncio, sys
            sys.modules["opentelemetry"] = None
            from cacheinval import Client, Settings
            async def main():
                settings = Settings(broker_url="memory://", database_url="", instance_id="one")
                async with Client(settings) as client:
                    await client.invalidate("a")
                    assert client._tracing is client.publisher.tracing is client.instance.tracing is None
            asyncio.run(main())
        """
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
