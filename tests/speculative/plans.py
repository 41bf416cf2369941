"""Plans for a drafter without an engine: requests with seats and blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quire.decoding import Decoding
from quire.kernels.program import StepRows
from quire.messages import AdmittedRequest, PlannedRow, StepPlan
from quire.speculative.base import Drafter


class Seating:
    """Keeps the arrays as a runner does."""

    num_blocks, block_size = 200, 16

    def __init__(self, seats: int = 8, max_model_len: int = 256) -> None:
        self.rows = StepRows(
            np.full((seats, max_model_len + 1), -1, dtype=np.int64),
            np.zeros((1, seats, -(-max_model_len // self.block_size)), dtype=np.int32),
            np.zeros((seats, 4), dtype=np.int64),
        )
        self.seat_of: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}
        self._free_seats = list(range(seats))
        self._free = list(range(1, self.num_blocks))

    def admit(
        self,
        drafter: Drafter,
        request_id: int,
        token_ids: Sequence[int],
        *,
        start: int = 0,
        shared: Sequence[int] = (),
        copy_of: int | None = None,
        **decoding: object,
    ) -> list[int]:
        """Plan a new request that computes all its tokens from `start` on. shared: its first blocks.
        copy_of: a block that is copied into its next one. Returns its blocks."""
        seat = self.seat_of[request_id] = self._free_seats.pop(0)
        count = -(-len(token_ids) // self.block_size)
        blocks = [*shared, *(self._free.pop(0) for _ in range(count - len(shared)))]
        self.blocks[request_id] = blocks
        self.rows.token_ids[seat, : len(token_ids)] = token_ids
        self.rows.block_ids[0, seat, :count] = blocks
        admitted = AdmittedRequest(
            request_id=request_id,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            block_ids=(blocks,),
            decoding=Decoding(**{"max_tokens": 50, "temperature": 0.0, **decoding}),
        )
        row = PlannedRow(
            request_id=request_id, start=start, num_tokens=len(token_ids) - start, samples=1
        )
        copies = [] if copy_of is None else [(copy_of, blocks[len(shared)])]
        plan = StepPlan(step_id=1, admitted=[admitted], rows=[row], copies=copies)
        drafter.begin(plan, self.seat_of)
        return blocks

    def step(self, drafter: Drafter, request_id: int, token_ids: Sequence[int]) -> None:
        """Plan a row that computes the last token, after the tokens of earlier steps were learned. As in an
        engine, the token that is sampled has no slot yet."""
        seat, blocks = self.seat_of[request_id], self.blocks[request_id]
        self.rows.token_ids[seat, : len(token_ids)] = token_ids
        missing = -(-(len(token_ids) - 1) // self.block_size) - len(blocks)
        new = [self._free.pop(0) for _ in range(max(0, missing))]
        self.rows.block_ids[0, seat, len(blocks) : len(blocks) + len(new)] = new
        blocks += new
        row = PlannedRow(
            request_id=request_id,
            start=len(token_ids) - 2,
            num_tokens=1,
            samples=1,
            new_block_ids=(new,) if new else (),
        )
        drafter.begin(StepPlan(step_id=2, rows=[row]), self.seat_of)

    def release(self, drafter: Drafter, request_id: int) -> None:
        seat = self.seat_of.pop(request_id)
        self._free_seats.insert(0, seat)
        self._free = [*self.blocks.pop(request_id), *self._free]
        drafter.release(seat)
