"""The operations that a model's forward pass is made of.

A model is written once, as calls of these operations. `EagerOps` (quire.layers.eager) computes each call
at once, on tensors. `ProgramOps` (quire.kernels.program) computes nothing: it records the calls, on
numbered buffers, as a program that one C function carries out. Both give the same bits.

A buffer holds one row for each token of the step (after `keep_wanted`: for each wanted token). An operation
that changes a buffer in place says so; all others give a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from torch import Tensor

Buf = TypeVar("Buf")
Activation = Literal["silu", "gelu_tanh"]
"""Of an MLP's gate. gelu_tanh is the tanh form of GELU (Hendrycks and Gimpel 2016, section 2):
`0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))`."""


class LinearProduct(Protocol):
    """`x @ weight.T + bias`, the weight in any format; row i of the result is the same bits for every number
    of rows. One that C code can compute on its own is also a `kernels.cpu.linear.CProduct`."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, in_features]. Returns [M, out_features]."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, as an embedding looks them up. ids: [T]. Returns [T, in_features]."""
        ...


@dataclass(frozen=True, slots=True)
class NormWeight:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension."""

    weight: Tensor
    """[N]. In the model's dtype: the normed value is rounded before it is scaled, as in Llama. In float32: it
    is scaled first and rounded once, as in Gemma."""
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """The data of an attention layer, besides its products."""

    part: int
    """Of the KV cache's blocks: the layer's own."""
    group: int
    """Whose block tables it uses, see `quire.kv_layout`."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cos_sin: Tensor
    """[max_position, R] float32: R/2 cosines, then R/2 sines; R = 0 rotates nothing."""
    q_norm: NormWeight | None
    """[head_dim]: of each head, before it rotates. Both or none, of one dtype and eps."""
    k_norm: NormWeight | None
    window: int
    """Number of keys that a query sees, its own included; 0 for all."""
    scale: float
    softcap: float
    """0: none."""

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def norm_eps(self) -> float:
        """Of both norms; 0 where there are none."""
        return 0.0 if self.q_norm is None else self.q_norm.eps


@dataclass(frozen=True, slots=True)
class Head:
    """From a hidden state to logits: the product, rounded; divided by `divisor`; and with c = softcap > 0
    made c * tanh(logits / c). Each operation rounds to the model's dtype."""

    product: LinearProduct
    divisor: float = 1.0
    softcap: float = 0.0
    first: int = 0
    """Of a rank of a group: its first token, and the number of tokens of all ranks."""
    width: int = 0


class Ops(Protocol[Buf]):
    """The operations. H: hidden size; T: rows; `round` is to the model's dtype."""

    def embed(self, embedding: LinearProduct | Tensor, starts: Sequence[int] = (0,)) -> Buf:
        """Rows of the matrix for the step's token ids: [T, H]. A product's rows are used if head and
        embedding are one matrix. starts: the first token of each rank's rows; each row is its owner's."""
        ...

    def receive(self, width: int) -> Buf:
        """The residual that the stage before this one has sent: [T, width]."""
        ...

    def send(self, x: Buf) -> Buf:
        """x, all rows, as it is sent to the next stage. Nothing follows."""
        ...

    def gather(self, x: Buf, first: int, width: int) -> Buf:
        """x: [T, n], this rank's columns from `first` on -> [T, width], those of all ranks, which must not be
        changed. x itself if it has them all."""
        ...

    def columns(self, x: Buf, first: int, width: int) -> Buf:
        """A copy of some columns: [T, width]."""
        ...

    def put_columns(self, x: Buf, first: int, width: int, target: Buf, at: int) -> None:
        """Some columns of x replace those of `target` from `at` on."""
        ...

    def norm(self, x: Buf, norm: NormWeight) -> Buf:
        """x: [T, N] -> [T, N]."""
        ...

    def norm_columns(self, x: Buf, norm: NormWeight, first: int) -> None:
        """In place, columns [first, first + N) of each row as one vector (OLMo 2's norm of all query
        heads)."""
        ...

    def linear(self, x: Buf, product: LinearProduct, label: str) -> Buf:
        """x: [T, in_features] -> [T, out_features]. label: for profiles."""
        ...

    def rope_write_kv(self, qkv: Buf, layer: AttentionLayer) -> None:
        """Norm and rotate the queries of a fused projection in place; norm and rotate its keys, and write
        keys and values to the layer's cache. Before anyone attends: a token sees those before it in the
        same step."""
        ...

    def scale_by_position(self, x: Buf, width: int, table: Tensor) -> None:
        """In place: the first `width` columns of row t become round(x * table[position of t])."""
        ...

    def attend(self, qkv: Buf, layer: AttentionLayer) -> Buf:
        """Causal attention of the step's queries over their requests' keys: [T, q_size]."""
        ...

    def gated(self, gate_up: Buf, activation: Activation) -> Buf:
        """round(activation(gate)) * up. gate_up: [T, 2F], gate first -> [T, F]."""
        ...

    def add(self, residual: Buf, x: Buf, *, scale: float = 1.0) -> Buf:
        """round(residual + round(x * scale)), in place of `residual`, which is returned. x must not be
        used again."""
        ...

    def scale(self, x: Buf, factor: float) -> Buf:
        """round(x * factor), in place of x, which is returned."""
        ...

    def tap(self, x: Buf) -> None:
        """Copy x, [T, N], to the next columns of what the pass leaves beside its result
        (`ForwardPass.tapped`). Before `keep_wanted`."""
        ...

    def keep_wanted(self, *bufs: Buf) -> Sequence[Buf]:
        """The same buffers, reduced to the tokens whose result is wanted. For the last layer, after all
        tokens' keys and values have been written."""
        ...
