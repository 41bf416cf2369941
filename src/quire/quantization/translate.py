"""Translates the tensors of a `StoredMatrix` to codes and scales, piece by piece as they are read."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.kernels.base import CodesProduct
from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.library import load_library
from quire.kernels.dequantize import Scales
from quire.quantization.base import LinearShape
from quire.quantization.stored import Axis, StoredMatrix, StoredTensor


class Reader:
    """`MatrixReader`. Codes are passed on at once; the small tensors are kept until all are here."""

    def __init__(self, stored: StoredMatrix, shape: LinearShape, product: CodesProduct) -> None:
        self._stored = stored
        self._shape = shape
        self._name = shape.parts[0].name
        self._outputs = shape.parts[0].outputs
        self._product = product
        self._lock = threading.Lock()
        self._kept: dict[str, list[tuple[int, Tensor]]] = {}
        # A code of 3 bits may begin in one word of its column and end in the next one.
        self._gathered = stored.packing == "columns" and 32 % stored.bits != 0

    def load(self, suffix: str, first: int, rows: Tensor) -> None:
        if suffix != self._stored.codes.suffix:
            with self._lock:
                self._kept.setdefault(suffix, []).append((first, rows.clone()))
        elif self._gathered:
            self._gather(first, rows)
        else:
            self._fill(first, rows)

    def _gather(self, first: int, rows: Tensor) -> None:
        suffix, total = (
            self._stored.codes.suffix,
            -(-self._shape.in_features * self._stored.bits // 32),
        )
        with self._lock:
            pieces = self._kept.setdefault(suffix, [])
            pieces.append((first, rows.clone()))
            if sum(len(piece) for _, piece in pieces) < total:
                return
        self._fill(0, self._take(suffix))

    def _fill(self, first: int, rows: Tensor) -> None:
        stored, inputs = self._stored, self._shape.in_features
        fill = self._product.fill_codes
        if stored.packing == "awq":
            fill(0, first, self._own(unpack(rows, 4, awq=True), stored.codes.axes[1]).T)
        elif stored.packing == "columns":
            column = first * 32 // stored.bits
            fill(0, column, unpack(rows.T.contiguous(), stored.bits)[:, : inputs - column])
        elif stored.packing == "rows":
            fill(first, 0, unpack(rows, stored.bits)[:, :inputs])
        elif stored.packing == "int8":
            fill(first, 0, rows.view(torch.uint8) ^ 128)
        else:
            fill(first, 0, rows.view(torch.uint8))

    def finish(self) -> None:
        stored = self._stored
        scale = self._scale(stored.scale)
        if stored.all_scale is not None:
            scale = self._times_all(scale, stored.all_scale)
        if stored.factor != 1.0:
            scale = scale * stored.factor
        self._product.fill_scales(
            0, Scales(scale.to(getattr(torch, stored.form.scale)).contiguous(), self._zero())
        )
        if stored.group_index is not None:
            self._reorder(self._take(stored.group_index.suffix))
        if stored.shape is not None:
            self._check_shape(self._take(stored.shape.suffix))
        self._kept.clear()

    def _take(self, suffix: str) -> Tensor:
        pieces = sorted(self._kept.pop(suffix), key=lambda piece: piece[0])
        return torch.cat([rows for _, rows in pieces]) if len(pieces) > 1 else pieces[0][1]

    def _bad(self, suffix: str, problem: str, remedy: str = "") -> CheckpointError:
        remedy = remedy or "the file is damaged, or the quantization failed: get another copy"
        return CheckpointError(f"tensor {self._name}.{suffix} {problem}; {remedy}")

    def _scale(self, tensor: StoredTensor) -> Tensor:
        """[N, groups], in the dtype of the file or float32."""
        scale = self._take(tensor.suffix)
        if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
            scale = powers_of_two(scale.view(torch.uint8))
        elif scale.dtype is torch.float8_e4m3fn:
            scale = scale.float()
        if not scale.isfinite().all():
            raise self._bad(tensor.suffix, "has a scale that is infinite or not a number")
        axes = [axis for axis in tensor.axes if axis.of != "1"]
        count = len(self._outputs)
        if not axes:
            return scale.reshape(1, 1).expand(count, 1)
        if axes[0].of == "K":
            return scale.T
        if axes[0].den > 1:
            scale = self._own(scale.repeat_interleave(axes[0].den, dim=0).T, axes[0]).T
        return scale.reshape(count, -1)

    def _own(self, columns: Tensor, axis: Axis) -> Tensor:
        """Those of this matrix's outputs. columns: of outputs, from the first in `axis.holding` on."""
        first = self._outputs.start % axis.unit
        return columns[:, first : first + len(self._outputs)]

    def _times_all(self, scale: Tensor, tensor: StoredTensor) -> Tensor:
        factor = self._take(tensor.suffix).float().reshape(())
        if not factor.isfinite() or factor == 0:
            raise self._bad(tensor.suffix, f"is {float(factor)}, which is no scale")
        return scale.float() / factor if self._stored.all_divides else scale.float() * factor

    def _zero(self) -> Tensor | None:
        """[N, groups] uint8"""
        stored = self._stored
        if stored.zero is None:
            return None
        words = self._take(stored.zero.suffix)
        if words.dtype is torch.int8:
            return words.view(torch.uint8) + 128
        if stored.packing not in ("awq", "columns"):
            words = words.T.contiguous()
        zero = unpack(words, stored.bits, awq=stored.packing == "awq")
        axis = next(axis for axis in stored.zero.axes if axis.of == "N")
        zero = self._own(zero, axis).T
        return (zero + stored.zero_added & (1 << stored.bits) - 1).contiguous()

    def _reorder(self, group_index: Tensor) -> None:
        group = self._stored.form.group
        group_index = group_index.long()
        inputs = torch.arange(len(group_index))
        order = torch.argsort(group_index, stable=True)
        if not torch.equal(group_index[order], inputs // group):
            raise self._bad(
                self._stored.group_index.suffix,  # type: ignore[union-attr]
                f"does not divide the inputs into groups of {group}",
                "the file and its config are of different models, or it is damaged",
            )
        if self._stored.form.reordered:
            self._product.reorder(order)
        elif not torch.equal(order, inputs):
            raise self._bad(
                self._stored.group_index.suffix,  # type: ignore[union-attr]
                "gives inputs out of order to groups, but the config's desc_act is false",
                "set desc_act to true in the file",
            )

    def _check_shape(self, stored: Tensor) -> None:
        shape = [self._shape.parts[0].out_features, self._shape.in_features]
        if stored.tolist() != shape:
            raise self._bad(
                self._stored.shape.suffix,  # type: ignore[union-attr]
                f"is {stored.tolist()}, but config.json makes the matrix {shape}",
                "the weights and the config are of different models",
            )


def unpack(words: Tensor, bits: int, *, awq: bool = False) -> Tensor:
    """Little-endian streams of bits. words: [rows, n] integers, contiguous. [rows, codes] uint8

    awq: the low half of a word has the columns 0, 2, 4, 6 from the lowest bits on, the high half 1, 3, 5, 7.
    """
    stream = words.reshape(-1).view(torch.uint8).view(len(words), -1)
    if bits == 8:
        return stream
    try:
        library = load_library()
    except BuildError:
        return unpack_awq_in_torch(words) if awq else unpack_in_torch(stream, bits)
    rows, size = stream.shape
    codes = torch.empty(rows, size * 8 // bits, dtype=torch.uint8)
    library.quire_unpack_codes(
        stream.data_ptr(), rows, size, codes.data_ptr(), codes.shape[1], bits, awq
    )
    return codes


def unpack_in_torch(stream: Tensor, bits: int) -> Tensor:
    """stream: [rows, n] uint8, of fewer than 8 bits a code."""
    rows, size = stream.shape
    count = size * 8 // bits
    eights = -(-count // 8)  # 8 codes are `bits` bytes, and become the 8 bytes of a lane
    padded = np.zeros((rows, size + 8), np.uint8)
    padded[:, :size] = stream.numpy()
    lanes = np.ndarray((rows, eights), np.int64, padded, strides=(size + 8, bits)).copy()
    for codes, width in ((4, 32), (2, 16), (1, 8)):  # so many codes stay, as many move up
        used = codes * bits
        low, high = (
            sum(((1 << used) - 1) << at for at in range(first, 64, 2 * width))
            for first in (0, used)
        )
        moved = lanes & high
        moved <<= width - used
        lanes &= low
        lanes |= moved
    return torch.from_numpy(lanes).view(torch.uint8)[:, :count]


def unpack_awq_in_torch(words: Tensor) -> Tensor:
    """[rows, n] int32 -> [rows, 8 n] uint8."""
    pairs = torch.empty(*words.shape, 4, dtype=torch.int16)
    for i in range(4):
        pair = words >> 4 * i & 0x000F000F
        pairs[..., i] = pair | pair >> 8
    return pairs.view(torch.uint8).view(len(words), -1)


def powers_of_two(exponents: Tensor) -> Tensor:
    """E8M0: 2^(e - 127), exactly; 255 is not a number. uint8 -> float32"""
    bits = exponents.int() << 23
    bits[exponents == 0] = 1 << 22
    powers = bits.view(torch.float32)
    powers[exponents == 255] = float("nan")
    return powers
