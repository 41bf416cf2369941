"""A forward pass as data: a flat list of operations over numbered buffers.

The program is recorded from the model's own `forward`, once per model and cache. It is to the CPU what a CUDA
graph is to a GPU: between two operations no Python runs. No C code knows the structure of a model.

A buffer has one row per token of the step and lives from the operation that writes it first to the last that
reads it. `ProgramOps.finish` gives buffers that do not live at the same time the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.checks import require
from quire.kernels.lora import EMBEDDING, HEAD, AdapterSet
from quire.kernels.ops import Activation, AttentionLayer, Head, LinearProduct, NormWeight

ALIGNMENT = 64
"""Bytes: a buffer's memory begins at a multiple of this many bytes per token, so at a cache line."""


class Code(IntEnum):
    """Numbers of the operations, as in cpu/program.c."""

    EMBED = 0
    NORM = 1
    LINEAR = 2
    LINEAR_ADD = 3
    """The product is rounded, then added to the target."""
    ROPE_WRITE = 4
    ATTEND = 5
    GATED = 6
    ADD = 7
    SCALE = 8
    SCALE_BY_POSITION = 9
    KEEP = 10
    """Moves the wanted rows of one buffer to its front."""
    NARROW = 11
    """From here on a buffer has the wanted rows only."""
    LOGITS = 12
    TAP = 13
    """Copies the rows of a buffer to columns of an output of the step."""
    GATHER = 14
    """When this rank's columns of a shared buffer are written: waits for those of the other ranks."""
    COPY = 15
    """Copies columns of one buffer to another; or each token's embedding, from its owner's columns."""
    RECEIVE = 16
    """Copies an input of the step to a buffer."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """[tokens, width] in the model's dtype."""

    number: int
    width: int
    shared: bool = False
    """Whether it is in the memory of all ranks; an operation that writes it writes this rank's columns."""


Argument: TypeAlias = LinearProduct | Tensor | NormWeight | AttentionLayer | None


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. What a field means depends on `code`; see `ProgramOps`."""

    code: Code
    label: str
    """The name under which a profile counts its time."""
    source: Buffer | None = None
    target: Buffer | None = None
    argument: Argument = None
    first: int = 0
    """First column, and number of columns: of the target where that is shared."""
    width: int = 0
    at: int = 0
    """First column of the source (COPY)."""
    activation: Activation = "silu"
    factor: float = 1.0
    """A scale, or the divisor of logits."""
    softcap: float = 0.0
    site: int = 0
    """Of a product, the head or the embedding: its number for adapters (`quire.kernels.lora`)."""


@dataclass(frozen=True, slots=True)
class Program:
    """The result of `finish`."""

    ops: tuple[Op, ...]
    num_hidden_ops: int
    """The number of operations up to the hidden states; the others compute logits from them."""
    num_cache_ops: int
    """The number of operations up to the last that writes keys and values or taps: a step without wanted
    results stops there."""
    tap_width: int
    """Columns of the output of `tap`."""
    hidden: Buffer
    offsets: tuple[int, ...]
    """Where each buffer's memory begins, in bytes per token of the step: in the memory of this rank, or of
    all ranks."""
    bytes_per_token: int
    dtype: torch.dtype
    vocab_size: int
    """Columns of the logits, if there are any."""
    shared_bytes_per_token: int = 0
    shared: frozenset[int] = frozenset()
    """The buffers that all ranks share."""
    starts: tuple[int, ...] = (0,)
    """The first token of each rank's part of the embedding."""

    @property
    def products(self) -> list[LinearProduct]:
        """Of all sites for adapters but the last, the embedding."""
        codes = (Code.LINEAR, Code.LINEAR_ADD, Code.LOGITS)
        return [op.argument for op in self.ops if op.code in codes]  # type: ignore[misc]


class CachePart(Protocol):
    """A layer's keys and values: `quire.attention.base.LayerCache`."""

    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def scales(self) -> tuple[Tensor, Tensor] | None: ...


@dataclass(slots=True)
class StepRows:
    """A step's rows: which requests compute which tokens.

    The arrays keep their addresses from step to step. A large model's weights evict Python objects from
    the CPU cache (about 1 us per object touched), so a step uses few objects.
    """

    token_ids: NDArray[np.int64]
    """[seats, max_tokens]: known tokens of the request in each seat."""
    block_ids: NDArray[np.int32]
    """[groups, seats, max_blocks]: its blocks in order, for each group of layers."""
    rows: NDArray[np.int64]
    """[max_rows, 4]: seat (none twice), first token to compute, number of tokens (at least 1), and of how
    many of these, the last ones, the result is wanted."""
    num_rows: int = 0
    """How many of `rows` are this step's; at most max_rows."""
    num_wanted: int = 0
    """How many results they want in all."""
    adapters: NDArray[np.int32] | None = None
    """[seats]: index of the LoRA adapter of the request in each seat (`quire.runner.adapters`), -1 for
    none; None if the engine has no adapters."""
    has_adapters: bool = False
    """Whether any row of this step has one: else the step does not look at `adapters`."""
    adapter_set: AdapterSet | None = None
    """What the indices mean. None if `adapters` is."""


class ForwardPass(Protocol):
    """A model's forward pass over one cache."""

    tapped: Tensor
    """What the last step's operations `tap` have copied, in the model's dtype: [T, columns], of all its
    tokens; or what a stage of a pipeline sends to the next. Valid until the next call. No columns if there
    is neither."""
    received: Tensor
    """[T, hidden_size]: what the stage before this one has sent for the next step."""

    def forward(self, rows: StepRows) -> Tensor:
        """Write every token's keys and values to the cache, and compute the wanted logits, in the order
        of the rows: [R, vocab_size] float32, valid until the next call.

        Raises `KernelArgumentError`, with nothing written, for an index out of range.
        """
        ...

    def hidden(self, rows: StepRows) -> Tensor:
        """The same, but it returns the hidden states after the final norm instead of logits: [R,
        hidden_size] in the model's dtype."""
        ...


@dataclass(slots=True)
class ProgramOps:
    """`Ops` that records. Shared buffers have the same places at every rank: their widths and lifetimes do
    not depend on the rank."""

    dtype: torch.dtype
    rank: int = 0
    _starts: tuple[int, ...] = (0,)
    _ops: list[Op] = field(default_factory=list)
    _widths: list[int] = field(default_factory=list)
    _num_products: int = 0
    _tap_width: int = 0

    def embed(self, embedding: LinearProduct | Tensor, starts: Sequence[int] = (0,)) -> Buffer:
        width = embedding.shape[1] if isinstance(embedding, Tensor) else embedding.in_features
        out = self._buffer(width)
        if len(starts) == 1:
            return self._record(Code.EMBED, "embed", None, out, argument=embedding, site=EMBEDDING)
        self._starts = tuple(starts)
        rows = self._buffer(width)
        self._record(Code.EMBED, "embed", None, rows, argument=embedding)
        by_owner = self.gather(rows, self.rank * width, len(starts) * width)
        return self._record(Code.COPY, "embed", by_owner, out, width=width, site=EMBEDDING)

    def receive(self, width: int) -> Buffer:
        return self._record(Code.RECEIVE, "receive", None, self._buffer(width), width=width)

    def send(self, x: Buffer) -> Buffer:
        self.tap(x)
        return x

    def gather(self, x: Buffer, first: int, width: int) -> Buffer:
        if x.width == width:
            return x
        whole = self._buffer(width, shared=True)
        for index, op in enumerate(self._ops):  # they write to their columns of the whole
            if op.target == x:
                source = whole if op.source == x else op.source
                self._ops[index] = replace(
                    op, source=source, target=whole, first=first, width=x.width
                )
            require(op.target == x or op.source != x, "a part is read after it was gathered")
        return self._record(Code.GATHER, "gather", whole, whole, first=first, width=x.width)

    def columns(self, x: Buffer, first: int, width: int) -> Buffer:
        return self._record(Code.COPY, "copy", x, self._buffer(width), at=first, width=width)

    def put_columns(self, x: Buffer, first: int, width: int, target: Buffer, at: int) -> None:
        self._record(Code.COPY, "copy", x, target, at=first, first=at, width=width)

    def norm(self, x: Buffer, norm: NormWeight) -> Buffer:
        self._check_norm(norm, x.width)
        out = self._buffer(x.width)
        return self._record(Code.NORM, "norm", x, out, argument=norm, width=x.width)

    def norm_columns(self, x: Buffer, norm: NormWeight, first: int) -> None:
        width = norm.weight.shape[0]
        self._check_norm(norm, width)
        require(first + width <= x.width, f"a norm of columns {first} to {first + width}")
        self._record(Code.NORM, "norm", x, x, argument=norm, first=first, width=width)

    def linear(self, x: Buffer, product: LinearProduct, label: str) -> Buffer:
        self._check_product(x, product, label)
        out, site = self._buffer(product.out_features), self._num_products
        self._num_products += 1
        return self._record(Code.LINEAR, label, x, out, argument=product, site=site)

    def rope_write_kv(self, qkv: Buffer, layer: AttentionLayer) -> None:
        width = (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
        require(qkv.width == width, f"qkv has {qkv.width} columns; the layer's heads need {width}")
        norms = [norm for norm in (layer.q_norm, layer.k_norm) if norm is not None]
        for norm in norms:
            self._check_norm(norm, layer.head_dim)
        alike = {(norm.weight.dtype, norm.eps) for norm in norms}
        require(len(norms) != 1 and len(alike) <= 1, "queries and keys are normed alike")
        self._record(Code.ROPE_WRITE, "rope_write", qkv, qkv, argument=layer)

    def scale_by_position(self, x: Buffer, width: int, table: Tensor) -> None:
        require(0 < width <= x.width, f"{width} columns of {x.width}")
        self._record(Code.SCALE_BY_POSITION, "scale", x, x, argument=table, width=width)

    def attend(self, qkv: Buffer, layer: AttentionLayer) -> Buffer:
        return self._record(
            Code.ATTEND, "attention", qkv, self._buffer(layer.q_size), argument=layer
        )

    def gated(self, gate_up: Buffer, activation: Activation) -> Buffer:
        out = self._buffer(gate_up.width // 2)
        return self._record(Code.GATED, "gated", gate_up, out, activation=activation)

    def add(self, residual: Buffer, x: Buffer, *, scale: float = 1.0) -> Buffer:
        require(residual.width == x.width, f"{x.width} columns added to {residual.width}")
        last = self._ops[-1]
        if (
            last.code is Code.LINEAR and last.target == x and scale == 1.0
        ):  # saves one pass over memory
            self._ops[-1] = replace(last, code=Code.LINEAR_ADD, target=residual)
            return residual
        return self._record(Code.ADD, "add", x, residual, factor=scale)

    def scale(self, x: Buffer, factor: float) -> Buffer:
        return self._record(Code.SCALE, "scale", x, x, factor=factor)

    def tap(self, x: Buffer) -> None:
        narrowed = any(op.code is Code.NARROW for op in self._ops)
        require(not narrowed, "a buffer is tapped while it has all rows")
        self._record(Code.TAP, "tap", x, x, first=self._tap_width, width=x.width)
        self._tap_width += x.width

    def keep_wanted(self, *bufs: Buffer) -> Sequence[Buffer]:
        for buffer in bufs:
            self._record(Code.KEEP, "keep", buffer, buffer)
        self._record(Code.NARROW, "keep", bufs[0], bufs[0])
        return bufs

    def finish(self, hidden: Buffer, head: Head | None, vocab_size: int = 0) -> Program:
        """hidden: the result of the recorded calls, for the wanted rows. head: None if it is sent instead.
        vocab_size: then that of the token ids."""
        codes = [op.code for op in self._ops]
        changed = [op.label for op in self._ops if op.target and op.target.shared]
        require("add" not in changed and "scale" not in changed, "a gathered buffer is not changed")
        num_hidden_ops = len(codes)
        if head is not None:
            require(Code.NARROW in codes, "a program keeps the wanted rows before it ends")
            vocab_size = head.width or head.product.out_features
            self._logits(hidden, head, vocab_size)
        num_sites = self._num_products + 1 + (head is not None)
        ops = tuple(replace(op, site=op.site % num_sites) for op in self._ops)
        effects = (Code.ROPE_WRITE, Code.TAP)
        writes = [index for index, code in enumerate(codes) if code in effects]
        sizes = [width * self.dtype.itemsize for width in self._widths]
        placed = [_place(ops, sizes, shared=shared) for shared in (False, True)]
        return Program(
            ops=ops,
            num_hidden_ops=num_hidden_ops,
            num_cache_ops=1 + max(writes, default=-1),
            tap_width=self._tap_width,
            hidden=hidden,
            offsets=tuple(max(both) for both in zip(*(each[0] for each in placed), strict=True)),
            bytes_per_token=placed[0][1],
            dtype=self.dtype,
            vocab_size=vocab_size,
            shared_bytes_per_token=placed[1][1],
            shared=frozenset(b.number for op in ops if (b := op.target) is not None and b.shared),
            starts=self._starts,
        )

    def _logits(self, hidden: Buffer, head: Head, vocab_size: int) -> None:
        self._check_product(hidden, head.product, "head")
        own = head.product.out_features
        self._record(
            Code.LOGITS,
            "head",
            hidden,
            hidden,
            argument=head.product,
            factor=head.divisor,
            softcap=head.softcap,
            site=HEAD,
            first=head.first,
            width=own,
        )
        if own != vocab_size:
            self._ops.append(Op(Code.GATHER, "gather", first=head.first, width=own))

    def _buffer(self, width: int, *, shared: bool = False) -> Buffer:
        self._widths.append(width)
        return Buffer(len(self._widths) - 1, width, shared)

    def _record(
        self, code: Code, label: str, source: Buffer | None, target: Buffer, **rest: object
    ) -> Buffer:
        self._ops.append(Op(code, label, source, target, **rest))  # type: ignore[arg-type]
        return target

    def _check_norm(self, norm: NormWeight, width: int) -> None:
        weight = norm.weight
        require(tuple(weight.shape) == (width,), f"{tuple(weight.shape)} norm {width} columns")
        require(weight.is_contiguous(), "a norm's weight is dense")
        require(weight.dtype in (self.dtype, torch.float32), f"a norm's weight is {weight.dtype}")

    def _check_product(self, x: Buffer, product: LinearProduct, label: str) -> None:
        require(
            product.in_features == x.width,
            f"{label} takes {product.in_features} columns, and is given {x.width}",
        )


def _place(ops: Sequence[Op], sizes: Sequence[int], *, shared: bool) -> tuple[list[int], int]:
    """An offset for each buffer, in bytes per token, and the total bytes. Each buffer gets the lowest
    place that no buffer with an overlapping lifetime has. A shared one lives until the GATHER after its last
    use: another rank may still read it until then."""
    first, last = [0] * len(sizes), [0] * len(sizes)
    used: set[int] = set()  # since the last GATHER
    for index, op in enumerate(ops):
        for buffer in (op.source, op.target):
            if buffer is not None and buffer.shared == shared:
                first[buffer.number] = first[buffer.number] or index + 1
                last[buffer.number] = index + 1
                used.add(buffer.number)
        if shared and op.code is Code.GATHER:
            for number in used:
                last[number] = index + 1
            used.clear()
    offsets = [0] * len(sizes)
    placed: list[int] = []
    total = 0
    for number in sorted(range(len(sizes)), key=first.__getitem__):
        if not first[number]:
            continue  # unused: its product was added directly to the target
        size = -(-sizes[number] // ALIGNMENT) * ALIGNMENT
        living = sorted(
            (offsets[other], -(-sizes[other] // ALIGNMENT) * ALIGNMENT)
            for other in placed
            if last[other] >= first[number]
        )
        at = 0
        for offset, length in living:
            if at + size <= offset:
                break
            at = max(at, offset + length)
        offsets[number] = at
        placed.append(number)
        total = max(total, at + size)
    return offsets, total
