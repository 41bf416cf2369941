"""What every layer's attention shares in one step, and the memory the keys and values live in.

One set of tensors describes a step, and all layers read it: layers differ only in weights, window
and which slice of the cache is theirs. A request that decodes, one that prefills a chunk and one
that resumes are rows of the same kind: `query_start_loc` says which tokens are whose, `seq_lens`
how many keys each then has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from quire.kernels.base import LayerKernels, OnCPU


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
    """Most tokens that a request has in this step, where the host knows."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's slice of the cache; the shapes, and why they are so, are in `KVCacheShapes`."""

    k: torch.Tensor
    v: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    """Of keys and values, [num_kv_heads] float32 each, where they are stored in float8_e4m3fn."""


class KVCache:
    """Keys and values of every layer, in one allocation whose size is known before anything is served.

    A slot is read only after it was written, so blocks are not cleared when they change hands. Pages cost
    nothing until they are touched, or reserved (`kernels.memory.reserve_in_background`).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        kernels: LayerKernels | None = None,
    ) -> None:
        """kernels: whose layout and device; the CPU's if None."""
        holder = kernels or OnCPU()
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
        self.storage = torch.empty(num_layers, 2, size, dtype=dtype, device=holder.device)
        scales = None
        if (
            dtype is torch.float8_e4m3fn
        ):  # one: bf16 keys and values of published models fit its range
            ones = torch.ones(num_kv_heads, dtype=torch.float32, device=holder.device)
            scales = (ones, ones)
        self.layers = tuple(
            LayerCache(k=layer[0].view(shapes.k), v=layer[1].view(shapes.v), scales=scales)
            for layer in self.storage
        )

    @property
    def pairs(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """(k, v) of each layer, as `Kernels.copy_blocks` takes them."""
        return tuple((layer.k, layer.v) for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()


class AttentionBackend(Protocol):
    """Causal attention of one step's queries over all their requests' keys, old and new."""

    def forward(
        self,
        q: torch.Tensor,
        *,
        cache: LayerCache,
        metadata: AttentionMetadata,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """Write the attention of `q` to `out`; the step's keys and values are in the cache.

        q, out: [T, num_heads, head_dim]; q's heads dense, any token stride. With a window a query
        sees that many keys, its own included.
        """
