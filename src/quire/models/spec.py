"""What a model is, in numbers: resolved once from `config.json`, read by everyone, torch-free.

The HTTP front end, the scheduler's memory ledger and the simulator all need a model's sizes and none
of them may pay for importing torch, so a `ModelSpec` holds plain Python values only. Everything a family's
config can say has been decided by the time one exists: no field is optional "because the config left it out".

A model is a stack of `LayerSpec`, each with its own attention and MLP. A default in these classes is the
neutral value: what a plain Llama layer has. Sizes are counts of elements, never bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from quire.errors import ConfigError
from quire.kv_layout import KVLayout, group_layers
from quire.layers.share import WHOLE, Share, can_divide
from quire.layers.spec import AttentionSpec, HeadShape, MlpSpec, NormSpec, RopeSpec
from quire.quantization.base import LinearMethod, LinearPart, LinearShape
from quire.quantization.matrix import is_quantized
from quire.quantization.unquantized import UNQUANTIZED
from quire.weights.names import EMBEDDING

Placement = Literal["pre", "post", "sandwich"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Attention, then MLP, each added to the residual stream."""

    placement: Placement
    """Where the norms are: on the inputs of attention and MLP (Llama), on their outputs (OLMo 2 and 3), or on
    both (Gemma 2 and 3)."""
    attention: AttentionSpec
    mlp: MlpSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    """Of every norm in the model."""
    ropes: tuple[RopeSpec, ...]
    context_length: int
    """Positions that a request may use; `quire.models.context` derives it."""
    context_source: str
    """What in the config says so, for messages."""
    tie_word_embeddings: bool
    checkpoint_dtype: str | None
    """The config's own dtype: "bfloat16", "float16" or "float32"; None where it names none."""
    default_eos_token_ids: tuple[int, ...]
    """What transformers' config class assumes to end a text. It counts only where no file names any:
    `quire.engine.end_tokens` joins what the files say."""
    has_head: bool = True
    """False: a base model saved alone, which gives hidden states and no logits."""
    embed_scale: float = 1.0
    """Multiplies the embeddings (Gemma: the square root of the hidden size; Granite)."""
    embed_scale_rounded: bool = False
    """Whether `embed_scale` is rounded to the model's dtype first (Gemma)."""
    residual_scale: float = 1.0
    """Multiplies what attention and MLP add to the residual stream (Granite)."""
    logits_divisor: float = 1.0
    """Divides the logits (Granite)."""
    logits_softcap: float = 0.0
    """Logits become softcap * tanh(logit / softcap); 0 leaves them (Gemma 2)."""
    num_draft_layers: int = 0
    """Layers for multi-token prediction that the checkpoint has beside the model's."""
    quantization: LinearMethod = UNQUANTIZED
    """How the checkpoint stores the matrices of linear layers."""
    keeps_all: bool = False
    """Whether layers with a window keep all tokens too: then there is one group of layers, as a draft model
    needs, which has the block table of another model."""
    share: Share = WHOLE
    """The part of one rank. Bytes, products and `heads` are those of the part; all other fields describe the
    whole."""
    stage: range | None = None
    """The layers of one stage of a pipeline (`quire.models.stages`); None: all. Bytes, products and the
    places of `kv` are those of the stage, which has the embedding if it is first, norm and head if last."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def own_layers(self) -> range:
        return range(self.num_layers) if self.stage is None else self.stage

    @property
    def is_first(self) -> bool:
        return self.own_layers.start == 0

    @property
    def is_last(self) -> bool:
        return self.own_layers.stop == self.num_layers

    @property
    def has_logits(self) -> bool:
        """Whether it has the head's matrix: to compute logits, or because the embedding is tied to it."""
        return self.is_last or (self.is_first and self.tie_word_embeddings)

    @property
    def heads(self) -> HeadShape:
        """Of every layer: the KV cache has one shape, and so has every family so far."""
        shapes = {layer.attention.heads for layer in self.layers}
        assert len(shapes) == 1, shapes
        q, kv = self.layers[0].attention.own_heads(self.share)
        return HeadShape(len(q), len(kv), shapes.pop().head_dim)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's attention window."""
        return tuple(layer.attention.window for layer in self.layers)

    @property
    def kv(self) -> KVLayout:
        """Which layers keep which keys and values, and how they share blocks."""
        windows = [None] * self.num_layers if self.keeps_all else self.windows
        return group_layers(windows, 2 * self.heads.kv_size).only(self.own_layers)

    def divided(self, rank: int, size: int) -> ModelSpec:
        """The part of one of `size` ranks. Raises `ConfigError` if some rank had no part of a matrix."""
        smallest = min(self.hidden_size, *(layer.mlp.intermediate_size for layer in self.layers))
        attention = [layer.attention for layer in self.layers]

        def works(size: int) -> bool:
            heads = all(can_divide(each.num_heads, each.num_kv_heads, size) for each in attention)
            return heads and size <= min(smallest, self.vocab_size)

        if not works(size):
            first = attention[0]
            known = ", ".join(str(n) for n in range(1, first.num_heads + 1) if works(n))
            raise ConfigError(
                f"tensor_parallel_size is {size}, but {self.architecture} has {first.num_heads} query heads "
                f"and {first.num_kv_heads} key and value heads, which can be divided among {known}; use one "
                "of these."
            )
        return replace(self, share=Share(rank, size))

    @property
    def whole(self) -> ModelSpec:
        return replace(self, share=WHOLE, stage=None)

    def num_parameters(self) -> int:
        """Trained values, counting a tied embedding once."""
        linears = sum(linear.num_parameters for linear in self.linears())
        return linears + self._other_parameters()

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Memory the loaded model holds: every parameter once, a tied embedding too.

        dtype_bytes: of an element of the model's dtype; matrices are as large as their format makes them.
        """
        linears = sum(
            self.quantization.weight_bytes(linear, dtype_bytes) for linear in self.linears()
        )
        return linears + self._other_parameters() * dtype_bytes

    def linears(self) -> Iterator[LinearShape]:
        """Every product of the model."""
        for index in self.own_layers:
            layer, prefix = self.layers[index], f"model.layers.{index}"
            yield from layer.attention.linears(f"{prefix}.self_attn", self.hidden_size, self.share)
            yield from layer.mlp.linears(f"{prefix}.mlp", self.hidden_size, self.share)
        if self.has_logits:
            yield self.head
        if self.embedding is not None:
            yield self.embedding

    @property
    def head(self) -> LinearShape:
        """The product that turns a hidden state into logits. A tied one is also where tokens' embeddings are
        looked up."""
        name = EMBEDDING if self.tie_word_embeddings else "lm_head"
        return self._of_tokens(name)

    @property
    def embedding(self) -> LinearShape | None:
        """The product in which tokens' embeddings are looked up, if it is not the head and their matrix is
        quantized."""
        is_product = is_quantized(self.quantization, EMBEDDING) and not self.tie_word_embeddings
        return self._of_tokens(EMBEDDING) if is_product and self.is_first else None

    def _of_tokens(self, name: str) -> LinearShape:
        part = LinearPart(name, self.vocab_size, self.share.columns(self.vocab_size))
        return LinearShape(self.hidden_size, (part,), bias=False)

    def _other_parameters(self) -> int:
        """Of norms, and of an embedding that is no product."""
        is_product = self.tie_word_embeddings or self.embedding is not None
        rows = len(self.share.columns(self.vocab_size)) if self.is_first and not is_product else 0
        return rows * self.hidden_size + self.norm_parameters()

    def norm_parameters(self) -> int:
        own = [self.layers[index] for index in self.own_layers]
        norms = sum(_norm_parameters(layer, self.hidden_size) for layer in own)
        return norms + self.is_last * self.hidden_size

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Keys and values of one token in all layers. A layer with a sliding window keeps those of its window
        only: see `kv`.
        """
        return 2 * len(self.own_layers) * self.heads.kv_size * dtype_bytes


def _norm_parameters(layer: LayerSpec, hidden_size: int) -> int:
    attention = layer.attention
    qk_norms = {
        "none": 0,
        "head": 2 * attention.head_dim,
        "whole": attention.q_size + attention.kv_size,
    }
    return (4 if layer.placement == "sandwich" else 2) * hidden_size + qk_norms[attention.qk_norm]
