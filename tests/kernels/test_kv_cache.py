from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from quire.kernels.base import Kernels, kv_cache_shapes
from quire.kernels.checks import KernelArgumentError
from quire.kernels.cpu.native import NativeKernels
from tests.kernels.cases import DTYPES, bits, dtypes, generator, randn, seeds


def empty_caches(
    num_blocks: int, heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = kv_cache_shapes(
        num_blocks=num_blocks,
        num_kv_heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    return torch.zeros(shapes.k, dtype=dtype), torch.zeros(shapes.v, dtype=dtype)


@given(
    tokens=st.integers(0, 40),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 8, 12, 33, 64]),
    block_size=st.sampled_from([16, 48, 128]),
    dtype=dtypes,
    seed=seeds,
)
def test_write_kv_puts_each_token_in_its_slot(
    native: NativeKernels,
    reference: Kernels,
    tokens: int,
    heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    assume(dtype is not torch.bfloat16 or head_dim % 2 == 0)
    rng = generator(seed)
    qkv = randn(tokens, 3 * heads * head_dim, rng=rng, dtype=dtype)
    k, v = (part.view(tokens, heads, head_dim) for part in qkv.split(heads * head_dim, dim=1)[1:])
    slots = torch.randperm(4 * block_size, generator=rng)[:tokens]
    slots[::5] = -1
    caches = []
    for kernels in (native, reference):
        k_cache, v_cache = empty_caches(4, heads, head_dim, block_size, dtype)
        kernels.write_kv(k, v, k_cache, v_cache, slots)
        caches.append((k_cache, v_cache))
    for mine, theirs in zip(*caches, strict=True):
        assert torch.equal(bits(mine), bits(theirs))
    k_cache, v_cache = caches[0]
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            pack = 2 if dtype is torch.bfloat16 else 1
            assert torch.equal(k_cache[block, :, :, offset].flatten(1), k[t])
            assert torch.equal(v_cache[block, :, offset // pack, :, offset % pack], v[t])
    written = int((slots >= 0).sum())
    assert (
        int((k_cache != 0).sum()) == int((k[slots >= 0] != 0).sum()) <= written * heads * head_dim
    )


def test_write_kv_refuses_a_slot_past_the_cache(native: NativeKernels, reference: Kernels) -> None:
    k = torch.ones(2, 1, 8)
    for kernels in (native, reference):
        k_cache, v_cache = empty_caches(3, 1, 8, 16, torch.float32)
        with pytest.raises(KernelArgumentError, match="48"):
            kernels.write_kv(k, k, k_cache, v_cache, torch.tensor([0, 48]))
        assert not k_cache.any() and not v_cache.any()


def test_write_kv_refuses_wrong_tensors(native: NativeKernels, reference: Kernels) -> None:
    k, slots = torch.ones(2, 1, 8), torch.tensor([0, 1])
    for kernels in (native, reference):
        k_cache, v_cache = empty_caches(3, 1, 8, 16, torch.float32)
        for args in (
            (k.half(), k.half(), k_cache, v_cache, slots),
            (k, k, k_cache, v_cache.half(), slots),
            (k, k, k_cache.transpose(2, 3), v_cache, slots),
            (k, k, v_cache, k_cache, slots),
            (k, k, k_cache, v_cache, slots.int()),
            (k, k[:1], k_cache, v_cache, slots),
            (torch.ones(2, 2, 8), k, k_cache, v_cache, slots),
        ):
            with pytest.raises(KernelArgumentError):
                kernels.write_kv(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_blocks(native: NativeKernels, reference: Kernels, dtype: torch.dtype) -> None:
    for kernels in (native, reference):
        layers = []
        for layer in range(3):
            k_cache, v_cache = empty_caches(6, 2, 8, 16, dtype)
            rng = generator(layer)
            layers.append(
                (
                    randn(*k_cache.shape, rng=rng, dtype=dtype),
                    randn(*v_cache.shape, rng=rng, dtype=dtype),
                )
            )
        before = [(k.clone(), v.clone()) for k, v in layers]
        kernels.copy_blocks(layers, [(1, 4), (1, 5), (3, 0)])
        for layer, old in zip(layers, before, strict=True):
            for cache, was in zip(layer, old, strict=True):
                assert torch.equal(cache[[4, 5, 0]], was[[1, 1, 3]])
                assert torch.equal(cache[[1, 2, 3]], was[[1, 2, 3]])
        kernels.copy_blocks(layers, [])
        for pairs in ([(0, 6)], [(-1, 0)], [(0, 1), (2, 1)], [(0, 1), (1, 2)]):
            with pytest.raises(KernelArgumentError):
                kernels.copy_blocks(layers, pairs)
