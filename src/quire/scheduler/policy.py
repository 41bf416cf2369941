"""The order in which requests are served, and the queue in that order.

A policy gives each waiting request a sort key. The scheduler admits in ascending order. A request keeps
the key of its first admission: running requests get budget in ascending order of their keys, and are
preempted in descending order. So one order decides admission, budget and victims, and no counter that
changes while requests run can make two of them preempt each other in turn.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from quire.errors import ConfigError
from quire.placement import Placement
from quire.scheduler.request import Request


class Placed(Protocol):
    """What keys are made of: a `Request` has it, and so has an `AddRequest`."""

    @property
    def request_id(self) -> int: ...
    @property
    def arrival_time(self) -> float: ...
    @property
    def placement(self) -> Placement: ...


SortKey = Callable[[Placed], tuple[float, ...]]


class Policy(Protocol):
    @property
    def moves(self) -> bool:
        """Whether keys of waiting requests change from step to step. If so, the queue is sorted by new
        keys once a step."""

    def waiting_key(self, request: Placed) -> tuple[float, ...]:
        """The sort key of a request that was never admitted; no two keys are equal."""

    def served(self, request: Request, num_tokens: int) -> None:
        """num_tokens of the request are computed in this step. Called only if `moves`."""


@dataclass(frozen=True, slots=True)
class FixedOrder:
    """A policy whose keys depend on the request alone."""

    waiting_key: SortKey
    moves: bool = False

    def served(self, request: Request, num_tokens: int) -> None:
        pass


def fcfs(request: Placed) -> tuple[float, ...]:
    """First come, first served."""
    return (request.arrival_time, request.request_id)


def priority(request: Placed) -> tuple[float, ...]:
    """Lower `priority` first, then first come."""
    return (request.placement.priority, request.arrival_time, request.request_id)


POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": lambda: FixedOrder(fcfs),
    "priority": lambda: FixedOrder(priority),
}


def create_policy(name: str) -> Policy:
    if name not in POLICIES:
        raise ConfigError(f"scheduling_policy must be one of {', '.join(POLICIES)}, got {name!r}.")
    return POLICIES[name]()


class RequestQueue:
    """Requests in ascending `sort_key`, which changes only by `sort`."""

    def __init__(self) -> None:
        self._items: list[Request] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._items)

    def __getitem__(self, index: int) -> Request:
        return self._items[index]

    def add(self, request: Request) -> None:
        insort(self._items, request, key=_sort_key)

    def remove(self, request: Request) -> None:
        index = bisect_left(self._items, request.sort_key, key=_sort_key)
        assert self._items[index] is request, f"{request} is not queued"
        del self._items[index]

    def sort(self, key: SortKey) -> None:
        """Sort by new keys for the requests that were never admitted."""
        for request in self._items:
            if not request.was_admitted:
                request.sort_key = key(request)
        self._items.sort(key=_sort_key)


def _sort_key(request: Request) -> tuple[float, ...]:
    return request.sort_key
