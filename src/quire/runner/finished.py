"""The step of a plan without rows."""

from __future__ import annotations

from dataclasses import dataclass

from quire.kvtransfer.mover import Mover
from quire.messages import StepResult

LOAD_WAIT_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A `StepFuture`."""

    step_id: int
    store: Mover | None = None

    def result(self) -> StepResult:
        """Waits a moment for a load if one is under way, so that the engine's loop does not spin."""
        result = StepResult(step_id=self.step_id)
        if self.store is not None:
            result.transferred = self.store.collect(LOAD_WAIT_SECONDS)
        return result
