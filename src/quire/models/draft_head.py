"""A layer that drafts from the target's hidden states; `quire.models.head_spec` says which there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quire.attention.base import AttentionMetadata, KVCache
from quire.attention.paged import PagedAttention
from quire.errors import CheckpointError
from quire.kernels.base import LayerKernels
from quire.kernels.ops import LinearProduct, NormWeight
from quire.kv_layout import KVPlace
from quire.layers.attention import Attention
from quire.layers.eager import EagerOps
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.mlp import Mlp
from quire.layers.norm import RMSNorm
from quire.layers.parameter import WeightTarget
from quire.layers.rotary import cos_sin_table
from quire.models.decoder import DecoderModel
from quire.models.head_spec import EMBEDDING, HeadSpec
from quire.weights.load import load_random_weights, load_weights
from quire.weights.source import ModelSource, Selected


@dataclass(frozen=True, slots=True)
class HeadResult:
    """[R, hidden_size] each, for the wanted tokens."""

    hidden: torch.Tensor
    """For the logits."""
    state: torch.Tensor
    """In place of the target's hidden state, for the next draft."""


class DraftHead:
    """Usable once every target has been loaded and `bind()` called. Its cache belongs to the caller."""

    def __init__(self, spec: HeadSpec, target: DecoderModel, kernels: LayerKernels) -> None:
        """target: the bound model that it drafts for. kernels: its kernels."""
        self.spec, self._target, self._kernels = spec, target, kernels
        self.dtype = target.dtype
        self._paged = PagedAttention(kernels)
        shared = {"dtype": self.dtype, "kernels": kernels}
        names, hidden_size = spec.names, spec.hidden_size
        cos_sin = cos_sin_table(spec.rope, max_model_len=target.max_model_len, dtype=self.dtype)
        self._attention = Attention(
            spec.layer.attention,
            f"{names.layer}.self_attn",
            place=KVPlace(group=0, part=0),
            hidden_size=hidden_size,
            norm=spec.norm,
            cos_sin=cos_sin.to(kernels.device),
            method=spec.quantization,
            **shared,
        )
        self._mlp = Mlp(
            spec.layer.mlp,
            f"{names.layer}.mlp",
            hidden_size=hidden_size,
            method=spec.quantization,
            **shared,
        )
        self._join, self._head = (
            None if shape is None else Linear(shape, method=spec.quantization, **shared)
            for shape in (spec.join, spec.head)
        )
        self._embedding: Embedding | None = None
        if spec.has_embedding:
            self._embedding = Embedding(
                EMBEDDING,
                vocab_size=spec.target.vocab_size,
                hidden_size=hidden_size,
                dtype=self.dtype,
                device=kernels.device,
            )
        self._norms: dict[str, RMSNorm] = {}
        after_attention = f"{names.layer}.post_attention_layernorm"
        self._after_attention = self._norm(after_attention, hidden_size)
        self._embedding_norm = self._norm(names.embedding_norm, hidden_size)
        self._state_norm = self._norm(names.state_norm, hidden_size)
        self._input_norm = self._norm(names.input_norm, hidden_size)
        self._final_norm = self._norm(names.final_norm, hidden_size)
        width = len(spec.taps) * spec.target.hidden_size
        self._tap_norms = [
            self._norm(name, width // len(spec.tap_norms)) for name in spec.tap_norms
        ]
        self._offsets: torch.Tensor | None = None
        if spec.has_offsets:
            self._offsets = torch.zeros(spec.draft_vocab_size or 0, dtype=torch.int64)
        self.token_ids: torch.Tensor | None = None
        """[draft_vocab_size]: the target's ids of the head's tokens; None if they are the same."""

    def _norm(self, name: str | None, size: int) -> NormWeight | None:
        if name is None:
            return None
        norm = RMSNorm(
            name, size=size, spec=self.spec.norm, dtype=self.dtype, device=self._kernels.device
        )
        self._norms[name] = norm
        return norm.weight

    def targets(self) -> Iterator[WeightTarget]:
        yield from self._attention.targets()
        yield from self._mlp.targets()
        for linear in (self._join, self._head):
            if linear is not None:
                yield from linear.targets()
        for norm in self._norms.values():
            yield from norm.targets()
        if self._embedding is not None:
            yield from self._embedding.targets()
        if self._offsets is not None:
            yield WeightTarget(
                "d2t", tuple(self._offsets.shape), self._load_offsets, "bias", dtypes=("int64",)
            )

    def _load_offsets(self, first: int, rows: torch.Tensor) -> None:
        assert self._offsets is not None
        self._offsets[first : first + len(rows)] = rows

    def bind(self) -> None:
        """Raises `CheckpointError` if the head's tokens are not the target's."""
        self._attention.bind()
        self._mlp.bind()
        assert self._join is not None
        self._join_product = self._join.bind()
        self._head_product = None if self._head is None else self._head.bind()
        self._embedded: LinearProduct | torch.Tensor = self._target.embedded
        if self._embedding is not None:
            self._embedded = self._embedding.weight
        if self._offsets is not None:
            ids = self._offsets + torch.arange(len(self._offsets))
            vocab_size = self.spec.target.vocab_size
            if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
                raise CheckpointError(
                    f"tensor d2t maps the head's tokens to ids from {int(ids.min())} to {int(ids.max())}, "
                    f"but the target has {vocab_size} tokens; the head is for another model"
                )
            self.token_ids = ids.to(self._kernels.device)

    @torch.inference_mode()
    def states(self, tapped: torch.Tensor) -> torch.Tensor:
        """The states that the head reads, [T, hidden_size]. tapped: what `spec.taps` give of T tokens."""
        spec, rms_norm = self.spec, self._kernels.rms_norm
        if not spec.joins_taps:
            norm = self._target.final_norm
            return rms_norm(tapped, norm.weight, norm.eps) if spec.reads_normed else tapped
        if self._tap_norms:
            parts = tapped.chunk(len(self._tap_norms), dim=1)
            pairs = zip(parts, self._tap_norms, strict=True)
            normed = [rms_norm(x, norm.weight, norm.eps) for x, norm in pairs if norm]
            tapped = torch.cat(normed, dim=1)
        return self._join_product(tapped.contiguous())

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

        next_ids: [T] int64, the token after each. states: [T, hidden_size]; overwritten. wanted: [R] int64,
        indices of tokens. None if R = 0.
        """
        ops = EagerOps(self._kernels, self._paged, cache, next_ids, [metadata], wanted)
        residual, x = self._joined(ops, states)
        mixed = self._attention.mix(ops, x)
        if not len(wanted):
            return None
        residual, mixed = ops.keep_wanted(residual, mixed)
        residual = ops.add(residual, self._attention.project(ops, mixed))
        assert self._after_attention is not None
        out = self._mlp.forward(ops, ops.norm(residual, self._after_attention))
        residual = ops.add(residual, out)
        ops.tap(residual)
        hidden = state = ops.tapped[0]
        if self._final_norm is not None:
            hidden = ops.norm(residual, self._final_norm)
        return HeadResult(hidden, hidden if self.spec.recycles_normed else state)

    def _joined(self, ops: EagerOps, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual, and the input of attention."""
        spec = self.spec
        embedded, state = ops.embed(self._embedded), states
        if self._embedding_norm is not None:
            embedded = ops.norm(embedded, self._embedding_norm)
        if self._state_norm is not None:
            state = ops.norm(states, self._state_norm)
        both = torch.cat((state, embedded) if spec.state_first else (embedded, state), dim=1)
        if spec.joins_taps:
            return (state if spec.norm_before_residual else states), both
        residual = ops.linear(both, self._join_product, "join")
        return residual, residual if self._input_norm is None else ops.norm(
            residual, self._input_norm
        )

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, draft_vocab_size or the target's] float32, of the head's tokens. hidden: [R, hidden_size]"""
        if self._head_product is None:
            return self._target.compute_logits(hidden)
        return self._head_product(hidden).float()


@torch.inference_mode()
def load_head(
    spec: HeadSpec,
    source: ModelSource,
    target: DecoderModel,
    *,
    kernels: LayerKernels,
    random_seed: int | None = None,
) -> DraftHead:
    """A head ready to compute. random_seed: random weights, and no file is read.

    Raises `CheckpointError` if a tensor is missing, unexpected, or of the wrong shape or dtype.
    """
    head = DraftHead(spec, target, kernels)
    if random_seed is not None:
        load_random_weights(head.targets(), dtype=head.dtype, seed=random_seed)
    else:
        with source.open() as checkpoint:
            selected = Selected(checkpoint, spec.select(checkpoint.tensors))
            load_weights(head.targets(), selected, dtype=head.dtype)
    head.bind()
    return head
