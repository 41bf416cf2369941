"""Which layers and heads a rank's blocks have, and where: ranks of another division can then read them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from quire.kv_layout import KVLayout

Run = tuple[int, int]
"""(first byte, number of bytes) of a block."""


class KVShare(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A block of group g has, of the i-th layer of `layers[g]`, its keys, then its values, each
    [heads, head_bytes]. Bytes after the last layer of a small group are unused."""

    layers: tuple[tuple[int, ...], ...]
    """Of each group, this rank's, as `KVGroup.layers`."""
    heads: tuple[int, int]
    """The first KV head, and the one after the last."""
    head_bytes: int
    """Of the keys of one head in one layer and block; its values have as many."""

    @property
    def part_bytes(self) -> int:
        return 2 * self.head_bytes * (self.heads[1] - self.heads[0])

    @property
    def block_bytes(self) -> int:
        return self.part_bytes * max(map(len, self.layers))

    def runs(self, layers: Sequence[int], heads: tuple[int, int]) -> list[list[Run]]:
        """By group, where those layers and heads are, in this share's order; adjacent ones are joined. Those
        that it lacks are left out."""
        wanted = set(layers)
        first, stop = max(heads[0], self.heads[0]), min(heads[1], self.heads[1])
        size = max(0, stop - first) * self.head_bytes
        found = []
        for group in self.layers:
            runs: list[Run] = []
            for half in range(2 * len(group)):
                if not size or group[half // 2] not in wanted:
                    continue
                start = half * (self.part_bytes // 2) + (first - self.heads[0]) * self.head_bytes
                if runs and sum(runs[-1]) == start:
                    runs[-1] = (runs[-1][0], runs[-1][1] + size)
                else:
                    runs.append((start, size))
            found.append(runs)
        return found

    def divide(
        self, others: Sequence[KVShare]
    ) -> list[tuple[tuple[int, ...], tuple[int, int]]] | None:
        """Of each of these ranks of another instance, the layers and heads to read of it: all together are
        this share, each once. None if they are not."""
        missing = {
            (layer, head) for group in self.layers for layer in group for head in range(*self.heads)
        }
        parts = []
        for other in others:
            heads = max(self.heads[0], other.heads[0]), min(self.heads[1], other.heads[1])
            layers = tuple(
                layer
                for group in other.layers
                for layer in group
                if heads[0] < heads[1] and all((layer, head) in missing for head in range(*heads))
            )
            missing.difference_update((layer, head) for layer in layers for head in range(*heads))
            parts.append((layers, heads))
        return None if missing else parts

    def fits(self, other: KVShare) -> bool:
        """Whether heads have the same size, and layers that both have are in the same groups and order."""
        if self.head_bytes != other.head_bytes or len(self.layers) != len(other.layers):
            return False
        pairs = list(zip(self.layers, other.layers, strict=True))
        common = {layer for group in self.layers for layer in group}
        common &= {layer for group in other.layers for layer in group}
        return all([i for i in a if i in common] == [i for i in b if i in common] for a, b in pairs)


def share_of(layout: KVLayout, heads: range, head_bytes: int) -> KVShare:
    """layout: of the rank's stage (`KVLayout.only`). heads: `Share.kv_heads`. head_bytes: see `KVShare`."""
    layers = tuple(group.layers for group in layout.groups)
    return KVShare(layers, (heads.start, heads.stop), head_bytes)
