"""The parts of a worker that depend on the kind of its device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from quire.attention.base import AttentionBackend, KVCache
from quire.config import EngineConfig
from quire.kernels.base import LayerKernels
from quire.models.decoder import DecoderModel
from quire.runner.backend import StepBackend
from quire.runner.device import Device
from quire.runner.footprint import Footprint, WorkerSpec


class Platform(Protocol):
    max_in_flight: int

    @property
    def device(self) -> Device | None:
        """None: the CPU."""
        ...

    @property
    def kernels(self) -> LayerKernels: ...

    def active(self) -> AbstractContextManager[object]:
        """Inside, work runs on this device, and its errors get explanations."""
        ...

    def attention(self) -> AttentionBackend | None:
        """The attention backend; None for the kernels' own."""
        ...

    def backend(self, model: DecoderModel) -> StepBackend: ...

    def footprint(self, model: DecoderModel) -> Footprint:
        """Includes the memory of the backend."""
        ...

    def cache(self, num_blocks: int) -> KVCache: ...

    def release(self) -> None:
        """Return the memory of dropped objects to the system."""
        ...


def make_cache(
    config: EngineConfig, spec: WorkerSpec, kernels: LayerKernels, num_blocks: int
) -> KVCache:
    return KVCache(
        num_parts=spec.model.kv.layers_per_page,
        num_blocks=num_blocks,
        num_kv_heads=spec.model.heads.num_kv_heads,
        head_dim=spec.model.heads.head_dim,
        block_size=config.cache.block_size,
        dtype=getattr(torch, spec.kv_cache_dtype),
        kernels=kernels,
    )
