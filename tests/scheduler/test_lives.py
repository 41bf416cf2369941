"""The reason that is read for each moment of a wait is the scheduler's own, and the parts add up."""

from __future__ import annotations

import random

import pytest

from quire.messages import FinishReason
from quire.scheduler import WaitReason
from quire.scheduler import explain as explain_module
from quire.scheduler.explain import explain
from quire.scheduler.lives import lives
from tests.scheduler.observed import Observed, place


def random_run(seed: int, **fields: object) -> Observed:
    chance = random.Random(seed)
    is_chunked = chance.random() < 0.8
    engine = Observed(
        num_blocks=chance.choice([30, 60, 400]),
        seats=chance.choice([2, 3, 8]),
        budget=chance.choice([8, 16, 48]) if is_chunked else 100,  # a whole prompt must fit a step
        longest=100,
        depth=chance.choice([1, 2]),
        limits={
            "enable_chunked_prefill": is_chunked,
            "watermark_blocks": chance.choice([0, 2]),
            "itl_target": chance.choice([0.0, 0.0, 0.02]),
            **fields,
        },
    )
    number = 0
    for _ in range(80):
        while chance.random() < 0.35:
            number += 1
            engine.now += chance.random() * 1e-4
            kinds = {"first": chance.choice([1, 2, 1000 + number])}
            if number > 1 and chance.random() < 0.1 and number - 1 in engine.scheduler.requests:
                leader = engine.scheduler.requests[number - 1]
                engine.add(
                    number,
                    leader.num_prompt_tokens,
                    first=leader.token_ids[0],
                    fork_of=number - 1,
                )
                continue
            if fields:
                kinds["placement"] = place(chance.randint(0, 2), chance.choice("abc"))
            engine.add(number, chance.randint(1, 60), chance.randint(1, 30), **kinds)
        if chance.random() < 0.1 and engine.scheduler.requests:
            reason = chance.choice([FinishReason.ABORT, FinishReason.EXPIRED])
            engine.abort(chance.choice(list(engine.scheduler.requests)), reason)
        engine.step()
    return engine


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_each_moment_has_the_schedulers_reason(policy: str) -> None:
    seen: set[WaitReason] = set()
    for seed in range(9):
        engine = random_run(seed, policy=policy)
        if seed % 2:
            engine.drain()
        history = engine.history() if seed % 3 else engine.recorded()
        found = lives(history)
        times = [step.planned for step in history.steps]
        for (_, waits), planned, until in zip(engine.truth, times, times[1:], strict=False):
            for request_id, wait in waits.items():
                end = engine.ends.get(request_id)
                if (end is not None and end.time <= until) or until - planned < 1e-9:
                    continue
                life = found[request_id]
                moment = (planned + until) / 2
                at = [w for w in life.waits if w.start <= moment < w.end]
                assert len(at) == 1, (seed, request_id, planned, life.waits)
                assert (at[0].reason, at[0].behind) == (wait.reason, wait.because_of), (
                    seed, request_id, planned, life.waits, wait,
                )  # fmt: skip
                seen.add(wait.reason)
    assert seen >= {
        WaitReason.BLOCKS, WaitReason.SEAT, WaitReason.BUDGET, WaitReason.BEHIND, WaitReason.PREFIX,
        WaitReason.PREEMPTED, WaitReason.FORK,
    }  # fmt: skip


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_the_parts_of_the_time_in_the_queue_add_up_to_it(policy: str) -> None:
    for seed in range(5):
        engine = random_run(1000 + seed, policy=policy)
        history = engine.history()
        admitted = {}
        for step in engine.steps:
            for decision in step.decisions:
                if decision.kind.value == "admitted":
                    admitted.setdefault(decision.request_id, step.planned)
        for request_id, arrival in engine.arrivals.items():
            end = engine.ends.get(request_id)
            until = admitted.get(request_id, end.time if end else engine.steps[-1].planned)
            found = explain(history, request_id)
            if arrival.time > engine.steps[-1].planned:
                continue
            assert found is not None and found.is_whole
            assert found.queue_seconds == pytest.approx(until - arrival.time, abs=1e-9)
            assert sum(part.seconds for part in found.queue) == pytest.approx(found.queue_seconds)
            assert all(part.seconds > 0 for part in found.queue)
            for stop in found.preemptions:
                assert sum(part.seconds for part in stop.parts) == pytest.approx(stop.waited)


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_the_times_of_an_explanation_add_up(policy: str, monkeypatch) -> None:
    """Queue, prefill and gaps, one after the other, are the time from its arrival to its last token."""
    monkeypatch.setattr(explain_module, "MOST_PARTS", 1 << 30)
    monkeypatch.setattr(explain_module, "LONG_GAP", 0.0)
    ended = preempted = 0
    for seed in range(8):
        engine = random_run(2000 + seed, policy=policy)
        if seed % 2:
            engine.drain()
        history = engine.recorded()
        for request_id, life in lives(history).items():
            found = explain(history, request_id)
            assert found is not None
            if not life.tokens:
                assert found.prefill is None and found.first_token is None
                continue
            assert found.is_whole and found.prefill is not None and life.arrival is not None
            assert found.first_token == pytest.approx(found.queue_seconds + found.prefill.seconds)
            last = life.tokens[-1][0].done
            assert last is not None and len(found.gaps) == len(life.tokens) - 1
            total = found.first_token + sum(gap.seconds for gap in found.gaps)
            assert total == pytest.approx(last - life.arrival.start)
            if found.finish_reason is FinishReason.LENGTH:
                assert found.seconds == pytest.approx(total)
                assert found.num_tokens == sum(row.num_accepted for _, row in life.tokens)
                ended += 1
            for stop in found.preemptions:
                assert sum(part.seconds for part in stop.parts) == pytest.approx(stop.waited)
            preempted += len(found.preemptions)
    assert ended > 50 and preempted
