"""A GPU as a worker's device: kernels, attention, the memory of a step, explanations of errors."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from quire.attention.base import AttentionBackend, AttentionMetadata, AttentionTask, KVCache
from quire.attention.select import OURS, VLLM_NAMES, create_attention
from quire.config import EngineConfig
from quire.errors import ConfigError, MemoryFitError
from quire.kernels.triton.backend import TritonKernels
from quire.models.decoder import DecoderModel
from quire.runner.device import CudaDevice, Device
from quire.runner.footprint import Footprint, WorkerSpec, estimate
from quire.runner.gpu_step import GPUBackend
from quire.runner.platform import make_cache

logger = logging.getLogger(__name__)

STEP_MARGIN = 128 << 20
"""Bytes that stay free when CUDA graphs are captured, besides those of the largest step."""


class GPU:
    """A `Platform` whose steps are launched while the one before runs."""

    def __init__(
        self, config: EngineConfig, spec: WorkerSpec, device: Device | None = None
    ) -> None:
        """device: the rank's GPU if None. Raises `ConfigError` if it cannot be used."""
        self._config = config
        self._spec = spec
        self.max_in_flight = 2 if config.runtime.async_scheduling else 1
        with self._explained():
            self.device = device or CudaDevice(spec.rank)
        self.kernels = TritonKernels(
            self.device.torch_device, batch_invariant=config.runtime.batch_invariant
        )

    def active(self) -> AbstractContextManager[object]:
        return self._active()

    @contextmanager
    def _active(self) -> Iterator[None]:
        with self.device.active(), self._explained():
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Converts errors of PyTorch, Triton and the driver to errors that name a remedy."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            options = self._config.scheduler
            raise MemoryFitError(
                f"The GPU's memory did not suffice ({_first_line(error)}) Less of any of these gives room: "
                f"--gpu-memory-utilization, --max-num-batched-tokens ({options.max_num_batched_tokens}), "
                f"--max-num-seqs ({options.max_num_seqs}), --max-model-len ({self._spec.max_model_len})."
            ) from None
        except (RuntimeError, subprocess.CalledProcessError) as error:
            remedy = _remedy(error)
            if remedy is None:
                raise
            raise ConfigError(f"{remedy} ({_first_line(error)})") from None

    def attention(self) -> AttentionBackend:
        spec, device = self._spec, self.device.torch_device
        task = AttentionTask(
            softcap=max(layer.attention.softcap for layer in spec.model.layers),
            head_dim=spec.model.heads.head_dim,
            dtype=getattr(torch, spec.dtype),
            kv_dtype=getattr(torch, spec.kv_cache_dtype),
            block_size=self._config.cache.block_size,
            capability=torch.cuda.get_device_capability(device)
            if device.type == "cuda"
            else (0, 0),
            batch_invariant=self._config.runtime.batch_invariant,
        )
        return create_attention(self._config.runtime.attention_backend, self.kernels, task)

    def backend(self, model: DecoderModel) -> GPUBackend:
        options = self._config.scheduler
        return GPUBackend(
            model,
            self.device,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=self._spec.max_model_len,
            block_size=self._config.cache.block_size,
            eager=self._config.runtime.enforce_eager,
            logprobs_mode=self._config.model.logprobs_mode,
        )

    def footprint(self, model: DecoderModel) -> Footprint:
        """Measured with the largest possible step."""
        cache = self.cache(1)
        try:
            measured = self.device.measure(lambda: self._try_out(model, cache))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            name = self._config.runtime.attention_backend
            if VLLM_NAMES.get(name, name) in OURS:
                raise
            # Packages refuse a device or a shape in many ways, some with an assertion.
            raise ConfigError(
                f"attention_backend {name!r} failed in its first step ({type(error).__name__}: "
                f"{_first_line(error)}): use --attention-backend triton."
            ) from error
        if measured is None:
            return estimate(
                self._config,
                self._spec.model,
                self.device.memory(),
                dtype_bytes=model.dtype.itemsize,
                max_model_len=self._spec.max_model_len,
            )
        weights, step = measured
        logger.info("measured: weights %d MiB, largest step %d MiB", weights >> 20, step >> 20)
        self.device.keep_free(step + STEP_MARGIN)
        return Footprint(weights, step, self.device.memory())

    @torch.inference_mode()
    def _try_out(self, model: DecoderModel, cache: KVCache) -> None:
        """Run a step with the whole token budget and the largest number of rows of logits."""
        options = self._config.scheduler
        tokens = min(options.max_num_batched_tokens, model.max_model_len)
        requests = -(-options.max_num_batched_tokens // tokens)
        hidden = _run_step(model, cache, requests=requests, tokens=tokens)
        # As in the runner: logits, and the edited ones in float32.
        model.compute_logits(hidden[: options.max_num_seqs])
        # Compile what decoding needs (minutes for FlashInfer) before a request waits for it.
        _run_step(model, cache, requests=1, tokens=1)

    def cache(self, num_blocks: int) -> KVCache:
        """The cache; the first call also allocates attention's workspace, whose address CUDA graphs
        contain."""
        cache = make_cache(self._config, self._spec, self.kernels, num_blocks)
        model = self._spec.model
        self.kernels.reserve(
            cache.parts[0].k,
            q_heads=model.heads.num_heads,
            max_requests=self._config.scheduler.max_num_seqs,
            max_len=self._spec.max_model_len,
            windows={window or 0 for window in model.windows},
        )
        return cache

    def release(self) -> None:
        self.device.release()


def _run_step(model: DecoderModel, cache: KVCache, *, requests: int, tokens: int) -> Tensor:
    """Hidden states of new requests with these numbers of tokens; all keys are read from one block."""
    device, size = cache.storage.device, cache.block_size
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * tokens
    positions = torch.arange(requests * tokens, device=device) % tokens
    metadata = AttentionMetadata(
        positions=positions,
        slot_mapping=torch.full_like(positions, -1),
        query_start_loc=starts,
        seq_lens=torch.full((requests,), tokens, dtype=torch.int32, device=device),
        block_table=torch.zeros(requests, -(-tokens // size), dtype=torch.int32, device=device),
        max_query_len=tokens,
    )
    return model.compute(torch.zeros_like(positions), [metadata] * len(model.spec.kv.groups), cache)


def _remedy(error: Exception) -> str | None:
    """The remedy, if the error is caused by the installation."""
    lower = str(error).lower()
    if "c compiler" in lower or isinstance(error, subprocess.CalledProcessError):
        return (
            "Triton compiles its launchers with a C compiler and Python's headers: install them "
            "(apt-get install gcc python3-dev), or use --device cpu."
        )
    if "driver" in lower and ("old" in lower or "version" in lower or "not found" in lower):
        return (
            "The NVIDIA driver does not fit the installed PyTorch: update the driver (580 or later for "
            "CUDA 13), or install a PyTorch built for an older CUDA (https://pytorch.org)."
        )
    if any(part in lower for part in ("no cuda gpus are", "invalid device", "0 active drivers")):
        return "PyTorch finds no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu."
    if "cuda error" in lower or "cuda_error" in lower:
        return (
            "The GPU could not be used: see nvidia-smi, whether another process holds it exclusively, and "
            "the driver's log; or use --device cpu."
        )
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
