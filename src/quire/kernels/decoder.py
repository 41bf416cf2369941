"""What a decoder's forward pass needs beside its inputs, for kernels that can run all of it in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.cpu.linear import CProduct


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One pre-norm decoder layer with its slice of the KV cache."""

    input_norm: Tensor
    """[hidden]"""
    qkv: CProduct
    q_norm: Tensor | None
    """[head_dim]"""
    k_norm: Tensor | None
    o: CProduct
    post_norm: Tensor
    gate_up: CProduct
    down: CProduct
    k_cache: Tensor
    """As `kv_cache_shapes`; all layers' alike."""
    v_cache: Tensor
    window: int
    """Keys a query sees, its own included; 0 for all."""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    layers: tuple[LayerWeights, ...]
    embedding: Tensor | None
    """[vocab_size, hidden], or None where the head's rows serve."""
    final_norm: Tensor
    head: CProduct
    cos_sin: Tensor
    """[max_position, rotary_dim] float32: cosines, then sines."""
    eps: float
    scale: float
    """Of attention scores."""


@dataclass(slots=True)
class StepRows:
    """A step's rows: who computes which tokens.

    All arrays stay where they are from step to step, and a pass may keep their addresses. While a step of
    a large model runs, its weights push Python out of the cache, and every object that is touched
    afterwards costs a microsecond: so there are few.
    """

    token_ids: NDArray[np.int64]
    """[seats, max_tokens]: known tokens of the request in each seat."""
    block_ids: NDArray[np.int32]
    """[seats, max_blocks]: its blocks in order."""
    rows: NDArray[np.int64]
    """[max_rows, 4]: seat (none twice), first token to compute, number of tokens (at least 1), and of how
    many of these, the last ones, the result is wanted."""
    num_rows: int = 0
    """How many of `rows` are this step's; at most max_rows."""
    num_wanted: int = 0
    """How many results they want in all."""


class DecoderPass(Protocol):
    """A whole forward pass over one model and one cache."""

    def forward(self, rows: StepRows) -> Tensor:
        """Every token's keys and values in the cache, and the logits of those wanted, in the order of the
        rows: [R, vocab_size] float32, good until the next call.

        Raises `KernelArgumentError`, with nothing written, for an index out of range.
        """
        ...

    def hidden(self, rows: StepRows) -> Tensor:
        """The same, but instead of logits what they are made of: the hidden states after the final norm,
        [R, hidden_size] in the model's dtype."""
        ...
