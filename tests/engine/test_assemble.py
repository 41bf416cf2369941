"""Assembling an engine, without a model: what was measured decides, and is the same for all."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from quire.config import EngineConfig, from_flat
from quire.engine.assemble import build_core
from quire.engine.memory import GPU_RESERVE
from quire.engine.setup import ResolvedModel, locate, resolve
from quire.errors import ConfigError, MemoryFitError
from quire.executor.mock import MockExecutor
from quire.runner.footprint import DeviceMemory, Footprint, WorkerSpec

GIB = 1 << 30


class MeasuredExecutor(MockExecutor):
    """A model of the size that it is said to have been measured at."""

    def __init__(self, footprint: Footprint) -> None:
        super().__init__(lambda request_id, index: index)
        self.footprint = footprint
        self.spec: WorkerSpec | None = None
        self.opened: list[tuple[int, int]] = []

    def create(self, config: EngineConfig, spec: WorkerSpec, grammars: object) -> MeasuredExecutor:
        self.spec = spec
        return self

    def load(self) -> Footprint:
        return self.footprint

    def open_cache(self, num_blocks: int, max_model_len: int) -> None:
        self.opened.append((num_blocks, max_model_len))


def resolved(**options: object) -> tuple[EngineConfig, ResolvedModel]:
    """The built-in model, without its weights."""
    config = locate(from_flat({"max_num_seqs": 2, **options}))
    return config, resolve(config)


def kv_bytes(model: ResolvedModel, num_blocks: int) -> int:
    return num_blocks * 16 * model.spec.kv_bytes_per_token(4 if model.dtype == "float32" else 2)


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("quire.engine.assemble, quire.executor.mock", {"torch"}),
        ("quire.engine.core_client", {"torch", "quire.engine.core"}),
        ("quire.engine.core_process, quire.engine.assemble", {"torch", "quire.structured.spec"}),
    ],
)
def test_what_is_not_needed_is_not_imported(module: str, unneeded: set[str]) -> None:
    """A start waits for the front end's imports up to the launch of the core, and for all of the core's."""
    code = f"import sys, {module}; print({unneeded} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_the_length_that_fits_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `auto`, memory may turn out smaller than it looked: other programs, a larger step. What the cache
    holds in the end is what the scheduler and the front end are told."""
    monkeypatch.setattr(
        "quire.engine.assemble.host_memory", lambda: DeviceMemory(64 * GIB, 64 * GIB)
    )
    config, model = resolved(max_model_len=-1)
    room = kv_bytes(model, 1 + 3)
    executor = MeasuredExecutor(Footprint(GIB, GIB, DeviceMemory(64 * GIB, 4 * GIB + 2 * room)))
    core, ready = build_core(config, model, executor.create)
    assert executor.spec is not None and executor.spec.max_model_len == model.max_model_len
    assert executor.opened == [(4, 48)]
    assert core.scheduler.limits.max_samples == 2
    assert ready.max_model_len == core.scheduler.limits.max_model_len == 48 < model.max_model_len


def test_a_length_that_was_asked_for_is_not_made_less() -> None:
    config, model = resolved(max_model_len=64)
    room = kv_bytes(model, 1 + 3)
    executor = MeasuredExecutor(Footprint(GIB, GIB, DeviceMemory(64 * GIB, 4 * GIB + 2 * room)))
    with pytest.raises(MemoryFitError, match="--max-model-len 48"):
        build_core(config, model, executor.create)


def test_what_cannot_fit_is_refused_before_it_is_loaded() -> None:
    config, model = resolved(num_gpu_blocks_override=3)
    executor = MeasuredExecutor(Footprint(0, 0, DeviceMemory(GIB, GIB)))
    with pytest.raises(MemoryFitError):
        build_core(config, model, executor.create)
    config, model = resolved(enable_chunked_prefill=False, max_num_batched_tokens=64)
    with pytest.raises(ConfigError, match="without chunked prefill"):
        build_core(config, model, executor.create)
    assert executor.spec is None


def test_a_gpu_is_planned_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = DeviceMemory(24 * GIB, 24 * GIB)
    monkeypatch.setattr("quire.engine.assemble.gpu_memory", lambda: memory)
    config, model = resolved(max_model_len=-1, gpu_memory_utilization=0.99)
    model = dataclasses.replace(model, device="cuda")
    room = kv_bytes(model, 1 + 2)
    executor = MeasuredExecutor(Footprint(23 * GIB, GIB - GPU_RESERVE - room, memory))
    _, ready = build_core(config, model, executor.create)
    assert executor.spec is not None and executor.spec.device == "cuda"
    assert (ready.num_blocks, ready.max_model_len) == (3, 32)
