"""The operations that a forward pass is made of.

The contract is invariance: the result of an operation for one row (a token, a head, a request) has the same
bits whatever other rows are in the call, however a request's tokens were cut into calls, and whichever thread
computes it. All guarantees of exactness depend on it.

All tensors are on `Kernels.device`. `dtype` is float32, bfloat16 or float16; arithmetic is in float32 and a
store rounds to nearest even. Tensors are contiguous unless a docstring says otherwise. A call with a
wrong dtype, shape or stride raises `KernelArgumentError` before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.codes import CodeFormat
from quire.kernels.dequantize import Scales
from quire.kernels.fields import PackedCodes
from quire.kernels.group import Group
from quire.kernels.lora import AdapterSet
from quire.kernels.ops import Activation, LinearProduct
from quire.kernels.program import CachePart, ForwardPass, Program
from quire.kernels.sampling import SampledTokens


@dataclass(frozen=True, slots=True)
class KVCacheShapes:
    """The shapes of one layer's cache tensors, the first dimension being num_blocks. An implementation
    chooses what a block looks like: `kernels/cpu/layout.py`, `kernels/triton/backend.py`.
    """

    k: tuple[int, ...]
    v: tuple[int, ...]
    zeroed: bool = False
    """Whether the memory must be zeros at first: kernels load whole blocks and multiply the slots past the
    end of a sequence by 0. That is NaN where the memory happened to hold NaN."""


class DenseProduct(LinearProduct, Protocol):
    """A product over a matrix of floats, to be filled."""

    def fill(self, first: int, weight: Tensor) -> None:
        """Rows [first, first + len(weight)) of the matrix, [rows, in_features] on the CPU; copied. Called
        from several threads for different rows."""
        ...

    def fill_bias(self, first: int, bias: Tensor) -> None: ...


class CodesProduct(LinearProduct, Protocol):
    """A product over a matrix of codes, to be filled. Tensors are on the CPU and copied. Called from several
    threads, for different rows or columns."""

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs, results and bias."""
        ...

    def fill_codes(self, row: int, column: int, codes: Tensor) -> None:
        """codes: [rows, columns] uint8, any strides, placed at `row` and `column`, a multiple of 8. The
        number of columns is one too, except at the matrix's end. Float8 codes are given as their bytes."""
        ...

    def fill_packed(self, row: int, packed: PackedCodes, rows: Tensor) -> None:
        """Codes of whole rows, as a file packs them. rows: [rows, bytes of a row] uint8, contiguous."""
        ...

    def fill_scales(self, row: int, scales: Scales) -> None:
        """Scales of all groups of some rows, from `row` on."""
        ...

    def fill_bias(self, first: int, bias: Tensor) -> None: ...

    def reorder(self, order: Tensor) -> None:
        """order: [in_features] integers. Column i of the matrix as filled was input i. It becomes column j
        with order[j] = i, and groups are of consecutive columns. Called once, after all codes were filled, if
        the format is `reordered`; scales are those of the new columns' groups."""
        ...


class LayerKernels(Protocol):
    """The operations that models are made of, and where they keep weights and cache."""

    @property
    def name(self) -> str:
        """ "native", "reference" or "triton"."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        ...

    def linear(
        self, *, in_features: int, out_features: int, dtype: torch.dtype, bias: bool
    ) -> DenseProduct:
        """A matrix to be filled, in the form that this implementation multiplies with."""
        ...

    def codes(
        self,
        form: CodeFormat,
        *,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        bias: bool,
    ) -> CodesProduct:
        """A matrix of codes to be filled. dtype: of inputs and results."""
        ...

    def stack(self, products: Sequence[LinearProduct]) -> LinearProduct:
        """Products over one input, filled, as one: their results side by side."""
        ...

    def kv_cache_shapes(
        self,
        *,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> KVCacheShapes: ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
    ) -> Tensor:
        """RMSNorm (Zhang and Sennrich 2019). The weight's dtype says where Hugging Face's module rounds.

        weight: [H]. In x's dtype: `round(weight * round(x / rms(x)))`, as in Llama. In float32 with x
        in 16 bits: `round(weight * (x / rms(x)))`, as in Gemma (with 1 already added) and OLMo 2.
        x: [T, H], or [T, heads, H] to norm each head; any token stride, so a view into a fused
        projection serves. out: of x's shape and dtype, any token stride; may be x itself. Else a new
        contiguous tensor. Returns out.
        """
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`add(x, residual)`, then `rms_norm(residual)`.

        x, residual: [T, H]. weight: [H], as in `rms_norm`. Returns [T, H].
        """
        ...

    def rope_write_kv(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
        kv_scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Rotate the queries of a fused projection in place; rotate its keys, and put keys and values
        into their slots.

        qkv: [T, (q_heads + 2 * kv_heads) * D], query heads, then key heads, then value heads, rows
        dense, any token stride; keys and values are left as they are. positions: [T] int64.
        cos_sin: [max_position, R] float32, R/2 cosines then R/2 sines; dimension i < R/2 is paired
        with i + R/2 ("neox", HF's rotate_half), dimensions from R on are not rotated; R is even and may
        be 0. Caches as `kv_cache_shapes`, same dtype as qkv. slot_mapping: [T] int64,
        `block_id * block_size + offset`; a negative slot is padding and stores nothing. q_norm, k_norm:
        [D], both in qkv's dtype or both in float32: each head is first `rms_norm`ed with them and eps, as
        in Qwen3 or in Gemma 3. kv_scales: for caches in float8_e4m3fn, and for no others: [num_kv_heads]
        float32 for keys and for values; a stored number times its head's scale is the number meant.
        """
        ...

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        max_query_len: int | None = None,
        min_query_len: int = 1,
        kv_scales: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of each request's query tokens over its blocks.

        q: [T, q_heads, D], heads dense, any token stride. block_table: [B, max_blocks] int32.
        query_start_loc: [B + 1] int32, from 0. seq_lens: [B] int32, keys each request has, its query
        tokens' included: query token t of request b is at position
        `seq_lens[b] - (start[b + 1] - start[b]) + (t - start[b])`. Decode and chunked prefill mix.
        window: with w > 0 a query at i sees keys i - w < j <= i; blocks wholly before the window of
        every query are not read. softcap: with c > 0 a score becomes c * tanh(score / c).
        kv_scales: as in `rope_write_kv`. max_query_len, min_query_len: most and fewest query tokens a
        request has, where the host knows; a GPU chooses by them.
        out: [T, q_heads, D] contiguous, else a new tensor. Returns out; rows from query_start_loc[B]
        on are left alone (zero in a new tensor). D <= 512.
        Slots past a request's length may hold any bits.
        """
        ...

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """`round(round(activation(gate)) * up)`. gate_up: [T, 2F], gate first. Returns [T, F]."""
        ...

    def add(self, x: Tensor, residual: Tensor, *, scale: float = 1.0) -> None:
        """`residual = round(residual + round(x * scale))` in place. x, residual: [T, H].

        scale: Granite's `residual_multiplier`, a float32.
        """
        ...

    def scale(self, x: Tensor, factor: float) -> None:
        """`x = round(x * factor)` in place. x: [T, N], any token stride. factor: a float32, of embeddings:
        Granite's `embedding_multiplier`; Gemma's is rounded to the model's dtype by the caller.
        """
        ...

    def scale_by_position(self, x: Tensor, positions: Tensor, table: Tensor) -> None:
        """`x[t] = round(x[t] * table[positions[t]])` in place: Ministral 3's query temperature.

        x: [T, N], any token stride: the query columns of a fused projection. positions: [T] int64.
        table: [max_position] float32, rounded to x's dtype by the caller.
        """
        ...

    def finish_logits(
        self, logits: Tensor, dtype: torch.dtype, *, divisor: float = 1.0, cap: float = 0.0
    ) -> None:
        """`x = round(x / divisor)`, then with cap c > 0 `x = round(round(tanh(round(x / c))) * c)`, in
        place. Granite's `logits_scaling` is a divisor, Gemma 2's `final_logit_softcapping` a cap.

        logits: [R, V] contiguous: float32 on a CPU, in dtype on a GPU. dtype: the model's, which the
        values are rounded to before, between and after.
        """
        ...

    def adapters(
        self,
        products: Sequence[LinearProduct],
        *,
        dtype: torch.dtype,
        capacity: int,
        max_rank: int,
        parts: Sequence[Sequence[int]],
    ) -> AdapterSet:
        """An empty set of adapters for a model with these products (`Program.products`). capacity: indices
        are below it. max_rank: of each matrix. parts: outputs of each matrix of each product.

        Raises `KernelArgumentError` if this implementation cannot.
        """
        ...

    def compile(
        self, program: Program, caches: Sequence[CachePart], group: Group | None = None
    ) -> ForwardPass | None:
        """A recorded forward pass as one call, bit-equal to its operations one by one; None if this
        implementation cannot. caches: of each layer. group: of the ranks whose parts the program has.
        """
        ...


class Kernels(LayerKernels, Protocol):
    """One implementation of every operation of a step."""

    def copy_blocks(
        self, caches: Sequence[tuple[Tensor, Tensor]], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Copy whole blocks, for copy-on-write. caches: (k_cache, v_cache) of each layer. pairs:
        (source, destination); no destination is a source or appears twice.
        """
        ...

    def philox_uniform(self, seed: int, position: int, n: int) -> Tensor:
        """The uniform numbers of one sampled position: [n] float32 in (0, 1), one a token id.

        A pure function of (seed, position, token id); see `quire.kernels.philox`. seed: 64 bits,
        two's complement accepted. position: 0 <= position < 2**64.
        """
        ...

    def sample(self, logits: Tensor, rows: NDArray[np.void] | None) -> SampledTokens:
        """One token a row: the most likely, or one drawn from the softmax of its filtered scores.

        logits: [R, V] float32, any row stride; not changed. rows: [R] `SAMPLE_ROW`, or None if all are
        greedy. Scores are (logit - best) / temperature, 0 for the best logit alone. Tokens are ordered by
        score, ties by id. In vLLM's order: min_p keeps scores that are not below log(min_p); top_k the
        first k; top_p, of what is left, tokens while the probability before them is below top_p. So
        top_k=1 is greedy. The best is always kept; a logit of -inf never is; those of +inf share the
        whole probability. The draw is by the Gumbel-max trick, with `philox_uniform` of the row's seed
        and position; its ties go to the lowest id too. A row with only -inf gives 0.
        """
        ...
