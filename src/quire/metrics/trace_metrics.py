"""Whether spans reach the collector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector


class Sent(Protocol):
    num_sent: int

    @property
    def dropped(self) -> Mapping[str, int]: ...


class TraceMetrics(Collector):
    """Read at each scrape. Zeros without a collector, so that an alert has something to look at."""

    def __init__(self, exporter: Callable[[], Sent | None] = lambda: None) -> None:
        self._exporter = exporter

    def collect(self) -> Iterator[Metric]:
        exporter = self._exporter()
        sent, lost = (0, {}) if exporter is None else (exporter.num_sent, exporter.dropped)
        yield CounterMetricFamily(
            "quire:trace_spans_sent",
            "Spans that the OpenTelemetry collector has taken.",
            value=sent,
        )
        dropped = CounterMetricFamily(
            "quire:trace_spans_dropped",
            "Spans that were lost: the queue was full, or the collector was away or refused them.",
            labels=["reason"],
        )
        for reason in ("full", "unreachable", "rejected"):
            dropped.add_metric([reason], lost.get(reason, 0))
        yield dropped
