"""Random lives of a scheduler with a record, by a seed. `python -m tests.scheduler.recorded_lives 100000`
replays so many steps."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field, replace

from quire.engine.core import EngineCore
from quire.kvcache import KVCacheManager
from quire.kvcache.retention import Retention
from quire.messages import AbortRequests, Control, FinishReason, ResetPrefixCache, StepPlan
from quire.placement import Placement, Retain
from quire.sampling_params import RepetitionDetectionParams
from quire.scheduler import DecisionLog, Scheduler, SchedulerLimits
from quire.scheduler.fitted import FittedCost
from quire.scheduler.record import Recorder
from quire.scheduler.replay import replay
from tests.scheduler.fake_executor import CheckingExecutor, FakeAdapters
from tests.scheduler.requests import add_request
from tests.scheduler.test_scheduler_properties import VOCAB, draft, needs_token_before_next

LAYOUTS = ((None,), (None,), (None,), (None, 5), (None, 3, 3), (4,))
COSTS = FittedCost((1.0, 8.0, 40.0), (0.6, 1.0, 6.0), context=0.02)
REPETITION = RepetitionDetectionParams(max_pattern_size=2, min_count=3)


@dataclass
class Life:
    """What has happened. config: of the scheduler, for messages of failures."""

    seed: int
    scheduler: Scheduler
    core: EngineCore
    executor: CheckingExecutor
    recorder: Recorder | None
    log: DecisionLog
    config: dict[str, object]
    plans: list[StepPlan] = field(default_factory=list)
    drafts_of: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """By step and request."""
    outputs: dict[int, int] = field(default_factory=dict)
    ends: dict[int, FinishReason] = field(default_factory=dict)
    tenants: set[str] = field(default_factory=set)
    preemptions: int = 0

    def planned(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        for row in plan.rows:
            self.drafts_of[plan.step_id, row.request_id] = row.draft_token_ids


def begin(seed: int, *, record: bool = True, **fixed: object) -> Life:
    """fixed: of `config`, instead of what the seed gives."""
    rng = random.Random(seed)
    length = rng.choice((24, 24, 60, 160))
    seats = rng.randint(1, 8)
    chunked = rng.random() < 0.9
    drafts = rng.random() < 0.4
    stages = rng.choice((1, 1, 1, 2))
    config: dict[str, object] = {
        "block_size": rng.choice((1, 2, 4, 8)),
        "spare": rng.choice((0, 0, 1, 3, 30)),
        "caching": rng.random() < 0.85,
        "windows": rng.choice(LAYOUTS),
        "depth": stages if stages > 1 else rng.randint(1, 3),
        "segment_room": rng.choice((100, 1000, 16384)),
        "drafts": drafts,
        "length": length,
    }
    budget = seats + rng.randint(0, 20)
    limits = SchedulerLimits(
        max_num_seqs=seats,
        max_num_batched_tokens=budget if chunked else max(budget, length),
        max_model_len=length,
        watermark_blocks=rng.randint(0, 3),
        long_prefill_token_threshold=rng.choice((0, 0, 3)) if chunked else 0,
        enable_chunked_prefill=chunked,
        policy=rng.choice(("fcfs", "priority", "fair")),
        aging=rng.choice((0.0, 3.0)),
        max_drafts=5 if drafts else 0,
        adaptive_drafts=rng.random() < 0.5,
        max_adapters=2,
        stages=stages,
        least_prompt_tokens=2,
        itl_target=rng.choice((0.0, 0.0, 1.0)) if chunked else 0.0,
    )
    limits = replace(limits, cost_file=COSTS.numbers() if seed % 3 == 1 else "")
    config |= {"limits": limits} | fixed
    recorder = None
    ticks = random.Random(seed)
    now = [0.0]

    def clock() -> float:
        now[0] += ticks.random()
        return now[0]

    if record:
        recorder = Recorder(clock=clock, salt=b"salt", segment_room=config["segment_room"])
    read = clock if recorder is None else recorder.clock
    size, windows = config["block_size"], config["windows"]
    sizes = {
        "windows": windows,
        "max_row_tokens": limits.max_num_batched_tokens,
        "enable_prefix_caching": config["caching"],
    }
    most = KVCacheManager(2, size, **sizes).blocks_for(length)
    num_blocks = 1 + most + config["spare"]
    retention = Retention.of_blocks(num_blocks - 1, 0.5, len(windows), read)
    scheduler = Scheduler(
        limits,
        KVCacheManager(num_blocks, size, retention=retention, **sizes),
        clock=clock,
        needs_token_before_next=needs_token_before_next,
        takes_drafts=lambda message: message.request_id % 5 > 0,
        observe=(log := DecisionLog(most=10**7)),
        record=recorder,
    )
    scheduler.worth.least_steps = rng.choice((2.0, 32.0))
    adapters = FakeAdapters(3)
    executor = CheckingExecutor(
        num_blocks,
        size,
        vocab_size=VOCAB,
        max_in_flight=config["depth"],
        windows=windows,
        drafter=draft if drafts else lambda tokens, seed: [],
        adapters=adapters,
        on_plan=lambda plan: life.planned(plan),
    )
    life = Life(
        seed,
        scheduler,
        EngineCore(scheduler, executor, clock=lambda: 0.0),
        executor,
        recorder,
        log,
        config,
    )
    return life


def live(life: Life, steps: int) -> None:
    rng = random.Random(-life.seed)
    prompts: list[list[int]] = []
    next_id, length = 1, life.scheduler.limits.max_model_len
    many = rng.choice((3, 8, 20))
    while life.scheduler._step_id < steps or life.core.has_work:
        is_over = life.scheduler._step_id >= steps
        if not is_over and len(life.scheduler.requests) < many and rng.random() < 0.4:
            next_id = _add(life, rng, prompts, next_id, length)
        if rng.random() < 0.03 and life.scheduler.requests:
            reason = rng.choice((FinishReason.ABORT, FinishReason.EXPIRED))
            chosen = rng.choice(sorted(life.scheduler.requests))
            if reason is FinishReason.ABORT:
                _take(life, life.core.handle(AbortRequests([chosen, chosen, 10**9])).updates)
            else:
                _take(life, life.core._outputs(life.core._end([chosen], reason)).updates)
        if rng.random() < 0.01:
            life.core.handle(Control(0, ResetPrefixCache()))
        if life.core.has_work:
            _take(life, life.core.step().updates)
        elif is_over:
            break


def _take(life: Life, updates) -> None:
    for update in updates:
        life.outputs[update.request_id] += len(update.new_token_ids)
        if update.finish_reason is not None:
            life.ends[update.request_id] = update.finish_reason
            life.preemptions += update.num_preemptions


def _add(
    life: Life, rng: random.Random, prompts: list[list[int]], next_id: int, length: int
) -> int:
    kind = rng.random()
    if prompts and kind < 0.3:
        prompt = list(rng.choice(prompts))
    elif prompts and kind < 0.6:
        prompt = rng.choice(prompts)[: rng.randint(1, length)]
        prompt = (prompt + [rng.randint(0, 1) for _ in range(rng.randint(0, 6))])[: length - 1]
    else:
        prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, length - 1))]
    requests = life.scheduler.requests
    if requests and rng.random() < 0.2:  # a conversation goes on
        tokens = requests[rng.choice(sorted(requests))].token_ids
        prompt = [*tokens, 1][: length - 1]
    prompts.append(prompt)
    del prompts[:-8]
    leader, tenant = next_id, rng.choice("aabc")
    life.tenants.add(tenant)
    max_tokens = rng.randint(1, length - len(prompt))
    fields = {
        "max_tokens": max_tokens,
        "min_tokens": min(rng.choice((0, 0, 3)), max_tokens),
        "end_token_ids": frozenset(rng.choice(((), (7,)))),
        "stop_token_ids": frozenset(rng.choice(((), (5,)))),
        "repetition_detection": rng.choice((None, REPETITION)),
        "reads_prefix_cache": rng.random() < 0.9,
        "placement": Placement(
            priority=rng.randint(-2, 2),
            tenant=tenant,
            weight=3.0 if tenant == "b" else 1.0,
            cache_salt=rng.choice((None, None, None, "x")),
            retain=rng.choice(((), (), (Retain(5.0),), (Retain(9.0, 4),))),
        ),
    }
    for index in range(rng.choice((1, 1, 1, 2, 3))):
        message = add_request(
            next_id,
            prompt,
            seed=index,
            arrival_time=float(leader),
            fork_of=leader if index else None,
            **fields,
        )
        life.outputs[next_id] = 0
        assert life.core.handle(message) is None
        next_id += 1
    return next_id


def main(total: int) -> None:
    steps = seed = preemptions = requests = 0
    while steps < total:
        life = begin(seed)
        live(life, 300)
        departure = replay(life.recorder.dump())
        if departure is not None:
            print(seed, departure, life.config)
            sys.exit(1)
        steps += life.scheduler._step_id
        preemptions += life.preemptions
        requests += len(life.ends)
        seed += 1
    print(
        f"{steps} steps of {seed} lives, {requests} requests, {preemptions} preemptions: all replayed"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
