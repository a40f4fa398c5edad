"""OpenTelemetry traces: a span for each request, and its stages as spans of their own below it.

The caller's `traceparent` is the parent, and decides whether a request is recorded at all; other settings are the SDK's
own variables (`OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`, ...). Imports nothing of it before it is asked for.
"""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

from starlette.types import Scope

from siglane.errors import UserError
from siglane.server.context import RequestContext

# a stage's name in metrics and timings -> its span's
SPANS = {"prepare": "preprocess", "generate": "decode tokens", "decode": "decode images"}
NANOSECONDS = 1e9


def check_traces(endpoint: str | None) -> None:
    """UserError when traces are asked for and cannot be sent."""
    if endpoint is None:
        return
    if not endpoint.startswith(("http://", "https://")):
        message = f"otlp_traces_endpoint must be an http(s) address, got {endpoint!r}"
        raise UserError(message, code="bad_option", param="otlp_traces_endpoint")
    try:
        importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        message = f"traces need more packages ({error}); pip install 'siglane[otel]'"
        raise UserError(message, code="missing_extra", param="otlp_traces_endpoint") from error


class Traces:
    """Sends spans to `endpoint` (OTLP over HTTP) from a thread of its own; what it does not take is dropped."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "siglane"}
        self._provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("siglane")
        self._parents = TraceContextTextMapPropagator()

    def record(self, scope: Scope, context: RequestContext, route: str, status: int) -> None:
        """A request that has ended."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        past = time.time() - time.monotonic()  # from the one clock to the other
        attributes: dict[str, Any] = {
            "http.request.method": scope["method"],
            "http.route": route,
            "http.response.status_code": status,
            "siglane.request_id": context.request_id,
        }
        attributes |= {"siglane.key": context.client.name} if context.client.name else {}
        attributes |= {"error.type": context.failed} if context.failed else {}
        span = self._tracer.start_span(
            f"{scope['method']} {route}",
            context=self._parents.extract(headers),
            kind=SpanKind.SERVER,
            start_time=_ns(context.began + past),
            attributes=attributes,
        )
        below = set_span_in_context(span)
        for stage, begin, end in context.watch.intervals:
            child = self._tracer.start_span(SPANS.get(stage, stage), context=below, start_time=_ns(begin + past))
            child.end(_ns(end + past))
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(_ns(time.time()))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * NANOSECONDS)
