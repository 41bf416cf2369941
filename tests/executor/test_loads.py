"""A load on several ranks is over when all have reported, with the blocks that every rank has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from quire.errors import WorkerError
from quire.executor.loads import RankLoads
from quire.messages import StepPlan, Transfer, TransferResult


class FakeWatch:
    def __init__(self) -> None:
        self.loads: deque[tuple[int, TransferResult]] = deque()
        self.later: list[tuple[int, TransferResult]] = []
        """Arrive while somebody waits."""
        self.waits = 0
        self.error: WorkerError | None = None

    def wait(self, seconds: float, condition: Callable[[], object]) -> None:
        assert 0 < seconds < 0.01 and not condition()
        self.waits += 1
        self.loads += self.later
        self.later = []

    def fail(self, error: WorkerError) -> None:
        self.error = error

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def result(key: int, good: int) -> TransferResult:
    return TransferResult(transfer_id=key, num_good=good)


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def watch() -> FakeWatch:
    return FakeWatch()


@pytest.fixture
def loads(watch: Any, now: list[float]) -> RankLoads:
    ranks: list[Any] = [SimpleNamespace(number=n, name=f"rank {n}") for n in (1, 2)]
    found = RankLoads(watch, ranks, timeout=5.0, clock=lambda: now[0])
    names = [(bytes(32), 0)] * 4
    found.started(
        StepPlan(
            step_id=1,
            loads=[Transfer(transfer_id=n, names=names, block_ids=[1, 2, 3, 4]) for n in (1, 2)],
        )
    )
    return found


def test_the_least_of_all_ranks(loads: RankLoads, watch: FakeWatch) -> None:
    watch.loads += [(1, result(1, 3)), (2, result(2, 4))]
    assert loads.merge([result(1, 4)], wait=False) == []
    watch.loads.append((2, result(1, 2)))
    assert loads.merge([], wait=False) == [result(1, 2)]
    watch.loads.append((1, result(2, 4)))
    assert loads.merge([result(2, 4)], wait=False) == [result(2, 4)]
    assert loads.merge([], wait=True) == [] and not watch.waits


def test_a_load_is_late_if_it_was_at_any_rank_and_has_the_sources_of_this_one(
    loads: RankLoads, watch: FakeWatch
) -> None:
    own = TransferResult(transfer_id=1, num_good=4, sources={"ram": 1, "disk": 3})
    watch.loads += [(1, TransferResult(transfer_id=1, num_good=2, late=True)), (2, result(1, 4))]
    assert loads.merge([own], wait=False) == [
        TransferResult(transfer_id=1, num_good=2, sources=own.sources, late=True)
    ]


def test_it_waits_only_for_other_ranks(loads: RankLoads, watch: FakeWatch) -> None:
    """This one has waited for its own loads already."""
    watch.later = [(1, result(1, 4)), (2, result(1, 4))]
    assert loads.merge([result(1, 4)], wait=True) == [] and not watch.waits
    assert loads.merge([result(2, 4)], wait=True) == [result(1, 4)] and watch.waits == 1


def test_what_was_under_way_at_a_clear_has_no_good_block(
    loads: RankLoads, watch: FakeWatch
) -> None:
    watch.loads += [(1, result(1, 4)), (2, result(1, 4))]
    loads.started(StepPlan(step_id=2, clears_stores=True))
    assert loads.merge([result(1, 4)], wait=False) == [result(1, 0)]


def test_a_rank_that_never_reports_is_named(
    loads: RankLoads, watch: FakeWatch, now: list[float]
) -> None:
    watch.loads.append((1, result(1, 4)))
    loads.merge([result(1, 4)], wait=False)
    now[0] = 4.9
    assert loads.merge([], wait=False) == []
    now[0] = 5.0
    with pytest.raises(WorkerError, match="rank 2 is late by 5 s"):
        loads.merge([], wait=False)
