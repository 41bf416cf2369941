"""A model on this process's accelerator, one plan made while another runs."""

from __future__ import annotations

from quire.executor.base import StepFuture
from quire.messages import StepPlan
from quire.runner.device_runner import DeviceRunner


class DeviceExecutor:
    def __init__(self, runner: DeviceRunner, *, overlap: bool = True) -> None:
        self.max_in_flight = 2 if overlap else 1
        self.runner: DeviceRunner | None = runner

    def execute(self, plan: StepPlan) -> StepFuture:
        assert self.runner is not None, "the executor is closed"
        return self.runner.launch(plan)

    def prepare(self) -> bool:
        assert self.runner is not None, "the executor is closed"
        return self.runner.prepare()

    def close(self) -> None:
        self.runner = None
