"""A model on this process's accelerator, one plan made while another runs."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from quire.executor.base import StepFuture
from quire.messages import StepPlan
from quire.models.decoder import DecoderModel
from quire.runner.device_runner import DeviceRunner


class DeviceExecutor:
    def __init__(
        self,
        runner: DeviceRunner,
        *,
        overlap: bool = True,
        restart: Callable[[DecoderModel | None], DeviceRunner] | None = None,
    ) -> None:
        """restart: makes another runner, over this model or one loaded anew."""
        self.max_in_flight = 2 if overlap else 1
        self.runner: DeviceRunner | None = runner
        self._restart = restart
        self._kept: DecoderModel | None = None

    def execute(self, plan: StepPlan) -> StepFuture:
        assert self.runner is not None, "the executor is closed"
        return self.runner.launch(plan)

    def prepare(self) -> bool:
        return self.runner is not None and self.runner.prepare()  # None while asleep

    def sleep(self, level: int) -> None:
        assert self.runner is not None and self._restart is not None
        self._kept = self.runner.model if level < 2 else None
        self.runner = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def wake_up(self) -> None:
        assert self.runner is None and self._restart is not None
        self.runner, self._kept = self._restart(self._kept), None

    def close(self) -> None:
        self.runner = None
