"""Steps that take simulated time, and drafts that are right with given probabilities."""

from __future__ import annotations

import random
from collections.abc import Callable

from quire.kvcache import KVCacheManager
from quire.messages import SampledRow, StepPlan, StepResult
from quire.scheduler import Scheduler, SchedulerLimits
from tests.scheduler.requests import add_request

Cost = Callable[[int], float]
"""Seconds of a step that samples so many tokens."""


def knee(size: float, *, base: float = 0.01) -> Cost:
    """Flat up to `size` tokens, which a processor computes while it reads the weights; then linear."""
    return lambda samples: base * max(1.0, samples / size)


class Simulation:
    """`rows` requests that never end. right: the probability that a draft is right if those before it are.
    propose: seconds for a draft. noise: relative, of a step's time."""

    def __init__(
        self,
        cost: Cost,
        right: float,
        *,
        rows: int = 1,
        most: int = 7,
        propose: float = 0.0,
        noise: float = 0.1,
        max_drafts: int | None = None,
        fixed: bool = False,
        seed: int = 0,
    ) -> None:
        self.cost, self.right, self.propose, self.noise = cost, right, propose, noise
        self.now = 0.0
        self.num_tokens = self.num_steps = self.num_drafts = 0
        self._chance = random.Random(seed)
        limits = SchedulerLimits(
            max_num_seqs=256,
            max_num_batched_tokens=2048,
            max_model_len=100_000,
            max_samples=256,
            max_drafts=most,
            adaptive_drafts=not fixed,
        )
        kv = KVCacheManager(rows * 7000, 16, enable_prefix_caching=False)
        self.scheduler = Scheduler(limits, kv, clock=lambda: self.now)
        for index in range(rows):
            self.scheduler.add_request(
                add_request(index, [1, 2, 3], max_tokens=90_000, end_token_ids=frozenset({9}))
            )

    def run(self, steps: int) -> float:
        """Tokens per second."""
        began, before = self.now, self.num_tokens
        for _ in range(steps):
            plan = self.scheduler.schedule()
            result = self.execute(plan)
            for update in self.scheduler.update(plan, result):
                self.num_tokens += len(update.new_token_ids)
        return (self.num_tokens - before) / (self.now - began)

    def execute(self, plan: StepPlan) -> StepResult:
        self.num_steps += 1
        seconds = self.cost(sum(row.samples for row in plan.rows))
        if self.noise:
            seconds *= self._chance.lognormvariate(0.0, self.noise)
        sampled, asked = [], 0
        for row in plan.rows:
            tokens = []
            for draft in row.draft_token_ids:
                self.num_drafts += 1
                right = self._chance.random() < self.right
                tokens.append(draft if right else 2)
                if not right:
                    break
            else:
                tokens.append(2)
            asked += row.num_drafts
            drafts = (1,) * row.num_drafts
            sampled.append(
                SampledRow(request_id=row.request_id, token_ids=tokens, draft_token_ids=drafts)
            )
        self.now += seconds + asked * self.propose
        return StepResult(step_id=plan.step_id, sampled=sampled, draft_seconds=asked * self.propose)
