"""The block types of GGUF: values bit-equal to ggml's, products of them, errors, sizes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from quire.errors import CheckpointError, UnsupportedModelError
from quire.kernels.base import Kernels
from quire.kernels.select import create_kernels
from quire.quantization import read_method
from quire.quantization.base import LinearPart, LinearShape
from quire.quantization.gguf import FORMATS, Gguf
from quire.quantization.gguf_types import BLOCKS
from tests.quantization.gguf_rows import HALVES, SHAPES, raw_rows, values

GOLDEN = json.loads((Path(__file__).parents[1] / "data/quantized/gguf.json").read_text())
"""By data/quantized/make_gguf.py, from two other readers."""


@pytest.fixture(scope="module", params=["auto", "reference"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return create_kernels(request.param)


@pytest.mark.parametrize(("rows", "blocks"), SHAPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_values_are_ggmls_bit_for_bit(kind: str, rows: int, blocks: int) -> None:
    got = values(kind, torch.from_numpy(raw_rows(kind, rows, blocks))).numpy()
    assert hashlib.sha256(got.tobytes()).hexdigest() == GOLDEN[f"{kind} {rows} {blocks}"]


@pytest.mark.parametrize("kind", FORMATS)
def test_values_are_those_of_the_gguf_package(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    raw = raw_rows(kind, 7, 5)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind.upper()])
    got = values(kind, torch.from_numpy(raw)).numpy()
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))


def linear(kind: str, rows: int, blocks: int) -> LinearShape:
    part = LinearPart("layer.proj", rows)
    return LinearShape(BLOCKS[kind].elements * blocks, (part,), bias=False)


def product(kind: str, raw: torch.Tensor, shape: LinearShape, kernels: Kernels, step: int = 64):
    """Filled with the rows that its state wants, `step` at a time and in reverse."""
    method = Gguf({"layer.proj": kind})
    state = method.create(shape, dtype=torch.float32, kernels=kernels)
    (want,) = state.wants(shape.parts[0])
    assert want.shape == tuple(raw.shape) and want.dtypes == (kind,)
    assert want.taken is not None
    (rows,) = want.taken
    mine = raw[rows.start : rows.stop]
    for first in reversed(range(0, len(mine), step)):
        state.load(0, "weight", first, mine[first : first + step].contiguous())
    return state.finish()


@pytest.mark.parametrize(("rows", "blocks"), [*SHAPES, (130, 1)])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_product_has_these_rows(kind: str, rows: int, blocks: int, kernels: Kernels) -> None:
    raw = torch.from_numpy(raw_rows(kind, rows, blocks))
    filled = product(kind, raw, linear(kind, rows, blocks), kernels)
    ids = torch.tensor([rows - 1, 0, rows // 2])
    assert torch.equal(filled.rows(ids), values(kind, raw)[ids])
    x = torch.randn(3, raw.shape[1] // BLOCKS[kind].bytes * BLOCKS[kind].elements)
    expected = x.double() @ values(kind, raw).double().T
    error = (filled(x).double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-3


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_may_be_sharded(kind: str, kernels: Kernels) -> None:
    """With the bits of the whole, also in products."""
    raw, inputs = torch.from_numpy(raw_rows(kind, 150, 2)), 2 * BLOCKS[kind].elements
    whole = product(kind, raw, linear(kind, 150, 2), kernels)
    x = torch.randn(3, inputs)
    for outputs in (range(64), range(64, 150), range(7, 90)):
        part = LinearPart("layer.proj", 150, outputs)
        filled = product(kind, raw, LinearShape(inputs, (part,), bias=False), kernels)
        ids = torch.arange(len(outputs))
        assert torch.equal(filled.rows(ids), values(kind, raw)[outputs.start : outputs.stop])
        assert torch.equal(filled(x), whole(x)[:, outputs.start : outputs.stop])


def test_rows_are_whole_blocks(kernels: Kernels) -> None:
    raw = torch.from_numpy(raw_rows("q4_K", 5, 4))
    shape = LinearShape(1000, (LinearPart("layer.proj", 5),), bias=False)
    with pytest.raises(UnsupportedModelError, match=r"1000 inputs, no multiple of the 256.*q4_K"):
        product("q4_K", raw, shape, kernels)


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01])
@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "mxfp4"])
def test_a_scale_that_is_no_number_is_an_error(kind: str, bits: int, kernels: Kernels) -> None:
    raw = torch.from_numpy(raw_rows(kind, 5, 2))
    for at in HALVES.get(kind, (0,)):
        damaged = raw.clone()
        at += BLOCKS[kind].bytes  # in the second block
        damaged[3, at : at + 2] = torch.tensor([bits & 255, bits >> 8], dtype=torch.uint8)
        with pytest.raises(CheckpointError, match=r"layer\.proj\.weight has a scale.*rows 0 to 4"):
            product(kind, damaged, linear(kind, 5, 2), kernels)


def test_a_config_says_which_matrices_are_quantized() -> None:
    tensors = {
        "a.weight": ("q4_K", (4, 144)),
        "b.weight": ("float16", (4, 256)),
        "b.bias": ("float32", (4,)),
    }
    method = read_method({"quant_method": "gguf", "tensors": tensors})
    assert isinstance(method, Gguf)
    form = method.format_of("a")
    assert form is not None and form.label == "q4_K"
    assert method.format_of("b") is None and method.format_of("c") is None
    with pytest.raises(UnsupportedModelError, match=r"tensor b\.weight is of GGUF's type iq1_s"):
        read_method({"quant_method": "gguf", "tensors": {"b.weight": ("iq1_s", (4, 50))}})


@pytest.mark.parametrize("kind", FORMATS)
def test_memory_is_near_the_files(kind: str) -> None:
    """4 bits for codes of 2, 3 and 4, and 8 for codes of 5, 6 and 8; and integer scales take whole bytes."""
    shape = linear(kind, 128, 4)
    stored = 128 * 4 * BLOCKS[kind].bytes
    bits = {"q2_K": 2, "q3_K": 3, "q5_0": 5, "q5_1": 5, "q5_K": 5, "q6_K": 6}
    form = FORMATS[kind]
    wider = 128 * shape.in_features * (form.bits - bits.get(kind, form.bits)) // 8
    held = Gguf({"layer.proj": kind}).weight_bytes(shape, 2)
    assert stored <= held <= (1.11 if kind == "q2_K" else 1.06) * (stored + wider)
