from __future__ import annotations

from quire.messages import RequestUpdate, SchedulerStats, StepOutputs, TierStats
from quire.metrics import StatsLogger
from quire.prefix_report import MissReason, PrefixReport

PREFIX = PrefixReport(device=4, ram=3, computed=1, reason=MissReason.WHOLE)


def test_line_has_vllms_words_and_the_intervals_rates():
    log = StatsLogger()
    assert log.line(0.0) is None
    log.on_step(
        StepOutputs(
            updates=[RequestUpdate(request_id=1, new_token_ids=[5], prefix=PREFIX)],
            stats=SchedulerStats(
                step_tokens=100, num_running=2, num_waiting=1, kv_usage=0.25, prefix_queries=8,
                prefix_hits=4,
            ),
        )
    )  # fmt: skip
    assert log.line(10.0) == (
        "Engine 000: Avg prompt throughput: 10.0 tokens/s, Avg generation throughput: 0.1 tokens/s, "
        "Running: 2 reqs, Waiting: 1 reqs, GPU KV cache usage: 25.0%, Prefix cache hit rate: 50.0%"
    )


def test_stores_outside_the_cache_have_their_hit_rate() -> None:
    log = StatsLogger()
    log.line(0.0)
    update = RequestUpdate(request_id=1, new_token_ids=[5], prefix=PREFIX)
    stats = SchedulerStats(step_tokens=1, kv_tiers={"ram": TierStats()})
    log.on_step(StepOutputs(updates=[update], stats=stats))
    assert (log.line(10.0) or "").endswith("External prefix cache hit rate: 75.0%")


def test_idle_is_said_once():
    log = StatsLogger()
    log.line(0.0)
    log.on_step(StepOutputs(stats=SchedulerStats(step_tokens=1, num_running=1)))
    assert log.line(1.0) is not None
    log.on_step(StepOutputs(stats=SchedulerStats()))
    assert "Running: 0 reqs" in (log.line(2.0) or "")
    assert log.line(3.0) is None
