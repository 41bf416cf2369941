"""In which order requests are served, and the queue that keeps them so.

A policy is one function, request -> sort key. The scheduler serves in ascending order and preempts in
descending order, so one function decides admission, budget and victims alike.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from quire.errors import ConfigError
from quire.scheduler.request import Request

SortKey = Callable[[Request], tuple[float, ...]]


def fcfs(request: Request) -> tuple[float, ...]:
    """First come, first served."""
    return (request.arrival_time, request.request_id)


def priority(request: Request) -> tuple[float, ...]:
    """Lower `priority` first, then first come."""
    return (request.placement.priority, request.arrival_time, request.request_id)


POLICIES: dict[str, SortKey] = {"fcfs": fcfs, "priority": priority}


def get_policy(name: str) -> SortKey:
    if name not in POLICIES:
        raise ConfigError(f"scheduling_policy must be one of {', '.join(POLICIES)}, got {name!r}.")
    return POLICIES[name]


class RequestQueue:
    """Requests in ascending `sort_key`, which must not change while they are in it."""

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


def _sort_key(request: Request) -> tuple[float, ...]:
    return request.sort_key
