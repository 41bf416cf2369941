"""Matrix products on the CPU: weights packed once, and the same bits for a row whatever the batch.

Two products over a matrix of floats; `dense_product` takes the first that works here:

1. `PanelProduct`: our own C kernel (linear.c), invariant by construction, in all three dtypes.
2. `ExactSumProduct`: PyTorch's product of operands whose every sum is exact, in any order. Used where
   no compiler is found.

PyTorch's oneDNN was used for bfloat16 and float32 before. In measurements, our kernel reads weights at about
twice oneDNN's rate with few rows, and is as fast with many. That a row's bits do not change follows from its
construction and needs no measurement (docs/adr/0013).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from ctypes import CDLL, byref
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quire.kernels import checks
from quire.kernels.codes import PANEL
from quire.kernels.cpu import library
from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.tiles import choose_tiles
from quire.kernels.memory import large_zeros

_EXACT_BLOCK = 1 << 17  # weights made exact at a time, for the L2 cache


@runtime_checkable
class CProduct(Protocol):
    """A product that C code can compute on its own: it has a filled `linear_weight`, in any format.

    A recorded program takes every product that has one. It must keep the product too: the struct holds
    addresses of the product's memory.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    """Of inputs and results."""
    c_weight: library.LinearWeight


class CPUProduct(ABC):
    """`x @ weight.T + bias` over a matrix of floats. All zeros until filled.

    Row i of the result is the same bits for every number of rows and every thread count. A tensor of the
    wrong dtype, shape or stride raises `KernelArgumentError` before anything is read.
    """

    __slots__ = ("bias", "dtype", "in_features", "out_features")

    def __init__(
        self, *, in_features: int, out_features: int, dtype: torch.dtype, bias: bool
    ) -> None:
        checks.require(dtype in checks.FLOATS, f"dtype {dtype} is not one of {checks.FLOATS}")
        checks.require(
            in_features > 0 and out_features > 0, f"empty: [{out_features}, {in_features}]"
        )
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.bias = torch.zeros(out_features, dtype=dtype) if bias else None

    def fill(self, first: int, weight: Tensor) -> None:
        """Rows [first, first + len(weight)) of the matrix. weight: [rows, in_features], dense; copied.

        In this thread alone: a loader calls it from several, each with rows of its own.
        """
        checks.check_dims("weight", weight, 2)
        rows = weight.shape[0]
        checks.check_dense("weight", weight, self.dtype, (rows, self.in_features))
        checks.require(
            first >= 0 and first + rows <= self.out_features,
            f"rows {first} to {first + rows} are outside [0, {self.out_features})",
        )
        self._fill(first, weight.detach())

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
        return self._multiply(x)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, as an embedding looks them up. ids: [T] int64. [T, in_features]

        Raises `KernelArgumentError` for an id outside [0, out_features).
        """
        checks.check_dense("ids", ids, torch.int64, (ids.numel(),))
        return self._rows(ids)

    @abstractmethod
    def _fill(self, first: int, weight: Tensor) -> None: ...

    @abstractmethod
    def _multiply(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _rows(self, ids: Tensor) -> Tensor: ...


def dense_product(
    *, in_features: int, out_features: int, dtype: torch.dtype, bias: bool
) -> CPUProduct:
    """`PanelProduct`, or `ExactSumProduct` where there is no compiler."""
    sizes = {"in_features": in_features, "out_features": out_features}
    try:
        return PanelProduct(**sizes, dtype=dtype, bias=bias)
    except BuildError:
        return ExactSumProduct(**sizes, dtype=dtype, bias=bias)


class PanelProduct(CPUProduct):
    """Computed by linear.c, from panels of 64 output columns: [ceil(N / 64), ceil(K / pair), 64, pair], zeros
    around the edges.

    A pair is two elements along K in bfloat16 (the operand of the processor's dot product), else one.
    """

    __slots__ = ("_lib", "_panels", "c_weight")

    def __init__(
        self, *, in_features: int, out_features: int, dtype: torch.dtype, bias: bool
    ) -> None:
        """Raises `BuildError` with no compiler."""
        self._lib = library.load_library()
        super().__init__(in_features=in_features, out_features=out_features, dtype=dtype, bias=bias)
        pair = _pair(dtype)
        shape = (-(-out_features // PANEL), -(-in_features // pair), PANEL, pair)
        self._panels = large_zeros(shape, dtype)
        self.c_weight = library.LinearWeight(
            panels=self._panels.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            n=out_features,
            k=in_features,
            dtype=library.DTYPES[dtype],
            tiles=choose_tiles().tiles,
        )

    def _fill(self, first: int, weight: Tensor) -> None:
        self._lib.quire_pack_linear(
            weight.data_ptr(),
            first,
            weight.shape[0],
            self.in_features,
            weight.element_size(),
            _pair(weight.dtype),
            self._panels.data_ptr(),
            1,
        )

    def _multiply(self, x: Tensor) -> Tensor:
        return multiply(self._lib, self.c_weight, self.out_features, x)

    def _rows(self, ids: Tensor) -> Tensor:
        return gather(self._lib, self, ids)


def multiply(
    lib: CDLL,
    weight: library.LinearWeight,
    out_features: int,
    x: Tensor,
    adapted: tuple[library.LoraRows, int] | None = None,
) -> Tensor:
    """out_features: of the whole stack. x: [M, in_features] in the weight's dtype, rows dense. adapted: the
    rows with an adapter, and the product's number for it."""
    rows, site = adapted or (None, 0)
    out = x.new_empty((x.shape[0], out_features))
    code = lib.quire_adapted_linear(
        byref(weight),
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        out.stride(0),
        x.shape[0],
        0,
        torch.get_num_threads(),
        None if rows is None else byref(rows),
        site,
    )
    if code:
        raise MemoryError("linear could not allocate its scratch memory")
    return out


def gather(lib: CDLL, product: CProduct, ids: Tensor) -> Tensor:
    """Rows of a product's matrix. Raises `KernelArgumentError` for an id outside of it."""
    out = torch.empty(ids.shape[0], product.in_features, dtype=product.dtype)
    code = lib.quire_gather_rows(
        byref(product.c_weight),
        ids.data_ptr(),
        ids.shape[0],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    checks.require(code == 0, f"a row id is outside [0, {product.out_features})")
    return out


def _pair(dtype: torch.dtype) -> int:
    return 2 if dtype is torch.bfloat16 else 1


class ExactSumProduct(CPUProduct):
    """PyTorch's product in float64, of operands rounded so that every sum is exact.

    A library may choose another blocking or another order of the sum for other numbers of rows, for a
    row's place among them, or for another processor: PyTorch's do. This changes the result only because
    sums are rounded. So each row of x and of the weight is rounded to multiples of one power of two, so
    few that any sum of products along K is below 2**53 units and exact in float64. Then every order gives
    the same bits (docs/adr/0022).

    Of the 53 bits, the length of the sum takes log2(K), and the operands share the rest: about 21 each,
    counted from the largest element of the row. x is split into two such parts, because a few activations
    can be a thousand times the others, and so is a float32 weight. The error is smaller than that of
    rounding a sum in float32.
    """

    __slots__ = ("_bits", "_parts", "_to_grid", "_weight")

    def __init__(
        self, *, in_features: int, out_features: int, dtype: torch.dtype, bias: bool
    ) -> None:
        super().__init__(in_features=in_features, out_features=out_features, dtype=dtype, bias=bias)
        self._weight = torch.zeros(out_features, in_features, dtype=dtype)
        self._to_grid = torch.zeros(out_features, 1, dtype=torch.float64)
        self._bits = (53 - (in_features - 1).bit_length()) // 2
        self._parts = 2 if dtype is torch.float32 else 1  # of the weight

    def _fill(self, first: int, weight: Tensor) -> None:
        rows = slice(first, first + weight.shape[0])
        self._weight[rows] = weight
        self._to_grid[rows] = _to_grid(weight, self._bits)

    def _multiply(self, x: Tensor) -> Tensor:
        return self.rounded(self.sums(x))

    def sums(self, x: Tensor) -> Tensor:
        """The result without bias, not rounded: [M, out_features] float64."""
        rows, in_features = x.shape
        exact = _split(x, _to_grid(x, self._bits), self._bits, 2)  # [2 * M, K]
        out_features = self._weight.shape[0]
        out = torch.empty(rows, out_features, dtype=torch.float64)
        block = max(1, _EXACT_BLOCK // in_features)
        for first in range(0, out_features, block):
            columns = slice(first, first + block)
            weight = _split(
                self._weight[columns], self._to_grid[columns], self._bits, self._parts
            )  # [parts * n, K]
            products = torch.matmul(exact, weight.t())
            n = weight.shape[0] // self._parts
            lesser = products[rows:, :n]
            if self._parts == 2:  # the product of two second parts is below float32's precision
                lesser = lesser + products[:rows, n:]
            torch.add(products[:rows, :n], lesser, out=out[:, columns])
        return out.add_(0.0)  # a library may sum zeros to -0

    def rounded(self, sums: Tensor) -> Tensor:
        return (sums if self.bias is None else sums.add_(self.bias)).to(self.dtype)

    def _rows(self, ids: Tensor) -> Tensor:
        inside = bool(((ids >= 0) & (ids < self._weight.shape[0])).all())
        checks.require(inside, f"a row id is outside [0, {self._weight.shape[0]})")
        return self._weight[ids]


def _to_grid(rows: Tensor, bits: int) -> Tensor:
    """1.5 * 2**52 times each row's unit: adding and subtracting it rounds to multiples of the unit.

    rows: [R, K]. Returns [R, 1] float64. A row is below 2**bits units. Made of bits, since an
    elementary function of a library may differ in the last place.
    """
    largest = rows.abs().amax(dim=1, keepdim=True).double()
    exponent = (largest.view(torch.int64) >> 52).clamp(max=1023 + 128)  # biased
    exponent += 1  # of the power of two above `largest`
    return ((exponent - bits + 52 << 52) | (1 << 51)).view(torch.float64)


def _split(rows: Tensor, to_grid: Tensor, bits: int, parts: int) -> Tensor:
    """The rows as multiples of their units, and below these the remainders: [parts * R, K] float64."""
    whole = rows.double()
    first = (whole + to_grid).sub_(to_grid)
    if parts == 1:
        return first
    finer = to_grid * 2.0**-bits
    return torch.cat((first, whole.sub_(first).add_(finer).sub_(finer)))
