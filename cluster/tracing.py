"""Spans of this process, sent to an OpenTelemetry collector: the only file that knows OpenTelemetry."""

import asyncio
import logging
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

from kernels.transport.spans import Span, SpanLog

logger = logging.getLogger(__name__)

EXPORT_EVERY_S = 1.0
EXPORT_TIMEOUT_S = 2.0
NAMESPACE = "trivium"
TRACES_PATH = "/v1/traces"
OPERATION = "gen_ai.operation.name"  # on the span of a whole generation alone


class Tracing:
    """Takes a log's spans and exports them, in the running event loop and a thread, until it is stopped."""

    def __init__(self, exporter: SpanExporter, pool: str, name: str, log: SpanLog):
        self._exporter = exporter
        who = {"service.name": f"{NAMESPACE}-{pool}", "service.instance.id": name}
        self._resource = Resource.create({"service.namespace": NAMESPACE, **who})
        self._log = log
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Export what is left, and no more."""
        self._running.cancel()
        await asyncio.wait([self._running])
        await self._export_once()
        await asyncio.to_thread(self._exporter.shutdown)

    def export(self) -> None:
        """Send what has ended since the last time; a collector that is away costs spans, nothing else."""
        spans = self._log.take()
        if spans:
            self._exporter.export(readable(spans, self._resource))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EXPORT_EVERY_S)
            await self._export_once()

    async def _export_once(self) -> None:
        try:
            await asyncio.to_thread(self.export)
        except Exception:
            logger.exception("spans could not be exported; later ones are")


def start_tracing(endpoint: str, pool: str, name: str, log: SpanLog) -> Tracing | None:
    """Begin to send a log's spans to the collector at an OTLP/HTTP endpoint; None where none is named."""
    if not endpoint:
        return None
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # an absent collector fills no log
    exporter = OTLPSpanExporter(endpoint.rstrip("/") + TRACES_PATH, timeout=EXPORT_TIMEOUT_S)
    return Tracing(exporter, pool, name, log)


async def stop_tracing(tracing: Tracing | None) -> None:
    """End it, if it was begun."""
    if tracing is not None:
        await tracing.stop()


def readable(spans: Sequence[Span], resource: Resource) -> list[ReadableSpan]:
    """Spans as OpenTelemetry's exporters take them."""
    return [
        ReadableSpan(
            name=span.name,
            context=context_of(span.trace_id, span.span_id),
            parent=context_of(span.trace_id, span.parent_id) if span.parent_id else None,
            kind=SpanKind.SERVER if OPERATION in span.attributes else SpanKind.INTERNAL,
            resource=resource,
            attributes=dict(span.attributes),
            start_time=int(span.begin_s * 1e9),
            end_time=int(span.end_s * 1e9),
        )
        for span in spans
    ]


def context_of(trace_id: str, span_id: str) -> SpanContext:
    """A place in a trace as OpenTelemetry knows it."""
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(1))
