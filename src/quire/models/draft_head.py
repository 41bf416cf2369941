"""A layer that drafts from the target's hidden states; `quire.models.head_spec` says which there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from quire.attention.base import AttentionMetadata, KVCache
from quire.attention.paged import PagedAttention
from quire.errors import CheckpointError
from quire.kernels.base import LayerKernels
from quire.kv_layout import KVPlace
from quire.layers.attention import Attention
from quire.layers.eager import EagerOps
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.mlp import Mlp
from quire.layers.norm import RMSNorm
from quire.layers.parameter import WeightTarget
from quire.layers.rotary import cos_sin_table
from quire.models.copies import TokenMatrices
from quire.models.decoder import DecoderModel
from quire.models.head_spec import HeadSpec
from quire.weights.load import load_random_weights, load_weights
from quire.weights.names import EMBEDDING
from quire.weights.source import ModelSource


class HeadResult(NamedTuple):
    """[R, hidden_size] each, for the wanted tokens."""

    hidden: torch.Tensor
    """For the logits."""
    state: torch.Tensor
    """In place of the target's hidden state, for the next draft."""


class DraftHead:
    """Usable once every target has been loaded and `bind()` called. Its cache belongs to the caller."""

    def __init__(
        self,
        spec: HeadSpec,
        target: DecoderModel,
        kernels: LayerKernels,
        copies: TokenMatrices | None = None,
    ) -> None:
        """target: the bound model that it drafts for. kernels: its kernels. copies: of what it reads of a
        target that is divided among ranks."""
        self._tokens = copies or target
        self.spec, self._target, self._kernels = spec, target, kernels
        self.dtype, method, names = target.dtype, spec.quantization, spec.names
        hidden_size, vocab_size = spec.hidden_size, spec.target.vocab_size
        self._paged = PagedAttention(kernels)
        cos_sin = cos_sin_table(spec.rope, max_model_len=target.max_model_len, dtype=self.dtype)
        self._attention = Attention(
            spec.layer.attention,
            f"{names.layer}.self_attn",
            place=KVPlace(group=0, part=0),
            hidden_size=hidden_size,
            norm=spec.norm,
            cos_sin=cos_sin.to(kernels.device),
            dtype=self.dtype,
            kernels=kernels,
            method=method,
        )
        self._mlp = Mlp(
            spec.layer.mlp,
            f"{names.layer}.mlp",
            hidden_size=hidden_size,
            dtype=self.dtype,
            kernels=kernels,
            method=method,
        )
        self._join = Linear(spec.join, dtype=self.dtype, method=method, kernels=kernels)
        self._head: Linear | None = None
        if spec.head is not None:
            self._head = Linear(spec.head, dtype=self.dtype, method=method, kernels=kernels)
        where = {"dtype": self.dtype, "device": kernels.device}
        self._embedding: Embedding | None = None
        if spec.has_embedding:
            self._embedding = Embedding(
                EMBEDDING, vocab_size=vocab_size, hidden_size=hidden_size, **where
            )
        self._norms = {
            name: RMSNorm(name, size=size, spec=spec.norm, **where)
            for name, size in spec.norms.items()
        }
        self._offsets = torch.zeros(spec.draft_vocab_size or 0, dtype=torch.int64)
        self.token_ids: torch.Tensor | None = None
        """[draft_vocab_size]: the target's ids of the head's tokens; None if they are the same."""

    def targets(self) -> Iterator[WeightTarget]:
        parts = (self._attention, self._mlp, self._join, self._head, self._embedding)
        for part in (*parts, *self._norms.values()):
            if part is not None:
                yield from part.targets()
        if self.spec.has_offsets:
            shape = tuple(self._offsets.shape)
            yield WeightTarget("d2t", shape, self._load_offsets, "bias", dtypes=("int64",))

    def _load_offsets(self, first: int, rows: torch.Tensor) -> None:
        self._offsets[first : first + len(rows)] = rows

    def bind(self) -> None:
        """Raises `CheckpointError` if the head's tokens are not the target's."""
        self._attention.bind()
        self._mlp.bind()
        self._join_product = self._join.bind()
        self._head_product = None if self._head is None else self._head.bind()
        own = self._embedding
        embedded = self._tokens.embedded if own is None else own.weight
        assert embedded is not None
        self._embedded = embedded
        if self.spec.has_offsets:
            ids = self._offsets + torch.arange(len(self._offsets))
            low, high, vocab_size = int(ids.min()), int(ids.max()), self.spec.target.vocab_size
            if low < 0 or high >= vocab_size:
                raise CheckpointError(
                    f"tensor d2t maps the head's tokens to ids from {low} to {high}, but the target has "
                    f"{vocab_size} tokens; the head is for another model"
                )
            self.token_ids = ids.to(self._kernels.device)

    @torch.inference_mode()
    def states(self, tapped: torch.Tensor) -> torch.Tensor:
        """The states that the head reads, [T, hidden_size]. tapped: what `spec.taps` give of T tokens."""
        spec, rms_norm = self.spec, self._kernels.rms_norm
        if not spec.joins_taps:
            norm = self._target.final_norm
            return rms_norm(tapped, norm.weight, norm.eps) if spec.reads_normed else tapped
        if names := spec.tap_norms:
            weights = [self._norms[name].weight for name in names]
            pairs = zip(tapped.chunk(len(names), dim=1), weights, strict=True)
            tapped = torch.cat([rms_norm(x, norm.weight, norm.eps) for x, norm in pairs], dim=1)
        return self._join_product(tapped)

    @torch.inference_mode()
    def compute(
        self,
        next_ids: torch.Tensor,
        states: torch.Tensor,
        metadata: AttentionMetadata,
        cache: KVCache,
        wanted: torch.Tensor,
    ) -> HeadResult | None:
        """Write the keys and values of T tokens, and compute the result of the wanted ones.

        next_ids: [T] int64, the token after each. states: [T, hidden_size]. wanted: [R] int64, indices of
        tokens. None if R = 0.
        """
        spec, names = self.spec, self.spec.names
        ops = EagerOps(self._kernels, self._paged, cache, next_ids, [metadata], wanted)
        embedded = self._normed(ops, ops.embed(self._embedded), names.embedding_norm)
        state = self._normed(ops, states, names.state_norm)
        both = torch.cat((state, embedded) if spec.state_first else (embedded, state), dim=1)
        if spec.joins_taps:
            residual, x = state if spec.norm_before_residual else states, both
        else:
            residual = ops.linear(both, self._join_product, "join")
            x = self._normed(ops, residual, names.input_norm)
        mixed = self._attention.mix(ops, x)
        if not len(wanted):
            return None
        residual, mixed = ops.keep_wanted(residual, mixed)
        residual = ops.add(residual, self._attention.project(ops, mixed))
        x = self._normed(ops, residual, names.mlp_norm)
        residual = ops.add(residual, self._mlp.forward(ops, x))
        ops.tap(residual)
        state = ops.tapped[0]
        hidden = state if names.final_norm is None else self._normed(ops, state, names.final_norm)
        return HeadResult(hidden, hidden if spec.recycles_normed else state)

    def _normed(self, ops: EagerOps, x: torch.Tensor, name: str | None) -> torch.Tensor:
        return x if name is None else ops.norm(x, self._norms[name].weight)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, draft_vocab_size or the target's] float32, of the head's tokens. hidden: [R, hidden_size]"""
        if self._head_product is None:
            return self._tokens.compute_logits(hidden)
        return self._head_product(hidden).float()


@torch.inference_mode()
def load_head(
    spec: HeadSpec,
    source: ModelSource,
    target: DecoderModel,
    *,
    kernels: LayerKernels,
    random_seed: int | None = None,
    copies: TokenMatrices | None = None,
) -> DraftHead:
    """A head ready to compute. random_seed: random weights, and no file is read. copies: as for `DraftHead`.

    Raises `CheckpointError` if a tensor is missing, unexpected, or of the wrong shape or dtype.
    """
    head = DraftHead(spec, target, kernels, copies)
    if random_seed is not None:
        load_random_weights(head.targets(), dtype=head.dtype, seed=random_seed)
    else:
        with source.open() as checkpoint:
            selected = spec.select(checkpoint.tensors)
            load_weights(head.targets(), checkpoint, dtype=head.dtype, selected=selected)
    head.bind()
    return head
