"""LoRA adapters over the products of a model: y = g * (W x + B (s * A x)) + bias, rounded once.

The delta is computed in float32 and added before the product is rounded. A row without an adapter has the
bits and the cost that it has without this module. A row with one has bits that depend on its own adapter
only.

Products are numbered in the order in which a forward pass calls `Ops.linear`; then come the head and the
embedding (`quire.weights.adapter.sites`). The number is called a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quire.kernels.ops import LinearProduct


class MatrixDelta(NamedTuple):
    """What an adapter does to one matrix of a product. Tensors on the CPU, finite, dense."""

    first: int
    """Of the product's outputs: that of the matrix's first row."""
    a: Tensor
    """[rank, inputs] in the model's dtype"""
    b: Tensor
    """[outputs, rank] in the model's dtype"""
    scale: float
    gains: Tensor | None = None
    """[outputs] float32; None: ones"""


Deltas = Mapping[int, Sequence[MatrixDelta]]
"""By site; the matrices of a product in the order of its outputs."""


class PackedAdapter(Protocol):
    """An adapter in the form that one implementation computes with."""

    @property
    def num_bytes(self) -> int: ...


class AdaptedRows(Protocol):
    """The rows of a step, and the adapter of each. Rows are those of the buffers that are given to it."""

    def linear(self, site: int, product: LinearProduct, x: Tensor) -> Tensor:
        """`product(x)` with what the adapters change. site: may be negative, as an index of all sites."""
        ...

    def embed(self, x: Tensor, ids: Tensor) -> Tensor:
        """x: [T, hidden_size], rows of the embedding for ids, [T] int64. May be changed in place."""
        ...

    def keep(self, wanted: Tensor) -> AdaptedRows:
        """The rows with these indices. wanted: [R] int64 or int32."""
        ...


class AdapterSet(Protocol):
    """The adapters that one model can use, by index."""

    def pack(self, deltas: Deltas) -> PackedAdapter:
        """Called from any thread."""
        ...

    def put(self, index: int, packed: PackedAdapter) -> None: ...

    def clear(self, index: int) -> None: ...

    def rows(self, adapters: Tensor) -> AdaptedRows:
        """adapters: [T] int32 on the CPU, the index for each row, -1 for none. Raises
        `KernelArgumentError` for an index that is not there."""
        ...


HEAD, EMBEDDING = -2, -1
"""Sites, counted from the end."""


def leaves(product: LinearProduct) -> Sequence[LinearProduct]:
    """The matrices of a stack, or the product itself."""
    parts: Sequence[LinearProduct] = getattr(product, "products", (product,))
    return parts


def matrix_rows(
    product: LinearProduct, first: int, count: int, device: torch.device | None = None
) -> Tensor:
    """Rows [first, first + count) of a product's matrix, in its dtype (dequantized) and on its device. They
    belong to one matrix of a stack. [count, in_features]"""
    for leaf in leaves(product):
        if first < leaf.out_features:
            return leaf.rows(torch.arange(first, first + count, device=device))
        first -= leaf.out_features
    raise AssertionError("rows past the product's end")
