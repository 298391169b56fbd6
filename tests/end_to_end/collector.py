"""A collector of traces: an HTTP server that keeps the spans it is sent, as OpenTelemetry's own would."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """Spans by service, as they come."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, dict]] = []

    def take(self, body: bytes) -> None:
        """Keep the spans of one export."""
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(named["service.name"], MessageToDict(span)) for span in scope.spans]

    def of_name(self, name: str) -> list[dict]:
        """Spans of a name."""
        return [span for _, span in list(self.spans) if span["name"] == name]

    def of_trace(self, trace_id: str) -> list[tuple[str, dict]]:
        """Spans of one trace, its id as base64."""
        return [(service, span) for service, span in list(self.spans) if span["traceId"] == trace_id]


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A collector in a thread, and its endpoint."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
