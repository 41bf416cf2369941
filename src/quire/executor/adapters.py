"""The LoRA adapters of several ranks, as one store.

The other ranks get plans and calls in one order. In a pipeline this rank starts a plan later than they do
(`LaterStep`), so it also carries out later what must follow the plan.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from quire.executor.followers import Followers
from quire.messages import AddAdapter, DropAdapter
from quire.runner.adapters import AdapterTable


class PlanOrder:
    """Calls for this rank alone, each after the plans that were sent before it."""

    def __init__(self) -> None:
        self._num_sent = self._num_started = 0
        self._later: deque[tuple[int, str, Callable[[], None]]] = deque()
        """(number of plans that have been sent, key, call)"""

    def sent(self) -> None:
        """A plan has been."""
        self._num_sent += 1

    def started(self) -> None:
        """The oldest plan that had not been is."""
        self._num_started += 1
        while self._later and self._later[0][0] <= self._num_started:
            self._later.popleft()[2]()

    def call(self, key: str, call: Callable[[], None]) -> None:
        """Now, if all plans have started."""
        if self._num_started < self._num_sent:
            self._later.append((self._num_sent, key, call))
        else:
            call()

    def holds(self, key: str) -> bool:
        """Whether a call with this key is still to come."""
        return any(each == key for _, each, _ in self._later)


class AdapterEnd(NamedTuple):
    """An `AdapterLoad`."""

    key: str
    error: str | None


class RankAdapters:
    """An `AdapterStore`: an adapter is in memory when every rank has its part."""

    def __init__(self, own: AdapterTable, others: Followers, order: PlanOrder) -> None:
        self.own = own
        self._others = others
        self._watch = others.watch
        self._order = order
        self._missing: dict[str, set[int]] = {}
        """The ranks that have not ended, by adapter that is loading. -1: this one."""
        self._errors: dict[str, str] = {}

    def load(self, key: str, path: Path) -> None:
        self._missing[key] = {-1, *(rank.number for rank in self._others.ranks)}
        self._errors.pop(key, None)
        self._others.send(AddAdapter(key, str(path)))
        if self._order.holds(key):  # a drop
            self._order.call(key, lambda: self.own.load(key, path))
        else:
            self.own.load(key, path)

    def poll(self) -> Sequence[AdapterEnd]:
        for each in self.own.poll():
            self._note(-1, each.key, each.error)
        while self._watch.adapters:
            number, ended = self._watch.adapters.popleft()
            self._note(number, ended.key, ended.error)
        over = [key for key, missing in self._missing.items() if not missing]
        for key in over:
            del self._missing[key]
            if key in self._errors:
                self._drop(key)
        return [AdapterEnd(key, self._errors.pop(key, None)) for key in over]

    def wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        if any(-1 in missing for missing in self._missing.values()):
            self.own.wait(seconds)
        if self._missing:
            left = max(0.0, until - time.monotonic())
            self._watch.wait(left, lambda: bool(self._watch.adapters))

    def drop(self, key: str) -> None:
        self._missing.pop(key, None)
        self._drop(key)

    def _drop(self, key: str) -> None:
        self._others.send(DropAdapter(key))
        self._order.call(key, lambda: self.own.drop(key))

    def _note(self, number: int, key: str, error: str | None) -> None:
        if key in self._missing:
            self._missing[key].discard(number)
            if error is not None:
                self._errors.setdefault(key, error)
