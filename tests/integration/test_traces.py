"""Traces from a write to the evictions that it causes, over real RabbitMQ and Postgres."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState
from waiting import Eventually

from cacheinval import Client, Settings
from cacheinval.outbox import apply_schema
from cacheinval.publisher import Unpublished
from cacheinval.sandbox import RabbitMQ


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[TracerProvider]:
    """The tracer provider of the application, for this test."""
    provider = TracerProvider()
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    yield provider
    provider.shutdown()


@pytest.fixture
def service(provider: TracerProvider) -> trace.Tracer:
    """Makes the spans of the application."""
    return provider.get_tracer("the service")


@pytest.fixture
def exported(provider: TracerProvider) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
async def schema(database_url: str) -> str:
    connection = await asyncpg.connect(database_url)
    try:
        await apply_schema(connection)
        await connection.execute("CREATE TABLE p (id int PRIMARY KEY)")
    finally:
        await connection.close()
    return database_url


@pytest.fixture
async def join(
    rabbitmq: RabbitMQ, schema: str, namespace: str, service: trace.Tracer
) -> AsyncIterator[Callable[..., Any]]:
    """Enters a client, as a part of some trace, and waits until it hears of others."""
    async with AsyncExitStack() as stack:

        async def join(instance_id: str, **options: Any) -> Client:
            settings = Settings(
                broker_url=rabbitmq.url,
                namespace=namespace,
                instance_id=instance_id,
                **{"database_url": schema, "relay": "off"} | options,
            )
            with service.start_as_current_span("starting"):  # of which nothing that happens later is a part
                client = await stack.enter_async_context(Client(settings))
            await client.wait_ready(20)
            return client

        yield join


def named(exported: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exported.get_finished_spans() if span.name.split()[0] == name]


def sources(span: ReadableSpan) -> list[tuple[int, int]]:
    """Trace and span ids of what it comes from: its parent, or what it has links to."""
    contexts = [span.parent] if span.parent is not None else [link.context for link in span.links]
    return [(context.trace_id, context.span_id) for context in contexts]


def ids(span: Any) -> tuple[int, int]:
    context = span.get_span_context()
    return context.trace_id, context.span_id


@pytest.mark.parametrize("bus", ["fanout", "stream"])
async def test_an_eviction_elsewhere_is_a_part_of_the_trace_of_the_write(
    bus: str,
    join: Callable[..., Any],
    service: trace.Tracer,
    exported: InMemorySpanExporter,
    namespace: str,
    eventually: Eventually,
) -> None:
    writer, reader = await join("writer", bus=bus), await join("reader", bus=bus)
    with service.start_as_current_span("PUT /products") as request:
        await writer.execute("INSERT INTO p VALUES (1)", invalidate=["a"])
    with service.start_as_current_span("POST /products") as other:
        async with writer.transaction() as tx:
            await tx.execute("INSERT INTO p VALUES (2)")
            tx.invalidate("b", "c", tags=["t"])
    await eventually(lambda: len(named(exported, "evict")) == 2)
    first, second = named(exported, "evict")
    assert (sources(first), sources(second)) == ([ids(request)], [ids(other)])
    assert first.get_span_context().trace_id == ids(request)[0]
    assert (first.kind, first.name) == (SpanKind.CONSUMER, f"evict cacheinval.{namespace}")
    assert first.start_time <= first.end_time
    origin = writer.publisher._channel.origin
    assert dict(second.attributes) == {
        "messaging.system": "rabbitmq",
        "messaging.destination.name": f"cacheinval.{namespace}",
        "messaging.client.id": "reader",
        "messaging.operation.name": "evict",
        "messaging.operation.type": "process",
        "messaging.message.id": f"{origin}.2",
        "cacheinval.keys": 2,
        "cacheinval.tags": 1,
        "cacheinval.everything": False,
    }
    await eventually(lambda: len(named(exported, "publish")) == 2)
    publish = named(exported, "publish")[0]
    assert sources(publish) == [ids(request)]
    assert (publish.kind, publish.attributes["messaging.client.id"]) == (SpanKind.PRODUCER, "writer")
    assert reader.stats()["receiver"]["malformed"] == 0


async def test_a_message_for_many_writes_has_links_to_each(
    join: Callable[..., Any], service: trace.Tracer, exported: InMemorySpanExporter, eventually: Eventually
) -> None:
    writer, _ = await join("writer"), await join("reader")
    spans = []
    for number in range(3):  # without an await in between, so they go out together
        with service.start_as_current_span(f"request {number}") as span:
            spans.append(span)
            context = writer._tracing.current()
        unpublished = Unpublished(keys=[f"k{number}"], evicted_here=True, context=context)
        writer.publisher.submit(unpublished)
    await eventually(lambda: len(named(exported, "evict")) == 1)
    (evict,) = named(exported, "evict")
    assert evict.parent is None
    assert sources(evict) == [ids(span) for span in spans]
    assert {link.context.is_remote for link in evict.links} == {True}
    assert evict.attributes["cacheinval.keys"] == 3
    await eventually(lambda: named(exported, "publish"))  # the confirm may come later
    (publish,) = named(exported, "publish")
    assert sources(publish) == sources(evict)


async def test_what_the_relay_publishes_belongs_to_the_write_too(
    join: Callable[..., Any],
    service: trace.Tracer,
    exported: InMemorySpanExporter,
    eventually: Eventually,
    schema: str,
) -> None:
    reader = await join("reader")
    writer = await join("writer", tick_interval=0.2, relay="auto")
    with service.start_as_current_span("a transaction of its own") as request:
        connection = await asyncpg.connect(schema)
        try:
            async with connection.transaction():
                await writer.record(connection, "a")
        finally:
            await connection.close()
    await eventually(
        lambda: len(named(exported, "evict")) == 2
    )  # the writer's own cache hears of it by the relay
    spans = named(exported, "evict")
    assert {span.attributes["messaging.client.id"] for span in spans} == {"reader", "writer"}
    assert [sources(span) for span in spans] == [[ids(request)]] * 2
    await eventually(lambda: named(exported, "publish"))
    assert [sources(span) for span in named(exported, "publish")] == [[ids(request)]]
    assert reader.stats()["receiver"]["malformed"] == 0


async def test_a_write_of_which_its_process_dies_is_traced_by_the_relay_of_another(
    join: Callable[..., Any],
    service: trace.Tracer,
    exported: InMemorySpanExporter,
    eventually: Eventually,
    monkeypatch: Any,
) -> None:
    writer = await join("writer")
    monkeypatch.setattr(writer.publisher, "submit", lambda unpublished: None)  # as if it were gone
    with service.start_as_current_span("request") as request:
        await writer.execute("INSERT INTO p VALUES (1)", invalidate=["a"])
    await join("reader", relay="auto", tick_interval=0.2)
    await eventually(lambda: len(named(exported, "publish")) == 1)
    assert sources(named(exported, "publish")[0]) == [ids(request)]


async def test_a_trace_state_goes_along(
    join: Callable[..., Any], exported: InMemorySpanExporter, eventually: Eventually
) -> None:
    writer, _ = await join("writer"), await join("reader")
    state = TraceState([("vendor", "a b"), ("other", "1")])
    remote = trace.NonRecordingSpan(SpanContext(7, 8, True, TraceFlags(1), state))
    with trace.use_span(remote):
        await writer.invalidate("a")
    await eventually(lambda: len(named(exported, "evict")) == 1)
    (span,) = named(exported, "evict")
    assert sources(span) == [(7, 8)]
    assert span.get_span_context().trace_state == state


async def test_what_is_not_traced_makes_no_spans(
    join: Callable[..., Any], service: trace.Tracer, exported: InMemorySpanExporter, eventually: Eventually
) -> None:
    writer, reader = await join("writer"), await join("reader")
    unsampled = TracerProvider(sampler=ALWAYS_OFF).get_tracer("x")
    await writer.invalidate("a")
    with unsampled.start_as_current_span("request"):
        assert (
            writer._tracing.current() is None
        )  # among other writes' it would be linked to, and lead nowhere
        await writer.invalidate("b")
    with service.start_as_current_span("the last"):
        await writer.invalidate("c")
    await eventually(lambda: named(exported, "evict"))
    assert reader.stats()["receiver"]["evictions"] >= 3
    assert [span.name.split()[0] for span in exported.get_finished_spans()].count("evict") == 1


class Failing(SpanProcessor):
    def on_start(self, span: Any, parent_context: Any = None) -> None:
        if span.name.startswith(("publish", "evict")):
            raise RuntimeError("the exporter is broken")


async def test_a_span_processor_that_fails_keeps_nobody_from_evicting(
    join: Callable[..., Any], service: trace.Tracer, provider: TracerProvider, eventually: Eventually
) -> None:
    provider.add_span_processor(Failing())
    writer, reader = await join("writer"), await join("reader")
    epoch = reader.status()["cache"]["epoch"]
    with service.start_as_current_span("request"):
        await writer.invalidate("a")
    await eventually(lambda: reader.stats()["receiver"]["latencies"] != [0] * 16)
    assert writer.stats()["publisher"]["failures"] == 0
    assert (reader.state, reader.status()["cache"]["epoch"]) == ("ready", epoch)
