"""A worker's life: waking up without memory, and errors of the machine as what to do about them."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import replace

import pytest
import torch

from quire.config import from_flat
from quire.errors import ConfigError, MemoryFitError
from quire.executor.base import Executor
from quire.messages import StepPlan
from quire.runner import gpu
from quire.runner.device import HostDevice
from quire.runner.footprint import WorkerSpec
from quire.runner.gpu import GPU
from quire.runner.worker import Worker
from tests.models.test_loader import spec_of
from tests.models.variants import build_reference, save


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    folder = save(build_reference("llama"), tmp_path_factory.mktemp("tiny"))
    return WorkerSpec(
        model=spec_of(folder), directory=folder, dtype="float32", kv_cache_dtype="float32",
        device="cpu", max_model_len=32,
    )  # fmt: skip


CONFIG = from_flat({"max_num_seqs": 2, "max_num_batched_tokens": 32})


def test_a_worker_is_an_executor(spec: WorkerSpec) -> None:
    executor: Executor = Worker(CONFIG, spec)
    footprint = executor.load()
    assert footprint.weight_bytes >= spec.model.weight_bytes(4)
    assert 0 < footprint.memory.available <= footprint.memory.total
    executor.open_cache(4, 32)
    assert executor.execute(StepPlan(step_id=3)).result().step_id == 3
    executor.close()
    executor.close()
    assert not executor.prepare()


def test_a_worker_that_cannot_wake_up_sleeps_on(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(CONFIG, spec)
    worker.load()
    worker.open_cache(4, 32)
    assert worker.runner is not None
    model = worker.runner.model
    worker.sleep(1)

    def fails(num_blocks: int) -> None:
        raise MemoryFitError("others took it")

    with monkeypatch.context() as patched:
        patched.setattr(worker.platform, "cache", fails)
        with pytest.raises(MemoryFitError):
            worker.wake_up()
    assert worker.runner is None
    worker.wake_up()
    assert worker.runner is not None and worker.runner.model is model


def test_every_cache_in_fp8_has_the_models_scales(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(CONFIG, replace(spec, kv_cache_dtype="float8_e4m3fn"))
    made, make = [], worker.platform.cache
    monkeypatch.setattr(worker.platform, "cache", lambda n: made.append(make(n)) or made[-1])
    worker.load()
    assert worker.runner is not None
    for layer, scales in worker.runner.model.kv_scales.items():
        heads = len(scales.tensors["k"])
        scales.tensors = {"k": torch.full((heads,), 2.0 + layer), "v": torch.full((heads,), 0.5)}
    worker.open_cache(4, 32)
    worker.sleep(1)
    worker.wake_up()
    for cache in made:
        for layer, part in enumerate(cache.parts):
            assert part.scales is not None
            assert [set(each.tolist()) for each in part.scales] == [{2.0 + layer}, {0.5}]
    assert len(made) == 2


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("The NVIDIA driver on your system is too old (found version 12040)."), "driver"),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "nvidia-smi"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "gcc"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "python3-dev"),
        (RuntimeError("No CUDA GPUs are available"), "CUDA_VISIBLE_DEVICES"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_machine_is_said_with_a_remedy(
    spec: WorkerSpec, error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(HostDevice):
        def active(self) -> contextlib.AbstractContextManager[object]:
            raise error

    def broken(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(gpu, "CudaDevice", broken)
    with pytest.raises(ConfigError, match=says):
        GPU(CONFIG, spec)
    platform = GPU(CONFIG, spec, HostDevice())
    monkeypatch.setattr(gpu, "create_attention", broken)
    with pytest.raises(ConfigError, match=says):
        Worker(CONFIG, spec, platform=platform).load()


def test_other_errors_are_not_hidden(spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("shape mismatch")

    platform = GPU(CONFIG, spec, HostDevice())
    monkeypatch.setattr(gpu, "create_attention", fails)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        Worker(CONFIG, spec, platform=platform).load()
