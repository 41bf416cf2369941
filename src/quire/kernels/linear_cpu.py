"""Linear layers on the CPU: weights packed once, and the same bits for a row whatever the batch.

Three backends; `PackedLinear.pack` takes the first that serves the dtype on this machine:

1. oneDNN with prepacked weights, through the two private operators that Inductor emits. Float32 and
   bfloat16.
2. Our own C kernel (cpu/linear.c), invariant by construction. Float16, and whatever oneDNN refuses.
3. `F.linear` on sixteen padded rows at a time: one shape, so one path. Where no compiler is found.

What was measured (torch 2.13, oneDNN 3.12, Zen 4; K, N from 8 to 4096, odd sizes included; M in 1..64,
100, 128, 200, 256, 511; 1 and 2 threads; each chunk of M rows against the same rows of M = 512):

- oneDNN prepacked differs only at M = 1, for K >= 2048 (bfloat16: 0.02 % of the values, float32:
  nearly half), never for M >= 2 and not with the number of threads. So a lone row goes in twice.
- Plain `F.linear` in float32 differs at M = 1, 2, 3, and with two threads also at 5, 6, 7 and 9
  (a thread's share of the rows counts); in bfloat16 at M = 1. Where neither K nor N is a multiple
  of 16 even a row's place among sixteen counts (float32), so the plain backend pads both.
- Plain `F.linear` in float16 is invariant but runs at 20 GFLOP/s a core, and the prepacked operator
  refuses float16 on CPUs without fp16 instructions. The C kernel runs at 87 (and 0.5 ms, not 4.6,
  for one row of 3072 x 1024).
- One core, M = 256, K = 3072, N = 1024, GFLOP/s: oneDNN 202 bfloat16 and 107 float32; C kernel 77 and
  105.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.kernels import checks

_PANEL = 32  # output columns packed together; PANEL in cpu/linear.c
_BATCH_HINT = 64  # oneDNN chooses its blocking for about this many rows
_PLAIN_SIZE = 16  # F.linear gets exactly this many rows, and multiples of it of the rest


class _Backend(Protocol):
    def __call__(self, x: Tensor) -> Tensor: ...


class PackedLinear:
    """`x @ weight.T + bias`, the weight held only in packed form.

    Row i of the result is the same bits for every number of rows and every thread count.
    """

    __slots__ = ("_backend", "backend_name", "dtype", "in_features", "out_features")

    def __init__(
        self, backend: _Backend, *, in_features: int, out_features: int, dtype: torch.dtype
    ) -> None:
        self._backend = backend
        self.backend_name = type(backend).__name__
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """weight: [out_features, in_features]; bias: [out_features], same dtype. The caller gives
        both up: nothing here keeps a reference to `weight` once packed (the plain backend excepted).
        """
        checks.check_float("weight", weight)
        checks.check_dims("weight", weight, 2)
        checks.check_dense("weight", weight, weight.dtype, weight.shape)
        out_features, in_features = weight.shape
        checks.require(weight.numel() > 0, f"weight is empty: {tuple(weight.shape)}")
        if bias is not None:
            checks.check_dense("bias", bias, weight.dtype, (out_features,))
        return cls(
            _choose_backend(weight.detach(), None if bias is None else bias.detach()),
            in_features=in_features,
            out_features=out_features,
            dtype=weight.dtype,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, in_features], M >= 0. Returns [M, out_features]."""
        rows = x.shape[0]
        checks.check_rows("x", x, self.dtype, (rows, self.in_features))
        if rows == 0:
            return x.new_empty((0, self.out_features))
        return self._backend(x)


def _choose_backend(weight: Tensor, bias: Tensor | None) -> _Backend:
    if (packed := _onednn_pack(weight)) is not None:
        return OneDnnLinear(packed, bias)
    from quire.kernels.cpu.build import BuildError

    try:
        return NativeLinear(weight, bias)
    except BuildError:
        return PlainLinear(weight, bias)


def _onednn_pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's blocked layout, or None where oneDNN does not serve it."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_HINT)
    except (RuntimeError, AttributeError):  # dtype unsupported here, or the private name has gone
        return None


def _onednn_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class OneDnnLinear:
    __slots__ = ("_bias", "_packed")

    def __init__(self, packed: Tensor, bias: Tensor | None) -> None:
        self._packed = packed
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return _onednn_linear(torch.cat((x, x)), self._packed, self._bias)[:1]
        return _onednn_linear(x.contiguous(), self._packed, self._bias)


class NativeLinear:
    """Panels of 32 output columns: [ceil(N / 32), K, 32]. Raises `BuildError` with no compiler."""

    __slots__ = ("_bias", "_lib", "_out_features", "_panels")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        from quire.kernels.cpu.library import load_library

        self._lib = load_library()
        self._out_features, in_features = weight.shape
        padded = F.pad(weight, (0, 0, 0, -self._out_features % _PANEL))
        self._panels = padded.view(-1, _PANEL, in_features).transpose(1, 2).contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        from quire.kernels.cpu.library import DTYPES

        out = x.new_empty((x.shape[0], self._out_features))
        code = self._lib.quire_linear(
            x.data_ptr(),
            x.stride(0),
            self._panels.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            self._out_features,
            x.shape[1],
            DTYPES[x.dtype],
            torch.get_num_threads(),
        )
        if code:
            raise MemoryError("linear could not allocate its scratch memory")
        return out


class PlainLinear:
    """All three extents are padded to multiples of 16: small odd ones take paths of their own."""

    __slots__ = ("_bias", "_out_features", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._out_features, in_features = weight.shape
        more_out, more_in = -self._out_features % _PLAIN_SIZE, -in_features % _PLAIN_SIZE
        self._weight = F.pad(weight, (0, more_in, 0, more_out))
        self._bias = None if bias is None else F.pad(bias, (0, more_out))

    def __call__(self, x: Tensor) -> Tensor:
        rows, in_features = x.shape
        padded = F.pad(x, (0, self._weight.shape[1] - in_features, 0, -rows % _PLAIN_SIZE))
        blocks = [F.linear(part, self._weight, self._bias) for part in padded.split(_PLAIN_SIZE)]
        return torch.cat(blocks)[:rows, : self._out_features].contiguous()
