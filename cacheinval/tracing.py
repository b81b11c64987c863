"""Traces of OpenTelemetry that reach from a write to each eviction that it causes (PROTOCOL.md, "Traces").

A context is a text: W3C's `traceparent`, and after a space its `tracestate` if there is one. As such it waits in the outbox and
goes from bus to bus, also through processes that know nothing of OpenTelemetry. Spans are made where the application has set a
tracer provider before the client is entered; else nothing here runs.
"""

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanKind, Tracer

__all__ = ["LONGEST", "MOST", "Tracing", "contexts_of", "headers_of", "names_context", "together", "tracing"]

log = logging.getLogger("cacheinval.tracing")

MOST = 32
"""Contexts that one message carries; of more writes that it gathers, the first ones are told."""

LONGEST = 600
"""Characters of a context: W3C asks for 512 of a `tracestate`."""

ONE, STATE, MANY = "traceparent", "tracestate", "traceparents"


def together(contexts: Iterable[str | None]) -> list[str]:
    """The contexts of what is told by one message, each once."""
    return list(dict.fromkeys(context for context in contexts if context))[:MOST]


def headers_of(contexts: Sequence[str]) -> dict[str, Any] | None:
    """The AMQP headers that carry these: of one write as everybody writes them, of several as a list."""
    if not contexts:
        return None
    if len(contexts) > 1:
        return {MANY: list(contexts)}
    parent, _, state = contexts[0].partition(" ")
    return {ONE: parent, STATE: state} if state else {ONE: parent}


def names_context(header: bytes) -> bool:
    """Whether there may be a context among the properties in this frame; most have none, and need not be understood."""
    return b"traceparent" in header


def contexts_of(headers: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What `headers_of` has made headers of; whoever sent them may have written anything there."""
    headers = headers or {}
    many, one, state = headers.get(MANY), headers.get(ONE), headers.get(STATE)
    if not isinstance(many, list):
        many = [f"{one} {state}" if one and state else one]
    return tuple(context for context in many[:MOST] if isinstance(context, str) and len(context) <= LONGEST)


def tracing(system: str, destination: str, instance_id: str) -> "Tracing | None":
    """What makes spans, if the application has set a tracer provider; the arguments are what is said in them."""
    if "opentelemetry.trace" not in sys.modules:
        return None  # who has not imported it has set none
    from opentelemetry import trace

    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    about = {
        "messaging.system": system,
        "messaging.destination.name": destination,
        "messaging.client.id": instance_id,
    }
    return Tracing(trace.get_tracer("cacheinval"), about)


class Tracing:
    """Makes spans by the conventions for messaging; a write's own context is the parent, several are linked to.

    Whatever an exporter or a span processor raises stays here: an eviction must not fail for being watched.
    """

    def __init__(self, tracer: "Tracer", about: Mapping[str, str]) -> None:
        self._tracer = tracer
        self._about = about

    def current(self) -> str | None:
        """The context of the span that this runs in; None outside of any, or in one that is not sampled."""
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        if not (context.is_valid and context.trace_flags.sampled):
            return None
        ids = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
        text = "-".join(("00", *ids, f"{context.trace_flags:02x}"))
        state = context.trace_state.to_header()
        return f"{text} {state}" if state and len(text) + len(state) < LONGEST else text

    @contextmanager
    def publishing(self, contexts: Sequence[str], message: object) -> Iterator[None]:
        """A span around the publish of a message for these contexts, from its first byte to its confirm."""
        from opentelemetry.trace import SpanKind, StatusCode

        span = self._start("publish", "send", SpanKind.PRODUCER, contexts, message)
        try:
            yield
        except BaseException as error:
            if span is not None:
                span.set_status(StatusCode.ERROR, str(error) or type(error).__name__)
            raise
        finally:
            self._end(span)

    def evicted(self, contexts: Sequence[str], message: object, began: int) -> None:
        """A message that carried these contexts was evicted just now; it arrived at `began`, in ns since 1970."""
        from opentelemetry.trace import SpanKind

        self._end(self._start("evict", "process", SpanKind.CONSUMER, contexts, message, began))

    def _start(
        self,
        name: str,
        kind_of_operation: str,
        kind: "SpanKind",
        contexts: Sequence[str],
        message: Any,
        began: int | None = None,
    ) -> "Span | None":
        from opentelemetry.trace import Link, get_current_span

        attributes = {
            **self._about,
            "messaging.operation.name": name,
            "messaging.operation.type": kind_of_operation,
            "cacheinval.keys": len(message.keys),
            "cacheinval.tags": len(message.tags),
            "cacheinval.everything": message.all,
        }
        if message.origin is not None and message.seq is not None:
            attributes["messaging.message.id"] = f"{message.origin}.{message.seq}"
        try:
            sources = [_extracted(context) for context in contexts]
            links = [Link(get_current_span(source).get_span_context()) for source in sources]
            alone = len(sources) == 1
            return self._tracer.start_span(
                f"{name} {self._about['messaging.destination.name']}",
                sources[0] if alone else _nowhere(),
                kind,
                attributes,
                () if alone else [link for link in links if link.context.is_valid],
                began,
            )
        except Exception:
            log.debug("a span cannot be made", exc_info=True)
            return None

    def _end(self, span: "Span | None") -> None:
        try:
            if span is not None:
                span.end()
        except Exception:
            log.debug("a span cannot be ended", exc_info=True)


def _extracted(context: str) -> "Context":
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent, _, state = context.partition(" ")
    carrier = {ONE: parent, STATE: state} if state else {ONE: parent}
    return TraceContextTextMapPropagator().extract(carrier, _nowhere())


def _nowhere() -> "Context":
    """No span at all. The tasks that publish and receive run in the context in which the client was entered, which is not
    that of what they do."""
    from opentelemetry.context import Context

    return Context()
