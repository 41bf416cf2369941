"""A draft model or head as files and numbers, before anything is loaded. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quire.dtypes import element_bytes
from quire.models.head_spec import HeadSpec
from quire.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class DraftSpec:
    model: ModelSpec
    """Its layers are in one group, which uses the block table of the target's first."""
    directory: Path
    dtype: str
    """Dtype of weights, activations and KV cache, by torch's name."""
    max_model_len: int
    """Positions that it reaches. A longer request goes on without drafts."""

    @property
    def slot_bytes(self) -> int:
        """Of one token's keys and values."""
        return self.model.kv.page_bytes(1, element_bytes(self.dtype))

    @property
    def weight_bytes(self) -> int:
        """With rotary tables."""
        weights = self.model.weight_bytes(element_bytes(self.dtype))
        return weights + sum(rope.table_bytes(self.max_model_len) for rope in self.model.ropes)


@dataclass(frozen=True, slots=True)
class HeadDraftSpec:
    """A head that reads the target's hidden states: as `DraftSpec`."""

    head: HeadSpec
    directory: Path
    """For MTP, the target's."""
    dtype: str
    max_model_len: int
    copied_from: Path | None = None
    """The target's, if the target is divided among ranks: the head has whole copies of the embedding and the
    output head."""

    @property
    def slot_bytes(self) -> int:
        return 2 * self.head.layer.attention.kv_size * element_bytes(self.dtype)

    @property
    def weight_bytes(self) -> int:
        size = element_bytes(self.dtype)
        weights = self.head.weight_bytes(size)
        weights += 0 if self.copied_from is None else self.head.copied_bytes(size)
        return weights + self.head.rope.table_bytes(self.max_model_len)
