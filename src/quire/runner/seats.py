"""The host's side of the admitted requests, each in a seat of its own: tokens, blocks, rules, prompt work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from quire.kernels.program import StepRows
from quire.messages import AdmittedRequest, BlockIds
from quire.runner.prompt_work import PromptWork
from quire.sampling.rules import RequestRules
from quire.sampling.sampler import GrammarSource, rules_of


class Seats:
    """Arrays are indexed by seat, so a step gathers its inputs with a few NumPy calls however long the
    contexts are, and nothing is rebuilt. They are sized for the worst case and never cleared: the operating
    system commits pages only as they are written. Admission writes all that is read of a seat.
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
    ) -> None:
        self.max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._grammars = grammars
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = np.empty((max_num_seqs, max_model_len + 1), dtype=np.int64)
        """Of a step in flight the sampled ones are missing."""
        self.block_ids = np.zeros((num_groups, max_num_seqs, max_blocks), dtype=np.int32)
        """By group of layers; each has as many."""
        self.step = StepRows(
            self.token_ids, self.block_ids, np.zeros((max_num_seqs, 4), dtype=np.int64)
        )
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_brought = np.zeros(max_num_seqs, dtype=np.int64)
        """So many tokens are in `token_ids` that were not simply sampled: admitted, forced, drafts. A device
        that keeps tokens of its own learns them from here."""
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_released = 0
        """Requests so far: whether results may be for requests that have gone."""
        self.seat_of: dict[int, int] = {}
        self.rules: dict[int, RequestRules] = {}
        """By seat, as the next one: of the requests that have any."""
        self.prompts: dict[int, PromptWork] = {}
        """Of those that want something of their prompt's hidden states."""
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def admit(self, request: AdmittedRequest) -> int:
        seat = self.seat_of[request.request_id] = self._free.pop()
        count = len(request.token_ids)
        self.token_ids[seat, :count] = request.token_ids
        self.num_brought[seat] = count
        self.num_prompt_tokens[seat] = request.num_prompt_tokens
        self.num_blocks[seat] = 0
        self.add_blocks(seat, request.block_ids)
        if (rules := rules_of(request, self._vocab_size, self._grammars)) is not None:
            self.rules[seat] = rules
        if (work := PromptWork.of(request)) is not None:
            self.prompts[seat] = work
        return seat

    def release(self, request_id: int) -> int:
        seat = self.seat_of.pop(request_id)
        self.rules.pop(seat, None)
        self.prompts.pop(seat, None)
        self._free.append(seat)
        self.num_released += 1
        return seat

    def add_blocks(self, seat: int, block_ids: BlockIds) -> None:
        start = self.num_blocks[seat]
        end = self.num_blocks[seat] = start + len(block_ids[0])
        for table, ids in zip(self.block_ids, block_ids, strict=True):
            table[seat, start:end] = ids

    def bring(self, seat: int, start: int, token_ids: Sequence[int]) -> None:
        """Tokens that are not simply sampled follow those before `start`."""
        end = start + len(token_ids)
        self.token_ids[seat, start:end] = token_ids
        self.num_brought[seat] = end


def independent(copies: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Copies of blocks in order, in groups that may run at once: a block just copied to may be copied from,
    in a later group."""
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
