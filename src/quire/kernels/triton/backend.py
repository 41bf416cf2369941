"""The Triton kernels behind the protocol that models call, and how matrices are held and multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.kernels.base import KVCacheShapes
from quire.kernels.checks import require
from quire.kernels.codes import CodeFormat
from quire.kernels.dequantize import SideBySide
from quire.kernels.group import Group
from quire.kernels.ops import Activation, LinearProduct
from quire.kernels.program import CachePart, Program
from quire.kernels.triton import attention, layers
from quire.kernels.triton.codes import TritonCodes
from quire.kernels.triton.lora import DeviceAdapters
from quire.kernels.triton.matmul import matmul


class TritonKernels:
    """`LayerKernels` on one GPU. What is a step's own (the batch, sampling) is not here but in
    `runner.gpu_step`, which calls it directly."""

    name = "triton"

    def __init__(self, device: torch.device, *, batch_invariant: bool = False) -> None:
        """batch_invariant: attention of a token takes one path whether its request decodes or prefills, and
        matrices are multiplied by our own kernel.
        """
        self.device = device
        self.batch_invariant = batch_invariant
        self._product = matmul if batch_invariant else F.linear
        self._workspace = torch.empty(0, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def linear(
        self, *, in_features: int, out_features: int, dtype: torch.dtype, bias: bool
    ) -> RowMajorProduct:
        return RowMajorProduct(
            in_features, out_features, dtype, bias=bias, device=self.device, product=self._product
        )

    def codes(
        self,
        form: CodeFormat,
        *,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        bias: bool,
    ) -> TritonCodes:
        return TritonCodes(
            form,
            in_features,
            out_features,
            dtype,
            bias=bias,
            device=self.device,
            invariant=self.batch_invariant,
        )

    stack = SideBySide

    def adapters(
        self,
        products: Sequence[LinearProduct],
        *,
        dtype: torch.dtype,
        capacity: int,
        max_rank: int,
        parts: Sequence[Sequence[int]],
    ) -> DeviceAdapters:
        return DeviceAdapters(
            products,
            dtype=dtype,
            capacity=capacity,
            max_rank=max_rank,
            parts=parts,
            device=self.device,
        )

    def kv_cache_shapes(
        self,
        *,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> KVCacheShapes:
        """[num_blocks, num_kv_heads, block_size, head_dim] for both: a tile of one head's keys is one
        contiguous piece. Zeroed, because FlashAttention-4 documents that it loads whole tiles."""
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        return KVCacheShapes(k=shape, v=shape, zeroed=True)

    def reserve(
        self,
        k_cache: Tensor,
        *,
        q_heads: int,
        max_requests: int,
        max_len: int,
        windows: Iterable[int],
    ) -> None:
        """Attention's workspace, for steps up to this size: once, since graphs keep its address. windows: of
        the layers, 0 for those without.
        """
        need = max(
            attention.workspace_floats(
                k_cache,
                q_heads=q_heads,
                max_requests=max_requests,
                max_len=max_len,
                window=window,
                invariant=self.batch_invariant,
            )
            for window in windows
        )
        if need > self._workspace.numel():
            self._workspace = torch.empty(need, dtype=torch.float32, device=self.device)
        heads = max_requests * k_cache.shape[1]
        if heads > self._arrived.numel():
            self._arrived = torch.zeros(heads, dtype=torch.int32, device=self.device)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
    ) -> Tensor:
        return layers.rms_norm(x, weight, eps, out)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return layers.add_rms_norm(x, residual, weight, eps)

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
        layers.rope_write_kv(
            qkv,
            positions,
            cos_sin,
            k_cache,
            v_cache,
            slot_mapping,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            k_scale=None if kv_scales is None else kv_scales[0],
            v_scale=None if kv_scales is None else kv_scales[1],
        )

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
        if out is None:
            out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        attention.paged_attention(
            q,
            k_cache,
            v_cache,
            block_table,
            query_start_loc,
            seq_lens,
            scale=scale,
            max_query_len=q.shape[0] if max_query_len is None else max_query_len,
            min_query_len=min_query_len,
            window=window,
            softcap=softcap,
            invariant=self.batch_invariant,
            k_scale=None if kv_scales is None else kv_scales[0],
            v_scale=None if kv_scales is None else kv_scales[1],
            out=out,
            workspace=self._workspace,
            arrived=self._arrived if self._arrived.numel() else None,
        )
        return out

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return layers.gated(gate_up, activation)

    def add(self, x: Tensor, residual: Tensor, *, scale: float = 1.0) -> None:
        layers.add(x, residual, scale=scale)

    def scale(self, x: Tensor, factor: float) -> None:
        layers.scale(x, factor)

    def scale_by_position(self, x: Tensor, positions: Tensor, table: Tensor) -> None:
        layers.scale_by_position(x, positions, table)

    def finish_logits(
        self, logits: Tensor, dtype: torch.dtype, *, divisor: float = 1.0, cap: float = 0.0
    ) -> None:
        require(logits.dtype is dtype, f"logits are {logits.dtype}, the model's dtype is {dtype}")
        layers.finish_logits(logits, divisor=divisor, cap=cap)

    def compile(
        self, program: Program, caches: Sequence[CachePart], group: Group | None = None
    ) -> None:
        return None


class RowMajorProduct:
    """A matrix as it is, [out_features, in_features]. product: of x, weight and bias, as `F.linear`."""

    __slots__ = ("bias", "in_features", "out_features", "product", "weight")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        *,
        bias: bool,
        device: torch.device,
        product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.product = product
        self.weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None

    def fill(self, first: int, weight: Tensor) -> None:
        self.weight[first : first + len(weight)].copy_(weight)

    def fill_bias(self, first: int, bias: Tensor) -> None:
        assert self.bias is not None, "made without bias"
        self.bias[first : first + len(bias)].copy_(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        return layers.embedding(ids, self.weight)
