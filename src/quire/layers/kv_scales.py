"""Scales of the KV cache that a checkpoint has for each layer: what numbers in FP8 are multiplied by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from quire.attention.base import KVCache
from quire.errors import CheckpointError
from quire.kv_layout import KVPlace
from quire.layers.parameter import WeightTarget
from quire.quantization.stored import Entry

NAMES: Mapping[str, str] = {
    "k_scale": "k", "v_scale": "v", "kv_scale": "kv",
    "k_proj.output_scale": "k", "v_proj.output_scale": "v",
    "k_proj.k_scale": "k", "v_proj.v_scale": "v",
}  # fmt: skip
"""Names after that of the attention, by compressed-tensors, its older versions and ModelOpt -> whose."""


class KVScales:
    """Of one layer: 1 for each KV head until loaded."""

    def __init__(
        self, prefix: str, entries: Mapping[str, Entry], num_kv_heads: int, own: range
    ) -> None:
        """entries: the tensors of `NAMES` that the checkpoint has. own: the rank's heads."""
        self._prefix = prefix
        self._entries = entries
        self._num_heads, self._own = num_kv_heads, own
        self.tensors = {name: torch.ones(len(own)) for name in "kv"}

    def targets(self) -> Iterator[WeightTarget]:
        for name, entry in self._entries.items():
            full = f"{self._prefix}.{name}"
            yield WeightTarget(full, entry.shape, partial(self._load, full, NAMES[name]))

    def _load(self, name: str, whose: str, first: int, rows: torch.Tensor) -> None:
        scales = rows.float().flatten()
        if not (scales.isfinite() & (scales > 0)).all():
            raise CheckpointError(
                f"tensor {name} has a scale that is not above 0; get another copy"
            )
        for each in whose:
            kept = self.tensors[each]
            if len(scales) not in (1, self._num_heads):
                raise CheckpointError(
                    f"tensor {name} has {len(scales)} scales for {self._num_heads} heads; the weights and "
                    "the config are of different models"
                )
            own = slice(self._own.start, self._own.stop)
            kept[:] = scales if len(scales) == 1 else scales[own]


def give_scales(
    cache: KVCache, layers: Mapping[int, KVScales], places: Mapping[int, KVPlace]
) -> None:
    """Set a cache's scales. Of layers that share a part of it (those of several groups) the largest counts: a
    scale above its own costs a layer precision, not range."""
    for number, part in enumerate(cache.parts):
        sharing = [scales for i, scales in layers.items() if places[i].part == number]
        for name, given in zip("kv", part.scales or (), strict=False):
            if sharing:
                given.copy_(torch.stack([scales.tensors[name] for scales in sharing]).amax(0))
