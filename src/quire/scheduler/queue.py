"""The queue of requests in the order of their keys."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Protocol

from quire.placement import Placement
from quire.scheduler.request import Request

Clock = Callable[[], float]


class Placed(Protocol):
    """What keys are made of: a `Request` has it, and so has an `AddRequest`."""

    @property
    def request_id(self) -> int: ...
    @property
    def arrival_time(self) -> float: ...
    @property
    def placement(self) -> Placement: ...


SortKey = Callable[[Placed], tuple[float, ...]]


class RequestQueue:
    """Requests in ascending `sort_key`."""

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
