"""What the kernel tests share: tolerances, and paged caches filled from plain keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.base import Kernels
from quire.kernels.cpu.layout import kv_cache_shapes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Where one implementation rounds up and the other down, they differ by one unit in the last place.
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=rng).to(dtype)


def assert_close(
    actual: Tensor, expected: Tensor, *, ulps: float = 1.0, atol: float = 1e-6
) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=ulps * ULP[actual.dtype], atol=atol)


def bits(x: Tensor) -> Tensor:
    """The tensor as integers, so that equality also sees signs of zero and NaN payloads."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Keys and values of some requests, plain and as a paged cache with NaN in every unused slot."""

    keys: list[Tensor]  # each [length, kv_heads, D]
    values: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    block_size: int

    def table_row(self, b: int) -> Tensor:
        return self.block_table[b : b + 1].clone()


def make_sequences(
    kernels: Kernels,
    lengths: list[int],
    *,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    rng: torch.Generator,
) -> Sequences:
    max_blocks = max(-(-length // block_size) for length in lengths) + 1
    num_blocks = len(lengths) * max_blocks + 1
    shapes = kv_cache_shapes(
        num_blocks=num_blocks,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    k_cache = torch.full(shapes.k, torch.nan).to(dtype)
    v_cache = torch.full(shapes.v, torch.nan).to(dtype)
    order = torch.randperm(num_blocks - 1, generator=rng) + 1
    table = order.view(len(lengths), max_blocks).int()
    keys, values = [], []
    for b, length in enumerate(lengths):
        k = randn(length, kv_heads, head_dim, rng=rng, dtype=dtype)
        v = randn(length, kv_heads, head_dim, rng=rng, dtype=dtype)
        store(kernels, k, v, k_cache, v_cache, slots_of(table[b], 0, length, block_size))
        keys.append(k)
        values.append(v)
    # Rows of the table past a request's end must not be read as blocks.
    for b, length in enumerate(lengths):
        table[b, -(-length // block_size) :] = -1
    return Sequences(keys, values, k_cache, v_cache, table, torch.tensor(lengths).int(), block_size)


def store(
    kernels: Kernels, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    """Keys and values into their slots as they are: not rotated. k, v: [T, kv_heads, D]."""
    qkv = torch.cat((torch.zeros_like(k), k, v), dim=1).flatten(1)
    no_rotation, positions = torch.empty(1, 0), torch.zeros(len(k), dtype=torch.int64)
    kernels.rope_write_kv(qkv, positions, no_rotation, k_cache, v_cache, slots)


def slots_of(table: Tensor, start: int, end: int, block_size: int) -> Tensor:
    positions = torch.arange(start, end)
    return table[positions // block_size].long() * block_size + positions % block_size


def starts(query_lens: list[int]) -> Tensor:
    return torch.tensor([0, *query_lens]).cumsum(0).int()
