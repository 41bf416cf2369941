"""What a decoder's forward pass needs beside its inputs, for kernels that can run all of it in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quire.kernels.linear_cpu import PackedLinear


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One pre-norm decoder layer with its slice of the KV cache."""

    input_norm: Tensor
    """[hidden]"""
    qkv: PackedLinear
    q_norm: Tensor | None
    """[head_dim]"""
    k_norm: Tensor | None
    o: PackedLinear
    post_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear
    k_cache: Tensor
    """As `kv_cache_shapes`; all layers' alike."""
    v_cache: Tensor
    window: int
    """Keys a query sees, its own included; 0 for all."""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    layers: tuple[LayerWeights, ...]
    embedding: Tensor | None
    """[vocab_size, hidden], or None where the head's rows serve."""
    final_norm: Tensor
    head: PackedLinear
    cos_sin: Tensor
    """[max_position, rotary_dim] float32: cosines, then sines."""
    eps: float
    scale: float
    """Of attention scores."""


class DecoderPass(Protocol):
    """A whole forward pass over one model and one cache."""

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        logit_rows: Tensor | None,
    ) -> Tensor:
        """Logits of the wanted tokens, and every token's keys and values in the cache.

        input_ids, positions, slot_mapping: [T] int64. query_start_loc: [B + 1] int32. seq_lens: [B]
        int32. block_table: [B, max_blocks] int32. As in `Kernels.paged_attention`. logit_rows: [R]
        int64, rising token indices, or None for all. Returns [R, vocab_size] float32.
        Raises `KernelArgumentError`, with nothing written, for an index out of range.
        """
        ...
