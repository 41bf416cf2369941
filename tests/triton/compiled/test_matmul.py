"""What the product compiles to at the shapes of real models, and that the number of rows compiles nothing."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.triton.matmul import matmul
from tests.triton.harness import ARCHES, Report, compile_launches

SHAPES = {
    "Llama-3.1-8B, down": (4096, 14336),
    "Qwen3-0.6B, qkv": (4096, 1024),
    "a head of odd size": (151_929, 1000),
}


def compiled(
    *sizes: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, arch: int = 90
) -> list[Report]:
    def launch() -> None:
        weight, bias = (torch.empty(*s, dtype=dtype, device="meta") for s in ((n, k), (n,)))
        for rows in sizes:
            matmul(torch.empty(rows, k, dtype=dtype, device="meta"), weight, bias)

    return compile_launches(launch, arch=arch)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_of_models_fit(name: str, arch: int) -> None:
    n, k = SHAPES[name]
    (report,) = compiled(7, n=n, k=k, arch=arch)
    report.assert_fits(arch)
    assert (report.mma > 0, report.wgmma > 0, report.tcgen05 > 0) == tuple(
        a == arch for a in ARCHES
    )
    assert report.cp_async > 0, f"{report} does not load ahead"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_fit(dtype: torch.dtype) -> None:
    (report,) = compiled(7, n=1024, k=1024, dtype=dtype)
    report.assert_fits(90)
    assert bool(report.wgmma) == (dtype is torch.float16)


def test_every_number_of_rows_runs_the_same_code() -> None:
    """1 and multiples of 16 are what Triton would compile for. One report is one machine code."""
    reports = compiled(1, 2, 16, 129, 4096, n=1024, k=1024)
    assert len(reports) == 5 and len({id(report) for report in reports}) == 1
