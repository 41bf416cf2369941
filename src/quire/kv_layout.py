"""Which layers keep which keys and values, and how they share blocks; torch-free.

A layer with a sliding window needs the blocks of its window only, one with full attention needs all. So
layers of one kind make one or more *groups*, each with block tables of its own. A page (a block's memory)
holds `block_size` tokens in the layers of one group. All pages are equally large: one pool and one order of
eviction serve all groups. The grouping is that of vLLM's hybrid KV cache manager
(docs/design/hybrid_kv_cache_manager.md, 0.33).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MOST_PADDING = 1.5
"""Groups have as many layers as the least frequent kind; or, if the most frequent kind has less than so
many times as many, as that one."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share a block table. The i-th of them has its KV in the i-th part of each page."""

    layers: tuple[int, ...]
    """Ascending indices of the model's layers."""
    window: int | None = None
    """A token attends to so many positions, its own included; None: to all before it."""


class KVPlace(NamedTuple):
    """Where a layer keeps its KV."""

    group: int
    part: int
    """Of the group's blocks."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    groups: tuple[KVGroup, ...]
    layer_size: int
    """Elements that one token's keys and values are in one layer, the largest."""

    @property
    def layers_per_page(self) -> int:
        """Parts of a page: layers of the largest group. The last parts of a smaller one stay unused."""
        return max(len(group.layers) for group in self.groups)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """By group."""
        return tuple(group.window for group in self.groups)

    def places(self) -> dict[int, KVPlace]:
        """By layer."""
        return {
            layer: KVPlace(number, part)
            for number, group in enumerate(self.groups)
            for part, layer in enumerate(group.layers)
        }

    def blocks_for(self, num_tokens: int, block_size: int, *, max_row_tokens: int) -> int:
        """Blocks that a request of so many tokens holds at most at a time."""
        count = -(-num_tokens // block_size)
        held = (most_held(window, block_size, max_row_tokens) for window in self.windows)
        return sum(count if most is None else min(count, most) for most in held)

    def page_bytes(self, block_size: int, dtype_bytes: int) -> int:
        """Memory of one block."""
        return self.layers_per_page * self.layer_size * block_size * dtype_bytes


def most_held(window: int | None, block_size: int, max_row_tokens: int) -> int | None:
    """Blocks of one group that hold what a row reads and writes; None: all. max_row_tokens: the most that a
    row computes in a step."""
    return None if window is None else (window + max_row_tokens - 3) // block_size + 2


def group_layers(windows: Sequence[int | None], layer_size: int) -> KVLayout:
    """windows: of each layer. Full attention comes first, then windows, the largest first."""
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
