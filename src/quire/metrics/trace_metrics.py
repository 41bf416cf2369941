"""Whether spans reach the collector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector


class Sent(Protocol):
    num_sent: int

    @property
    def dropped(self) -> Mapping[str, int]: ...


class TraceMetrics(Collector):
    """Read at each scrape."""

    def __init__(self, exporter: Sent) -> None:
        self._exporter = exporter

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "quire:trace_spans_sent", "Spans that the collector has taken.", value=self._exporter.num_sent
        )
        dropped = CounterMetricFamily(
            "quire:trace_spans_dropped",
            "Spans that were lost: the queue was full, or the collector could not be reached or refused them.",
            labels=["reason"],
        )
        for reason in ("full", "unreachable", "rejected"):
            dropped.add_metric([reason], self._exporter.dropped.get(reason, 0))
        yield dropped
