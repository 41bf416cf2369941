"""The last minute, second by second."""

from __future__ import annotations

import pytest

from quire.messages import (
    DraftCounts,
    RequestUpdate,
    SchedulerStats,
    StepOutputs,
    TenantStats,
    TierStats,
)
from quire.metrics import NullMetrics
from quire.metrics.recent import MOST_TENANTS, SECONDS, Latencies, Recent
from quire.prefix_report import MissReason, PrefixReport

PREFIX = PrefixReport(device=4, computed=1, reason=MissReason.WHOLE)


class Clock:
    def __init__(self) -> None:
        self.now = 100.5

    def __call__(self) -> float:
        return self.now


def step(*updates: RequestUpdate, **stats: object) -> StepOutputs:
    return StepOutputs(updates=list(updates), stats=SchedulerStats(**stats))


def test_steps_are_counted_in_their_second_and_forgotten_after_a_minute() -> None:
    clock = Clock()
    recent = Recent(clock)
    first = RequestUpdate(request_id=1, new_token_ids=[5], prefix=PREFIX)
    later = RequestUpdate(request_id=2, new_token_ids=[6, 7])
    drafts = DraftCounts(num_drafts=1, num_draft_tokens=4, num_accepted_tokens=3)
    recent.on_step(step(first, later, step_tokens=30, num_running=2, drafts=drafts))
    clock.now = 102.1
    recent.on_step(step(later, step_tokens=1, num_running=1, num_waiting=4, num_preemptions=2))
    recent.on_step(StepOutputs())
    clock.now = 103.0
    columns = recent.columns()
    assert {len(column) for column in columns.values()} == {SECONDS}
    shown = {name: column[-4:] for name, column in columns.items()}
    assert shown["steps"] == [1, 0, 2, 0] and shown["preemptions"] == [0, 0, 2, 0]
    assert shown["prompt_tokens"] == [29, 0, 0, 0], "without the token of the row that generates"
    assert shown["output_tokens"] == [3, 0, 2, 0]
    assert (shown["drafts"][0], shown["drafts_accepted"][0]) == (4, 3)
    assert shown["running"] == [2, 2, 1, 1] and shown["waiting"] == [0, 0, 4, 4]
    clock.now = 102.0 + SECONDS
    columns = recent.columns()
    assert sum(columns["steps"]) == 0 and columns["waiting"] == [4] * SECONDS


def test_state_before_the_minute_is_remembered_and_memory_is_bounded() -> None:
    clock = Clock()
    recent = Recent(clock)
    for _ in range(3 * SECONDS):
        recent.on_step(step(num_running=3))
        clock.now += 1.0
    assert len(recent._seconds) <= SECONDS + 1
    for index in range(3 * MOST_TENANTS):
        recent.on_step(step(tenants={f"t{index}": TenantStats(charged=1.0)}))
    assert len(recent.service()) == MOST_TENANTS


def test_the_service_of_tenants_and_the_sums_of_tiers() -> None:
    clock = Clock()
    recent = Recent(clock)
    tier = TierStats(blocks=3, saved_blocks=5)
    for blocks in (3, 2):
        recent.on_step(
            step(
                tenants={"a": TenantStats(charged=2.0)},
                kv_tiers={"ram": TierStats(blocks=blocks, saved_blocks=5)},
            )
        )
        clock.now += 1.0
    assert recent.service() == {"a": 4.0}
    assert (recent.tiers["ram"].blocks, recent.tiers["ram"].saved_blocks) == (2, 10)
    recent.on_step(step(kv_tiers={"ram": tier}))
    assert tier.saved_blocks == 5, "the message is not changed"
    clock.now += 2 * SECONDS
    assert recent.service() == {}


def test_latencies_are_those_that_are_reported() -> None:
    class Sink(NullMetrics):
        def __init__(self) -> None:
            self.gaps: list[float] = []
            self.first: list[tuple[float | None, object]] = []

        def on_token_gap(self, seconds: float) -> None:
            self.gaps.append(seconds)

        def on_first_token(self, ttft_seconds: float | None, **counts: object) -> None:
            self.first.append((ttft_seconds, counts))

    sink, latencies = Sink(), Latencies()
    both = latencies.beside(sink)
    for hundredth in range(1, 101):
        both.on_token_gap(hundredth / 1000.0)
    both.on_first_token(None, prompt_tokens=3, cached_tokens=0)
    both.on_first_token(0.25, prompt_tokens=3, cached_tokens=1, external_tokens=1)
    assert len(sink.gaps) == 100 and len(sink.first) == 2
    shown = latencies.percentiles()
    assert shown["itl"] == {"count": 100, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert shown["ttft"] == {"count": 1, "p50": 250.0, "p90": 250.0, "p99": 250.0}
    assert Latencies().percentiles()["itl"] == {"count": 0}
    assert both.on_step == sink.on_step
    assert pytest.approx(sink.first[1][0]) == 0.25
