"""What a model is, in numbers: resolved once from `config.json`, read by everyone, torch-free.

The HTTP front end, the scheduler's memory ledger and the simulator all need a model's sizes and none
of them may pay for importing torch, so a `ModelSpec` holds plain Python values only. Everything a family's
config can say has been decided by the time one exists: no field is optional "because the config left it out".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding, with every default of its type already filled in.

    A field that a type does not use keeps its neutral default, so two specs that rotate alike compare equal.
    The formulas are in `quire.layers.rotary`.
    """

    type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    """How much longer the context is than the one trained on (linear, dynamic, llama3, yarn)."""
    original_max_position_embeddings: int = 0
    """Context length before scaling (llama3, yarn); for dynamic, where scaling begins. In tokens."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin (yarn's temperature, already derived from mscale where the config
    gives that).
    """
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only transformer. Sizes are counts of elements, never bytes."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeSpec
    context_length: int
    """Positions that a request may use; `quire.models.context` derives it."""
    context_source: str
    """What in the config says so, for messages."""
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    """Per layer: how many tokens a query sees, itself included; None sees everything before it."""
    has_head: bool
    """False: a base model saved alone, which gives hidden states and no logits."""
    checkpoint_dtype: str | None
    """The config's own dtype: "bfloat16", "float16" or "float32"; None where it names none."""
    default_eos_token_ids: tuple[int, ...]
    """What transformers' config class assumes to end a text. It counts only where no file names any:
    `quire.engine.end_tokens` joins what the files say."""

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def num_parameters(self) -> int:
        """Trained values, counting a tied embedding once."""
        qkv_out = self.q_size + 2 * self.kv_size
        layer = self.hidden_size * (qkv_out + self.q_size + 3 * self.intermediate_size)
        layer += 2 * self.hidden_size
        layer += qkv_out if self.qkv_bias else 0
        layer += self.hidden_size if self.o_bias else 0
        layer += 2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
        layer += 2 * self.head_dim if self.qk_norm else 0
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_layers * layer + self.hidden_size

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Memory the loaded model holds: every parameter once, a tied embedding too."""
        return self.num_parameters() * dtype_bytes

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Keys and values of one token in all layers.

        A sliding window does not shrink this: blocks hold every layer.
        """
        return 2 * self.num_layers * self.kv_size * dtype_bytes
