"""HTTP counters under the names of prometheus-fastapi-instrumentator, which vLLM's dashboards use."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from quire.metrics import buckets

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Other methods are counted together: clients must not be able to add label values."""

UNMATCHED = "none"


class HttpMetrics:
    """`http_requests_total` and `http_request_duration_seconds`.

    `handler` is the route's template, never the requested path, so the number of label values is limited.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests",
            "Requests by method, status class and handler.",
            ["method", "status", "handler"],
            registry=registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds until the last byte of the response, by method and handler.",
            ["method", "handler"],
            buckets=buckets.HTTP_SECONDS,
            registry=registry,
        )

    def on_response(self, *, method: str, handler: str | None, status: int, seconds: float) -> None:
        method = method if method in METHODS else "OTHER"
        handler = handler or UNMATCHED
        self._requests.labels(method, f"{status // 100}xx", handler).inc()
        self._seconds.labels(method, handler).observe(seconds)
