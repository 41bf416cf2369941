"""Whether the file of API keys is in use, and what quotas have refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Use(Protocol):
    num_running: int

    @property
    def refused(self) -> Mapping[str, int]: ...


class Accounts(Protocol):
    is_current: bool

    def uses(self) -> Mapping[str, Use]:
        """By the tenant's name."""


class KeyMetrics(Collector):
    """Read at each scrape. The file's tenants are the label's values, so clients add none."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "quire:api_keys_file_current",
            "1: the file of API keys, as it is now, is in use. 0: it has a mistake; the old keys hold.",
            value=self._accounts.is_current,
        )
        running = GaugeMetricFamily(
            "quire:tenant_requests", "Requests of a tenant in flight.", labels=["tenant"]
        )
        refused = CounterMetricFamily(
            "quire:quota_refusals",
            "Requests that a quota has refused: requests, tokens or concurrency.",
            labels=["tenant", "quota"],
        )
        for name, use in self._accounts.uses().items():
            running.add_metric([name], use.num_running)
            for quota in ("requests", "tokens", "concurrency"):
                refused.add_metric([name, quota], use.refused.get(quota, 0))
        yield running
        yield refused
