"""Steps that take simulated time by what they compute, with noise, on the real scheduler."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from quire.kvcache import KVCacheManager
from quire.messages import AddRequest, SampledRow, StepPlan, StepResult
from quire.placement import Placement
from quire.scheduler import Decision, Scheduler, SchedulerLimits
from quire.scheduler.cost_model import Work, work_of
from quire.scheduler.invariants import check_invariants
from tests.scheduler.requests import add_request

LONG = 32_000
M2 = Work(rows=1.3e-3, contexts=2e-7, constant=5.5e-3, prompt_tokens=3.7e-4, prompt_contexts=1.5e-7)
"""Coefficients about those of a model of 110M parameters on two cores."""


@dataclass
class TimedEngine:
    """noise: standard deviation of a step's time, relative (log-normal)."""

    target: float = 0.0
    cost: Work = M2
    noise: float = 0.1
    seats: int = 64
    policy: str = "fcfs"
    budget: int = 2048
    num_blocks: int = 20_000
    longest: int = LONG + 4000
    seed: int = 1
    now: float = 0.0
    step: int = 0
    gaps: list[float] = field(default_factory=list)
    """Of steps in which a request generated."""
    plans: list[StepPlan] = field(default_factory=list)
    first: dict[int, int] = field(default_factory=dict)
    """The step in which a request's first token came."""
    started: dict[int, float] = field(default_factory=dict)
    """When a request was admitted."""
    ended: dict[int, float] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        limits = SchedulerLimits(
            max_num_seqs=self.seats,
            max_num_batched_tokens=self.budget,
            max_model_len=self.longest,
            itl_target=self.target,
            policy=self.policy,
        )
        kv = KVCacheManager(self.num_blocks, 16, enable_prefix_caching=True)
        self.scheduler = Scheduler(
            limits, kv, clock=lambda: self.now, observe=self.decisions.append
        )

    def add(self, request_id: int, prompt: int, max_tokens: int = 8, tenant: str = "") -> None:
        self.add_message(
            add_request(
                request_id,
                [1000 + request_id] * prompt,
                max_tokens=max_tokens,
                arrival_time=self.now,
                placement=Placement(tenant=tenant),
            )
        )

    def add_message(self, message: AddRequest) -> None:
        self.scheduler.add_request(message)

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.step_once()
        check_invariants(self.scheduler)

    def step_once(self) -> None:
        self.step += 1
        plan = self.scheduler.schedule()
        self.plans.append(plan)
        for admitted in plan.admitted:
            self.started.setdefault(admitted.request_id, self.now)
        seconds = sum(a * b for a, b in zip(self.cost, work_of(plan.rows), strict=True))
        seconds *= self._chance.lognormvariate(0.0, self.noise)
        self.now += seconds
        if any(row.samples and row.num_tokens == 1 for row in plan.rows):
            self.gaps.append(seconds)
        sampled = [
            SampledRow(request_id=row.request_id, token_ids=[7]) for row in plan.rows if row.samples
        ]
        result = StepResult(step_id=plan.step_id, sampled=sampled)
        for update in self.scheduler.update(plan, result):
            self.first.setdefault(update.request_id, self.step)
            self.tokens.setdefault(update.request_id, []).extend(update.new_token_ids)
            if update.finish_reason is not None:
                self.ended[update.request_id] = self.now

    def prompt_tokens(self) -> int:
        """Of the last step."""
        return int(work_of(self.plans[-1].rows).prompt_tokens)


def percentile(values: list[float], share: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))]
