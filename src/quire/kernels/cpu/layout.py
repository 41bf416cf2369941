"""The layout of the KV cache in every implementation for the CPU."""

from __future__ import annotations

import torch

from quire.errors import ConfigError
from quire.kernels.base import KVCacheShapes
from quire.kernels.checks import pack_of

device = torch.device("cpu")


def kv_cache_shapes(
    *, num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> KVCacheShapes:
    """With p = 2 in bfloat16 and float8, else 1:

    k: [num_blocks, num_kv_heads, head_dim / p, block_size, p]
    v: [num_blocks, num_kv_heads, block_size / p, head_dim, p]

    Keys are transposed inside a block: sixteen keys of one dimension lie side by side, so that a
    score needs a broadcast and a multiply-add, and no horizontal sum. In bfloat16 what is summed over
    (dimensions of a key, values of a dimension) lies in pairs, because processors multiply and add
    pairs of bfloat16 in one instruction (AVX512_BF16 VDPBF16PS, Arm BFDOT). The layout depends on
    the dtype alone, so that every CPU implementation on every machine reads the same.

    Raises `ConfigError` for an odd head_dim in these. block_size is even.
    """
    pack = pack_of(dtype)
    if head_dim % pack:
        raise ConfigError(
            f"head_dim={head_dim} is odd, which a KV cache in bfloat16 or fp8 cannot hold; "
            "use dtype='float32' or 'float16', and kv_cache_dtype='auto'"
        )
    return KVCacheShapes(
        k=(num_blocks, num_kv_heads, head_dim // pack, block_size, pack),
        v=(num_blocks, num_kv_heads, block_size // pack, head_dim, pack),
    )
