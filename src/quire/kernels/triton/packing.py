"""The host's input to every step: one buffer of int32, copied once.

A request sits in a seat of the device's persistent batch (`batch.DeviceBatch`) from its admission to
its release. The device keeps the seat's token ids and block table, so a step sends only what the
device does not have: which seats compute how many tokens, token ids from the host, and new blocks. The
tokens with which a request is admitted are sent when they are computed. Tokens sampled since then are
not: `batch.append_tokens` has written them to the seat, the last one perhaps in the step in flight, and
the host need not know them.

The buffer has sections of equal width (a multiple of four above `max_seqs`, so that each starts on 16
bytes), then a tail. Entry b of a section is for row b of the step, which is one request. CUDA graphs
launch padding rows too: these have no tokens, and nothing is written for them. Their number of keys is 1,
because other projects' kernels read a block of each row.

    section           what entry b holds                                            padding
    query_start_loc   where the row's tokens begin among the step's; b + 1: end     T
    seq_lens          keys the request has once the step's are written              1
    seats             its seat
    num_blocks        blocks in its table, the new ones included
    id_start          where in the buffer the ids are that it brings, those of
                      its first tokens of this step
    id_count          how many
    block_start       where in the buffer its new blocks are, the last of its tables: one
                      group of layers after another
    block_count       how many in each group

    section           what entry r holds, about the r-th token to be sampled        padding
    logit_rows        where the token before it is among the step's                 0
    sample_seats      its seat                                                      -1
    sample_positions  index in the request of the token to be sampled               0

    tail              ids and new blocks

`query_start_loc`, `seq_lens` and those of sampling are used where they lie; `batch.build_step` turns
the rest into the model's inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from quire.kernels.checks import KernelArgumentError


class Section(IntEnum):
    """Sections by their place in the buffer; see above."""

    QUERY_START_LOC = 0
    SEQ_LENS = 1
    SEATS = 2
    NUM_BLOCKS = 3
    ID_START = 4
    ID_COUNT = 5
    BLOCK_START = 6
    BLOCK_COUNT = 7
    LOGIT_ROWS = 8
    SAMPLE_SEATS = 9
    SAMPLE_POSITIONS = 10


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The limits of one step."""

    max_seqs: int
    """Rows, and tokens to be sampled."""
    max_tokens: int
    """Tokens of one step, the padding of a graph included."""
    max_blocks: int
    """Blocks of one request, in each group of layers."""
    num_groups: int = 1

    @property
    def section_width(self) -> int:
        return self.max_seqs // 4 * 4 + 4

    @property
    def tail(self) -> int:
        """Where the tail begins."""
        return len(Section) * self.section_width

    @property
    def packed_size(self) -> int:
        """int32 in the buffer: enough for every seat's whole table to be new."""
        return self.tail + self.max_tokens + self.num_groups * self.max_seqs * self.max_blocks


@dataclass(frozen=True, slots=True)
class StepPacker:
    """Fills one host buffer with a step's input.

    The buffer may be filled again as soon as the caller has copied it: `Device.upload` copies it to
    page-locked memory first.
    """

    shape: BatchShape
    buffer: NDArray[np.int32]
    """[packed_size]"""

    def pack(
        self,
        *,
        seats: NDArray[np.integer],
        counts: NDArray[np.integer],
        seq_lens: NDArray[np.integer],
        num_blocks: NDArray[np.integer],
        sampling: NDArray[np.integer],
        positions: NDArray[np.integer],
        new_ids: Iterable[tuple[int, Sequence[int] | NDArray[np.integer]]],
        new_blocks: Iterable[tuple[int, Sequence[int] | NDArray[np.integer]]],
    ) -> int:
        """Write a step; returns the number of int32 of the buffer to copy.

        seats, counts, seq_lens, num_blocks: [B], one row each: its seat, tokens to compute (one at
        least), keys once they are, and blocks of its table. sampling: [R], the rows that sample, a row as
        often as it does; positions: [R], the index in its request of the token to be sampled.
        new_ids, new_blocks: (row, ids), for the rows that have any; blocks of one group of layers after
        those of another, as many of each. Raises `KernelArgumentError` if there is more than the shape has
        room for.
        """
        rows, picked = len(seats), len(sampling)
        ends = np.cumsum(counts)
        tokens = int(ends[-1]) if rows else 0
        if max(rows, picked) > self.shape.max_seqs or tokens > self.shape.max_tokens:
            raise KernelArgumentError(
                f"a step of {rows} rows, {tokens} tokens and {picked} samples does not fit {self.shape}"
            )
        of = self.buffer[: self.shape.tail].reshape(len(Section), -1)
        of[Section.QUERY_START_LOC, 0] = 0
        of[Section.QUERY_START_LOC, 1 : rows + 1] = ends
        of[Section.QUERY_START_LOC, rows + 1 :] = tokens
        of[Section.SEQ_LENS, :rows] = seq_lens
        of[Section.SEQ_LENS, rows:] = 1
        of[Section.SEATS, :rows] = seats
        of[Section.NUM_BLOCKS, :rows] = num_blocks
        of[Section.LOGIT_ROWS, :picked] = (ends - seq_lens)[sampling] + positions - 1
        of[Section.LOGIT_ROWS, picked:] = 0
        of[Section.SAMPLE_SEATS, :picked] = seats[sampling]
        of[Section.SAMPLE_SEATS, picked:] = -1
        of[Section.SAMPLE_POSITIONS, :picked] = positions
        of[Section.SAMPLE_POSITIONS, picked:] = 0
        end = self._append(self.shape.tail, new_ids, of[Section.ID_START], of[Section.ID_COUNT])
        end = self._append(end, new_blocks, of[Section.BLOCK_START], of[Section.BLOCK_COUNT])
        of[Section.BLOCK_COUNT] //= self.shape.num_groups
        return end

    def _append(
        self,
        end: int,
        items: Iterable[tuple[int, Sequence[int] | NDArray[np.integer]]],
        start: NDArray[np.int32],
        count: NDArray[np.int32],
    ) -> int:
        count[:] = 0
        for row, values in items:
            start[row], count[row] = end, len(values)
            end += len(values)
            if end > len(self.buffer):
                raise KernelArgumentError(f"more new ids and blocks than {self.shape} allows")
            self.buffer[end - len(values) : end] = values
        return end
