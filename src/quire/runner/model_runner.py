"""Turns a `StepPlan` into tensors, runs the model, samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from quire.attention.base import KVCache
from quire.kernels.base import Kernels
from quire.messages import AdmittedRequest, PlannedRow, SampledRow, StepPlan, StepResult
from quire.models.decoder import DecoderModel
from quire.sampling.sampler import Sampler, SamplingSeats


class RunningBatch:
    """Token ids, block tables and sampling of the admitted requests, each in a seat of its own.

    Arrays are indexed by seat, so a step gathers its inputs with a few NumPy calls however long the
    contexts are, and nothing is rebuilt. They are sized for the worst case and never cleared: the
    operating system commits pages only as they are written.
    """

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int
    ) -> None:
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = np.empty((max_num_seqs, max_model_len + 1), dtype=np.int64)
        self.block_ids = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt_tokens = [0] * max_num_seqs
        self.sampling = SamplingSeats(max_num_seqs, vocab_size)
        self.seat_of: dict[int, int] = {}
        self._free_seats = list(range(max_num_seqs - 1, -1, -1))

    def admit(self, request: AdmittedRequest) -> None:
        seat = self._free_seats.pop()
        self.seat_of[request.request_id] = seat
        count = len(request.token_ids)
        self.token_ids[seat, :count] = request.token_ids
        self.num_tokens[seat] = count
        self.num_blocks[seat] = 0
        self.num_prompt_tokens[seat] = request.num_prompt_tokens
        self.sampling.admit(seat, request)
        self.add_blocks(seat, request.block_ids)

    def release(self, request_id: int) -> None:
        seat = self.seat_of.pop(request_id)
        self.sampling.release(seat)
        self._free_seats.append(seat)

    def add_blocks(self, seat: int, block_ids: Sequence[int]) -> None:
        start = self.num_blocks[seat]
        self.block_ids[seat, start : start + len(block_ids)] = block_ids
        self.num_blocks[seat] = start + len(block_ids)

    def append_tokens(self, seats: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """One to each seat; no seat twice."""
        self.token_ids[seats, self.num_tokens[seats]] = token_ids
        self.num_tokens[seats] += 1


_NAN_ERROR = "The model produced invalid numbers (NaN) for this request."


class ModelRunner:
    """The model, its KV cache, and the requests admitted to it."""

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: KVCache,
        kernels: Kernels,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self._decoder = model.over(kv_cache)
        self._kernels = kernels
        self._sampler = Sampler(kernels)
        self.batch = RunningBatch(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=kv_cache.block_size,
            vocab_size=model.spec.vocab_size,
        )

    def execute(self, plan: StepPlan) -> StepResult:
        """Apply the plan: forget, admit, copy, compute, sample."""
        for request_id in plan.released:
            self.batch.release(request_id)
        for request in plan.admitted:
            self.batch.admit(request)
        self._copy(plan.copies)
        if not plan.rows:
            return StepResult(step_id=plan.step_id)
        seats = [self.batch.seat_of[row.request_id] for row in plan.rows]
        for row, seat in zip(plan.rows, seats, strict=True):
            if row.new_block_ids:
                self.batch.add_blocks(seat, row.new_block_ids)
        sampling = [index for index, row in enumerate(plan.rows) if row.samples]
        seat_array = np.array(seats)
        logits = self._forward(plan.rows, seat_array, sampling)
        return self._sample(plan, seat_array, sampling, logits)

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy-on-write, in order: a block just copied to may be copied from."""
        ready: list[tuple[int, int]] = []
        touched: set[int] = set()
        for source, destination in copies:
            if source in touched or destination in touched:
                self._kernels.copy_blocks(self.kv_cache.pairs, ready)
                ready, touched = [], set()
            ready.append((source, destination))
            touched.update((source, destination))
        if ready:
            self._kernels.copy_blocks(self.kv_cache.pairs, ready)

    def _forward(
        self, rows: Sequence[PlannedRow], seats: np.ndarray, sampling: Sequence[int]
    ) -> torch.Tensor:
        """Logits of the last token of each row that samples. [R, vocab_size] float32"""
        batch, size = self.batch, self.batch.block_size
        starts = np.array([row.start for row in rows], dtype=np.int64)
        counts = np.array([row.num_tokens for row in rows], dtype=np.int64)
        ends = np.cumsum(counts)
        first = ends - counts  # index in the step of each row's first token
        row_of = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(ends[-1]) - (first - starts)[row_of]
        seat_of = seats[row_of]
        input_ids = batch.token_ids[seat_of, positions]
        blocks = batch.block_ids[seat_of, positions // size].astype(np.int64)
        seq_lens = starts + counts
        width = -(-int(seq_lens.max()) // size)
        query_start_loc = np.zeros(len(rows) + 1, dtype=np.int32)
        query_start_loc[1:] = ends
        return self._decoder.forward(
            input_ids=torch.from_numpy(input_ids),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(blocks * size + positions % size),
            query_start_loc=torch.from_numpy(query_start_loc),
            seq_lens=torch.from_numpy(seq_lens.astype(np.int32)),
            block_table=torch.from_numpy(batch.block_ids[seats, :width]),
            logit_rows=None if len(sampling) == ends[-1] else torch.from_numpy(ends[sampling] - 1),
        )

    def _sample(
        self,
        plan: StepPlan,
        seats: NDArray[np.int64],
        sampling: Sequence[int],
        logits: torch.Tensor,
    ) -> StepResult:
        if not sampling:
            return StepResult(step_id=plan.step_id)
        batch = self.batch
        picked = seats[sampling]
        # A row that samples reaches its last known token; the next one's index is their number.
        sampled = self._sampler.sample(logits, batch.sampling, picked, batch.num_tokens[picked])
        rows = [
            SampledRow(request_id=plan.rows[index].request_id, token_ids=[token])
            for index, token in zip(sampling, sampled.token_ids.tolist(), strict=True)
        ]
        for index, entry in sampled.logprobs.items():
            rows[index].logprobs = [entry]
        if sampled.valid.all():
            batch.append_tokens(picked, sampled.token_ids)
        else:
            valid = sampled.valid
            batch.append_tokens(picked[valid], sampled.token_ids[valid])
            for index in np.flatnonzero(~valid).tolist():
                rows[index].token_ids = []
                rows[index].error = _NAN_ERROR
        return StepResult(step_id=plan.step_id, sampled=rows)
