"""Requests and charges by tenant, under the fair policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

from quire.metrics.family import Family

if TYPE_CHECKING:
    from quire.messages import TenantStats

MOST_TENANTS = 20
OTHER = "other"
WAITING = ("quire:tenant_requests_waiting", "Requests that wait, by tenant.")
RUNNING = ("quire:tenant_requests_running", "Requests that run, by tenant.")
CHARGED = (
    "quire:tenant_charged_tokens",
    "What tenants were charged: 1 for each prompt token that was not in the cache, 2 for each generated one.",
)


class TenantMetrics:
    """Labels are bounded: `MOST_TENANTS` have one of their own, those that had requests last; the rest are
    `other`. The series of a tenant that loses its label end, and begin at 0 if it gets one again."""

    def __init__(self, make: Family) -> None:
        self._make = make
        self._shown: dict[str, _Tenant] = {}
        """Who had no requests for the longest time is first."""
        self._others: dict[str, TenantStats] = {}
        """Those of the others that have requests."""
        self._other: _Tenant | None = None

    def on_tenants(self, tenants: Mapping[str, TenantStats]) -> None:
        for name, stats in sorted(tenants.items(), key=lambda item: item[1].charged, reverse=True):
            shown = self._shown.pop(name, None) or self._new(name)
            if shown is None:
                self._add_to_others(name, stats)
                continue
            shown.report(stats.waiting, stats.running, stats.charged)
            self._shown[name] = shown

    def _new(self, name: str) -> _Tenant | None:
        """None if all labels are taken by tenants with requests."""
        if name in self._others:  # until it has none, so that its requests are not counted twice
            return None
        if len(self._shown) >= MOST_TENANTS:
            idle = next((name for name, tenant in self._shown.items() if not tenant.is_busy), None)
            if idle is None:
                return None
            self._shown.pop(idle).remove()
        return _Tenant(self._make, name)

    def _add_to_others(self, name: str, stats: TenantStats) -> None:
        self._others.pop(name, None)
        if stats.waiting or stats.running:
            self._others[name] = stats
        if self._other is None:
            self._other = _Tenant(self._make, OTHER)
        waiting = sum(each.waiting for each in self._others.values())
        running = sum(each.running for each in self._others.values())
        self._other.report(waiting, running, stats.charged)


class _Tenant:
    """The series of a label."""

    def __init__(self, make: Family, name: str) -> None:
        self._labels = (*make.base.values(), name)
        labels = [*make.base, "tenant"]
        self._families: tuple[Gauge | Counter, ...] = (
            make.family(Gauge, *WAITING, labels),
            make.family(Gauge, *RUNNING, labels),
            make.family(Counter, *CHARGED, labels),
        )
        self._waiting = make.gauge(*WAITING, tenant=name)
        self._running = make.gauge(*RUNNING, tenant=name)
        self._charged = make.counter(*CHARGED, tenant=name)
        self._refunds = 0.0
        self.is_busy = False

    def report(self, waiting: int, running: int, charged: float) -> None:
        self.is_busy = waiting + running > 0
        self._waiting.set(waiting)
        self._running.set(running)
        charged -= self._refunds  # a counter does not fall
        self._refunds = max(0.0, -charged)
        self._charged.inc(max(0.0, charged))

    def remove(self) -> None:
        for family in self._families:
            family.remove(*self._labels)
