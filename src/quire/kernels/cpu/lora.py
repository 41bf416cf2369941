"""Adapters on the CPU: computed in C with the products that C computes (lora.c), in PyTorch with others."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import addressof, byref, c_int64, c_void_p
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quire.kernels.checks import KernelArgumentError, require
from quire.kernels.codes import PANEL
from quire.kernels.cpu import library
from quire.kernels.cpu.codes import ReferenceCodes
from quire.kernels.cpu.linear import CProduct, ExactSumProduct, multiply
from quire.kernels.lora import EMBEDDING, Deltas, MatrixDelta, PackedAdapter, leaves
from quire.kernels.ops import LinearProduct

MOST_RANKS = 2048  # LORA_RANKS in kernels.h


class _Site(ctypes.Structure):
    """Mirrors lora_site in kernels.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("a", "b", "panels", "scales", "gains")),
        *((name, c_int64) for name in ("rank", "k", "dtype")),
    ]


class _Table(ctypes.Structure):
    """Mirrors lora_table in kernels.h."""

    _fields_ = [("adapters", c_void_p), ("size", c_int64)]


_PANEL = np.dtype([("first", np.int32), ("count", np.int32), ("start", np.int64)])
"""lora_panel in kernels.h."""


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One matrix, or a stack that C computes as one. `widths`: the outputs of each of its matrices of
    panels."""

    product: LinearProduct | None
    """None: the embedding."""
    first: int
    """Its first output in the site's product."""
    widths: tuple[int, ...]
    in_c: bool


@dataclass(slots=True)
class HostAdapter:
    """An adapter in memory. Keeps the tensors whose addresses are in `sites`."""

    sites: ctypes.Array[_Site]
    """By leaf."""
    plain: dict[int, list[MatrixDelta]] = field(default_factory=dict)
    """Of the leaves that C does not compute."""
    kept: list[Tensor | np.ndarray] = field(default_factory=list)
    num_bytes: int = 0

    def keep(self, array: Tensor | np.ndarray) -> int:
        """Its address."""
        self.kept.append(array)
        self.num_bytes += array.nbytes
        return int(array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data)


class HostAdapters:
    """`AdapterSet` on the CPU."""

    def __init__(
        self,
        products: Sequence[LinearProduct],
        *,
        dtype: torch.dtype,
        capacity: int,
        max_rank: int,
        parts: Sequence[Sequence[int]],
    ) -> None:
        """products: of all sites but the last, the embedding, which is as wide as the inputs of the first.
        capacity: indices are below it. max_rank and parts are not needed here, where no memory is
        reserved."""
        self.products = tuple(products)
        self._dtype = dtype
        self._leaves: list[_Leaf] = []
        self._leaves_of: list[range] = []
        """By site."""
        for product in products:
            self._add([*_split(product)])
        hidden = products[0].in_features
        try:
            library.load_library()
            in_c = True
        except library.BuildError:
            in_c = False
        self._add([_Leaf(None, 0, (hidden,), in_c)])
        self._adapters: list[HostAdapter | None] = [None] * capacity
        self._addresses = (c_void_p * capacity)()
        self._table = _Table(addressof(self._addresses), capacity)
        self.address = addressof(self._table)
        """Of the lora_table."""

    def _add(self, found: list[_Leaf]) -> None:
        start = len(self._leaves)
        self._leaves += found
        self._leaves_of.append(range(start, len(self._leaves)))

    def pack(self, deltas: Deltas) -> HostAdapter:
        packed = HostAdapter((_Site * len(self._leaves))())
        for site, matrices in deltas.items():
            for number in self._leaves_of[site]:
                leaf = self._leaves[number]
                here = [
                    each._replace(first=each.first - leaf.first)
                    for each in matrices
                    if 0 <= each.first - leaf.first < sum(leaf.widths)
                ]
                if not here:
                    continue
                if leaf.in_c:
                    packed.sites[number] = _pack(packed, leaf, here, self._dtype)
                else:
                    packed.plain[number] = here
                    packed.num_bytes += sum(each.a.nbytes + each.b.nbytes for each in here)
        return packed

    def put(self, index: int, packed: PackedAdapter) -> None:
        assert isinstance(packed, HostAdapter)
        self._adapters[index] = packed
        self._addresses[index] = addressof(packed.sites)

    def clear(self, index: int) -> None:
        self._addresses[index] = None
        self._adapters[index] = None

    def rows(self, adapters: Tensor) -> HostRows:
        require(adapters.dtype is torch.int32 and adapters.dim() == 1, "adapters are [T] int32")
        return HostRows(self, adapters.numpy())


def _split(product: LinearProduct) -> Iterator[_Leaf]:
    if isinstance(product, CProduct):
        yield _Leaf(product, 0, tuple(each.out_features for each in leaves(product)), True)
        return
    first = 0
    for each in leaves(product):
        in_c = isinstance(each, CProduct)
        require(
            in_c or isinstance(each, ExactSumProduct | ReferenceCodes),
            f"products of {type(each).__name__} cannot have adapters",
        )
        yield _Leaf(each, first, (each.out_features,), in_c)
        first += each.out_features


def _pack(
    packed: HostAdapter, leaf: _Leaf, matrices: Sequence[MatrixDelta], dtype: torch.dtype
) -> _Site:
    """B in panels: of each, only the ranks of the matrices that have outputs in it."""
    ranks = np.cumsum([0, *(each.a.shape[0] for each in matrices)])
    require(int(ranks[-1]) <= MOST_RANKS, f"{ranks[-1]} ranks of one product; {MOST_RANKS} at most")
    starts, panels = [], 0  # of the first panel and output of each width
    for begin, width in zip(np.cumsum([0, *leaf.widths]).tolist(), leaf.widths, strict=False):
        starts.append((panels, begin, width))
        panels += -(-width // PANEL)
    table = np.zeros(panels, dtype=_PANEL)
    spans = []  # of each matrix: its pieces (matrix, panel, column in it, output, count)
    for number, each in enumerate(matrices):
        for panel, begin, width in starts:
            low, high = max(each.first, begin), min(each.first + len(each.b), begin + width)
            if low >= high:
                continue
            at = panel + (low - begin) // PANEL
            spans.append((number, at, (low - begin) % PANEL, low - each.first, high - low))
            touched = table[at : panel + -(-(high - begin) // PANEL)]
            new = touched["count"] == 0
            touched["first"][new] = ranks[number]
            touched["count"] = ranks[number + 1] - touched["first"]
    table["start"] = np.cumsum(table["count"]) - table["count"]
    b = torch.zeros(int(table["count"].sum()), PANEL, dtype=dtype)
    gains = torch.ones(panels, PANEL) if any(m.gains is not None for m in matrices) else None
    for number, panel, column, row, count in spans:
        each = matrices[number]
        if gains is not None and each.gains is not None:
            flat = gains.view(-1)[panel * PANEL + column :]
            flat[:count] = each.gains[row : row + count]
        rank = each.a.shape[0]
        while count:
            whole = 0
            if column == 0 and table["count"][panel] == rank:  # panels of this matrix alone
                alone = table["count"][panel : panel + count // PANEL] == rank
                whole = int(alone.argmin()) if not alone.all() else len(alone)
            at = int(table["start"][panel]) + int(ranks[number] - table["first"][panel])
            if whole:
                part = each.b[row : row + whole * PANEL].view(whole, PANEL, rank)
                b[at : at + whole * rank].view(whole, rank, PANEL).copy_(part.transpose(1, 2))
                taken, panel = whole * PANEL, panel + whole
            else:
                taken = min(PANEL - column, count)
                b[at : at + rank, column : column + taken] = each.b[row : row + taken].t()
                panel += 1
            row, count, column = row + taken, count - taken, 0
    a = torch.cat([each.a for each in matrices]) if len(matrices) > 1 else matrices[0].a
    if leaf.product is None:
        a = a.t()  # a token's row is looked up
    scales = torch.tensor([each.scale for each in matrices for _ in each.a], dtype=torch.float32)
    return _Site(
        a=packed.keep(a.contiguous()),
        b=packed.keep(b),
        panels=packed.keep(table),
        scales=packed.keep(scales),
        gains=None if gains is None else packed.keep(gains),
        rank=int(ranks[-1]),
        k=matrices[0].a.shape[1],
        dtype=library.DTYPES[dtype],
    )


class HostRows:
    """`AdaptedRows` on the CPU."""

    def __init__(self, adapters: HostAdapters, indices: np.ndarray) -> None:
        self._set = adapters
        self._indices = indices
        known = adapters._adapters
        for index in np.unique(indices[indices >= 0]).tolist():
            if index >= len(known) or known[index] is None:
                raise KernelArgumentError(f"adapter {index} is not in the table")
        self._groups: library.LoraRows | None = None
        self._memory: ctypes.Array[ctypes.c_char] | None = None

    def keep(self, wanted: Tensor) -> HostRows:
        return HostRows(self._set, self._indices[wanted.numpy()])

    def linear(self, site: int, product: LinearProduct, x: Tensor) -> Tensor:
        outs = []
        for number in self._set._leaves_of[site]:
            leaf = self._set._leaves[number]
            assert leaf.product is not None
            if leaf.in_c:
                assert isinstance(leaf.product, CProduct)
                outs.append(
                    multiply(
                        library.load_library(),
                        leaf.product.c_weight,
                        leaf.product.out_features,
                        x,
                        (self._grouped(), number),
                    )
                )
            else:
                outs.append(self._plain(number, leaf.product, x))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def embed(self, x: Tensor, ids: Tensor) -> Tensor:
        number = self._set._leaves_of[EMBEDDING][0]
        if self._set._leaves[number].in_c:
            library.load_library().quire_adapt_embedding(
                byref(self._grouped()),
                number,
                ids.data_ptr(),
                x.data_ptr(),
                x.shape[1],
                library.DTYPES[x.dtype],
                torch.get_num_threads(),
            )
            return x
        for rows, matrices in self._of_leaf(number):
            for each in matrices:
                t = each.a.t()[ids[rows]].float() * each.scale
                x[rows] = (x[rows].float() + _exact(each.b, t)).to(x.dtype)
        return x

    def _plain(self, number: int, product: LinearProduct, x: Tensor) -> Tensor:
        """In PyTorch: each product's sums are exact or row by row (docs/adr/0022)."""
        assert isinstance(product, ExactSumProduct | ReferenceCodes)
        sums = product.sums(x)
        for rows, matrices in self._of_leaf(number):
            for each in matrices:
                columns = slice(each.first, each.first + len(each.b))
                t = _exact(each.a, x[rows].float()) * each.scale
                part = sums[rows, columns] + _exact(each.b, t)
                sums[rows, columns] = part if each.gains is None else part * each.gains
        return product.rounded(sums)

    def _of_leaf(self, number: int) -> Iterator[tuple[Tensor, list[MatrixDelta]]]:
        """The rows of each adapter that changes it, and how."""
        for index in np.unique(self._indices[self._indices >= 0]).tolist():
            adapter = self._set._adapters[index]
            if adapter is not None and (matrices := adapter.plain.get(number)):
                yield torch.from_numpy(np.flatnonzero(self._indices == index)), matrices

    def _grouped(self) -> library.LoraRows:
        if self._groups is None:
            lib, count = library.load_library(), len(self._indices)
            memory = (ctypes.c_char * lib.quire_group_bytes(count, count))()
            ends = np.arange(1, count + 1, dtype=np.int32)
            indices = np.ascontiguousarray(self._indices, dtype=np.int32)
            groups = library.LoraRows()
            code = lib.quire_group_rows(
                self._set.address,
                indices.ctypes.data,
                ends.ctypes.data,
                count,
                addressof(memory),
                byref(groups),
            )
            require(code == 0, "an adapter is not in the table")
            self._groups, self._memory = groups, memory
        return self._groups


def _exact(weight: Tensor, x: Tensor) -> Tensor:
    """x @ weight.T in float32, with exact sums."""
    product = ExactSumProduct(
        in_features=weight.shape[1], out_features=len(weight), dtype=torch.float32, bias=False
    )
    product.fill(0, weight.float().contiguous())
    return product(x.contiguous())
