"""FlashAttention-3 (Shah et al. 2024) and -4 (its successor in CuTe DSL) over our cache, where installed.

The device determines which one: 3 has kernels for compute capability 8 and 9, and 4 reads a paged cache on 9,
10 and 11. On 9 both work; 3 is preferred, because it is older and more complete.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.attention.base import (
    AttentionBackend,
    AttentionMetadata,
    AttentionTask,
    LayerCache,
    TaskLimits,
)
from quire.errors import ConfigError
from quire.kernels.ops import AttentionLayer


def create_flash_attention(task: AttentionTask) -> AttentionBackend:
    """Raises `ConfigError` if it does not support the task, or no version for the device is installed."""
    major = task.capability[0]
    versions: list[tuple[TaskLimits, Callable[[AttentionTask], AttentionBackend]]] = []
    if major in (8, 9):
        limits = TaskLimits("FlashAttention-3", (8, 9), range(8, 257, 8))
        versions.append((limits, FlashAttention3))
    if major != 8:
        head_dims = range(8, 257, 8) if major == 9 else (*range(8, 129, 8), 256)
        versions.append((TaskLimits("FlashAttention-4", (9, 10, 11), head_dims), FlashAttention4))
    errors = []
    for limits, version in versions:
        limits.check(task)
        try:
            return version(task)
        except ImportError as error:
            errors.append(f"{limits.name} ({error})")
    raise ConfigError(
        f"attention_backend 'flash_attn' needs {' or '.join(errors)}: install FlashAttention-3 from its "
        "repository (hopper/) or flash-attn-4 from PyPI, or use --attention-backend triton."
    )


class FlashAttention3:
    def __init__(self, task: AttentionTask) -> None:
        """Raises `ImportError`."""
        from flash_attn_interface import flash_attn_with_kvcache

        self._attend = flash_attn_with_kvcache

    def forward(
        self,
        q: torch.Tensor,
        *,
        layer: AttentionLayer,
        cache: LayerCache,
        metadata: AttentionMetadata,
        out: torch.Tensor,
    ) -> torch.Tensor:
        attended: torch.Tensor = self._attend(
            q,
            cache.k.transpose(1, 2),  # [num_blocks, block_size, kv_heads, head_dim], as a view
            cache.v.transpose(1, 2),
            cache_seqlens=metadata.seq_lens,
            page_table=metadata.block_table,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len or q.shape[0],
            softmax_scale=layer.scale,
            causal=True,
            window_size=(layer.window - 1, 0) if layer.window else (-1, -1),
        )
        return attended


class FlashAttention4:
    def __init__(self, task: AttentionTask) -> None:
        """Raises `ImportError`."""
        from flash_attn.cute import flash_attn_varlen_func

        self._attend = flash_attn_varlen_func
        # 0: split a long sequence into as many parts as fill the device; not supported on Hopper.
        self._num_splits = 1 if task.capability[0] == 9 else 0

    def forward(
        self,
        q: torch.Tensor,
        *,
        layer: AttentionLayer,
        cache: LayerCache,
        metadata: AttentionMetadata,
        out: torch.Tensor,
    ) -> torch.Tensor:
        attended = self._attend(
            q,
            cache.k.transpose(1, 2),  # [num_blocks, block_size, kv_heads, head_dim], as a view
            cache.v.transpose(1, 2),
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len or q.shape[0],
            # Of all steps, as a graph is replayed; else it splits for a sequence as long as the whole cache.
            max_seqlen_k=metadata.block_table.shape[1] * cache.k.shape[2],
            seqused_k=metadata.seq_lens,
            page_table=metadata.block_table,
            softmax_scale=layer.scale,
            causal=True,
            window_size=(layer.window - 1, 0) if layer.window else (None, None),
            num_splits=self._num_splits,
        )
        # 4.0's betas return (out, lse) even if no lse is requested; a later version will not.
        result: torch.Tensor = attended[0] if isinstance(attended, tuple) else attended
        return result
