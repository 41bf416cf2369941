"""`ForwardPass` without a recorded program, and that of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from quire.attention.base import AttentionMetadata, KVCache
from quire.kernels.group import Channels
from quire.kernels.lora import AdaptedRows
from quire.kernels.program import ForwardPass, StepRows
from quire.models.spec import ModelSpec


class EagerModel(Protocol):
    """As `DecoderModel`."""

    dtype: torch.dtype

    @property
    def spec(self) -> ModelSpec: ...

    def compute(
        self,
        input_ids: torch.Tensor,
        metadata: Sequence[AttentionMetadata],
        kv_cache: KVCache,
        wanted: torch.Tensor | None = None,
        tapped: list[torch.Tensor] | None = None,
        adapters: AdaptedRows | None = None,
        received: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def compute_logits(
        self, hidden: torch.Tensor, adapters: AdaptedRows | None = None
    ) -> torch.Tensor: ...


class EagerPass:
    """Operation by operation, on tensors."""

    def __init__(self, model: EagerModel, kv_cache: KVCache) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self.tapped = self.received = torch.empty(0, 0, dtype=model.dtype)

    def forward(self, rows: StepRows) -> torch.Tensor:
        hidden, adapters = self._compute(rows)
        if not self._model.spec.is_last:
            self.tapped = hidden
            return torch.empty(rows.num_wanted, 0)
        return self._model.compute_logits(hidden, adapters)

    def hidden(self, rows: StepRows) -> torch.Tensor:
        return self._compute(rows)[0]

    def _compute(self, rows: StepRows) -> tuple[torch.Tensor, AdaptedRows | None]:
        """Hidden states of the wanted tokens, and their adapters."""
        input_ids, metadata = gather(rows, self._kv_cache.block_size)
        ends, wanted = (
            metadata[0].query_start_loc[1:].tolist(),
            rows.rows[: rows.num_rows, 3].tolist(),
        )
        picked = [np.arange(end - count, end) for end, count in zip(ends, wanted, strict=True)]
        indices = torch.from_numpy(np.concatenate(picked))
        tapped: list[torch.Tensor] = []
        adapters = adapted_tokens(rows)
        hidden = self._model.compute(
            input_ids, metadata, self._kv_cache, indices, tapped, adapters, self.received
        )
        if tapped:
            self.tapped = torch.cat(tapped, dim=1)
        return hidden, None if adapters is None else adapters.keep(indices)


class StagePass:
    """A stage of a pipeline: over its own pass, it receives and sends the residual, the sum of what is
    normed next."""

    def __init__(self, spec: ModelSpec, own: ForwardPass, channels: Channels | None) -> None:
        assert channels is not None, "a stage has channels"
        self._spec, self._own, self._channels = spec, own, channels
        self.received, self.tapped = own.received, own.tapped

    def forward(self, rows: StepRows) -> torch.Tensor:
        self._receive(rows)
        logits = self._own.forward(rows)
        self.tapped = self._own.tapped
        if self._channels.outlet is not None:
            self._channels.outlet.send(self.tapped)
        return logits

    def hidden(self, rows: StepRows) -> torch.Tensor:
        assert self._spec.is_last
        self._receive(rows)
        hidden = self._own.hidden(rows)
        self.tapped = self._own.tapped
        return hidden

    def _receive(self, rows: StepRows) -> None:
        if (inlet := self._channels.inlet) is not None:
            count = int(rows.rows[: rows.num_rows, 2].sum())
            dtype = self._own.received.dtype
            self._own.received = inlet.receive(count, self._spec.hidden_size, dtype)


def adapted_tokens(rows: StepRows) -> AdaptedRows | None:
    """A step's tokens, if any has an adapter."""
    seats, _, counts, _ = rows.rows[: rows.num_rows].T
    return adapted_seats(rows, np.repeat(seats, counts)) if rows.has_adapters else None


def adapted_seats(rows: StepRows, seats: NDArray[np.int64]) -> AdaptedRows | None:
    """Rows of these seats, if any of the step has an adapter."""
    if not rows.has_adapters:
        return None
    assert rows.adapters is not None and rows.adapter_set is not None
    return rows.adapter_set.rows(torch.from_numpy(rows.adapters[seats]))


def gather(rows: StepRows, block_size: int) -> tuple[torch.Tensor, list[AttentionMetadata]]:
    """A step's input ids, [T] int64, and attention's metadata for each group of layers."""
    seats, starts, counts, _ = rows.rows[: rows.num_rows].T
    ends = np.cumsum(counts)
    first = ends - counts  # index in the step of each row's first token
    row_of = np.repeat(np.arange(len(ends)), counts)
    positions = np.arange(ends[-1]) - (first - starts)[row_of]
    seat_of = seats[row_of]
    seq_lens = starts + counts
    width = -(-int(seq_lens.max()) // block_size)
    query_start_loc = np.zeros(len(ends) + 1, dtype=np.int32)
    query_start_loc[1:] = ends
    shared = {
        "positions": torch.from_numpy(positions),
        "query_start_loc": torch.from_numpy(query_start_loc),
        "seq_lens": torch.from_numpy(seq_lens.astype(np.int32)),
    }
    metadata = []
    for tables in rows.block_ids:
        blocks = tables[seat_of, positions // block_size].astype(np.int64)
        metadata.append(
            AttentionMetadata(
                **shared,
                slot_mapping=torch.from_numpy(blocks * block_size + positions % block_size),
                block_table=torch.from_numpy(tables[seats, :width]),
            )
        )
    return torch.from_numpy(rows.token_ids[seat_of, positions]), metadata
