"""Each waiting request has exactly one reason, and it is true: in a copy of the scheduler in which what the
reason names is otherwise, the request is admitted, or waits for something else."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import Counter

import pytest

from quire.kvcache.block import Block
from quire.scheduler import Scheduler, Wait, WaitReason
from quire.scheduler.request import RequestStatus
from tests.scheduler.recorded_lives import begin, live

SEEDS = range(200, 232)
STEPS, MOST = 25, 4
"""Of each life: steps, and waits of each reason that are checked."""


def more_blocks(scheduler: Scheduler, count: int) -> None:
    pool = scheduler.kv.pool
    for _ in range(count):
        block = Block(len(pool.blocks))
        pool.blocks.append(block)
        pool._free.append(block)


def limit(scheduler: Scheduler, **changes: object) -> None:
    limits = dataclasses.replace(scheduler.limits, **changes)
    scheduler.limits = scheduler._micro_batches._limits = scheduler.latency._limits = limits


def flip(scheduler: Scheduler, request_id: int, wait: Wait) -> None:
    """Make what it waited for otherwise."""
    match wait.reason:
        case WaitReason.SEAT:
            count, budget = len(scheduler.requests), scheduler.limits.max_num_batched_tokens
            limit(scheduler, max_num_seqs=count, max_num_batched_tokens=max(budget, 2 * count))
        case WaitReason.BLOCKS:
            more_blocks(scheduler, wait.needed - wait.free)
        case WaitReason.BUDGET:
            limit(scheduler, max_num_batched_tokens=10**6, stages=1)
            limit(scheduler, long_prefill_token_threshold=0)
        case WaitReason.COST:
            more_blocks(scheduler, 10**4)
        case WaitReason.TARGET:
            scheduler.latency.target = 1e9
        case WaitReason.TOKEN:
            request = scheduler.requests[request_id]
            request.token_ids += [0] * request.num_pending_tokens
            request.num_pending_tokens = 0
        case WaitReason.PREEMPTED:
            more_blocks(scheduler, 100)
        case WaitReason.BEHIND | WaitReason.PREFIX | WaitReason.FORK:
            assert wait.because_of is not None and wait.because_of in scheduler.requests
            scheduler.abort([wait.because_of])
        case _:
            raise AssertionError(wait)


def follow(seed: int) -> Counter[WaitReason]:
    """Check all waits of a life. Returns how many there were of each reason."""
    life = begin(seed, record=False, windows=(None,))
    if life.config["length"] > 24:  # copies of it would take long
        return Counter()
    scheduler, seen = life.scheduler, Counter()
    original = scheduler.schedule

    def schedule():
        before = copy.deepcopy(scheduler) if scheduler.waiting else scheduler
        plan = original()
        check_all_have_one(scheduler)
        waiting = list(scheduler.waiting) if before is not scheduler else []
        for request in waiting[:1] + waiting[-1:] + waiting[1:2]:
            wait = scheduler.why_waits(request)
            seen[wait.reason] += 1
            if request.request_id in before.requests and seen[wait.reason] <= MOST:
                check(copy.deepcopy(before), request.request_id, wait)
        return plan

    scheduler.schedule = schedule
    live(life, STEPS)
    return seen


def check(scheduler: Scheduler, request_id: int, wait: Wait) -> None:
    flip(scheduler, request_id, wait)
    scheduler.schedule = Scheduler.schedule.__get__(scheduler)
    request = scheduler.requests[request_id]
    plan = scheduler.schedule()
    if request_id in {admitted.request_id for admitted in plan.admitted}:
        return
    if request.status is RequestStatus.RUNNING:
        return  # it would have been preempted
    now = scheduler.why_waits(request)
    assert (now.reason, now.because_of) != (wait.reason, wait.because_of), (
        f"{request} still waits for {wait}"
    )


def check_all_have_one(scheduler: Scheduler) -> None:
    """Those that were not considered stand behind one that was."""
    for request in scheduler.waiting:
        wait = scheduler.why_waits(request)
        if wait.reason is WaitReason.BEHIND:
            before = scheduler.requests[wait.because_of]
            assert request.request_id not in scheduler._waits
            assert before.status is not RequestStatus.RUNNING
            assert scheduler.why_waits(before).reason is not WaitReason.BEHIND
        else:
            assert wait is scheduler._waits[request.request_id]


@pytest.fixture(scope="module")
def deep_copies():
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)  # the free list is a chain
    yield
    sys.setrecursionlimit(limit)


def test_what_a_request_waits_for_is_what_it_lacks(deep_copies) -> None:
    seen: Counter[WaitReason] = Counter()
    for seed in SEEDS:
        seen += follow(seed)
    assert seen.keys() == {
        WaitReason.SEAT, WaitReason.BLOCKS, WaitReason.BUDGET, WaitReason.BEHIND, WaitReason.PREFIX,
        WaitReason.FORK, WaitReason.PREEMPTED, WaitReason.COST, WaitReason.TARGET, WaitReason.TOKEN,
    }  # fmt: skip
