"""Spans out of a log into an exporter, and a collector that is away, slow or broken."""

import asyncio
import logging
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from cluster import tracing as tracing_module
from cluster.tracing import Tracing, start_tracing, stop_tracing
from kernels.transport.spans import SpanLog, begin_trace, place_under, span_id_of, trace_id_of
from tests.cluster.served import until


@pytest.fixture(autouse=True)
def hurried(monkeypatch) -> Iterator[None]:
    """Little waiting; OpenTelemetry's own log is as before at the end."""
    monkeypatch.setattr(tracing_module, "EXPORT_EVERY_S", 0.01)
    monkeypatch.setattr(tracing_module, "EXPORT_TIMEOUT_S", 0.2)
    logger = logging.getLogger("opentelemetry")
    before = logger.level
    yield
    logger.setLevel(before)


def test_a_span_is_whole_in_the_exporter():
    async def run() -> None:
        log, exporter, now_s = SpanLog(), InMemorySpanExporter(), time.monotonic()
        above = begin_trace()
        here = place_under(above)
        tracing = Tracing(exporter, "decode", "decode-1", log)
        log.record("generate", above, now_s - 2, now_s, above, **{"gen_ai.operation.name": "chat"})
        log.record("decode", above, now_s - 1, now_s, here, tokens_count=3, names=("a", "b"))
        await until(lambda: len(exporter.get_finished_spans()) == 2)
        root, span = exporter.get_finished_spans()
        assert (root.name, root.parent, root.kind) == ("generate", None, SpanKind.SERVER)
        assert (span.name, span.kind) == ("decode", SpanKind.INTERNAL)
        assert f"{span.context.trace_id:032x}" == trace_id_of(above) == f"{root.context.trace_id:032x}"
        assert f"{span.context.span_id:016x}" == span_id_of(here)
        assert f"{span.parent.span_id:016x}" == span_id_of(above) == f"{root.context.span_id:016x}"
        assert span.end_time - span.start_time == pytest.approx(1e9, rel=1e-3)
        assert abs(span.end_time / 1e9 - time.time()) < 5
        assert dict(span.attributes) == {"tokens_count": 3, "names": ("a", "b")}
        who = span.resource.attributes
        assert (who["service.namespace"], who["service.name"]) == ("trivium", "trivium-decode")
        assert who["service.instance.id"] == "decode-1"
        await tracing.stop()

    asyncio.run(run())


def test_what_is_left_is_exported_at_the_end_and_once(monkeypatch):
    monkeypatch.setattr(tracing_module, "EXPORT_EVERY_S", 60.0)

    class Noting(InMemorySpanExporter):
        """Keeps what it has when it is shut down."""

        was_shut_down = False

        def shutdown(self) -> None:
            self.was_shut_down = True

    async def run() -> None:
        log, exporter = SpanLog(), Noting()
        tracing = Tracing(exporter, "decode", "decode-1", log)
        log.record("decode", begin_trace(), 0.0, 1.0)
        await asyncio.sleep(0.01)
        assert exporter.get_finished_spans() == ()
        before = asyncio.all_tasks()
        await stop_tracing(tracing)
        assert len(exporter.get_finished_spans()) == 1 and exporter.was_shut_down
        assert len(before - asyncio.all_tasks()) == 1, "its task has ended"

    asyncio.run(run())


def test_where_there_is_nothing_to_send_nothing_is_sent():
    class Never(SpanExporter):
        """Wants to be left alone."""

        def export(self, spans) -> SpanExportResult:
            raise AssertionError(f"{len(spans)} spans were sent")

    async def run() -> None:
        tracing = Tracing(Never(), "decode", "decode-1", SpanLog())
        await asyncio.sleep(0.05)
        await tracing.stop()

    asyncio.run(run())


def test_an_exporter_that_fails_costs_its_spans_and_nothing_else():
    class Failing(InMemorySpanExporter):
        """Fails the first time and the last."""

        failures_count = 0
        is_broken = True

        def export(self, spans) -> SpanExportResult:
            if self.is_broken:
                self.failures_count += 1
                raise ConnectionError("gone")
            return super().export(spans)

    async def run() -> None:
        log, exporter = SpanLog(), Failing()
        tracing = Tracing(exporter, "decode", "decode-1", log)
        log.record("first", begin_trace(), 0.0, 1.0)
        await until(lambda: exporter.failures_count == 1)
        exporter.is_broken = False
        log.record("second", begin_trace(), 0.0, 1.0)
        await until(lambda: [span.name for span in exporter.get_finished_spans()] == ["second"])
        exporter.is_broken = True
        log.record("third", begin_trace(), 0.0, 1.0)
        await tracing.stop()
        assert exporter._stopped, "shut down whatever happened"

    asyncio.run(run())


def test_a_slow_exporter_holds_nobody_up():
    class Slow(InMemorySpanExporter):
        """Takes its time."""

        def export(self, spans) -> SpanExportResult:
            time.sleep(0.2)
            return super().export(spans)

    async def run() -> None:
        log, exporter = SpanLog(), Slow()
        tracing = Tracing(exporter, "decode", "decode-1", log)
        log.record("first", begin_trace(), 0.0, 1.0)
        slowest_s = 0.0
        while not exporter.get_finished_spans():
            begin_s = time.monotonic()
            await asyncio.sleep(0.001)
            slowest_s = max(slowest_s, time.monotonic() - begin_s)
        assert slowest_s < 0.15, "the event loop went on"
        await tracing.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", "http://127.0.0.1:9/", "collector:4318", "nonsense"]
)
def test_a_collector_that_is_away_breaks_nothing_and_fills_no_log(endpoint: str, capfd):
    async def run() -> None:
        log = SpanLog()
        tracing = start_tracing(endpoint, "decode", "decode-1", log)
        for _ in range(2):
            log.record("decode", begin_trace(), 0.0, 1.0)
            await asyncio.sleep(0.03)
        begin_s = time.monotonic()
        await stop_tracing(tracing)
        assert time.monotonic() - begin_s < 3.0
        assert log.take() == []

    asyncio.run(run())
    assert capfd.readouterr() == ("", "")


def test_without_an_endpoint_nothing_begins():
    async def run() -> None:
        before = asyncio.all_tasks()
        assert start_tracing("", "decode", "decode-1", SpanLog()) is None
        assert asyncio.all_tasks() == before
        await stop_tracing(None)

    asyncio.run(run())
