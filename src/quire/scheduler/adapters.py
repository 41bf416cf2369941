"""Which adapters running requests may use at once.

At most `most` distinct adapters are in use, because each is read in every step (and on a GPU has a fixed
slot). Places are given in the policy's order. A waiting request that needs a place waits until no running
request uses one of the adapters; those behind it that need another new one wait too. A request behind it
whose adapter is in use needs no place and passes, but only for `PATIENCE` steps: then none passes, so that
the running requests of some adapter come to an end. Requests without an adapter are never held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

from quire.scheduler.decisions import Wait, WaitReason
from quire.scheduler.request import Request

PATIENCE = 32
"""Number of steps."""
NO_PLACE = Wait(WaitReason.PLACE)


class AdapterPlaces:
    """Used by one scheduler, in each step: `begin`, then `wait_of` for waiting requests in order."""

    def __init__(self, most: int, *, patience: int = PATIENCE) -> None:
        self._most = most
        self._patience = patience
        self.in_use: Counter[str] = Counter()
        """The number of running requests by adapter."""
        self._lacking: dict[int, int] = {}
        """By request id, the step in which a place was lacking first."""
        self._step_id = 0
        self._taken: set[str] = set()
        self._overdue: Wait | None = None
        """What those behind a request that has waited for long wait for."""

    def begin(self, step_id: int, waiting: Container[int]) -> None:
        """waiting: contains the ids of waiting requests."""
        if self._lacking:
            self._lacking = {i: step for i, step in self._lacking.items() if i in waiting}
        self._step_id, self._overdue = step_id, None
        self._taken = set(self.in_use)

    def wait_of(self, request: Request) -> Wait | None:
        """Why the request cannot be admitted in this step, as far as its adapter is concerned."""
        adapter = request.placement.adapter
        if adapter is None:
            return None
        if adapter in self._taken:
            return self._overdue
        if len(self._taken) < self._most:
            self._taken.add(adapter)  # reserved, so that no request behind it takes the place
            return None
        since = self._lacking.setdefault(request.request_id, self._step_id)
        if self._overdue is None and self._step_id - since >= self._patience:
            self._overdue = Wait(WaitReason.PLACE, request.request_id)
        return NO_PLACE

    def enter(self, request: Request) -> None:
        """The request runs."""
        if (adapter := request.placement.adapter) is not None:
            self.in_use[adapter] += 1
            self._lacking.pop(request.request_id, None)

    def leave(self, request: Request) -> None:
        """It has ended, or is preempted."""
        if (adapter := request.placement.adapter) is not None:
            self.in_use[adapter] -= 1
            if not self.in_use[adapter]:
                del self.in_use[adapter]
