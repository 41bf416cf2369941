"""The cache's memory: one allocation, the shapes kernels expect, nothing shared between layers."""

from __future__ import annotations

import pytest
import torch

from quire.attention.base import AttentionMetadata, KVCache
from quire.attention.paged import PagedAttention
from quire.kernels.ops import AttentionLayer
from quire.kernels.select import create_kernels


def make_cache(**changes: int) -> KVCache:
    sizes = {"num_parts": 3, "num_blocks": 5, "num_kv_heads": 2, "head_dim": 8, "block_size": 16}
    return KVCache(**(sizes | changes), dtype=torch.float32)


def test_layout() -> None:
    cache = make_cache()
    assert cache.num_bytes == 3 * 2 * 5 * 2 * 8 * 16 * 4
    for layer in cache.parts:
        assert layer.k.shape == (5, 2, 8, 16, 1) and layer.v.shape == (5, 2, 16, 8, 1)
        assert layer.k.is_contiguous() and layer.v.is_contiguous()
    assert cache.pairs[1] == (cache.parts[1].k, cache.parts[1].v)


def test_layers_are_disjoint_and_cover_the_storage() -> None:
    cache = make_cache()
    cache.storage.zero_()
    for index, layer in enumerate(cache.parts):
        layer.k.add_(10 * index + 1)
        layer.v.add_(10 * index + 2)
    assert cache.storage.flatten(2).unique(dim=2).squeeze(2).tolist() == [
        [1, 2],
        [11, 12],
        [21, 22],
    ]


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("window", [None, 5])
def test_paged_attention_equals_plain_attention(name: str, window: int | None) -> None:
    """One request over blocks out of order, its 23 tokens all new, against a dense softmax."""
    torch.manual_seed(0)
    cache = make_cache()
    cache.storage.fill_(float("nan"))
    length, blocks = 23, [4, 2]
    q, k, v = (torch.randn(length, heads, 8) for heads in (4, 2, 2))
    metadata = AttentionMetadata(
        positions=torch.arange(length),
        slot_mapping=torch.tensor([blocks[i // 16] * 16 + i % 16 for i in range(length)]),
        query_start_loc=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_table=torch.tensor([blocks], dtype=torch.int32),
    )
    out = torch.empty(length, 4, 8)
    kernels, layer = create_kernels(name), cache.parts[1]
    qkv, no_rotation = torch.cat((q, k, v), dim=1).flatten(1), torch.empty(length, 0)
    kernels.rope_write_kv(
        qkv, metadata.positions, no_rotation, layer.k, layer.v, metadata.slot_mapping
    )
    attention = AttentionLayer(
        part=1,
        group=0,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        cos_sin=no_rotation,
        q_norm=None,
        k_norm=None,
        window=window or 0,
        scale=0.3,
        softcap=0.0,
    )
    backend = PagedAttention(kernels)
    backend.forward(q, layer=attention, cache=layer, metadata=metadata, out=out)

    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1)) * 0.3
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    expected = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, dim=1))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert cache.parts[0].k.isnan().all() and cache.parts[2].v.isnan().all()
