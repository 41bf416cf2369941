"""Linear layers on the CPU: weights packed once, and the same bits for a row whatever the batch.

Two backends; `PackedLinear` takes the first that works here:

1. Our own C kernel (cpu/linear.c), invariant by construction, in all three dtypes.
2. `F.linear` on sixteen padded rows at a time: one shape, so one path. Where no compiler is found.

PyTorch's oneDNN served bfloat16 and float32 before. Measured side by side, our kernel reads weights at
about twice oneDNN's rate when rows are few and is as fast when they are many, and it needs no
measurement to promise that a row's bits stay the same (docs/adr/0013).
"""

from __future__ import annotations

from ctypes import byref
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.kernels import checks
from quire.kernels.memory import large_zeros

_PANEL = 64  # output columns packed together; PANEL in cpu/linear.c
_PLAIN_SIZE = 16  # F.linear gets exactly this many rows, and multiples of it of the rest


class _Backend(Protocol):
    def fill(self, first: int, weight: Tensor) -> None: ...

    def multiply(self, x: Tensor) -> Tensor: ...

    def rows(self, ids: Tensor) -> Tensor: ...


class PackedLinear:
    """`x @ weight.T + bias`, the weight held only in packed form.

    Row i of the result is the same bits for every number of rows and every thread count.
    """

    __slots__ = ("backend", "bias", "dtype", "in_features", "out_features")

    def __init__(
        self, *, in_features: int, out_features: int, dtype: torch.dtype, bias: bool = False
    ) -> None:
        """All zeros until `fill`ed."""
        checks.require(dtype in checks.FLOATS, f"dtype {dtype} is not one of {checks.FLOATS}")
        checks.require(
            in_features > 0 and out_features > 0, f"empty: [{out_features}, {in_features}]"
        )
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.bias = torch.zeros(out_features, dtype=dtype) if bias else None
        self.backend = _create_backend(in_features, out_features, dtype, self.bias)

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """weight: [out_features, in_features]; bias: [out_features]. Copies both."""
        checks.check_dims("weight", weight, 2)
        packed = cls(
            in_features=weight.shape[1],
            out_features=weight.shape[0],
            dtype=weight.dtype,
            bias=bias is not None,
        )
        packed.fill(0, weight)
        if bias is not None:
            packed.fill_bias(0, bias)
        return packed

    def fill(self, first: int, weight: Tensor) -> None:
        """Rows [first, first + len(weight)) of the matrix. weight: [rows, in_features], dense.

        In this thread alone: a loader calls it from several, each with rows of its own.
        """
        checks.check_dims("weight", weight, 2)
        rows = weight.shape[0]
        checks.check_dense("weight", weight, self.dtype, (rows, self.in_features))
        checks.require(
            first >= 0 and first + rows <= self.out_features,
            f"rows {first} to {first + rows} are outside [0, {self.out_features})",
        )
        self.backend.fill(first, weight.detach())

    def fill_bias(self, first: int, bias: Tensor) -> None:
        assert self.bias is not None, "made without bias"
        checks.check_dense("bias", bias, self.dtype, (bias.numel(),))
        checks.require(
            first >= 0 and first + bias.numel() <= self.out_features,
            f"{bias.numel()} biases from {first} do not fit {self.out_features}",
        )
        self.bias[first : first + bias.numel()] = bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, in_features], M >= 0. Returns [M, out_features]."""
        rows = x.shape[0]
        checks.check_rows("x", x, self.dtype, (rows, self.in_features))
        if rows == 0:
            return x.new_empty((0, self.out_features))
        return self.backend.multiply(x)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, as an embedding looks them up. ids: [T] int64. [T, in_features]

        Raises `KernelArgumentError` for an id outside [0, out_features).
        """
        checks.check_dense("ids", ids, torch.int64, (ids.numel(),))
        return self.backend.rows(ids)


def _create_backend(
    in_features: int, out_features: int, dtype: torch.dtype, bias: Tensor | None
) -> _Backend:
    from quire.kernels.cpu.build import BuildError

    try:
        return NativeLinear(in_features, out_features, dtype, bias)
    except BuildError:
        return PlainLinear(in_features, out_features, dtype, bias)


class NativeLinear:
    """Panels of 64 output columns: [ceil(N / 64), ceil(K / pair), 64, pair], zeros around the edges.

    A pair is two elements along K in bfloat16 (what the processor's dot product eats), else one.
    Raises `BuildError` with no compiler.
    """

    __slots__ = ("_bias", "_lib", "panels", "struct")

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, bias: Tensor | None
    ) -> None:
        from quire.kernels.cpu.library import DTYPES, LinearWeight, load_library

        self._lib = load_library()
        pair = _pair(dtype)
        shape = (-(-out_features // _PANEL), -(-in_features // pair), _PANEL, pair)
        self.panels = large_zeros(shape, dtype)
        self._bias = bias  # the struct has only its address
        self.struct = LinearWeight(
            panels=self.panels.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            n=out_features,
            k=in_features,
            dtype=DTYPES[dtype],
        )

    def fill(self, first: int, weight: Tensor) -> None:
        self._lib.quire_pack_linear(
            weight.data_ptr(),
            first,
            weight.shape[0],
            self.struct.k,
            weight.element_size(),
            _pair(weight.dtype),
            self.panels.data_ptr(),
            1,
        )

    def multiply(self, x: Tensor) -> Tensor:
        out = x.new_empty((x.shape[0], self.struct.n))
        code = self._lib.quire_linear(
            byref(self.struct),
            x.data_ptr(),
            x.stride(0),
            out.data_ptr(),
            out.stride(0),
            x.shape[0],
            0,
            torch.get_num_threads(),
        )
        if code:
            raise MemoryError("linear could not allocate its scratch memory")
        return out

    def rows(self, ids: Tensor) -> Tensor:
        out = self.panels.new_empty((ids.shape[0], self.struct.k))
        code = self._lib.quire_gather_rows(
            byref(self.struct), ids.data_ptr(), ids.shape[0], out.data_ptr()
        )
        checks.require(code == 0, f"a row id is outside [0, {self.struct.n})")
        return out


def _pair(dtype: torch.dtype) -> int:
    return 2 if dtype is torch.bfloat16 else 1


class PlainLinear:
    """All three extents are padded to multiples of 16: small odd ones take paths of their own."""

    __slots__ = ("_bias", "_in_features", "_out_features", "_weight")

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, bias: Tensor | None
    ) -> None:
        self._in_features, self._out_features = in_features, out_features
        self._bias = bias
        padded = [size + -size % _PLAIN_SIZE for size in (out_features, in_features)]
        self._weight = torch.zeros(padded, dtype=dtype)

    def fill(self, first: int, weight: Tensor) -> None:
        self._weight[first : first + weight.shape[0], : self._in_features] = weight

    def multiply(self, x: Tensor) -> Tensor:
        rows, in_features = x.shape
        padded = F.pad(x, (0, self._weight.shape[1] - in_features, 0, -rows % _PLAIN_SIZE))
        bias = self._bias
        if bias is not None:
            bias = F.pad(bias, (0, self._weight.shape[0] - self._out_features))
        blocks = [F.linear(part, self._weight, bias) for part in padded.split(_PLAIN_SIZE)]
        return torch.cat(blocks)[:rows, : self._out_features].contiguous()

    def rows(self, ids: Tensor) -> Tensor:
        inside = bool(((ids >= 0) & (ids < self._out_features)).all())
        checks.require(inside, f"a row id is outside [0, {self._out_features})")
        return self._weight[ids, : self._in_features].contiguous()
