"""The model in this very process."""

from __future__ import annotations

from quire.executor.base import Done, StepFuture
from quire.messages import StepPlan
from quire.runner.model_runner import ModelRunner


class InlineExecutor:
    """Runs each plan at once, in the caller's thread."""

    max_in_flight = 1

    def __init__(self, runner: ModelRunner) -> None:
        self.runner: ModelRunner | None = runner

    def execute(self, plan: StepPlan) -> StepFuture:
        assert self.runner is not None, "the executor is closed"
        return Done(self.runner.execute(plan))

    def prepare(self) -> bool:
        return False

    def close(self) -> None:
        self.runner = None
