"""Quantizing while loading: a checkpoint of floats becomes int8, int4 or fp8 in memory. Each piece of rows is
rounded as it is read, so the floats are never in memory as a whole.

The head is int8 with each of them, and with a tied head the embedding: it is much of a small model, and
int4 there costs a lot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.errors import CheckpointError
from quire.kernels.codes import CodeFormat
from quire.quantization.base import LinearShape, TensorWant
from quire.quantization.matrix import MatrixReader, QuantizedMethod

if TYPE_CHECKING:
    import torch

    from quire.kernels.base import CodesProduct

GROUPS = (128, 64, 32)
"""Of int4: the first that divides the inputs; else the last, with a smaller group at the end."""
HEADS = ("lm_head", "model.embed_tokens")


@dataclass(frozen=True, slots=True)
class OnlineMatrix:
    """Stored as floats, in memory as `label` says."""

    label: str
    """ "int8": a scale for each output, as "fp8". "int4": for each group. All symmetric."""

    def memory(self, shape: LinearShape) -> CodeFormat:
        if self.label == "fp8":
            return CodeFormat(bits=8, float8=True)
        if self.label == "int8":
            return CodeFormat(bits=8, zero=128)
        inputs = shape.in_features
        group = next((group for group in GROUPS if inputs % group == 0), GROUPS[-1])
        return CodeFormat(bits=4, group=group, scale="bfloat16", zero=8)

    def wants(self, shape: LinearShape) -> Sequence[TensorWant]:
        (part,) = shape.parts
        stored = (part.out_features, shape.in_features)
        return [TensorWant("weight", stored, taken=(part.outputs,))]

    def reader(self, shape: LinearShape, product: CodesProduct) -> MatrixReader:
        return _Reader(shape.parts[0].name, self.memory(shape), product)


INT8, INT4, FP8 = OnlineMatrix("int8"), OnlineMatrix("int4"), OnlineMatrix("fp8")
ONLINE = {"int8": INT8, "int4": INT4, "fp8_per_channel": FP8}
"""Name of `--quantization` -> the matrices of the layers."""


@dataclass(frozen=True, slots=True)
class Online(QuantizedMethod):
    matrix: OnlineMatrix

    def format_of(self, name: str) -> OnlineMatrix:
        return INT8 if name in HEADS else self.matrix


def read_online(name: str) -> Online:
    """name: of `ONLINE`."""
    return Online(ONLINE[name])


class _Reader:
    def __init__(self, name: str, form: CodeFormat, product: CodesProduct) -> None:
        self._name = name
        self._form = form
        self._product = product

    def load(self, suffix: str, first: int, rows: torch.Tensor) -> None:
        from quire.quantization.rounding import quantize

        codes, scales = quantize(rows, self._form)
        if not scales.scale.isfinite().all():
            raise CheckpointError(
                f"tensor {self._name}.{suffix} has a weight that is NaN or infinite; it cannot be quantized: "
                "download it again, or load it without --quantization"
            )
        self._product.fill_codes(first, 0, codes)
        self._product.fill_scales(first, scales)

    def finish(self) -> None:
        pass
