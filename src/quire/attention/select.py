"""Which backend attends."""

from __future__ import annotations

import logging

from quire.attention.base import AttentionBackend
from quire.attention.paged import PagedAttention
from quire.errors import ConfigError
from quire.kernels.base import LayerKernels

logger = logging.getLogger(__name__)

VLLM_NAMES = {"TRITON_ATTN": "triton", "FLASH_ATTN": "flash_attn"}
BACKENDS = ("auto", "triton", "flash_attn", *VLLM_NAMES)


def create_attention(
    name: str, kernels: LayerKernels, *, scale: float, batch_invariant: bool = False
) -> AttentionBackend:
    """The backend by one of `BACKENDS`, for a GPU. Raises `ConfigError` where it cannot be had."""
    name = VLLM_NAMES.get(name, name)
    if name == "flash_attn":
        from quire.attention.flash import FlashAttention

        if batch_invariant:
            raise ConfigError(
                "attention_backend 'flash_attn' is not batch-invariant; use triton, or leave out "
                "--batch-invariant."
            )
        logger.info("attention: FlashAttention-3, as asked for")
        return FlashAttention(scale=scale)
    why = (
        "as asked for" if name == "triton" else "it is always there and batch-invariant on request"
    )
    logger.info("attention: Quire's Triton kernels (%s)", why)
    return PagedAttention(kernels, scale=scale)
