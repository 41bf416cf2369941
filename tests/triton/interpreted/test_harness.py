"""The mended interpreter computes what a GPU would."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def matmul(a, b, c, n, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    inside = (rows < n) & (columns < n)
    left = tl.load(a + rows * n + columns, mask=inside, other=0.0)
    right = tl.load(b + rows * n + columns, mask=inside, other=0.0)
    tl.store(c + rows * n + columns, tl.dot(left, right), mask=inside)


@triton.jit
def cast(x, y, n, BLOCK: tl.constexpr):
    for start in range(0, tl.load(n), BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(
            y + i, tl.load(x + i, mask=i < tl.load(n)).to(y.dtype.element_ty), mask=i < tl.load(n)
        )


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]
)
def test_dot_is_that_of_the_values(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 30, 30).to(dtype)
    c = torch.empty(30, 30)
    matmul[(1,)](a, b, c, 30, N=32)
    torch.testing.assert_close(c, a.float() @ b.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_casts_round_to_nearest_even_and_fp8_saturates(dtype: torch.dtype) -> None:
    x = torch.cat(
        [torch.randn(40) * 100, torch.tensor([0.0, 1e-9, 1e4, -1e4, 1.00390625, float("nan")])]
    )
    y = torch.empty(len(x), dtype=dtype)
    cast[(1,)](x, y, torch.tensor([len(x)], dtype=torch.int32), BLOCK=16)
    limit = torch.finfo(dtype).max
    torch.testing.assert_close(
        y.float(), x.clamp(-limit, limit).to(dtype).float(), rtol=0, atol=0, equal_nan=True
    )
