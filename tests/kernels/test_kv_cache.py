from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from quire.errors import ConfigError
from quire.kernels.base import Kernels
from quire.kernels.checks import KernelArgumentError
from quire.kernels.cpu.layout import kv_cache_shapes
from quire.kernels.cpu.native import NativeKernels
from tests.kernels.cases import DTYPES, assert_close, bits, dtypes, generator, randn, seeds


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


def rotated(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """x: [T, heads, D]. The formula, each product rounded to float32."""
    half = cos_sin.shape[1] // 2
    cos, sin = (part[:, None] for part in cos_sin[positions].split([half, half], dim=1))
    a, b, rest = x.split([half, half, x.shape[2] - 2 * half], dim=2)
    first, second = a.float() * cos - b.float() * sin, b.float() * cos + a.float() * sin
    return torch.cat((first.to(x.dtype), second.to(x.dtype), rest), dim=2)


@given(
    tokens=st.integers(0, 40),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    half=st.sampled_from([0, 1, 4, 17, 32, 64]),
    unrotated=st.sampled_from([0, 0, 1, 2, 16]),
    normed=st.sampled_from(["", "q", "k", "qk"]),
    in_float=st.booleans(),
    block_size=st.sampled_from([16, 48, 128]),
    consecutive=st.sampled_from([None, 0, 1, 15]),
    dtype=dtypes,
    seed=seeds,
)
def test_one_call_is_norm_then_rotation_then_slots(
    native: NativeKernels,
    reference: Kernels,
    tokens: int,
    heads: tuple[int, int],
    half: int,
    unrotated: int,
    normed: str,
    in_float: bool,
    block_size: int,
    consecutive: int | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """consecutive: the first slot, as in a prompt."""
    (group, kv_heads), head_dim = heads, 2 * half + unrotated
    assume(head_dim > 0 and (dtype is not torch.bfloat16 or head_dim % 2 == 0))
    rng, q_heads = generator(seed), group * kv_heads
    fused = randn(tokens, (q_heads + 2 * kv_heads) * head_dim + 3, rng=rng, dtype=dtype)[:, :-3]
    cos_sin = randn(50, 2 * half, rng=rng)
    positions = torch.randint(0, 50, (tokens,), generator=rng)
    if consecutive is None:
        slots = torch.randperm(4 * block_size, generator=rng)[:tokens]
    else:
        slots = torch.arange(consecutive, consecutive + tokens)
    slots[::5] = -1
    weight_dtype = torch.float32 if in_float else dtype
    q_norm, k_norm = (
        randn(head_dim, rng=rng, dtype=weight_dtype) if name in normed else None for name in "qk"
    )
    for kernels in (native, reference):
        qkv = fused.clone(memory_format=torch.preserve_format)
        k_cache, v_cache = empty_caches(4, kv_heads, head_dim, block_size, dtype)
        kernels.rope_write_kv(
            qkv, positions, cos_sin, k_cache, v_cache, slots,
            q_norm=q_norm, k_norm=k_norm, eps=1e-5,
        )  # fmt: skip
        q, k, v = fused.unflatten(1, (-1, head_dim)).split([q_heads, kv_heads, kv_heads], dim=1)
        q = q if q_norm is None else kernels.rms_norm(q, q_norm, 1e-5)
        k = k if k_norm is None else kernels.rms_norm(k, k_norm, 1e-5)
        q, k = rotated(q, positions, cos_sin), rotated(k, positions, cos_sin)
        assert torch.equal(bits(qkv[:, : q_heads * head_dim]), bits(q.flatten(1)))
        rest = slice(q_heads * head_dim, None)
        assert torch.equal(bits(qkv[:, rest]), bits(fused[:, rest]))
        expected = empty_caches(4, kv_heads, head_dim, block_size, dtype)
        pack = 2 if dtype is torch.bfloat16 else 1
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                block, offset = divmod(slot, block_size)
                expected[0][block, :, :, offset] = k[t].unflatten(1, (-1, pack))
                expected[1][block, :, offset // pack, :, offset % pack] = v[t]
        assert torch.equal(bits(k_cache), bits(expected[0]))
        assert torch.equal(bits(v_cache), bits(expected[1]))


def test_the_rotation_is_hugging_faces(native: NativeKernels) -> None:
    rng, head_dim = generator(3), 12
    qkv, positions = randn(6, 3 * head_dim, rng=rng), torch.arange(6)
    angles = positions[:, None] * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = angles.cos(), angles.sin()
    q = qkv[:, :head_dim].clone()
    half_turned = torch.cat((-q[:, head_dim // 2 :], q[:, : head_dim // 2]), dim=1)
    expected = q * torch.cat((cos, cos), dim=1) + half_turned * torch.cat((sin, sin), dim=1)
    caches = empty_caches(1, 1, head_dim, 16, torch.float32)
    native.rope_write_kv(qkv, positions, torch.cat((cos, sin), dim=1), *caches, positions)
    assert_close(qkv[:, :head_dim].contiguous(), expected, ulps=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(
    native: NativeKernels,
    dtype: torch.dtype,
    with_threads: Callable[[int, Callable[[], list[Tensor]]], list[Tensor]],
) -> None:
    rng, tokens = generator(1), 300
    fused, cos_sin = randn(tokens, 8 * 64, rng=rng, dtype=dtype), randn(tokens, 64, rng=rng)
    weight = randn(64, rng=rng, dtype=dtype)
    slots = torch.cat((torch.randperm(100, generator=rng), torch.arange(101, 101 + tokens - 100)))

    def run() -> list[Tensor]:
        qkv, caches = fused.clone(), empty_caches(20, 2, 64, 16, dtype)
        native.rope_write_kv(
            qkv, torch.arange(tokens), cos_sin, *caches, slots, q_norm=weight, k_norm=weight
        )
        return [qkv, *caches]

    one = with_threads(1, run)
    for threads in (2, 3):
        for mine, theirs in zip(with_threads(threads, run), one, strict=True):
            assert torch.equal(bits(mine), bits(theirs))


WILD = [-(2**63), -(2**40), -1, 50, 3 * 16, 2**31, 2**40, 2**63 - 1]


@given(token=st.integers(0, 4), number=st.sampled_from(WILD), field=st.sampled_from([0, 1]))
def test_wild_positions_and_slots_are_refused_before_anything_is_written(
    native: NativeKernels, reference: Kernels, token: int, number: int, field: int
) -> None:
    indices = [torch.arange(5), torch.arange(5)]
    indices[field][token] = number
    refused = number < 0 or number >= 50 if field == 0 else number >= 3 * 16
    for kernels in (native, reference):
        qkv, caches = torch.ones(5, 4 * 8), empty_caches(3, 1, 8, 16, torch.float32)
        call = partial(
            kernels.rope_write_kv, qkv, indices[0], torch.zeros(50, 8), *caches, indices[1]
        )
        if not refused:
            call()
            continue
        with pytest.raises(KernelArgumentError, match=("position", "slot")[field]):
            call()
        assert torch.equal(qkv, torch.ones(5, 4 * 8))
        assert not caches[0].any() and not caches[1].any()


def test_wrong_tensors_are_refused(native: NativeKernels, reference: Kernels) -> None:
    caches = empty_caches(3, 1, 8, 16, torch.float32)
    good = {
        "qkv": torch.ones(2, 4 * 8),
        "positions": torch.arange(2),
        "cos_sin": torch.zeros(50, 8),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "slot_mapping": torch.arange(2),
        "q_norm": torch.ones(8),
        "k_norm": torch.ones(8),
    }
    bad: list[dict[str, Tensor]] = [
        {"qkv": torch.ones(2, 4 * 8).half()},
        {"qkv": torch.ones(2, 4 * 8 + 1)},
        {"qkv": torch.ones(2, 2 * 8)},
        {"qkv": torch.ones(4 * 8, 2).t()},
        {"positions": torch.arange(3)},
        {"positions": torch.arange(2).int()},
        {"cos_sin": torch.zeros(50, 10)},
        {"cos_sin": torch.zeros(50, 7)},
        {"cos_sin": torch.zeros(50, 8).half()},
        {"slot_mapping": torch.arange(2).int()},
        {"slot_mapping": torch.arange(1)},
        {"k_cache": caches[1]},
        {"k_cache": caches[0].transpose(2, 3)},
        {"v_cache": caches[1].half()},
        {"k_norm": torch.ones(7)},
        {"q_norm": torch.ones(8).half()},
    ]
    for kernels in (native, reference):
        kernels.rope_write_kv(**good)
        for change in bad:
            with pytest.raises(KernelArgumentError):
                kernels.rope_write_kv(**{**good, **change})
        halves = empty_caches(3, 1, 8, 16, torch.float16)
        mixed = {"qkv": good["qkv"].half(), "k_cache": halves[0], "v_cache": halves[1]}
        with pytest.raises(KernelArgumentError, match="q_norm and k_norm"):
            kernels.rope_write_kv(**{**good, **mixed, "q_norm": torch.ones(8).half()})


def test_an_odd_head_dim_does_not_fit_bfloat16() -> None:
    with pytest.raises(ConfigError, match="head_dim=33"):
        empty_caches(3, 1, 33, 16, torch.bfloat16)


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
