"""A collector of OpenTelemetry's: takes spans over HTTP, as it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATIENCE = 60.0


class Collector:
    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.statuses: list[int] = []
        """Of the next answers; then 200."""
        self.answer = b"{}"
        self.retry_after: str | None = None
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = collector.statuses.pop(0) if collector.statuses else 200
                collector.paths.append(self.path)
                collector.headers.append({k.lower(): v for k, v in self.headers.items()})
                if status == 200:
                    collector.bodies.append(json.loads(body))
                self.send_response(status)
                if collector.retry_after is not None and status != 200:
                    self.send_header("retry-after", collector.retry_after)
                self.send_header("content-length", str(len(collector.answer)))
                self.end_headers()
                self.wfile.write(collector.answer)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    @property
    def spans(self) -> list[dict]:
        return [
            span
            for body in list(self.bodies)
            for resource in body["resourceSpans"]
            for scope in resource["scopeSpans"]
            for span in scope["spans"]
        ]

    def of_request(self, request_id: str) -> list[dict]:
        """Its spans, its own first; waits for them."""
        wait_for(
            lambda: any(attributes(s).get("gen_ai.request.id") == request_id for s in self.spans)
        )
        [own] = [s for s in self.spans if attributes(s).get("gen_ai.request.id") == request_id]
        return [own, *(s for s in self.spans if s.get("parentSpanId") == own["spanId"])]


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        thread.join()
        collector.server.server_close()


def attributes(span: dict) -> dict[str, object]:
    def plain(value: dict) -> object:
        [(kind, inner)] = value.items()
        if kind == "intValue":
            return int(inner)
        return [plain(v) for v in inner["values"]] if kind == "arrayValue" else inner

    return {item["key"]: plain(item["value"]) for item in span["attributes"]}


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
