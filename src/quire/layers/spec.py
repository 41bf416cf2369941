"""The parts of a model as plain data; torch-free. `quire.models.spec` puts parts together.

A default is the neutral value, that of a plain Llama layer. Sizes are numbers of elements, not bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from quire.layers.share import WHOLE, Share, spans
from quire.quantization.base import LinearPart, LinearShape

if TYPE_CHECKING:
    from quire.kernels.ops import Activation

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding, with every default of its type already filled in.

    A field that a type does not use keeps its neutral default, so two specs that rotate alike compare equal.
    The formulas are in `quire.layers.rotary`.
    """

    rotary_dim: int
    """The number of dimensions of a head that rotate: the first ones. Even; the others are not changed."""
    type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    """How much longer the context is than the one trained on (linear, dynamic, llama3, yarn)."""
    original_max_position_embeddings: int = 0
    """Tokens of context before scaling (llama3, yarn, longrope); for dynamic, where scaling begins."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin (yarn and longrope; already derived where the config does not give it)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    """longrope's divisor of each frequency within `original_max_position_embeddings`: rotary_dim / 2
    numbers."""
    long_factors: tuple[float, ...] = ()
    """The same beyond `original_max_position_embeddings`."""
    rounded: bool = True
    """Whether cos and sin are rounded to the model's dtype (all but OLMo 2 and 3)."""

    def table_bytes(self, max_model_len: int) -> int:
        """Memory of cos and sin for every position."""
        return 4 * max_model_len * self.rotary_dim


NormOrder = Literal["round_then_scale", "scale_then_round"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMSNorm: normalized in float32, then scaled by the weight and rounded to the model's dtype."""

    eps: float
    order: NormOrder = "round_then_scale"
    """Llama rounds the normalized value and multiplies in the model's dtype; Gemma and OLMo multiply in
    float32 and round once."""
    plus_one: bool = False
    """The checkpoint stores the weight minus one, and 1 + w is computed in float32 (Gemma)."""


class QueryTemperature(NamedTuple):
    """Queries are multiplied by 1 + beta * ln(1 + floor(position / original_length)), after they rotate
    (Llama 4, Ministral 3)."""

    beta: float
    original_length: int


class HeadShape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


QKNorm = Literal["none", "head", "whole"]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Causal softmax attention with grouped queries."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Multiplies the scores, before `softcap`."""
    window: int | None = None
    """The number of tokens that a query sees, itself included; None: all before it."""
    rope: int | None = 0
    """Which of `ModelSpec.ropes`; None rotates nothing (NoPE)."""
    softcap: float = 0.0
    """Scores become softcap * tanh(score / softcap); 0 leaves them."""
    qk_norm: QKNorm = "none"
    """An RMSNorm of queries and keys before they rotate: over each head, or over all heads together."""
    qkv_bias: bool = False
    o_bias: bool = False
    fused_qkv: bool = False
    """The checkpoint holds q, k and v as one matrix, `qkv_proj`."""
    query_temperature: QueryTemperature | None = None
    fused_input: bool = False
    """Queries, keys and values are made of two vectors of the hidden size, side by side (EAGLE-3)."""

    @property
    def heads(self) -> HeadShape:
        return HeadShape(self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def q_size(self) -> int:
        return self.heads.q_size

    @property
    def kv_size(self) -> int:
        return self.heads.kv_size

    def own_heads(self, share: Share) -> tuple[range, range]:
        """The query heads and KV heads of a rank."""
        kv = share.kv_heads(self.num_kv_heads)
        return share.q_heads(self.num_heads, self.num_kv_heads), kv

    def linears(
        self, prefix: str, hidden_size: int, share: Share = WHOLE
    ) -> tuple[LinearShape, LinearShape]:
        """The projections that make queries, keys and values, and the output projection. prefix: of their
        names."""
        q, kv = (
            range(heads.start * self.head_dim, heads.stop * self.head_dim)
            for heads in self.own_heads(share)
        )
        sizes = {"q_proj": self.q_size, "k_proj": self.kv_size, "v_proj": self.kv_size}
        fused = "qkv_proj" if self.fused_qkv else None
        qkv = _parts(prefix, sizes, (q, kv, kv), share, fused)
        o = (LinearPart(f"{prefix}.o_proj", hidden_size, share.columns(hidden_size)),)
        inputs = 2 * hidden_size if self.fused_input else hidden_size
        return (
            LinearShape(inputs, qkv, bias=self.qkv_bias),
            LinearShape(self.q_size, o, bias=self.o_bias),
        )


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """down(activation(gate(x)) * up(x))."""

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False
    """Whether all three projections have a bias."""
    fused_gate_up: bool = False
    """The checkpoint holds gate and up as one matrix, `gate_up_proj`."""

    def linears(
        self, prefix: str, hidden_size: int, share: Share = WHOLE
    ) -> tuple[LinearShape, LinearShape]:
        """The gate and up projections, and the down projection. prefix: of their names."""
        inner = self.intermediate_size
        sizes = {"gate_proj": inner, "up_proj": inner}
        fused = "gate_up_proj" if self.fused_gate_up else None
        gate_up = _parts(prefix, sizes, (share.columns(inner),) * 2, share, fused)
        down = (LinearPart(f"{prefix}.down_proj", hidden_size, share.columns(hidden_size)),)
        return (
            LinearShape(hidden_size, gate_up, bias=self.bias),
            LinearShape(inner, down, bias=self.bias),
        )


def _parts(
    prefix: str, sizes: dict[str, int], own: tuple[range, ...], share: Share, fused: str | None
) -> tuple[LinearPart, ...]:
    """The parts of a stack. sizes: of each matrix; own: its outputs that the rank computes. fused: the name
    of the one matrix that the checkpoint has for all of them."""
    if fused is None:
        items = zip(sizes.items(), own, strict=True)
        return tuple(LinearPart(f"{prefix}.{name}", size, rows) for (name, size), rows in items)
    name, total = f"{prefix}.{fused}", sum(sizes.values())
    if share.size == 1:
        return (LinearPart(name, total),)
    return tuple(LinearPart(name, total, rows) for rows in spans(tuple(sizes.values()), own))
