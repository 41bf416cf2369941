"""Metrics: the engine reports numbers, which are exported under vLLM's Prometheus names.

`request_stats` is data and a Protocol (nothing imported); `engine_metrics`, `http_metrics` and
`exposition` need prometheus_client and are therefore loaded on first use, so that `import quire`
stays light. Every app has its own registry: two engines can live in one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.metrics.request_stats import FinishedRequest, MetricsSink, NullMetrics

if TYPE_CHECKING:
    from quire.metrics.engine_metrics import EngineMetrics
    from quire.metrics.exposition import new_registry, render
    from quire.metrics.http_metrics import HttpMetrics
    from quire.metrics.log_line import StatsLogger
    from quire.metrics.replica_metrics import create_metrics

__all__ = [
    "EngineMetrics",
    "FinishedRequest",
    "HttpMetrics",
    "MetricsSink",
    "NullMetrics",
    "StatsLogger",
    "create_metrics",
    "new_registry",
    "render",
]

_HOMES = {
    "EngineMetrics": "quire.metrics.engine_metrics",
    "HttpMetrics": "quire.metrics.http_metrics",
    "StatsLogger": "quire.metrics.log_line",
    "create_metrics": "quire.metrics.replica_metrics",
    "new_registry": "quire.metrics.exposition",
    "render": "quire.metrics.exposition",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
