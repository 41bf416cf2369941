"""Anything that can carry out a `StepPlan`."""

from __future__ import annotations

from typing import Protocol

from quire.messages import StepPlan, StepResult


class StepFuture(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what the step raised."""
        ...


class Executor(Protocol):
    """Runs plans in the order given. The engine knows nothing else about devices."""

    def execute(self, plan: StepPlan) -> StepFuture: ...

    def close(self) -> None:
        """Give back memory and processes. Idempotent."""
        ...


class Done:
    """A step that is finished already."""

    __slots__ = ("_result",)

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result
