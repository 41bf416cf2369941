"""Metrics as plain values, for programs that use the engine as a library: vLLM's `LLM.get_metrics()`."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    value: int


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    value: float


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    count: int
    sum: float
    buckets: dict[str, int]
    """Upper bound as text, "+Inf" last -> number of values that were at most that."""


def read_metrics(registry: CollectorRegistry) -> list[Metric]:
    """The current value of every metric of the engine."""
    return [metric for family in registry.collect() for metric in _read(family)]


def _read(family: Family) -> list[Metric]:
    if family.type == "histogram":
        return _histograms(family)
    if family.type == "counter":
        totals = [s for s in family.samples if s.name.endswith("_total")]
        return [Counter(family.name, s.labels, int(s.value)) for s in totals]
    return [Gauge(family.name, s.labels, s.value) for s in family.samples]


def _histograms(family: Family) -> list[Metric]:
    """One histogram per set of labels; its samples are name_bucket with a bound `le`, name_count,
    name_sum."""
    parts: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for sample in family.samples:
        labels = dict(sample.labels)
        key = labels.pop("le", sample.name.rpartition("_")[2])
        parts.setdefault(tuple(labels.items()), {})[key] = sample.value
    return [
        Histogram(
            family.name,
            dict(labels),
            count=int(values.pop("count")),
            sum=values.pop("sum"),
            buckets={bound: int(value) for bound, value in values.items() if bound != "created"},
        )
        for labels, values in parts.items()
    ]
