"""How the ranks of a group divide a model among them; torch-free.

Every matrix is divided by its outputs, never by its inputs: each rank computes some columns of each result,
and the ranks then exchange columns. No sum crosses ranks, so n ranks give the bits of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

STEP = 64
"""Columns of a panel, in which matrices are packed: `quire.kernels.codes.PANEL`."""


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a model. All parts together are the whole, in the order of the ranks."""

    rank: int = 0
    size: int = 1

    def columns(self, count: int) -> range:
        """This rank's outputs of `count`; see `starts`."""
        bounds = (*self.starts(count), count)
        return range(bounds[self.rank], bounds[self.rank + 1])

    def starts(self, count: int) -> tuple[int, ...]:
        """The first output of each rank. Parts are as equal as possible in multiples of 64, or of a smaller
        power of two if some rank had none."""
        step = STEP
        while step > 1 and -(-count // step) < self.size:
            step //= 2
        units, rest = divmod(-(-count // step), self.size)
        return tuple(step * (rank * units + min(rank, rest)) for rank in range(self.size))

    def kv_heads(self, num_kv_heads: int) -> range:
        """With more ranks than heads, several ranks have the same one."""
        if self.size > num_kv_heads:
            own = self.rank * num_kv_heads // self.size
            return range(own, own + 1)
        return _run(num_kv_heads, self.rank, self.size)

    def q_heads(self, num_heads: int, num_kv_heads: int) -> range:
        """Those that read the rank's `kv_heads`; with several ranks to a head, a part of them."""
        group, kv = num_heads // num_kv_heads, self.kv_heads(num_kv_heads)
        if self.size <= num_kv_heads:
            return range(kv.start * group, kv.stop * group)
        sharing = self.size // num_kv_heads
        part = _run(group, self.rank % sharing, sharing)
        return range(kv.start * group + part.start, kv.start * group + part.stop)

    def k_columns(self, num_kv_heads: int, head_dim: int) -> range:
        """Of all keys' columns, those that this rank gives to a gather: parts of a head that several have."""
        kv = self.kv_heads(num_kv_heads)
        if self.size <= num_kv_heads:
            return range(kv.start * head_dim, kv.stop * head_dim)
        sharing = self.size // num_kv_heads
        part = _run(head_dim, self.rank % sharing, sharing)
        return range(kv.start * head_dim + part.start, kv.start * head_dim + part.stop)


WHOLE = Share()


def _run(count: int, rank: int, size: int) -> range:
    """One of `size` runs, as equal as possible."""
    each, rest = divmod(count, size)
    first = rank * each + min(rank, rest)
    return range(first, first + each + (rank < rest))


def can_divide(num_heads: int, num_kv_heads: int, size: int) -> bool:
    """Whether each of `size` ranks has a query head, and with it its KV head."""
    if size <= num_kv_heads:
        return True
    return size % num_kv_heads == 0 and size <= num_heads


def spans(sizes: tuple[int, ...], own: tuple[range, ...]) -> tuple[range, ...]:
    """Ranges of matrices that a file holds as one, one below the other. own: of each matrix."""
    starts = accumulate(sizes, initial=0)
    return tuple(
        range(start + each.start, start + each.stop)
        for start, each in zip(starts, own, strict=False)
    )
