"""The choice of the attention backend."""

from __future__ import annotations

import logging
from importlib import metadata

from quire.attention.base import AttentionBackend, AttentionTask
from quire.attention.paged import PagedAttention
from quire.kernels.base import LayerKernels

logger = logging.getLogger(__name__)

VLLM_NAMES = {"TRITON_ATTN": "triton", "FLASH_ATTN": "flash_attn", "FLASHINFER": "flashinfer"}
OURS = ("auto", "triton")
BACKENDS = ("auto", "triton", "flash_attn", "flashinfer", *VLLM_NAMES)
_PACKAGES = {
    "flash_attn_3": "flash_attn",
    "flash-attn-4": "flash_attn",
    "flashinfer-python": "flashinfer",
}


def create_attention(name: str, kernels: LayerKernels, task: AttentionTask) -> AttentionBackend:
    """The backend with a name of `BACKENDS`, for a GPU. Raises `ConfigError` if it cannot be used."""
    name = VLLM_NAMES.get(name, name)
    if name == "flash_attn":
        from quire.attention.flash import create_flash_attention

        flash = create_flash_attention(task)
        logger.info("attention: %s, as asked for", type(flash).__name__)
        return flash
    if name == "flashinfer":
        from quire.attention.flashinfer import FlashInferAttention

        flashinfer = FlashInferAttention(task, kernels)
        logger.info("attention: FlashInfer, as asked for (%s)", flashinfer.division)
        return flashinfer
    why = "as asked for" if name == "triton" else _why_ours()
    logger.info("attention: Quire's Triton kernels (%s)", why)
    return PagedAttention(kernels)


def _why_ours() -> str:
    """The reason for the log. Packages are found by their metadata: importing one takes seconds and may
    fail."""
    found = []
    for package, backend in _PACKAGES.items():
        try:
            found.append(f"{package} {metadata.version(package)}: --attention-backend {backend}")
        except metadata.PackageNotFoundError:
            continue
    return (
        "always there, and batch-invariant on request; also installed: "
        f"{', '.join(found) or 'no other that we know'}"
    )
