"""Loads of KV on several ranks: each loads its own layers and heads, and reports by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quire.errors import WorkerError
from quire.executor.ranks import Rank
from quire.executor.watch import Watch
from quire.messages import StepPlan, TransferResult

WAIT_SECONDS = 0.002


@dataclass(slots=True)
class _Load:
    missing: set[int]
    """The ranks that have not reported. -1: this one."""
    num_good: int
    overdue: float | None = None
    """When the others are, by the clock; None until this rank has reported."""
    sources: dict[str, int] = field(default_factory=dict)
    """Of this rank: the others' blocks are in the same places, or nearly."""
    late: bool = False


class RankLoads:
    """A load is over when all ranks have reported, with as many blocks as every rank has."""

    def __init__(
        self,
        watch: Watch,
        ranks: Sequence[Rank],
        *,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """timeout: seconds that other ranks may report later than this one."""
        self._watch, self._timeout, self._clock = watch, timeout, clock
        self._names = {rank.number: rank.name for rank in ranks}
        self._loads: dict[int, _Load] = {}

    def started(self, plan: StepPlan) -> None:
        """It was sent. If it clears the stores, loads under way have no good block."""
        if plan.clears_stores:
            for under_way in self._loads.values():
                under_way.num_good = 0
        for load in plan.loads:
            self._loads[load.transfer_id] = _Load({-1, *self._names}, len(load.names))

    def merge(self, own: Sequence[TransferResult], *, wait: bool) -> list[TransferResult]:
        """The loads that are over. own: those that are at this rank. wait: a moment, if only reports of other
        ranks are missing. Raises `WorkerError` if one is late."""
        if not self._loads:
            return []
        for result in own:
            self._note(-1, result)
        if wait and not any(-1 in load.missing for load in self._loads.values()):
            self._watch.wait(WAIT_SECONDS, lambda: bool(self._watch.loads))
        while self._watch.loads:
            self._note(*self._watch.loads.popleft())
        self._check_late()
        over = [key for key, load in self._loads.items() if not load.missing]
        return [
            TransferResult(
                transfer_id=key, num_good=load.num_good, sources=load.sources, late=load.late
            )
            for key in over
            for load in [self._loads.pop(key)]
        ]

    def _note(self, number: int, result: TransferResult) -> None:
        load = self._loads[result.transfer_id]
        load.missing.discard(number)
        load.num_good = min(load.num_good, result.num_good)
        load.late |= result.late
        if number == -1:
            load.sources = result.sources
            load.overdue = self._clock() + self._timeout

    def _check_late(self) -> None:
        now = self._clock()
        for load in self._loads.values():
            if load.missing and load.overdue is not None and now >= load.overdue:
                name = self._names[min(load.missing)]
                error = WorkerError(f"{name} is late by {self._timeout:g} s with a load of KV.")
                self._watch.fail(error)
                self._watch.check()
