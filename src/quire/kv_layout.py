"""Which layers keep which keys and values, and how they share blocks; torch-free.

A layer with a sliding window needs only the blocks of its window, one with full attention needs all. So
layers of one kind form one or more *groups*, each with its own block tables. A page (a block's memory)
holds `block_size` tokens in the layers of one group. All pages have the same size, so one pool and one
eviction order serve all groups. The grouping is that of vLLM's hybrid KV cache manager
(docs/design/hybrid_kv_cache_manager.md, 0.33).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MOST_PADDING = 1.5
"""Groups have as many layers as the least frequent kind; or, if the most frequent kind has fewer than
this many times as many layers, as the most frequent one."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share a block table. The i-th of them has its KV in the i-th part of each page."""

    layers: tuple[int, ...]
    """Ascending indices of the model's layers. A stage of a pipeline may have none."""
    window: int | None = None
    """Number of positions that a token attends to, its own included; None: to all before it."""


class KVPlace(NamedTuple):
    """Where a layer keeps its KV."""

    group: int
    part: int
    """Index of the layer's part in the group's pages."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    groups: tuple[KVGroup, ...]
    layer_size: int
    """Number of elements of one token's keys and values in one layer, the largest one."""

    @property
    def layers_per_page(self) -> int:
        """Parts of a page: the number of layers of the largest group. In a smaller group the last parts
        are unused."""
        return max(len(group.layers) for group in self.groups)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each group."""
        return tuple(group.window for group in self.groups)

    def only(self, layers: range) -> KVLayout:
        """Of one stage of a pipeline: the same groups, so that block tables are the same, with the parts of
        its layers."""
        groups = [KVGroup(tuple(i for i in g.layers if i in layers), g.window) for g in self.groups]
        return KVLayout(tuple(groups), self.layer_size)

    def places(self) -> dict[int, KVPlace]:
        """The place of each layer."""
        return {
            layer: KVPlace(number, part)
            for number, group in enumerate(self.groups)
            for part, layer in enumerate(group.layers)
        }

    def blocks_for(self, num_tokens: int, block_size: int, *, max_row_tokens: int) -> int:
        """The most blocks that a request of this many tokens holds at a time."""
        count = -(-num_tokens // block_size)
        held = (most_held(window, block_size, max_row_tokens) for window in self.windows)
        return sum(count if most is None else min(count, most) for most in held)

    def page_bytes(self, block_size: int, dtype_bytes: int) -> int:
        """Memory of one block."""
        return self.layers_per_page * self.layer_size * block_size * dtype_bytes


def most_held(window: int | None, block_size: int, max_row_tokens: int) -> int | None:
    """The most blocks of one group that a request needs at a time; None: all. max_row_tokens: the most
    tokens that a row computes in a step."""
    return None if window is None else (window + max_row_tokens - 3) // block_size + 2


def group_layers(windows: Sequence[int | None], layer_size: int) -> KVLayout:
    """Puts layers into groups. windows: of each layer. Groups with full attention come first, then those
    with windows, the largest first."""
    kinds = sorted(set(windows), key=lambda window: (window is not None, -(window or 0)))
    of_kind = [[i for i, window in enumerate(windows) if window == kind] for kind in kinds]
    fewest, most = min(map(len, of_kind)), max(map(len, of_kind))
    size = most if most < MOST_PADDING * fewest else fewest
    groups = [
        KVGroup(tuple(layers[start : start + size]), kind)
        for kind, layers in zip(kinds, of_kind, strict=True)
        for start in range(0, len(layers), size)
    ]
    return KVLayout(tuple(groups), layer_size)
