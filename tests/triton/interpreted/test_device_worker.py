"""A worker's life on an accelerator that the CPU plays: what is measured, and waking up without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quire.config import from_flat
from quire.errors import ConfigError, MemoryFitError
from quire.messages import StepPlan
from quire.runner import gpu
from quire.runner.device import HostDevice
from quire.runner.footprint import DeviceMemory, WorkerSpec
from quire.runner.gpu import GPU, STEP_MARGIN
from quire.runner.worker import Worker
from tests.models.test_loader import spec_of
from tests.models.variants import build_reference, save

CONFIG = from_flat({"max_num_seqs": 2, "max_num_batched_tokens": 32})


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    folder = save(build_reference("llama"), tmp_path_factory.mktemp("tiny"))
    return WorkerSpec(
        model=spec_of(folder), directory=folder, dtype="float32", kv_cache_dtype="float32",
        device="cpu", max_model_len=32,
    )  # fmt: skip


@pytest.mark.parametrize("level", [1, 2])
def test_a_worker_that_cannot_wake_up_sleeps_on(
    spec: WorkerSpec, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(CONFIG, spec, platform=GPU(CONFIG, spec, HostDevice()))
    worker.load()
    worker.open_cache(4, 32)
    assert worker.runner is not None
    model = worker.runner.model
    worker.sleep(level)
    released: list[int] = []
    monkeypatch.setattr(worker.platform, "release", lambda: released.append(1))

    def out_of_memory(num_blocks: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patched:
        patched.setattr(worker.platform, "cache", out_of_memory)
        with pytest.raises(MemoryFitError, match="--gpu-memory-utilization"):
            worker.wake_up()
    assert worker.runner is None and released
    worker.wake_up()
    assert worker.runner is not None and (worker.runner.model is model) == (level == 1)
    assert worker.execute(StepPlan(step_id=4)).result().step_id == 4


class MeasuredDevice(HostDevice):
    """Takes what it is asked to measure for measured."""

    def __init__(self) -> None:
        self.kept_free = self.held = 0
        self.count: Callable[[], int] = lambda: 0

    def measure(self, work: Callable[[], None]) -> tuple[int, int]:
        self.held = self.count()
        return 300, 40

    def keep_free(self, num_bytes: int) -> None:
        self.kept_free = num_bytes

    def memory(self) -> DeviceMemory:
        return DeviceMemory(1000, 900)


def test_the_footprint_is_measured_beside_the_runners_own_tables(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = MeasuredDevice()
    made: list[object] = []
    create = gpu.GPUBackend

    def noted(*arguments: Any, **named: Any) -> object:
        made.append(create(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(gpu, "GPUBackend", noted)
    device.count = lambda: len(made)
    worker = Worker(CONFIG, spec, platform=GPU(CONFIG, spec, device))
    footprint = worker.load()
    assert (footprint.weight_bytes, footprint.step_bytes) == (300, 40)
    assert footprint.memory == DeviceMemory(1000, 900)
    assert device.held == 1, "what a runner keeps was not there yet"
    assert device.kept_free == 40 + STEP_MARGIN


@pytest.mark.parametrize("backend", ["triton", "FLASH_ATTN"])
def test_a_package_that_fails_in_its_first_step_is_an_error_with_a_remedy(
    spec: WorkerSpec, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def forward(self, *arguments: Any, **named: Any) -> None:
            raise AssertionError("paged KV not supported on SM 8.0")

    class Measuring(MeasuredDevice):
        def measure(self, work: Callable[[], None]) -> tuple[int, int]:
            work()
            return super().measure(work)

    monkeypatch.setattr(gpu, "create_attention", lambda *given: Refusing())
    config = from_flat(
        {"max_num_seqs": 2, "max_num_batched_tokens": 32, "attention_backend": backend}
    )
    worker = Worker(config, spec, platform=GPU(config, spec, Measuring()))
    ours = backend == "triton"
    with pytest.raises(AssertionError if ours else ConfigError) as caught:
        worker.load()
    assert "SM 8.0" in str(caught.value)
    assert ours or "use --attention-backend triton" in str(caught.value)
