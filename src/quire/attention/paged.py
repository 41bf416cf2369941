"""Attention by walking each request's block table (PagedAttention, Kwon et al. 2023, section 4)."""

from __future__ import annotations

import torch

from quire.attention.base import AttentionMetadata, LayerCache
from quire.kernels.base import LayerKernels


class PagedAttention:
    """The backend over `Kernels`: one call, whatever mix of requests is in the step."""

    def __init__(self, kernels: LayerKernels, *, scale: float) -> None:
        self._kernels = kernels
        self._scale = scale

    def forward(
        self,
        q: torch.Tensor,
        *,
        cache: LayerCache,
        metadata: AttentionMetadata,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        self._kernels.paged_attention(
            q,
            cache.k,
            cache.v,
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            scale=self._scale,
            window=window or 0,
            max_query_len=metadata.max_query_len,
            kv_scales=cache.scales,
            out=out,
        )
