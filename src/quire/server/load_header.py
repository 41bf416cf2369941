"""The engine's load in the header of an answer, for balancers that ask for it (ORCA: Open Request Cost
Aggregation).

A request with `endpoint-load-metrics-format: TEXT` or `JSON` gets `endpoint-load-metrics`, with vLLM's names,
and what waits in tokens and seconds.
"""

from __future__ import annotations

import msgspec

from quire.messages import SchedulerStats
from quire.server.record import Headers

ASKED = b"endpoint-load-metrics-format"
ANSWER = b"endpoint-load-metrics"


def load_header(headers: Headers, stats: SchedulerStats) -> list[tuple[bytes, bytes]]:
    """Empty if the request does not ask, or asks for another format, which ORCA leaves unanswered."""
    form = next((value.strip().upper() for name, value in headers if name == ASKED), b"")
    metrics = {
        "kv_cache_usage_perc": float(stats.kv_usage),
        "num_requests_waiting": float(stats.num_waiting),
        "num_requests_running": float(stats.num_running),
        "queue_tokens": float(stats.load.queue_tokens),
        "estimated_wait_seconds": float(stats.load.wait_seconds),
    }
    if form == b"TEXT":
        named = ", ".join(f"named_metrics.{name}={value:g}" for name, value in metrics.items())
        return [(ANSWER, b"TEXT " + named.encode("ascii"))]
    if form == b"JSON":
        return [(ANSWER, b"JSON " + msgspec.json.encode({"named_metrics": metrics}))]
    return []
