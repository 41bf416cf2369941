"""The decoder of all families: attention and an MLP in each layer, over a flat batch of tokens.

There is no batch dimension and no padding. A step's tokens are contiguous, `[T, hidden_size]`, and only
attention knows to which request they belong. Every operation is row-invariant bit for bit: a token's
result is the same whether it is computed alone, in a chunk of a prompt or with other requests. So Quire's
output does not depend on load. Results are rounded where transformers rounds.

Only `DecoderModel.forward` defines the order of a model's computations. It is run on tensors by
`EagerOps`, and recorded once as a program for the CPU by `ProgramOps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from quire.attention.base import AttentionBackend, AttentionMetadata, KVCache
from quire.attention.paged import PagedAttention
from quire.kernels.base import LayerKernels
from quire.kernels.group import Channels, Group
from quire.kernels.lora import AdaptedRows
from quire.kernels.ops import Buf, Head, LinearProduct, NormWeight, Ops
from quire.kernels.program import ForwardPass, Program, ProgramOps
from quire.kv_layout import KVLayout, KVPlace
from quire.layers.attention import Attention
from quire.layers.eager import EagerOps, compute_logits
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.mlp import Mlp
from quire.layers.norm import NORM_NAMES, RMSNorm
from quire.layers.parameter import WeightTarget
from quire.layers.rotary import cos_sin_table
from quire.models.eager_pass import EagerPass, StagePass
from quire.models.spec import LayerSpec, ModelSpec
from quire.weights.names import EMBEDDING


class DecoderLayer:
    """One layer. Built empty; usable once every target has been loaded and `bind()` called."""

    def __init__(
        self,
        model: ModelSpec,
        index: int,
        *,
        dtype: torch.dtype,
        kernels: LayerKernels,
        cos_sin: torch.Tensor,
        place: KVPlace,
    ) -> None:
        prefix = f"model.layers.{index}"
        spec: LayerSpec = model.layers[index]
        self._residual_scale = model.residual_scale

        def norm(name: str | None) -> RMSNorm | None:
            if name is None:
                return None
            size, device = model.hidden_size, kernels.device
            return RMSNorm(
                f"{prefix}.{name}", size=size, spec=model.norm, dtype=dtype, device=device
            )

        self._attention = Attention(
            spec.attention,
            f"{prefix}.self_attn",
            place=place,
            hidden_size=model.hidden_size,
            norm=model.norm,
            cos_sin=cos_sin,
            dtype=dtype,
            kernels=kernels,
            method=model.quantization,
            share=model.share,
        )
        self.kv_scales = self._attention.kv_scales
        self._mlp = Mlp(
            spec.mlp,
            f"{prefix}.mlp",
            hidden_size=model.hidden_size,
            dtype=dtype,
            kernels=kernels,
            method=model.quantization,
            share=model.share,
        )
        names = NORM_NAMES[spec.placement]
        self._before_attention, self._after_attention = norm(names[0]), norm(names[1])
        self._before_mlp, self._after_mlp = norm(names[2]), norm(names[3])

    def targets(self) -> Iterator[WeightTarget]:
        yield from self._attention.targets()
        yield from self._mlp.targets()
        for norm in (
            self._before_attention,
            self._after_attention,
            self._before_mlp,
            self._after_mlp,
        ):
            if norm is not None:
                yield from norm.targets()

    def bind(self) -> None:
        self._attention.bind()
        self._mlp.bind()

    def forward(self, ops: Ops[Buf], residual: Buf, *, is_last: bool) -> Buf:
        """residual: [T, hidden_size]. After attention, the last layer continues only with the wanted
        tokens."""
        mixed = self._attention.mix(ops, _normed(ops, residual, self._before_attention))
        if is_last:
            residual, mixed = ops.keep_wanted(residual, mixed)
        out = _normed(ops, self._attention.project(ops, mixed), self._after_attention)
        residual = ops.add(residual, out, scale=self._residual_scale)
        out = self._mlp.forward(ops, _normed(ops, residual, self._before_mlp))
        out = _normed(ops, out, self._after_mlp)
        return ops.add(residual, out, scale=self._residual_scale)


def _normed(ops: Ops[Buf], x: Buf, norm: RMSNorm | None) -> Buf:
    return x if norm is None else ops.norm(x, norm.weight)


class DecoderModel:
    """A model, or a rank's part of it: token ids and positions in, hidden states and logits out.

    The KV cache belongs to the caller.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        kernels: LayerKernels,
        max_model_len: int,
        attention: AttentionBackend | None = None,
        layout: KVLayout | None = None,
        group: Group | None = None,
        channels: Channels | None = None,
    ) -> None:
        """`max_model_len` is the number of positions a request may reach; rotary tables have that many rows.
        attention: the backend, if it is not the kernels' own. layout: of the cache, if not the spec's own.
        group: of the ranks among which the model is divided, if spec is a part (`ModelSpec.divided`).
        channels: to the stages before and after this one, if spec is one of several.
        """
        share = (0, 1) if group is None else (group.rank, group.size)
        assert share == (spec.share.rank, spec.share.size), (share, spec.share)
        self.spec = spec
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.kernels = kernels
        self.group, self.channels = group, channels
        self.taps: tuple[int, ...] = ()
        """Layers whose input, the residual, a drafter reads: ascending. One more than the last layer's index
        is the residual before the final norm. Set before `over`."""
        self._attention = attention or PagedAttention(kernels)
        tables = [
            cos_sin_table(rope, max_model_len=max_model_len, dtype=dtype).to(kernels.device)
            for rope in spec.ropes
        ]
        places = (layout or spec.kv).places()
        no_rope = torch.empty(max_model_len, 0, device=kernels.device)
        self._layers = {
            index: DecoderLayer(
                spec,
                index,
                dtype=dtype,
                kernels=kernels,
                cos_sin=no_rope if rope is None else tables[rope],
                place=places[index],
            )
            for index in spec.own_layers
            for rope in [spec.layers[index].attention.rope]
        }
        self.kv_scales = {index: layer.kv_scales for index, layer in self._layers.items()}
        self._norm = RMSNorm(
            "model.norm", size=spec.hidden_size, spec=spec.norm, dtype=dtype, device=kernels.device
        )
        self._embed_scale = spec.embed_scale
        if spec.embed_scale_rounded:
            self._embed_scale = float(torch.tensor(spec.embed_scale).to(dtype))
        self._starts = spec.share.starts(spec.vocab_size)
        self._embedding: Embedding | Linear | None = None  # with a tied head, its rows are used
        if spec.embedding is not None:
            self._embedding = Linear(
                spec.embedding, dtype=dtype, method=spec.quantization, kernels=kernels
            )
        elif spec.is_first and not spec.tie_word_embeddings:
            self._embedding = Embedding(
                EMBEDDING,
                vocab_size=spec.vocab_size,
                own=spec.share.columns(spec.vocab_size),
                hidden_size=spec.hidden_size,
                dtype=dtype,
                device=kernels.device,
            )
        self._lm_head: Linear | None = None
        if spec.has_logits:
            self._lm_head = Linear(
                spec.head, dtype=dtype, method=spec.quantization, kernels=kernels
            )

    @property
    def final_norm(self) -> NormWeight:
        return self._norm.weight

    def targets(self) -> Iterator[WeightTarget]:
        """Every tensor the model takes from a checkpoint."""
        if self._embedding is not None:
            yield from self._embedding.targets()
        for layer in self._layers.values():
            yield from layer.targets()
        if self.spec.is_last:
            yield from self._norm.targets()
        if self._lm_head is not None:
            yield from self._lm_head.targets()

    def bind(self) -> None:
        """Call once, after every target has been loaded and before the first `forward`."""
        for layer in self._layers.values():
            layer.bind()
        if self._lm_head is not None:
            self._head = Head(
                self._lm_head.bind(),
                divisor=self.spec.logits_divisor,
                softcap=self.spec.logits_softcap,
                first=self._starts[self.spec.share.rank],
                width=self.spec.vocab_size,
            )
            self.embedded: LinearProduct | torch.Tensor = self._head.product
        embedding = self._embedding
        if embedding is not None:
            self.embedded = embedding.bind() if isinstance(embedding, Linear) else embedding.weight

    def forward(self, ops: Ops[Buf]) -> Buf:
        """Hidden states after the final norm of the wanted tokens; of a stage before the last, the residual.
        Writes this step's keys and values to the cache."""
        if not self.spec.is_first:
            residual = ops.receive(self.spec.hidden_size)
        else:
            residual = ops.embed(self.embedded, self._starts)
            if self._embed_scale != 1.0:
                residual = ops.scale(residual, self._embed_scale)
        count = self.spec.num_layers
        narrows_in = count - 1 if count not in self.taps else None
        for index, layer in self._layers.items():
            if index in self.taps:
                ops.tap(residual)
            residual = layer.forward(ops, residual, is_last=index == narrows_in)
        if not self.spec.is_last:
            return ops.send(residual)
        if narrows_in is None:
            ops.tap(residual)
            [residual] = ops.keep_wanted(residual)
        return ops.norm(residual, self._norm.weight)

    @torch.inference_mode()
    def compute(
        self,
        input_ids: torch.Tensor,
        metadata: Sequence[AttentionMetadata],
        kv_cache: KVCache,
        wanted: torch.Tensor | None = None,
        tapped: list[torch.Tensor] | None = None,
        adapters: AdaptedRows | None = None,
        received: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward` on tensors. input_ids: [T] int64, below vocab_size, and positions below max_model_len
        (not checked here). metadata: of each group of layers. wanted: [R] int64 or int32, indices of
        tokens; None for all. tapped: gets the residual at each of the model's taps, [T, hidden_size].
        Returns [R or T, hidden_size] in the model's dtype.
        """
        tapped = [] if tapped is None else tapped
        ops = EagerOps(
            self.kernels, self._attention, kv_cache, input_ids, metadata, wanted, tapped, adapters,
            self.group, received,
        )  # fmt: skip
        return self.forward(ops)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, adapters: AdaptedRows | None = None) -> torch.Tensor:
        """hidden: [R, hidden_size]. adapters: of these rows. Returns [R, vocab_size] with values of the
        model's dtype: as float32 on a CPU. All ranks of a group make the call."""
        return compute_logits(self.kernels, self._head, hidden, adapters, self.group)

    def compute_logits(
        self, hidden: torch.Tensor, adapters: AdaptedRows | None = None
    ) -> torch.Tensor:
        """The same, float32 everywhere."""
        return self.logits(hidden, adapters).float()

    def over(self, kv_cache: KVCache) -> ForwardPass:
        """The pass with this cache: a recorded program where the kernels can run one, else operation by
        operation. The bits are the same.
        """
        compiled = self.kernels.compile(self.record(), kv_cache.parts, self.group)
        found = compiled or EagerPass(self, kv_cache)
        return found if self.spec.stage is None else StagePass(self.spec, found, self.channels)

    def record(self) -> Program:
        recorder = ProgramOps(self.dtype, self.spec.share.rank)
        head = self._head if self.spec.is_last else None
        return recorder.finish(self.forward(recorder), head, self.spec.vocab_size)
