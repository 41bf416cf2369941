"""Attention through each request's block table (PagedAttention, Kwon et al. 2023, section 4)."""

from __future__ import annotations

import torch

from quire.attention.base import AttentionMetadata, LayerCache
from quire.kernels.base import LayerKernels
from quire.kernels.ops import AttentionLayer


class PagedAttention:
    """The backend that calls `Kernels`: one call for any mix of requests."""

    def __init__(self, kernels: LayerKernels) -> None:
        self._kernels = kernels

    def forward(
        self,
        q: torch.Tensor,
        *,
        layer: AttentionLayer,
        cache: LayerCache,
        metadata: AttentionMetadata,
        out: torch.Tensor,
    ) -> torch.Tensor:
        return self._kernels.paged_attention(
            q,
            cache.k,
            cache.v,
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            scale=layer.scale,
            window=layer.window,
            softcap=layer.softcap,
            max_query_len=metadata.max_query_len,
            min_query_len=metadata.min_query_len,
            kv_scales=cache.scales,
            out=out,
        )
