"""The harness sees what it is there to see."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import triton
import triton.language as tl

from tests.triton.harness import ARCHES, CompileFailed, compile_launches


@triton.jit
def matmul(a, b, c, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a + rows * N + columns), tl.load(b + rows * N + columns))
    tl.store(c + rows * N + columns, product)


@triton.jit
def dies(x):
    tl.static_assert(False, "never compiles")


def square(n: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(n, n, dtype=dtype, device="meta")


def launch_matmul(n: int, warps: int) -> None:
    matmul[(1,)](square(n), square(n), square(n, torch.float32), N=n, num_warps=warps)


@pytest.mark.parametrize("arch", ARCHES)
def test_matrix_instructions_of_each_architecture(arch: int) -> None:
    (report,) = compile_launches(lambda: launch_matmul(64, warps=4), arch=arch)
    report.assert_fits(arch)
    assert report.kernel == "matmul"
    assert bool(report.wgmma) == (arch == 90)
    assert bool(report.mma) == (arch == 80)
    assert bool(report.tcgen05) == (arch == 100)


def test_a_kernel_that_spills_is_seen_to_spill() -> None:
    (report,) = compile_launches(lambda: launch_matmul(256, warps=4), arch=90)
    assert report.stack > 0
    with pytest.raises(AssertionError, match="spills"):
        report.assert_fits(90)


def test_each_launch_is_reported() -> None:
    reports = compile_launches(lambda: [launch_matmul(n, warps=4) for n in (16, 32, 16)], arch=80)
    assert len(reports) == 3 and reports[0] == reports[2] != reports[1]


def test_an_error_in_the_child_is_raised_here() -> None:
    with pytest.raises(CompileFailed, match="never compiles"):
        compile_launches(lambda: dies[(1,)](square(16)))


def test_a_dying_child_is_an_error() -> None:
    with pytest.raises(CompileFailed, match="signal 9"):
        compile_launches(lambda: os.kill(os.getpid(), signal.SIGKILL))
