"""No model: scripted tokens, for tests of everything above the executor."""

from __future__ import annotations

from collections.abc import Callable

from quire.executor.base import Done, StepFuture
from quire.messages import SampledRow, StepPlan, StepResult

TokenScript = Callable[[int, int], int]
"""(request_id, index of the token in the request) -> token id."""


class MockExecutor:
    """Samples what a script says, in no time."""

    def __init__(self, script: TokenScript) -> None:
        self._script = script
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepFuture:
        self.plans.append(plan)
        sampled = [
            SampledRow(
                request_id=row.request_id,
                token_ids=[self._script(row.request_id, row.start + row.num_tokens)],
            )
            for row in plan.rows
            if row.samples
        ]
        return Done(StepResult(step_id=plan.step_id, sampled=sampled))

    def close(self) -> None:
        pass
