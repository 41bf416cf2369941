"""The decoder every supported family is: pre-norm attention and a gated MLP, over a flat batch of tokens.

There is no batch dimension and no padding. A step's tokens lie end to end, `[T, hidden_size]`, and
only attention knows whose they are. Every operation here is row-invariant bit for bit: a token's
result is the same whether it is computed alone, in a prompt's chunk or beside others, which is what
makes Quire's output independent of load. Roundings fall where transformers rounds (after each
product, each norm, each residual addition).

A decode step of a small model is spent in Python, not in arithmetic, so the layers are plain
objects that hold bound products and make nine kernel calls each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from quire.attention.base import AttentionBackend, AttentionMetadata, KVCache, LayerCache
from quire.attention.paged import PagedAttention
from quire.kernels.base import LayerKernels
from quire.kernels.cpu.linear import CProduct
from quire.kernels.decoder import DecoderPass, DecoderWeights, LayerWeights, StepRows
from quire.layers.embedding import Embedding, create_lm_head
from quire.layers.linear import Linear, LinearMethod, LinearPart, UnquantizedLinearMethod
from quire.layers.norm import RMSNorm
from quire.layers.parameter import WeightTarget
from quire.layers.rotary import cos_sin_table
from quire.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of one forward pass share."""

    positions: torch.Tensor
    metadata: AttentionMetadata
    attention_out: torch.Tensor
    """[T, num_heads, head_dim]: one buffer for all layers; each reads it before the next writes it."""
    attention_rows: torch.Tensor
    """The same memory as [T, num_heads * head_dim], the output projection's input."""


class DecoderLayer:
    """One layer. Built empty; usable once every target has been loaded and `bind()` called."""

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        *,
        dtype: torch.dtype,
        kernels: LayerKernels,
        attention: AttentionBackend,
        cos_sin: torch.Tensor,
        method: LinearMethod,
    ) -> None:
        prefix = f"model.layers.{index}"
        self._kernels = kernels
        self._attention = attention
        self._cos_sin = cos_sin
        layer = spec.layers[index]
        heads, mlp = layer.attention, layer.mlp
        self._heads = heads
        self._window = heads.window
        self._eps = spec.norm.eps

        def linear(parts: dict[str, int], *, in_features: int, bias: bool) -> Linear:
            stacked = [
                LinearPart(name=f"{prefix}.{name}", out_features=size)
                for name, size in parts.items()
            ]
            return Linear(stacked, in_features=in_features, bias=bias, dtype=dtype, method=method)

        def norm(name: str, size: int) -> RMSNorm:
            return RMSNorm(
                f"{prefix}.{name}",
                size=size,
                eps=spec.norm.eps,
                dtype=dtype,
                device=kernels.device,
            )

        hidden, inner = spec.hidden_size, mlp.intermediate_size
        qkv = {
            "self_attn.q_proj": heads.q_size,
            "self_attn.k_proj": heads.kv_size,
            "self_attn.v_proj": heads.kv_size,
        }
        self._linears = {
            "qkv": linear(qkv, in_features=hidden, bias=heads.qkv_bias),
            "o": linear({"self_attn.o_proj": hidden}, in_features=heads.q_size, bias=heads.o_bias),
            "gate_up": linear(
                {"mlp.gate_proj": inner, "mlp.up_proj": inner},
                in_features=hidden,
                bias=mlp.bias,
            ),
            "down": linear({"mlp.down_proj": hidden}, in_features=inner, bias=mlp.bias),
        }
        self.input_norm = norm("input_layernorm", hidden)
        self._post_attention_norm = norm("post_attention_layernorm", hidden)
        qk_norm = heads.qk_norm == "head"
        self._q_norm = norm("self_attn.q_norm", heads.head_dim) if qk_norm else None
        self._k_norm = norm("self_attn.k_norm", heads.head_dim) if qk_norm else None

    def targets(self) -> Iterator[WeightTarget]:
        for linear in self._linears.values():
            yield from linear.targets()
        for norm in (self.input_norm, self._post_attention_norm, self._q_norm, self._k_norm):
            if norm is not None:
                yield from norm.targets()

    def bind(self) -> None:
        """Fix the products to call, now that the weights are in."""
        self._qkv, self._o = self._linears["qkv"].bind(), self._linears["o"].bind()
        self._gate_up, self._down = self._linears["gate_up"].bind(), self._linears["down"].bind()

    def weights(self, cache: LayerCache) -> LayerWeights | None:
        """What a fused pass needs of this layer; None if some product cannot be computed by C."""
        qkv, o, gate_up, down = self._qkv, self._o, self._gate_up, self._down
        if not (
            isinstance(qkv, CProduct)
            and isinstance(o, CProduct)
            and isinstance(gate_up, CProduct)
            and isinstance(down, CProduct)
        ):
            return None
        return LayerWeights(
            input_norm=self.input_norm.weight,
            qkv=qkv,
            q_norm=None if self._q_norm is None else self._q_norm.weight,
            k_norm=None if self._k_norm is None else self._k_norm.weight,
            o=o,
            post_norm=self._post_attention_norm.weight,
            gate_up=gate_up,
            down=down,
            k_cache=cache.k,
            v_cache=cache.v,
            window=self._window or 0,
        )

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, cache: LayerCache, step: _Step
    ) -> torch.Tensor:
        """x: [T, hidden_size], already normed.

        Returns the MLP's output; adds the attention's to `residual` in place.
        """
        kernels = self._kernels
        qkv = self._qkv(x)
        # Stored before anyone attends: a token sees itself and those before it in the same step.
        kernels.rope_write_kv(
            qkv,
            step.positions,
            self._cos_sin,
            cache.k,
            cache.v,
            step.metadata.slot_mapping,
            q_norm=None if self._q_norm is None else self._q_norm.weight,
            k_norm=None if self._k_norm is None else self._k_norm.weight,
            eps=self._eps,
            kv_scales=cache.scales,
        )
        heads = qkv.view(qkv.shape[0], -1, self._heads.head_dim)
        self._attention.forward(
            heads[:, : self._heads.num_heads],
            cache=cache,
            metadata=step.metadata,
            window=self._window,
            out=step.attention_out,
        )
        x = self._o(step.attention_rows)
        x = kernels.add_rms_norm(x, residual, self._post_attention_norm.weight, self._eps)
        return self._down(kernels.silu_and_mul(self._gate_up(x)))


class DecoderModel:
    """A whole model: token ids and positions in, hidden states and logits out.

    The KV cache belongs to the caller.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        kernels: LayerKernels,
        max_model_len: int,
        linear_method: LinearMethod | None = None,
        attention: AttentionBackend | None = None,
    ) -> None:
        """`max_model_len` is the number of positions a request may reach; the rotary table has that
        many rows. attention: if not by `kernels`.
        """
        method = linear_method or UnquantizedLinearMethod(kernels)
        self.spec = spec
        self.dtype = dtype
        self.max_model_len = max_model_len
        self._kernels = kernels
        self._cos_sin = cos_sin_table(spec.ropes[0], max_model_len=max_model_len, dtype=dtype).to(
            kernels.device
        )
        attention = attention or PagedAttention(kernels, scale=spec.layers[0].attention.scale)
        sizes = {"vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size}
        self._layers = [
            DecoderLayer(
                spec,
                index,
                dtype=dtype,
                kernels=kernels,
                attention=attention,
                cos_sin=self._cos_sin,
                method=method,
            )
            for index in range(spec.num_layers)
        ]
        self._norm = RMSNorm(
            "model.norm",
            size=spec.hidden_size,
            eps=spec.norm.eps,
            dtype=dtype,
            device=kernels.device,
        )
        name = "model.embed_tokens"
        self._embedding: Embedding | None = None
        if spec.tie_word_embeddings:  # one copy, packed, serves both ends
            method = UnquantizedLinearMethod(kernels)
        else:
            self._embedding = Embedding(name, **sizes, dtype=dtype, device=kernels.device)
            name = "lm_head"
        self._lm_head = create_lm_head(name, **sizes, dtype=dtype, method=method)

    def targets(self) -> Iterator[WeightTarget]:
        """Every tensor the model takes from a checkpoint."""
        if self._embedding is not None:
            yield from self._embedding.targets()
        for layer in self._layers:
            yield from layer.targets()
        yield from self._norm.targets()
        yield from self._lm_head.targets()

    def bind(self) -> None:
        """Call once, after every target has been loaded and before the first `forward`."""
        for layer in self._layers:
            layer.bind()
        self._logits = head = self._lm_head.bind()
        if self._embedding is not None:
            self._embed: Callable[[torch.Tensor], torch.Tensor] = self._embedding
        else:
            self._embed = head.rows
        norms = [layer.input_norm.weight for layer in self._layers] + [self._norm.weight]
        self._first_norm, self._next_norms = norms[0], norms[1:]

    @property
    def weight_bytes(self) -> int:
        """What the weights hold in memory, but for the zeros around packed matrices' edges."""
        return sum(math.prod(target.shape) for target in self.targets()) * self.dtype.itemsize

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        attn: AttentionMetadata,
        kv_cache: KVCache,
    ) -> torch.Tensor:
        """Hidden states after the final norm, and this step's keys and values in the cache.

        input_ids, positions: [T] int64, ids below vocab_size and positions below max_model_len (not
        checked here). Returns [T, hidden_size] in the model's dtype.
        """
        kernels, eps = self._kernels, self.spec.norm.eps
        heads = self.spec.layers[0].attention
        out = torch.empty(
            input_ids.shape[0], heads.q_size, dtype=self.dtype, device=input_ids.device
        )
        step = _Step(
            positions=positions,
            metadata=attn,
            attention_out=out.view(-1, heads.num_heads, heads.head_dim),
            attention_rows=out,
        )
        residual = self._embed(input_ids)
        x = kernels.rms_norm(residual, self._first_norm, eps)
        for layer, cache, next_norm in zip(
            self._layers, kv_cache.layers, self._next_norms, strict=True
        ):
            x = layer.forward(x, residual, cache, step)
            x = kernels.add_rms_norm(x, residual, next_norm, eps)
        return x

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, hidden_size], the rows that sample. Returns [R, vocab_size] float32."""
        return self.logits(hidden).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same in the model's dtype, in which they were rounded anyway."""
        return self._logits(hidden)

    def over(self, kv_cache: KVCache) -> DecoderPass:
        """The pass with this cache: one call where the kernels have one for these weights, else layer
        by layer. The bits are the same.
        """
        layers = zip(self._layers, kv_cache.layers, strict=True)
        weights = [layer.weights(cache) for layer, cache in layers]
        complete = tuple(layer for layer in weights if layer is not None)
        if len(complete) == len(weights) and isinstance(self._logits, CProduct):
            fused = self._kernels.decoder(
                DecoderWeights(
                    layers=complete,
                    embedding=None if self._embedding is None else self._embedding.weight,
                    final_norm=self._norm.weight,
                    head=self._logits,
                    cos_sin=self._cos_sin,
                    eps=self.spec.norm.eps,
                    scale=self.spec.layers[0].attention.scale,
                )
            )
            if fused is not None:
                return fused
        return _LayerByLayer(self, kv_cache)


class _LayerByLayer:
    """`DecoderPass` by `DecoderModel.forward`."""

    def __init__(self, model: DecoderModel, kv_cache: KVCache) -> None:
        self._model = model
        self._kv_cache = kv_cache

    def forward(self, rows: StepRows) -> torch.Tensor:
        return self._model.compute_logits(self.hidden(rows))

    def hidden(self, rows: StepRows) -> torch.Tensor:
        input_ids, metadata = gather(rows, self._kv_cache.block_size)
        hidden = self._model.forward(input_ids, metadata.positions, metadata, self._kv_cache)
        ends, wanted = metadata.query_start_loc[1:].tolist(), rows.rows[: rows.num_rows, 3].tolist()
        picked = [np.arange(end - count, end) for end, count in zip(ends, wanted, strict=True)]
        return hidden[torch.from_numpy(np.concatenate(picked))]


def gather(rows: StepRows, block_size: int) -> tuple[torch.Tensor, AttentionMetadata]:
    """A step's input ids, [T] int64, and what attention needs to know."""
    seats, starts, counts, _ = rows.rows[: rows.num_rows].T
    ends = np.cumsum(counts)
    first = ends - counts  # index in the step of each row's first token
    row_of = np.repeat(np.arange(len(ends)), counts)
    positions = np.arange(ends[-1]) - (first - starts)[row_of]
    seat_of = seats[row_of]
    blocks = rows.block_ids[seat_of, positions // block_size].astype(np.int64)
    seq_lens = starts + counts
    width = -(-int(seq_lens.max()) // block_size)
    query_start_loc = np.zeros(len(ends) + 1, dtype=np.int32)
    query_start_loc[1:] = ends
    return torch.from_numpy(rows.token_ids[seat_of, positions]), AttentionMetadata(
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(blocks * block_size + positions % block_size),
        query_start_loc=torch.from_numpy(query_start_loc),
        seq_lens=torch.from_numpy(seq_lens.astype(np.int32)),
        block_table=torch.from_numpy(rows.block_ids[seats, :width]),
    )
