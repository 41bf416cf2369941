"""A step's inputs to attention, which all layers share, and the memory of keys and values.

One set of tensors describes a step, and all layers read it. Layers differ only in weights, window and
their slice of the cache. A request that decodes, one that prefills a chunk and one that resumes are rows
of the same kind: `query_start_loc` gives each request's tokens, and `seq_lens` its number of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from quire.errors import ConfigError
from quire.kernels.base import LayerKernels
from quire.kernels.cpu import layout
from quire.kernels.ops import AttentionLayer


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step's batch of B requests with T scheduled tokens in all, request after request."""

    positions: torch.Tensor
    """[T] int64: each token's index in its request."""
    slot_mapping: torch.Tensor
    """[T] int64: where each token's key and value go, `block_id * block_size + offset`."""
    query_start_loc: torch.Tensor
    """[B + 1] int32: request i owns tokens `query_start_loc[i]` up to `query_start_loc[i + 1]`."""
    seq_lens: torch.Tensor
    """[B] int32: keys each request has once this step's are written; its last token is at
    `seq_lens[i] - 1`.
    """
    block_table: torch.Tensor
    """[B, max_blocks] int32: each request's blocks in order; entries past the sequence are never read."""
    max_query_len: int | None = None
    """The largest number of tokens of a request in this step, if the host knows it."""
    min_query_len: int = 1
    """The smallest, or less. Not for a step that is recorded, whose rows may have any number."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One part of every block: the KV of one layer in each group. The shapes are those of
    `kernels.kv_cache_shapes`."""

    k: torch.Tensor
    v: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    """Of keys and values, [num_kv_heads] float32 each, if they are stored in float8_e4m3fn."""


class KVCache:
    """Keys and values of every layer, in one allocation whose size is known before anything is served.

    A slot is read only after it was written, so blocks are not cleared between requests. Pages take no memory
    until they are written or reserved (`kernels.memory.reserve_in_background`).
    """

    def __init__(
        self,
        *,
        num_parts: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        kernels: LayerKernels | None = None,
    ) -> None:
        """num_parts: layers whose KV a block holds, so those of the largest group (`quire.kv_layout`).
        kernels: whose layout and device; the CPU's if None.
        """
        holder = kernels or layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        shapes = holder.kv_cache_shapes(
            num_blocks=num_blocks,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
        )
        size = num_blocks * num_kv_heads * head_dim * block_size
        # Not on huge pages: three interleaved runs showed no gain in attention, rather a loss.
        self.storage = torch.empty(num_parts, 2, size, dtype=dtype, device=holder.device)
        if shapes.zeroed:
            self.storage.view(torch.uint8).zero_()
        # One, unless the checkpoint has others: keys and values of published models fit the range of float8.
        ones = torch.ones(num_parts, 2, num_kv_heads, dtype=torch.float32, device=holder.device)
        has_scales = dtype is torch.float8_e4m3fn
        self.parts = tuple(
            LayerCache(
                k=part[0].view(shapes.k),
                v=part[1].view(shapes.v),
                scales=(scales[0], scales[1]) if has_scales else None,
            )
            for part, scales in zip(self.storage, ones, strict=True)
        )

    @property
    def pairs(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """(k, v) of each part, as `Kernels.copy_blocks` takes them."""
        return tuple((part.k, part.v) for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()


@dataclass(frozen=True, slots=True)
class AttentionTask:
    """The requirements of a model, its cache and the device, known before anything is loaded."""

    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    capability: tuple[int, int]
    """The device's compute capability, (9, 0) for Hopper."""
    batch_invariant: bool = False
    softcap: float = 0.0
    """The largest of any layer."""


@dataclass(frozen=True, slots=True)
class TaskLimits:
    """What a backend of another project supports. Anything else is refused at the start.

    None of them reads a float8 cache for 16-bit queries: FlashAttention needs the queries in float8 too,
    which costs accuracy, and FlashInfer uses one scale where we have one per head. None is batch-invariant:
    they choose tiles and splits by the contents of the batch.
    """

    name: str
    capabilities: tuple[int, ...]
    """Major versions of compute capabilities."""
    head_dims: Sequence[int]
    block_sizes: Sequence[int] = (16, 32, 64, 128)

    def check(self, task: AttentionTask) -> None:
        """Raises `ConfigError`."""
        halves = (torch.bfloat16, torch.float16)
        kv_dtypes = (task.dtype,)
        # field, its value, supported values, remedy
        for field, value, taken, remedy in (
            ("batch_invariant", task.batch_invariant, (False,), "leave out --batch-invariant"),
            ("dtype", task.dtype, halves, "use --dtype bfloat16"),
            ("kv_cache_dtype", task.kv_dtype, kv_dtypes, "use --kv-cache-dtype auto"),
            ("compute capability", task.capability[0], self.capabilities, ""),
            ("head_dim", task.head_dim, self.head_dims, ""),
            ("soft-cap", task.softcap, (0.0,), ""),
            ("block_size", task.block_size, self.block_sizes, "use --block-size 64"),
        ):
            if value not in taken:
                raise ConfigError(
                    f"{self.name} does not take {field} {value}, only "
                    f"{', '.join(str(item) for item in taken)}: use --attention-backend triton"
                    f"{remedy and f', or {remedy}'}."
                )


class AttentionBackend(Protocol):
    """Causal attention of one step's queries over all their requests' keys, old and new.

    `forward` only launches: it never waits for the device nor reads lengths on the host, and a step of
    the same shape can be captured in a CUDA graph and replayed with other lengths and blocks.
    """

    def forward(
        self,
        q: torch.Tensor,
        *,
        layer: AttentionLayer,
        cache: LayerCache,
        metadata: AttentionMetadata,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The attention of `q`, in `out` or in a new tensor of its shape; the step's keys and values are in
        the cache.

        q, out: [T, num_heads, head_dim]; q's heads dense, any token stride. layer: its window, scale and
        soft-cap.
        """
