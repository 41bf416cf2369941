"""The model in this very process."""

from __future__ import annotations

from collections.abc import Callable

from quire.executor.base import Done, StepFuture
from quire.messages import StepPlan
from quire.models.decoder import DecoderModel
from quire.runner.model_runner import ModelRunner


class InlineExecutor:
    """Runs each plan at once, in the caller's thread."""

    max_in_flight = 1

    def __init__(
        self,
        runner: ModelRunner,
        *,
        restart: Callable[[DecoderModel | None], ModelRunner] | None = None,
    ) -> None:
        """restart: makes another runner, over this model or one loaded anew."""
        self.runner: ModelRunner | None = runner
        self._restart = restart
        self._kept: DecoderModel | None = None

    def execute(self, plan: StepPlan) -> StepFuture:
        assert self.runner is not None, "the executor is closed"
        return Done(self.runner.execute(plan))

    def prepare(self) -> bool:
        return False

    def sleep(self, level: int) -> None:
        assert self.runner is not None and self._restart is not None
        self._kept = self.runner.model if level < 2 else None
        self.runner = None

    def wake_up(self) -> None:
        assert self.runner is None and self._restart is not None
        self.runner, self._kept = self._restart(self._kept), None

    def close(self) -> None:
        self.runner = None
