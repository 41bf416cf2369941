"""Attention with grouped queries (Ainslie et al. 2023) as a part of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from quire.kernels.base import LayerKernels
from quire.kernels.ops import AttentionLayer, Buf, NormWeight, Ops
from quire.kv_layout import KVPlace
from quire.layers.kv_scales import NAMES, KVScales
from quire.layers.linear import Linear
from quire.layers.norm import RMSNorm
from quire.layers.parameter import WeightTarget
from quire.layers.rotary import query_temperatures
from quire.layers.share import WHOLE, Share
from quire.layers.spec import AttentionSpec, NormSpec
from quire.quantization.base import LinearMethod
from quire.quantization.matrix import QuantizedMethod
from quire.quantization.stored import Entry


class _WholeNorm(NamedTuple):
    """Of all query heads together, or of all key heads."""

    norm: NormWeight
    first: int
    """Column of the projection that has the rank's own ones from there on."""
    own: range
    """Those, of the columns of all heads."""
    given: range
    """Of these, what the rank gives to the gather: several ranks may have the same head."""


class Attention:
    """The attention of one layer. Usable once every target has been loaded and `bind()` called."""

    def __init__(
        self,
        spec: AttentionSpec,
        prefix: str,
        *,
        place: KVPlace,
        hidden_size: int,
        norm: NormSpec,
        cos_sin: torch.Tensor,
        dtype: torch.dtype,
        kernels: LayerKernels,
        method: LinearMethod,
        share: Share = WHOLE,
    ) -> None:
        """cos_sin: [max_position, R], as in `AttentionLayer`."""
        self._qkv, self._o = (
            Linear(shape, dtype=dtype, method=method, kernels=kernels)
            for shape in spec.linears(prefix, hidden_size, share)
        )
        q_heads, kv_heads = spec.own_heads(share)
        self._mixed = (q_heads.start * spec.head_dim, spec.q_size)
        """First own column, and width of the whole."""
        self._hidden = (share.columns(hidden_size).start, hidden_size)
        entries: dict[str, Entry] = {}
        if isinstance(method, QuantizedMethod):
            for matrix in ("", ".k_proj", ".v_proj"):
                found = method.entries_of(prefix + matrix)
                entries |= {f"{matrix}.{each}"[1:]: entry for each, entry in found.items()}
        self.kv_scales = KVScales(
            prefix,
            {name: entries[name] for name in NAMES if name in entries},
            spec.num_kv_heads,
            kv_heads,
        )
        self._norms: dict[str, RMSNorm] = {}
        if spec.qk_norm != "none":
            sizes = (spec.q_size, spec.kv_size) if spec.qk_norm == "whole" else (spec.head_dim,) * 2
            for name, size in zip(("q_norm", "k_norm"), sizes, strict=True):
                self._norms[name] = RMSNorm(
                    f"{prefix}.{name}", size=size, spec=norm, dtype=dtype, device=kernels.device
                )
        norms = [norm.weight for norm in self._norms.values()]
        self._whole_norms: list[_WholeNorm] = []
        if spec.qk_norm == "whole":
            q, k = (
                range(heads.start * spec.head_dim, heads.stop * spec.head_dim)
                for heads in (q_heads, kv_heads)
            )
            given = share.k_columns(spec.num_kv_heads, spec.head_dim)
            self._whole_norms = [
                _WholeNorm(norms[0], 0, q, q),
                _WholeNorm(norms[1], len(q), k, given),
            ]
        q_norm, k_norm = norms if spec.qk_norm == "head" else (None, None)
        self._layer = AttentionLayer(
            part=place.part,
            group=place.group,
            num_heads=len(q_heads),
            num_kv_heads=len(kv_heads),
            head_dim=spec.head_dim,
            cos_sin=cos_sin,
            q_norm=q_norm,
            k_norm=k_norm,
            window=spec.window or 0,
            scale=spec.scale,
            softcap=spec.softcap,
        )
        self._temperatures: torch.Tensor | None = None
        if spec.query_temperature is not None:
            self._temperatures = query_temperatures(
                spec.query_temperature, max_model_len=cos_sin.shape[0], dtype=dtype
            ).to(kernels.device)

    def targets(self) -> Iterator[WeightTarget]:
        yield from self._qkv.targets()
        yield from self._o.targets()
        yield from self.kv_scales.targets()
        for norm in self._norms.values():
            yield from norm.targets()

    def bind(self) -> None:
        self._qkv_product, self._o_product = self._qkv.bind(), self._o.bind()

    def mix(self, ops: Ops[Buf], x: Buf) -> Buf:
        """Attention of each token over those before it, of the rank's heads: [T, its q_size]. x: [T,
        hidden_size]"""
        layer = self._layer
        qkv = ops.linear(x, self._qkv_product, "qkv")
        for norm, first, own, given in self._whole_norms:
            width = norm.weight.shape[0]
            if len(own) == width:
                ops.norm_columns(qkv, norm, first)
                continue
            part = ops.columns(qkv, first + given.start - own.start, len(given))
            whole = ops.norm(ops.gather(part, given.start, width), norm)
            ops.put_columns(whole, own.start, len(own), qkv, first)
        ops.rope_write_kv(qkv, layer)
        if self._temperatures is not None:
            ops.scale_by_position(qkv, layer.q_size, self._temperatures)
        return ops.attend(qkv, layer)

    def project(self, ops: Ops[Buf], mixed: Buf) -> Buf:
        """From what `mix` returns to [T, hidden_size], token by token."""
        mixed = ops.gather(mixed, *self._mixed)
        return ops.gather(ops.linear(mixed, self._o_product, "o"), *self._hidden)
