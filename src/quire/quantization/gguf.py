"""The block types of GGUF files: q4_0, q4_K and the others.

A row is a sequence of blocks of 32 or 256 values. A block holds codes of 2 to 8 bits, a float16 scale, and in
most types a minimum. The K types have groups of 16 or 32 values in their blocks, whose small integer scales
are multiplied by the block's (`CodeFormat.super_groups`).

Layouts: ggml-common.h and `gguf.quants` (https://github.com/ggml-org/ggml). The float32 values are equal to
those of ggml, bit for bit. Rows arrive as bytes; each piece is translated by a few operations of PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.dtypes import FLOATS
from quire.errors import CheckpointError, UnsupportedModelError
from quire.kernels.codes import CodeFormat
from quire.quantization.base import LinearShape, TensorWant
from quire.quantization.gguf_types import BLOCKS
from quire.quantization.matrix import QuantizedMethod
from quire.quantization.stored import E2M1

if TYPE_CHECKING:
    import torch

    from quire.kernels.base import CodesProduct


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

FORMATS: Mapping[str, CodeFormat] = {
    "q4_0": CodeFormat(bits=4, group=32, scale="float16", zero=8),
    "q4_1": CodeFormat(bits=4, group=32, scale="float16", offset="minimum"),
    "q5_0": CodeFormat(bits=8, group=32, scale="float16", zero=16),
    "q5_1": CodeFormat(bits=8, group=32, scale="float16", offset="minimum"),
    "q8_0": CodeFormat(bits=8, group=32, scale="float16", zero=128),
    "q2_K": CodeFormat(bits=4, group=16, scale="int8", super_groups=16, offset="minimum"),
    "q3_K": CodeFormat(bits=4, group=16, scale="int8", super_groups=16, zero=4),
    "q4_K": CodeFormat(bits=4, group=32, scale="int8", super_groups=8, offset="minimum"),
    "q5_K": CodeFormat(bits=8, group=32, scale="int8", super_groups=8, offset="minimum"),
    "q6_K": CodeFormat(bits=8, group=16, scale="int8", super_groups=16, zero=32),
    "iq4_nl": CodeFormat(bits=4, group=32, scale="float16", values=_IQ4),
    "iq4_xs": CodeFormat(bits=4, group=32, scale="int8", super_groups=8, values=_IQ4),
    "mxfp4": CodeFormat(bits=4, group=32, scale="bfloat16", values=E2M1),
}
"""What Quire computes with, in memory: 4 bits for codes of 2, 3 and 4, and 8 for codes of 5, 6 and 8."""


def read_config(config: Mapping[str, object]) -> Gguf:
    """config: `tensors` has the type and shape of every tensor, as `quire.weights.gguf` makes it.

    Raises `UnsupportedModelError` for a matrix of a type that is not implemented.
    """
    types = {}
    tensors = config.get("tensors")
    for name, (kind, _) in (tensors if isinstance(tensors, dict) else {}).items():
        if kind not in FORMATS and kind not in FLOATS:
            raise UnsupportedModelError(
                f"tensor {name} is of GGUF's type {kind}, which is not supported; use a file whose types are "
                f"among {', '.join(FORMATS)}, f16, bf16 and f32 (Q4_K_M, for example)"
            )
        types[name.removesuffix(".weight")] = kind
    return Gguf(types)


@dataclass(frozen=True, slots=True)
class Gguf(QuantizedMethod):
    types: Mapping[str, str]
    """Name of a matrix, without `.weight` -> its type. One that is missing is not quantized."""

    def format_of(self, name: str) -> GgufMatrix | None:
        kind = self.types.get(name, "")
        return GgufMatrix(kind) if kind in FORMATS else None


@dataclass(frozen=True, slots=True)
class GgufMatrix:
    kind: str
    """A key of `FORMATS`."""

    @property
    def label(self) -> str:
        return self.kind

    def memory(self, shape: LinearShape) -> CodeFormat:
        return FORMATS[self.kind]

    def wants(self, shape: LinearShape) -> Sequence[TensorWant]:
        (part,) = shape.parts
        elements, size = BLOCKS[self.kind]
        if shape.in_features % elements:
            raise UnsupportedModelError(
                f"{part.name} has {shape.in_features} inputs, no multiple of the {elements} of a block of "
                f"{self.kind}; use another type"
            )
        stored = (part.out_features, shape.in_features // elements * size)
        return [TensorWant("weight", stored, (self.kind,), (part.outputs,))]

    def reader(self, shape: LinearShape, product: CodesProduct) -> GgufReader:
        return GgufReader(self.kind, shape.parts[0].name, product)


class GgufReader:
    def __init__(self, kind: str, name: str, product: CodesProduct) -> None:
        from quire.quantization.gguf_blocks import PACKED, read_scales

        self._packed = PACKED[kind]
        self._read_scales = read_scales
        self._kind = kind
        self._name = name
        self._product = product

    def load(self, suffix: str, first: int, rows: torch.Tensor) -> None:
        scales = self._read_scales(self._kind, rows)
        for each in (scales.scale, scales.offset, scales.super_scale, scales.super_minimum):
            if each is not None and each.is_floating_point() and not each.isfinite().all():
                raise CheckpointError(
                    f"tensor {self._name}.weight has a scale that is infinite or not a number, in rows "
                    f"{first} to {first + len(rows) - 1}; the file is damaged: download it again"
                )
        self._product.fill_packed(first, self._packed, rows)
        self._product.fill_scales(first, scales)

    def finish(self) -> None:
        """Nothing is kept."""
