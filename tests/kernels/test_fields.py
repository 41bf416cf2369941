"""Codes packed as fields of bits: what they mean, and that C fills a product as PyTorch does."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.checks import KernelArgumentError
from quire.kernels.codes import CodeFormat
from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.codes import PanelCodes, ReferenceCodes
from quire.kernels.cpu.library import load_library
from quire.kernels.dequantize import Scales
from quire.kernels.fields import BitField, PackedCodes, spread
from tests.kernels.cases import generator

CASES = {
    "neighbours": PackedCodes(8, 5, [BitField(1, 1, 4)]),
    "halves": PackedCodes(32, 18, [BitField(2, 16, 4)]),
    "two runs": PackedCodes(256, 144, [BitField(16, 32, 4)]),
    "quarters": PackedCodes(256, 84, [BitField(16, 32, 2)]),
    "a bit from below": PackedCodes(32, 24, [BitField(8, 16, 4), BitField(4, 1, 1, up=4)]),
    "a bit of runs": PackedCodes(256, 176, [BitField(48, 32, 4), BitField(16, 32, 1, up=4)]),
    "two bits of runs": PackedCodes(256, 210, [BitField(0, 64, 4), BitField(128, 32, 2, up=4)]),
    "bytes": PackedCodes(32, 34, [BitField(2, 32, 8)], flip=128),
    "short runs": PackedCodes(24, 12, [BitField(0, 3, 2), BitField(6, 3, 2, up=2)]),
}


def one_by_one(packed: PackedCodes, rows: torch.Tensor) -> torch.Tensor:
    """As the docstring says it."""
    codes = []
    for row in rows.tolist():
        line = []
        for start in range(0, len(row), packed.bytes):
            for element in range(packed.values):
                code = 0
                for offset, run, bits, up in packed.fields:
                    in_run = run * 8 // bits
                    at, inside = divmod(element, in_run)
                    byte = row[start + offset + at * run + inside % run]
                    code |= (byte >> inside // run * bits & (1 << bits) - 1) << up
                line.append(code ^ packed.flip)
        codes.append(line)
    return torch.tensor(codes, dtype=torch.uint8)


def random_rows(packed: PackedCodes, rows: int, blocks: int) -> torch.Tensor:
    shape = (rows, blocks * packed.bytes)
    return torch.randint(256, shape, generator=generator(rows)).to(torch.uint8)


@pytest.mark.parametrize("name", CASES)
def test_spread(name: str) -> None:
    packed = CASES[name]
    rows = random_rows(packed, 3, 2)
    assert torch.equal(spread(packed, rows), one_by_one(packed, rows))


@pytest.mark.parametrize("product", [PanelCodes, ReferenceCodes])
@pytest.mark.parametrize(("rows", "first", "blocks"), [(70, 0, 2), (70, 5, 1), (1, 69, 3)])
@pytest.mark.parametrize("name", CASES)
def test_a_product_is_filled(
    name: str, rows: int, first: int, blocks: int, product: type[PanelCodes]
) -> None:
    if product is PanelCodes:
        try:
            load_library()
        except BuildError as error:
            pytest.skip(str(error))
    packed = CASES[name]
    sizes = {"in_features": blocks * packed.values, "out_features": first + rows, "bias": False}
    filled = product(CodeFormat(bits=8), dtype=torch.float32, **sizes)
    filled.fill_scales(0, Scales(torch.ones(first + rows, 1)))
    given = random_rows(packed, rows, blocks)
    filled.fill_packed(first, packed, given)
    got = filled.rows(torch.arange(first + rows))
    assert torch.equal(got[first:], spread(packed, given).float())
    assert not got[:first].any()
    if product is PanelCodes:
        for row, packed_rows in ((first + 1, given), (first, given[:, 1:]), (-1, given)):
            with pytest.raises(KernelArgumentError):
                filled.fill_packed(row, packed, packed_rows)
        beyond = packed._replace(fields=[BitField(packed.bytes, 1, 4)])
        with pytest.raises(KernelArgumentError):
            filled.fill_packed(first, beyond, given)
