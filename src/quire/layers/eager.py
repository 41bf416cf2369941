"""`Ops` that compute at once, on tensors: the reference, and the path on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.attention.base import AttentionBackend, AttentionMetadata, KVCache
from quire.kernels.base import LayerKernels
from quire.kernels.group import Group
from quire.kernels.lora import HEAD, AdaptedRows
from quire.kernels.ops import Activation, AttentionLayer, Head, LinearProduct, NormWeight


@dataclass(slots=True)
class EagerOps:
    """One forward pass over one step.

    An addition is delayed until its sum is read: most sums are normed next, and the kernels add and norm
    in one pass over memory.
    """

    kernels: LayerKernels
    attention: AttentionBackend
    cache: KVCache
    input_ids: Tensor
    """[T] int64, below the vocabulary's size; not checked here."""
    metadata: Sequence[AttentionMetadata]
    """For each group of layers; they differ in slots and block tables."""
    wanted: Tensor | None = None
    """Tokens whose result is wanted, as indices into the step's; None for all."""
    tapped: list[Tensor] = field(default_factory=list)
    """Copies made by `tap`, in order."""
    adapters: AdaptedRows | None = None
    """The tokens, if any has an adapter."""
    group: Group | None = None
    """The ranks that compute each layer together."""
    received: Tensor | None = None
    """From the stage before this one."""
    _num_products: int = 0
    """The products that have been computed."""
    _sum: tuple[Tensor, Tensor] | None = None
    """(residual, the tensor that must still be added to it)"""

    def embed(self, embedding: LinearProduct | Tensor, starts: Sequence[int] = (0,)) -> Tensor:
        if self.group is None:
            out = _rows(embedding, self.input_ids)
        else:
            out = self._embed_by_owner(self.group, embedding, starts)
        return out if self.adapters is None else self.adapters.embed(out, self.input_ids)

    def _embed_by_owner(
        self, group: Group, embedding: LinearProduct | Tensor, starts: Sequence[int]
    ) -> Tensor:
        first = torch.tensor(starts, device=self.input_ids.device)
        owners = torch.searchsorted(first, self.input_ids, right=True) - 1
        own = torch.where(owners == group.rank, self.input_ids - starts[group.rank], 0)
        rows = _rows(embedding, own)
        width = rows.shape[1]
        found = group.gather(rows, group.rank * width, group.size * width)
        return found.view(-1, group.size, width)[torch.arange(len(owners)), owners]

    def receive(self, width: int) -> Tensor:
        assert self.received is not None and self.received.shape[1] == width
        return self.received.clone()

    def send(self, x: Tensor) -> Tensor:
        return self._whole(x)

    def gather(self, x: Tensor, first: int, width: int) -> Tensor:
        if x.shape[1] == width:
            return x
        assert self.group is not None, "a part of the model needs a group"
        return self.group.gather(x, first, width)

    def columns(self, x: Tensor, first: int, width: int) -> Tensor:
        return x[:, first : first + width].contiguous()

    def put_columns(self, x: Tensor, first: int, width: int, target: Tensor, at: int) -> None:
        target[:, at : at + width] = x[:, first : first + width]

    def norm(self, x: Tensor, norm: NormWeight) -> Tensor:
        if self._sum is not None and self._sum[0] is x:
            added, self._sum = self._sum[1], None
            return self.kernels.add_rms_norm(added, x, norm.weight, norm.eps)
        return self.kernels.rms_norm(x, norm.weight, norm.eps)

    def norm_columns(self, x: Tensor, norm: NormWeight, first: int) -> None:
        columns = x[:, first : first + norm.weight.shape[0]]
        self.kernels.rms_norm(columns, norm.weight, norm.eps, out=columns)

    def linear(self, x: Tensor, product: LinearProduct, label: str) -> Tensor:
        x, site = self._whole(x), self._num_products
        self._num_products += 1
        return product(x) if self.adapters is None else self.adapters.linear(site, product, x)

    def rope_write_kv(self, qkv: Tensor, layer: AttentionLayer) -> None:
        cache, metadata = self.cache.parts[layer.part], self.metadata[layer.group]
        self.kernels.rope_write_kv(
            qkv,
            metadata.positions,
            layer.cos_sin,
            cache.k,
            cache.v,
            metadata.slot_mapping,
            q_norm=None if layer.q_norm is None else layer.q_norm.weight,
            k_norm=None if layer.k_norm is None else layer.k_norm.weight,
            eps=layer.norm_eps,
            kv_scales=cache.scales,
        )

    def scale_by_position(self, x: Tensor, width: int, table: Tensor) -> None:
        self.kernels.scale_by_position(x[:, :width], self.metadata[0].positions, table)

    def attend(self, qkv: Tensor, layer: AttentionLayer) -> Tensor:
        out = qkv.new_empty((qkv.shape[0], layer.q_size))
        attended = self.attention.forward(
            qkv.view(qkv.shape[0], -1, layer.head_dim)[:, : layer.num_heads],
            layer=layer,
            cache=self.cache.parts[layer.part],
            metadata=self.metadata[layer.group],
            out=out.view(-1, layer.num_heads, layer.head_dim),
        )
        return attended.view(out.shape)

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return self.kernels.gated(gate_up, activation)

    def add(self, residual: Tensor, x: Tensor, *, scale: float = 1.0) -> Tensor:
        residual = self._whole(residual)
        if scale == 1.0:
            self._sum = (residual, x)
        else:
            self.kernels.add(x, residual, scale=scale)
        return residual

    def scale(self, x: Tensor, factor: float) -> Tensor:
        self.kernels.scale(x, factor)
        return x

    def tap(self, x: Tensor) -> None:
        self.tapped.append(self._whole(x).clone())

    def keep_wanted(self, *bufs: Tensor) -> Sequence[Tensor]:
        if self.wanted is None:
            return bufs
        if self.adapters is not None:
            self.adapters = self.adapters.keep(self.wanted)
        return [self._whole(x).index_select(0, self.wanted) for x in bufs]

    def _whole(self, x: Tensor) -> Tensor:
        """x, after a delayed addition."""
        if self._sum is not None and self._sum[0] is x:
            self.kernels.add(self._sum[1], x)
            self._sum = None
        return x


def _rows(embedding: LinearProduct | Tensor, ids: Tensor) -> Tensor:
    if isinstance(embedding, Tensor):
        return torch.index_select(embedding, 0, ids)
    return embedding.rows(ids)


def compute_logits(
    kernels: LayerKernels,
    head: Head,
    hidden: Tensor,
    adapters: AdaptedRows | None = None,
    group: Group | None = None,
) -> Tensor:
    """hidden: [R, H]. Returns [R, vocab_size], rounded to the model's dtype: as float32 on a CPU, as it is
    on a GPU. All ranks of a group call it, and each gets all columns."""
    dtype = hidden.dtype
    if adapters is None:
        logits = head.product(hidden)
    else:
        logits = adapters.linear(HEAD, head.product, hidden)
    if logits.is_cpu:
        logits = logits.float()
    if head.divisor != 1.0 or head.softcap != 0.0:
        kernels.finish_logits(logits, dtype, divisor=head.divisor, cap=head.softcap)
    if group is not None:
        logits = group.gather(logits, head.first, head.width)
    return logits
