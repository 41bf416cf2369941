"""FlashAttention-3 (Shah et al. 2024) over our cache, where its package is installed."""

from __future__ import annotations

import torch

from quire.attention.base import AttentionMetadata, LayerCache
from quire.errors import ConfigError


class FlashAttention:
    """Not batch-invariant: FlashAttention chooses tiles and splits by what is in the batch."""

    def __init__(self, *, scale: float) -> None:
        """Raises `ConfigError` where it cannot be imported."""
        try:
            from flash_attn_interface import flash_attn_with_kvcache
        except ImportError as error:
            raise ConfigError(
                f"attention_backend 'flash_attn' needs FlashAttention-3 ({error}); install it from its "
                "repository (hopper/), or use --attention-backend triton."
            ) from None
        self._attend = flash_attn_with_kvcache
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
        scales = {}
        if cache.scales is not None:  # one for each request and kv head
            requests = metadata.seq_lens.shape[0]
            scales = {
                name: scale.expand(requests, -1)
                for name, scale in zip(("k_descale", "v_descale"), cache.scales, strict=True)
            }
        attended = self._attend(
            q,
            cache.k.transpose(1, 2),  # [num_blocks, block_size, kv_heads, head_dim], as a view
            cache.v.transpose(1, 2),
            cache_seqlens=metadata.seq_lens,
            page_table=metadata.block_table,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len or q.shape[0],
            softmax_scale=self._scale,
            causal=True,
            window_size=(window - 1 if window else -1, 0 if window else -1),
            **scales,
        )
        out.copy_(attended)
