"""OpenTelemetry traces of pushes, over the processes of a service. Imported only where they are wanted.

A request that pushes is a span of each process that it goes through, below the caller's by its `traceparent`; the
phases of a shard's part, and requests to other processes, are spans below that.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freestep_service.domain.run_names import is_run_name
from freestep_service.runs.phases import Phases
from freestep_service.web.push_traces import TRACE

__all__ = ["Traces"]

_ROUTE = "/v1/runs/{run}/gradients"
_PUSH = re.compile(r"/v1/runs/([^/]+)/gradients")
_FAILED = 500
_PORTS = {"http": 80, "https": 443}
_PROPAGATOR = TraceContextTextMapPropagator()


class Traces:
    """ASGI middleware that traces pushes. url: of the process."""

    def __init__(self, app: ASGIApp, version: str, url: str) -> None:
        self._app = app
        resource = Resource.create({"service.name": "freestep", "service.version": version, "service.instance.id": url})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("freestep", version)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                await self._app(scope, receive, send)
            finally:
                # It sends what is left, and may wait for whoever takes it.
                await asyncio.to_thread(self._provider.shutdown)
            return
        match = _PUSH.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if match is None:
            await self._app(scope, receive, send)
            return
        trace = _PushTrace(self._tracer, match[1], scope)

        async def note_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.answered(message["status"])
            await send(message)

        try:
            await self._app({**scope, TRACE: trace}, receive, note_status)
        finally:
            trace.end()


class _PushTrace:
    """The span of a request that pushes."""

    def __init__(self, tracer: Tracer, run: str, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = _PROPAGATOR.extract(
            {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}, Context()
        )
        self._tracer = tracer
        attributes: dict[str, str] = {
            "http.request.method": scope["method"],
            "http.route": _ROUTE,
            "url.scheme": scope["scheme"],
        }
        if is_run_name(run):
            # Anybody may send any other text, of any length.
            attributes |= {"url.path": scope["path"], "freestep.run": run}
        self._span: Span = tracer.start_span("push", parent, SpanKind.SERVER, attributes)
        self._context: Context = set_span_in_context(self._span)
        self.phases: Phases | None = None
        """Of the part that is pushed here."""

    def note(self, **attributes: str | int) -> None:
        """Adds what is known of the push by now."""
        self._span.set_attributes({f"freestep.{name}": value for name, value in attributes.items()})

    def answered(self, status: int) -> None:
        """The answer begins."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= _FAILED:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(Status(StatusCode.ERROR))

    @contextmanager
    def relaying(self, method: str, url: str, headers: MutableMapping[str, str]) -> Iterator[None]:
        """A span of a request to another process, whose headers say so."""
        parts = urlsplit(url)
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "url.full": url,
            "server.address": parts.hostname or "",
            "server.port": parts.port or _PORTS[parts.scheme],
        }
        span = self._tracer.start_span("relay", self._context, SpanKind.CLIENT, attributes)
        _PROPAGATOR.inject(headers, set_span_in_context(span))
        try:
            yield
        except Exception as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            span.end()

    def end(self) -> None:
        """The answer is sent, or never will be."""
        if self.phases is not None and self.phases.ends:
            offset = time.time_ns() - time.monotonic_ns()
            ends = [*self.phases.ends, ("answer", self.phases.ends[-1][2], time.monotonic())]
            for phase, began, ended in ends:
                span = self._tracer.start_span(phase, self._context, start_time=offset + int(began * 1e9))
                span.end(offset + int(ended * 1e9))
        self._span.end()
