"""The host's state of the admitted requests, one seat each: tokens, blocks, rules, prompt work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from quire.kernels.program import StepRows
from quire.messages import AdmittedRequest, BlockIds
from quire.runner.adapters import AdapterTable
from quire.runner.prompt_work import PromptWork
from quire.sampling.rules import RequestRules
from quire.sampling.sampler import GrammarSource, rules_of


class Seats:
    """Arrays are indexed by seat, so a step gathers its inputs with a few NumPy calls however long the
    contexts are. They have the largest possible size and are never cleared: the operating system allocates
    pages only as they are written. Admission writes everything that is read of a seat.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_groups: int,
        vocab_size: int,
        grammars: GrammarSource | None = None,
        adapters: AdapterTable | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._adapters = adapters
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = np.empty((max_num_seqs, max_model_len + 1), dtype=np.int64)
        """Tokens of the requests; those sampled by a step in flight are missing."""
        self.block_ids = np.zeros((num_groups, max_num_seqs, max_blocks), dtype=np.int32)
        """By group of layers; each has as many."""
        self.step = StepRows(
            self.token_ids, self.block_ids, np.zeros((max_num_seqs, 4), dtype=np.int64)
        )
        if adapters is not None:
            self.step.adapters = np.full(max_num_seqs, -1, dtype=np.int32)
            self.step.adapter_set = adapters.packed
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_brought = np.zeros(max_num_seqs, dtype=np.int64)
        """Number of tokens in `token_ids` that may be unknown to a device which keeps sampled tokens
        itself: admitted, forced, drafts."""
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_released = 0
        """Counts releases: if it has changed, a result may be for a request that has been
        released."""
        self.seat_of: dict[int, int] = {}
        self.rules: dict[int, RequestRules] = {}
        """By seat, like the next one, for the requests that have rules."""
        self.prompts: dict[int, PromptWork] = {}
        """For the requests with prompt work."""
        self._num_adapted = 0
        """Number of seats whose request has an adapter."""
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def admit(self, request: AdmittedRequest) -> int:
        seat = self.seat_of[request.request_id] = self._free.pop()
        count = len(request.token_ids)
        self.token_ids[seat, :count] = request.token_ids
        self.num_brought[seat] = count
        self.num_prompt_tokens[seat] = request.num_prompt_tokens
        self.num_blocks[seat] = 0
        self.add_blocks(seat, request.block_ids)
        if self._adapters is not None and self.step.adapters is not None:
            self.step.adapters[seat] = self._adapters.acquire(request.placement.adapter)
            self._num_adapted += self.adapter_of(seat) >= 0
        if (rules := rules_of(request, self._vocab_size, self._grammars)) is not None:
            self.rules[seat] = rules
        if (work := PromptWork.of(request)) is not None:
            self.prompts[seat] = work
            if self._adapters is not None and (adapter := self.adapter_of(seat)) >= 0:
                work.adapter = (self._adapters.packed, adapter)
        return seat

    def release(self, request_id: int) -> int:
        seat = self.seat_of.pop(request_id)
        self.rules.pop(seat, None)
        self.prompts.pop(seat, None)
        if self._adapters is not None:
            self._adapters.release(self.adapter_of(seat))
            self._num_adapted -= self.adapter_of(seat) >= 0
        self._free.append(seat)
        self.num_released += 1
        return seat

    def adapter_of(self, seat: int) -> int:
        """The index of its request's adapter, -1 for none."""
        return -1 if self.step.adapters is None else int(self.step.adapters[seat])

    def has_adapters(self, seats: NDArray[np.int64]) -> bool:
        """Whether a request in one of these seats has an adapter."""
        adapters = self.step.adapters
        return bool(self._num_adapted and adapters is not None and (adapters[seats] >= 0).any())

    def add_blocks(self, seat: int, block_ids: BlockIds) -> None:
        start = self.num_blocks[seat]
        end = self.num_blocks[seat] = start + len(block_ids[0])
        for table, ids in zip(self.block_ids, block_ids, strict=True):
            table[seat, start:end] = ids

    def bring(self, seat: int, start: int, token_ids: Sequence[int]) -> None:
        """Write tokens that were not sampled by the device, from index `start` on."""
        end = start + len(token_ids)
        self.token_ids[seat, start:end] = token_ids
        self.num_brought[seat] = end


def independent(copies: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Splits copies of blocks into groups whose copies may run at once. A block that is copied to may be
    copied from in a later group."""
    group: list[tuple[int, int]] = []
    touched: set[int] = set()
    for pair in copies:
        if not touched.isdisjoint(pair):
            yield group
            group, touched = [], set()
        group.append(pair)
        touched.update(pair)
    if group:
        yield group
