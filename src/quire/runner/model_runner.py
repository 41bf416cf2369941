"""Turns a `StepPlan` into tensors, runs the model, samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quire.attention.base import KVCache
from quire.kernels.base import Kernels
from quire.kernels.program import StepRows
from quire.messages import AdmittedRequest, PlannedRow, SampledRow, StepPlan, StepResult
from quire.models.decoder import DecoderModel
from quire.runner.prompt_work import PromptWork
from quire.sampling.sampler import GrammarSource, Sampler, SamplingSeats


class FinishedStep:
    __slots__ = ("_result",)

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class RunningBatch:
    """Token ids, block tables and sampling of the admitted requests, each in a seat of its own.

    Arrays are indexed by seat, so a step gathers its inputs with a few NumPy calls however long the
    contexts are, and nothing is rebuilt. They are sized for the worst case and never cleared: the
    operating system commits pages only as they are written.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        grammars: GrammarSource | None = None,
    ) -> None:
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = np.empty((max_num_seqs, max_model_len + 1), dtype=np.int64)
        self.block_ids = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        rows = np.zeros((max_num_seqs, 4), dtype=np.int64)
        self.step = StepRows(self.token_ids, self.block_ids[None], rows)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt_tokens = [0] * max_num_seqs
        self.sampling = SamplingSeats(
            max_num_seqs, vocab_size, max_model_len=max_model_len, grammars=grammars
        )
        self.prompts: dict[int, PromptWork] = {}
        """By seat, of the requests that want something of their prompt's hidden states."""
        self.seat_of: dict[int, int] = {}
        self._free_seats = list(range(max_num_seqs - 1, -1, -1))

    def admit(self, request: AdmittedRequest) -> None:
        seat = self._free_seats.pop()
        self.seat_of[request.request_id] = seat
        count = len(request.token_ids)
        self.token_ids[seat, :count] = request.token_ids
        self.num_blocks[seat] = 0
        self.num_prompt_tokens[seat] = request.num_prompt_tokens
        self.sampling.admit(seat, request)
        if (work := PromptWork.of(request)) is not None:
            self.prompts[seat] = work
        self.add_blocks(seat, *request.block_ids)

    def release(self, request_id: int) -> None:
        seat = self.seat_of.pop(request_id)
        self.sampling.release(seat)
        self.prompts.pop(seat, None)
        self._free_seats.append(seat)

    def add_blocks(self, seat: int, block_ids: Sequence[int]) -> None:
        start = self.num_blocks[seat]
        self.block_ids[seat, start : start + len(block_ids)] = block_ids
        self.num_blocks[seat] = start + len(block_ids)


class ModelRunner:
    """The model, its KV cache, and the requests admitted to it."""

    def __init__(
        self,
        model: DecoderModel,
        kernels: Kernels,
        *,
        max_num_seqs: int,
        grammars: GrammarSource | None = None,
        logprobs_mode: str = "raw_logprobs",
    ) -> None:
        self.model = model
        self._kernels = kernels
        self._sampler = Sampler(kernels, logprobs_mode=logprobs_mode)
        self._max_num_seqs = max_num_seqs
        self._grammars = grammars

    def open_cache(self, kv_cache: KVCache, max_model_len: int) -> None:
        self.kv_cache = kv_cache
        self._decoder = self.model.over(kv_cache)
        self.batch = RunningBatch(
            max_num_seqs=self._max_num_seqs,
            max_model_len=max_model_len,
            block_size=kv_cache.block_size,
            vocab_size=self.model.spec.vocab_size,
            grammars=self._grammars,
        )

    def launch(self, plan: StepPlan) -> FinishedStep:
        return FinishedStep(self.execute(plan))

    def prepare(self) -> bool:
        return False

    def execute(self, plan: StepPlan) -> StepResult:
        """Apply the plan: forget, admit, copy, compute, sample."""
        for request_id in plan.released:
            self.batch.release(request_id)
        for request in plan.admitted:
            self.batch.admit(request)
        self._copy(plan.copies)
        result = StepResult(step_id=plan.step_id)
        if not plan.rows:
            return result
        step = self._seat(plan.rows)
        if not self.batch.prompts:
            logits = self._decoder.forward(step)
        else:
            hidden = self._decoder.hidden(step)
            result.sampled, last = self._read_prompts(plan.rows, hidden)
            logits = self.model.compute_logits(hidden[last])
        self._sample(plan, logits, result)
        return result

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

    def _seat(self, rows: Sequence[PlannedRow]) -> StepRows:
        batch = self.batch
        table = []
        for row in rows:
            seat = batch.seat_of[row.request_id]
            if row.new_block_ids:
                batch.add_blocks(seat, *row.new_block_ids)
            wanted = int(row.samples)
            if seat in batch.prompts:
                wanted = max(wanted, batch.prompts[seat].wanted(row.start, row.num_tokens))
            table.append((seat, row.start, row.num_tokens, wanted))
        batch.step.rows[: len(table)] = table
        batch.step.num_rows, batch.step.num_wanted = len(table), sum(row[3] for row in table)
        return batch.step

    def _read_prompts(
        self, rows: Sequence[PlannedRow], hidden: torch.Tensor
    ) -> tuple[list[SampledRow], list[int]]:
        """What there is to tell of prompts, and which of the hidden states are those of rows that sample."""
        batch, told, last, end = self.batch, [], [], 0
        for row, (seat, _, _, wanted) in zip(rows, batch.step.rows.tolist(), strict=False):
            begin, end = end, end + wanted
            if row.samples:
                last.append(end - 1)
            if seat not in batch.prompts:
                continue
            found = batch.prompts[seat].read(
                row.start, row.num_tokens, hidden[begin:end], self.model
            )
            if found is not None:
                told.append(
                    SampledRow(
                        request_id=row.request_id,
                        token_ids=[],
                        prompt_logprobs=found.logprobs,
                        embedding=found.embedding,
                    )
                )
            if batch.prompts[seat].is_done(row.start + row.num_tokens):
                del batch.prompts[seat]
        return told, last

    def _sample(self, plan: StepPlan, logits: torch.Tensor, result: StepResult) -> None:
        """logits: of the rows that sample."""
        rows = [row for row in plan.rows if row.samples]
        if not rows:
            return
        token_ids = self.batch.token_ids
        seats = np.array([self.batch.seat_of[row.request_id] for row in rows])
        # A row that samples reaches its last known token; the next one's index is their number.
        positions = np.array([row.start + row.num_tokens for row in rows])
        sampled = self._sampler.sample(logits, self.batch.sampling, seats, positions)
        token_ids[seats, positions] = sampled.token_ids  # without a token: ends at once
        told = [
            SampledRow(request_id=row.request_id, token_ids=[token])
            for row, token in zip(rows, sampled.token_ids.tolist(), strict=True)
        ]
        if result.sampled:  # a row may have told of its prompt already
            index_of = {row.request_id: index for index, row in enumerate(rows)}
            for of_prompt in result.sampled:
                if (index := index_of.get(of_prompt.request_id)) is None:
                    told.append(of_prompt)
                else:
                    told[index].prompt_logprobs = of_prompt.prompt_logprobs
        result.sampled = told
        for index, entry in sampled.logprobs.items():
            told[index].logprobs = [entry]
        for index, tokens in sampled.forced.items():
            told[index].token_ids += tokens
            at = int(positions[index]) + 1
            token_ids[seats[index], at : at + len(tokens)] = tokens
        for index, error in sampled.errors.items():
            told[index].token_ids, told[index].error = [], error
