"""An executor without a model: scripted tokens, for tests of everything above the executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quire.executor.base import AdapterStore
from quire.kvtransfer.base import Store
from quire.messages import SampledRow, StepPlan, StepResult
from quire.runner.footprint import Footprint, host_memory

TokenScript = Callable[[int, int], int]
"""(request_id, index of the token in the request) -> token id."""


class MockExecutor:
    """Samples the script's tokens, when the result is asked for."""

    def __init__(self, script: TokenScript, *, max_in_flight: int = 1) -> None:
        self.script = script
        self.max_in_flight = max_in_flight
        self.plans: list[StepPlan] = []
        self.events: list[tuple[str, int]] = []
        """("launched" or "taken", step_id), in the order in which it happened."""
        self.adapters: AdapterStore | None = None
        self.watched: int | None = None
        self.store: Store | None = None

    def load(self) -> Footprint:
        return Footprint(weight_bytes=0, step_bytes=0, memory=host_memory())

    def open_cache(self, num_blocks: int, max_model_len: int) -> None:
        pass

    def execute(self, plan: StepPlan) -> ScriptedFuture:
        self.plans.append(plan)
        self.events.append(("launched", plan.step_id))
        return ScriptedFuture(self, plan)

    def check(self) -> None:
        pass

    def prepare(self) -> bool:
        return False

    def sleep(self, level: int) -> None:
        pass

    def wake_up(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class ScriptedFuture:
    executor: MockExecutor
    plan: StepPlan

    def result(self) -> StepResult:
        self.executor.events.append(("taken", self.plan.step_id))
        sampled = [
            SampledRow(
                request_id=row.request_id,
                token_ids=[self.executor.script(row.request_id, row.start + row.num_tokens)],
            )
            for row in self.plan.rows
            if row.samples
        ]
        return StepResult(step_id=self.plan.step_id, sampled=sampled)
