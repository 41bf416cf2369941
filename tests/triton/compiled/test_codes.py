"""What products over codes compile to at shapes of models, and that the number of rows compiles nothing."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.codes import CodeFormat
from quire.kernels.triton.codes import MANY_ROWS, TritonCodes
from tests.kernels.test_codes_cpu import IQ4_NL
from tests.triton.harness import ARCHES, Report, compile_launches

FORMS = {
    "int4 g128": CodeFormat(bits=4, group=128, scale="bfloat16", offset="zero"),
    "q4_K": CodeFormat(bits=4, group=32, scale="int8", super_groups=8, offset="minimum"),
    "iq4_nl": CodeFormat(bits=4, group=32, scale="float16", values=IQ4_NL),
    "int8 rows": CodeFormat(bits=8, zero=128),
    "fp8 g128": CodeFormat(bits=8, group=128, float8=True),
}


def compiled(
    name: str, *sizes: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, arch: int = 90
) -> list[Report]:
    def launch() -> None:
        product = TritonCodes(
            FORMS[name], k, n, dtype, bias=True, device=torch.device("meta"), invariant=True
        )
        for rows in sizes:
            product._multiply(torch.empty(rows, k, dtype=dtype, device="meta"))

    return compile_launches(launch, arch=arch)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", FORMS)
def test_the_shapes_of_models_fit(name: str, arch: int) -> None:
    multiply, add = compiled(name, 7, n=4096, k=4096, arch=arch)
    multiply.assert_fits(arch)
    add.assert_fits(arch)
    assert multiply.mma + multiply.wgmma + multiply.tcgen05 > 0, f"{multiply} uses no tensor cores"
    assert multiply.cp_async > 0, f"{multiply} does not load ahead"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_fit(dtype: torch.dtype) -> None:
    for report in compiled("int4 g128", 7, n=1024, k=1024, dtype=dtype):
        report.assert_fits(90)


def test_every_number_of_rows_runs_the_same_code() -> None:
    reports = compiled("int4 g128", 1, 2, 16, 129, n=1024, k=1024)
    assert len(reports) == 8 and len({id(report) for report in reports}) == 2


def test_dequantizing_fits() -> None:
    def launch() -> None:
        form = FORMS["q4_K"]
        product = TritonCodes(
            form,
            4096,
            4096,
            torch.bfloat16,
            bias=False,
            device=torch.device("meta"),
            invariant=False,
        )
        product(torch.empty(MANY_ROWS + 1, 4096, dtype=torch.bfloat16, device="meta"))
        product.rows(torch.empty(7, dtype=torch.int64, device="meta"))

    reports = compile_launches(launch)
    assert len(reports) == 2
    for report in reports:
        report.assert_fits(90)
