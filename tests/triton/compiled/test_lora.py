"""What SGMV compiles to at shapes of models, and that the number of rows compiles nothing."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.triton.backend import RowMajorProduct
from quire.kernels.triton.lora import DeviceAdapters
from tests.triton.harness import ARCHES, Report, compile_launches


def compiled(
    *sizes: int, rank: int = 16, dtype: torch.dtype = torch.bfloat16, arch: int = 90
) -> list[Report]:
    def launch() -> None:
        device = torch.device("meta")
        product = RowMajorProduct(
            4096, 6144, dtype, bias=False, device=device, product=torch.nn.functional.linear
        )
        adapters = DeviceAdapters(
            [product, product],
            dtype=dtype,
            capacity=8,
            max_rank=rank,
            parts=[(4096, 1024, 1024)],
            device=device,
        )
        for rows in sizes:
            x, y = (torch.empty(rows, n, dtype=dtype, device=device) for n in (4096, 6144))
            slots = torch.empty(rows, dtype=torch.int32, device=device)
            adapters.add(0, product, x, y, slots)

    return compile_launches(launch, arch=arch)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("rank", [8, 64, 256])
def test_the_shapes_of_models_fit(rank: int, arch: int) -> None:
    reports = compiled(7, rank=rank, arch=arch)
    assert len(reports) == 4
    for report in reports:
        report.assert_fits(arch)
    shrink = reports[0]
    assert shrink.mma + shrink.wgmma + shrink.tcgen05 > 0, f"{shrink} uses no tensor cores"


def test_every_number_of_rows_runs_the_same_code() -> None:
    reports = compiled(1, 2, 16, 129)
    assert len({id(report) for report in reports}) == len({id(report) for report in reports[:4]})


def test_float32_fits() -> None:
    for report in compiled(7, dtype=torch.float32):
        report.assert_fits(90)
