"""Tenants in /metrics: bounded labels, and counters that do not fall."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from quire.messages import SchedulerStats, StepOutputs, TenantStats
from quire.metrics import create_metrics
from quire.metrics.tenant_metrics import MOST_TENANTS


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.sink = create_metrics(self.registry, [None], model_name="m", max_model_len=16)

    def report(self, **tenants: TenantStats) -> None:
        self.sink.on_step(StepOutputs(stats=SchedulerStats(tenants=tenants)))

    def value(self, name: str, tenant: str) -> float | None:
        labels = {"model_name": "m", "engine": "0", "tenant": tenant}
        return self.registry.get_sample_value(f"quire:tenant_{name}", labels)

    def tenants(self) -> set[str]:
        return {
            sample.labels["tenant"]
            for family in self.registry.collect()
            for sample in family.samples
            if "tenant" in sample.labels
        }


def test_gauges_follow_and_charges_add_up() -> None:
    metrics = Metrics()
    metrics.report(a=TenantStats(2, 1, 10.0), b=TenantStats(0, 1, 4.0))
    metrics.report(a=TenantStats(0, 0, 6.0))
    assert metrics.value("requests_waiting", "a") == metrics.value("requests_running", "a") == 0
    assert metrics.value("charged_tokens_total", "a") == 16
    assert metrics.value("requests_running", "b") == 1


def test_a_refund_does_not_make_a_counter_fall() -> None:
    metrics = Metrics()
    for charged, total in ((10.0, 10), (-4.0, 10), (3.0, 10), (5.0, 14)):
        metrics.report(a=TenantStats(0, 1, charged))
        assert metrics.value("charged_tokens_total", "a") == total


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    busy = {f"t{index}": TenantStats(1, 1, 8.0) for index in range(MOST_TENANTS + 5)}
    metrics.report(**busy)
    assert len(metrics.tenants()) == MOST_TENANTS + 1
    assert metrics.value("requests_waiting", "other") == 5
    assert metrics.value("charged_tokens_total", "other") == 40
    metrics.report(**{name: TenantStats() for name in busy})
    assert metrics.value("requests_waiting", "other") == 0
    metrics.report(new=TenantStats(3, 0, 1.0))
    assert metrics.value("requests_waiting", "new") == 3
    assert len(metrics.tenants()) == MOST_TENANTS + 1


def test_without_the_fair_policy_there_are_none() -> None:
    metrics = Metrics()
    metrics.report()
    assert not metrics.tenants()
