"""The order in which requests are served, and the queue in that order.

A policy is the queue of the requests that wait. The scheduler asks it for one candidate after the other, and
stops at the first that does not fit. When a request is admitted for the first time, its sort key is fixed:
running requests get budget in ascending order of their keys, and are preempted in descending order. So one
order decides admission, budget and victims, and nothing that changes while requests run can make two of them
preempt each other in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from quire.errors import ConfigError
from quire.messages import TenantStats
from quire.scheduler.decisions import Standing
from quire.scheduler.fair import FairQueue
from quire.scheduler.queue import Clock, Placed, RequestQueue, SortKey
from quire.scheduler.request import Request


class Policy(Protocol):
    """The requests that wait: those that were never admitted, and those that were preempted."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Request]:
        """In their order, except that counters are not considered."""

    def first(self) -> Request | None:
        """The first of the iteration."""

    def waiting_key(self, request: Placed) -> tuple[float, ...]:
        """The sort key of a request that was never admitted; no two keys are equal."""

    def add(self, request: Request) -> None: ...
    def remove(self, request: Request) -> None: ...

    def candidates(self) -> Iterator[Request]:
        """The requests in the order in which they may be admitted. Each may be removed, and `admitted`,
        before the next is asked for."""

    def admitted(self, request: Request, num_found: int) -> None:
        """A request that was removed will run. May change its key if this is its first admission.
        num_found: tokens whose KV it does not compute."""

    def stopped(self, request: Request) -> None:
        """A running request ends, or is preempted."""

    def ended(self, request: Request) -> None:
        """A request that is in no queue any more has ended."""

    def standing(self, request: Request) -> Standing: ...

    def take_tenants(self) -> dict[str, TenantStats]:
        """The state of tenants that has changed since the last report, if one is due."""

    def check_invariants(self) -> None: ...


class FixedOrder(RequestQueue):
    """A policy whose keys depend on the request alone."""

    def __init__(self, key: SortKey) -> None:
        super().__init__()
        self.waiting_key = key

    def first(self) -> Request | None:
        return self._items[0] if self._items else None

    def candidates(self) -> Iterator[Request]:
        return iter(list(self._items))

    def admitted(self, request: Request, num_found: int) -> None:
        pass

    def stopped(self, request: Request) -> None:
        pass

    def ended(self, request: Request) -> None:
        pass

    def standing(self, request: Request) -> Standing:
        return Standing()

    def take_tenants(self) -> dict[str, TenantStats]:
        return {}

    def check_invariants(self) -> None:
        keys = [request.sort_key for request in self]
        assert keys == sorted(keys)


def fcfs(request: Placed) -> tuple[float, ...]:
    """First come, first served."""
    return (request.arrival_time, request.request_id)


def priority(request: Placed) -> tuple[float, ...]:
    """Lower `priority` first, then first come."""
    return (request.placement.priority, request.arrival_time, request.request_id)


POLICIES: dict[str, Callable[[float, Clock], Policy]] = {
    "fcfs": lambda aging, clock: FixedOrder(fcfs),
    "priority": lambda aging, clock: FixedOrder(priority),
    "fair": FairQueue,
}


def create_policy(name: str, *, aging: float = 0.0, clock: Clock = time.monotonic) -> Policy:
    """aging: see `SchedulerLimits.aging`."""
    if name not in POLICIES:
        raise ConfigError(f"scheduling_policy must be one of {', '.join(POLICIES)}, got {name!r}.")
    return POLICIES[name](aging, clock)
