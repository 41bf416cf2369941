"""A tiny engine for tests: paged batches with shuffled blocks, driven by hand, one `step()` at a time.

It has no scheduler and no sampler, so a test says exactly which tokens share a step. The cache
starts full of NaN and blocks are handed out in a shuffled order: reading one slot that was not
written, or the wrong block, poisons the logits.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from quire.attention.base import AttentionMetadata, KVCache
from quire.kernels.lora import AdaptedRows, AdapterSet
from quire.kernels.program import StepRows
from quire.models.decoder import DecoderModel
from quire.models.eager_pass import adapted_seats, gather


@dataclass
class Request:
    """One request: its tokens, how many have their keys stored, and its blocks."""

    tokens: list[int]
    num_computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    """Of each group of layers."""
    adapter: int = -1
    """Index in the harness's adapters."""

    @property
    def num_left(self) -> int:
        return len(self.tokens) - self.num_computed


class PagedHarness:
    def __init__(
        self, model: DecoderModel, *, num_blocks: int = 96, block_size: int = 16, seed: int = 0
    ) -> None:
        spec = model.spec
        self.model = model
        self.adapters: AdapterSet | None = None
        """Set it to use adapters."""
        self._num_groups = len(spec.kv.groups)
        num_blocks *= self._num_groups
        self.cache = KVCache(
            num_parts=spec.kv.layers_per_page,
            num_blocks=num_blocks,
            num_kv_heads=spec.heads.num_kv_heads,
            head_dim=spec.heads.head_dim,
            block_size=block_size,
            dtype=model.dtype,
        )
        self.cache.storage.fill_(float("nan"))
        self._mirror = copy.deepcopy(self.cache)  # of the pass in one call
        self.one_call = model.over(self._mirror)
        self._steps = 0
        self.free = list(range(1, num_blocks))
        random.Random(seed).shuffle(self.free)

    def step(self, work: Sequence[tuple[Request, int]]) -> list[torch.Tensor]:
        """Compute the next n tokens of each request in one batch; logits [n, vocab_size] of each,
        in order.
        """
        block_size = self.cache.block_size
        input_ids, positions, starts, lens = [], [], [0], []
        slots: list[list[int]] = [[] for _ in range(self._num_groups)]
        for sequence, count in work:
            end = sequence.num_computed + count
            assert 0 < count <= sequence.num_left
            if not sequence.blocks:
                sequence.blocks = [[] for _ in range(self._num_groups)]
            while len(sequence.blocks[0]) * block_size < end:
                for blocks in sequence.blocks:
                    blocks.append(self.free.pop())
            span = range(sequence.num_computed, end)
            input_ids += [sequence.tokens[i] for i in span]
            positions += span
            for mapping, blocks in zip(slots, sequence.blocks, strict=True):
                mapping += [blocks[i // block_size] * block_size + i % block_size for i in span]
            starts.append(starts[-1] + count)
            lens.append(end)
            sequence.num_computed = end
        width = max(len(sequence.blocks[0]) for sequence, _ in work)
        metadata = [
            AttentionMetadata(
                positions=torch.tensor(positions),
                slot_mapping=torch.tensor(slots[group]),
                query_start_loc=torch.tensor(starts, dtype=torch.int32),
                seq_lens=torch.tensor(lens, dtype=torch.int32),
                block_table=torch.tensor(
                    [
                        sequence.blocks[group] + [0] * (width - len(sequence.blocks[group]))
                        for sequence, _ in work
                    ],
                    dtype=torch.int32,
                ),
            )
            for group in range(self._num_groups)
        ]
        adapted: AdaptedRows | None = None
        if self.adapters is not None and any(each.adapter >= 0 for each, _ in work):
            indices = [each.adapter for each, count in work for _ in range(count)]
            adapted = self.adapters.rows(torch.tensor(indices, dtype=torch.int32))
        hidden = self.model.compute(torch.tensor(input_ids), metadata, self.cache, adapters=adapted)
        logits = self.model.compute_logits(hidden, adapted)
        assert logits.dtype == torch.float32
        self._assert_one_call_is_the_same(work, torch.tensor(input_ids), metadata, logits)
        return list(logits.split([count for _, count in work]))

    def _assert_one_call_is_the_same(
        self,
        work: Sequence[tuple[Request, int]],
        ids_by_hand: torch.Tensor,
        by_hand: Sequence[AttentionMetadata],
        logits: torch.Tensor,
    ) -> None:
        """`DecoderModel.over` against the layers, bit for bit: the logits of no token, the last one or all of
        each row, and the cache."""
        order = list(range(len(work)))[::-1]  # seats need not be in the order of the rows
        wanted = [(0, 1, count)[(self._steps + i) % 3] for i, (_, count) in enumerate(work)]
        self._steps += 1
        requests = [request for request, _ in work]
        rows = StepRows(
            token_ids=_padded([requests[i].tokens for i in order], np.int64),
            block_ids=np.stack(
                [
                    _padded([requests[i].blocks[group] for i in order], np.int32)
                    for group in range(self._num_groups)
                ]
            ),
            rows=np.array(
                [
                    (seat, request.num_computed - count, count, some)
                    for seat, (request, count), some in zip(order, work, wanted, strict=True)
                ]
            ),
            num_rows=len(work),
            num_wanted=sum(wanted),
        )
        if self.adapters is not None:
            rows.adapters = np.array([requests[i].adapter for i in order], dtype=np.int32)
            rows.adapter_set = self.adapters
            rows.has_adapters = bool((rows.adapters >= 0).any())
        parts = logits.split([count for _, count in work])
        expected = torch.cat(
            [part[len(part) - some :] for part, some in zip(parts, wanted, strict=True)]
        )
        actual = self.one_call.forward(rows)
        assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))
        row_of = np.repeat(rows.rows[:, 0], wanted)
        again = self.model.compute_logits(self.one_call.hidden(rows), adapted_seats(rows, row_of))
        assert torch.equal(again.view(torch.int32), expected.view(torch.int32))
        ours, theirs = (c.storage.view(torch.uint8) for c in (self.cache, self._mirror))
        assert torch.equal(ours, theirs)
        input_ids, gathered = gather(rows, self.cache.block_size)
        names = ("positions", "slot_mapping", "query_start_loc", "seq_lens", "block_table")
        for ours, theirs in zip(gathered, by_hand, strict=True):
            for name in names:
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(input_ids, ids_by_hand)

    def free_sequence(self, sequence: Request) -> None:
        self.free += [block for blocks in sequence.blocks for block in blocks]
        sequence.blocks = []
        sequence.num_computed = 0

    def prefill(self, sequence: Request, *, chunk: int) -> torch.Tensor:
        """Logits of every known token, computed alone in chunks: [num_tokens, vocab_size]."""
        rows = []
        while sequence.num_left:
            rows += self.step([(sequence, min(chunk, sequence.num_left))])
        return torch.cat(rows)

    def greedy(
        self, prompt: Sequence[int], *, max_new_tokens: int, chunk: int = 10**6
    ) -> list[int]:
        """Tokens chosen one by one after the prompt."""
        sequence = Request(list(prompt))
        logits = self.prefill(sequence, chunk=chunk)
        for _ in range(max_new_tokens - 1):
            sequence.tokens.append(int(logits[-1].argmax()))
            logits = self.step([(sequence, 1)])[0]
        sequence.tokens.append(int(logits[-1].argmax()))
        self.free_sequence(sequence)
        return sequence.tokens[len(prompt) :]


def _padded(lists: Sequence[Sequence[int]], dtype: type[np.generic]) -> np.ndarray:
    array = np.zeros((len(lists), max(map(len, lists))), dtype=dtype)
    for row, values in zip(array, lists, strict=True):
        row[: len(values)] = values
    return array
