"""The running batch, kept on the GPU, and the copy of cache blocks.

A step is planned while the one before it runs, so its inputs are made on the device, where the tokens are.
The host copies one buffer (`packing`). `build_step` makes the model's inputs from it and from the seats.
`append_tokens` writes sampled tokens to the seats, where the next step's `build_step` reads them. The
order of the stream is the only synchronization. Shapes are fixed and all inputs are on the device, so all
three can be part of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.checks import KernelArgumentError
from quire.kernels.triton.packing import BatchShape, Section

# --- the seats --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """The state of the seats, and one step's inputs. All addresses are fixed.

    Attention reads the step's `block_table`, which is gathered once per step, and not the seats' tables
    through an
    index: with an index, every program of every layer would wait for one more load.
    """

    shape: BatchShape
    block_size: int
    packed: Tensor
    """[packed_size] int32: the copy of the host's buffer."""
    token_ids: Tensor
    """[max_seqs, max_model_len + 1] int32: the computed or sampled tokens of each seat's request. Tokens
    whose keys were found in the cache may be missing."""
    seat_blocks: Tensor
    """[groups, max_seqs, max_blocks] int32: a table for each group of layers (`quire.kv_layout`)."""
    input_ids: Tensor
    """[max_tokens] int64, as the next."""
    positions: Tensor
    slot_mapping: Tensor
    """[groups, max_tokens] int64"""
    block_table: Tensor
    """[groups, max_seqs, max_blocks] int32; entries past a row's blocks may hold anything."""

    @classmethod
    def create(
        cls, shape: BatchShape, *, max_model_len: int, block_size: int, device: torch.device
    ) -> DeviceBatch:
        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            shape=shape,
            block_size=block_size,
            packed=zeros(shape.packed_size),
            token_ids=zeros(shape.max_seqs, max_model_len + 1),
            seat_blocks=zeros(shape.num_groups, shape.max_seqs, shape.max_blocks),
            input_ids=zeros(shape.max_tokens, dtype=torch.int64),
            positions=zeros(shape.max_tokens, dtype=torch.int64),
            slot_mapping=zeros(shape.num_groups, shape.max_tokens, dtype=torch.int64),
            block_table=zeros(shape.num_groups, shape.max_seqs, shape.max_blocks),
        )

    def section(self, which: Section) -> Tensor:
        """A section of the packed buffer; its first entries are the step's."""
        return self.packed[: self.shape.tail].view(len(Section), -1)[which]


@triton.jit
def _kept_or_new(kept_ptr, new_ptr, index, first_new, end_new, inside):
    """Entries of a seat. Those in [first_new, end_new) come from the packed buffer and are written to the
    seat.

    New entries are not read back from the seat, so threads need not wait for each other's writes.
    """
    new = inside & (index >= first_new) & (index < end_new)
    fresh = tl.load(new_ptr + (index - first_new), mask=new, other=0)
    tl.store(kept_ptr + index, fresh, mask=new)
    return tl.where(new, fresh, tl.load(kept_ptr + index, mask=inside & (new == 0), other=0))


@triton.jit(do_not_specialize=["padded_tokens"])
def _build_step(
    packed_ptr, query_start_loc_ptr, seq_lens_ptr, seats_ptr, num_blocks_ptr,
    id_start_ptr, id_count_ptr, block_start_ptr, block_count_ptr,
    token_ids_ptr, seat_blocks_ptr,
    input_ids_ptr, positions_ptr, slot_mapping_ptr, block_table_ptr,
    padded_tokens,
    MAX_LEN: tl.constexpr, MAX_BLOCKS: tl.constexpr, MAX_SEQS: tl.constexpr, MAX_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid: rows, groups of layers. The program past the last row writes the padding behind the step's
    tokens; the programs of the first group also write the inputs that all groups share."""
    row, group = tl.program_id(0), tl.program_id(1)
    slot_mapping_ptr += group * MAX_TOKENS
    seat_blocks_ptr += group.to(tl.int64) * MAX_SEQS * MAX_BLOCKS
    block_table_ptr += group.to(tl.int64) * MAX_SEQS * MAX_BLOCKS
    is_first = group == 0
    lane = tl.arange(0, TILE)
    first = tl.load(query_start_loc_ptr + row)
    if row == tl.num_programs(0) - 1:
        for start in range(first, padded_tokens, TILE):
            token = start + lane
            inside = token < padded_tokens
            tl.store(input_ids_ptr + token, 0, mask=inside & is_first)
            tl.store(positions_ptr + token, 0, mask=inside & is_first)
            tl.store(slot_mapping_ptr + token, -1, mask=inside)
    else:
        count = tl.load(query_start_loc_ptr + row + 1) - first
        if count > 0:
            position = tl.load(seq_lens_ptr + row) - count  # of the row's first token
            seat = tl.load(seats_ptr + row).to(tl.int64)
            new_ids_end = position + tl.load(id_count_ptr + row)
            new_ids_ptr = packed_ptr + tl.load(id_start_ptr + row)
            num_blocks = tl.load(num_blocks_ptr + row)
            num_new = tl.load(block_count_ptr + row)
            first_new_block = num_blocks - num_new
            new_blocks_ptr = packed_ptr + tl.load(block_start_ptr + row) + group * num_new
            ids_ptr = token_ids_ptr + seat * MAX_LEN
            blocks_ptr = seat_blocks_ptr + seat * MAX_BLOCKS
            for start in range(0, num_blocks, TILE):
                index = start + lane
                inside = index < num_blocks
                block = _kept_or_new(
                    blocks_ptr, new_blocks_ptr, index, first_new_block, num_blocks, inside
                )
                tl.store(
                    block_table_ptr + row.to(tl.int64) * MAX_BLOCKS + index, block, mask=inside
                )
            for start in range(0, count, TILE):
                token = start + lane
                inside = token < count
                at = position + token
                token_id = _kept_or_new(
                    ids_ptr, new_ids_ptr, at, position, new_ids_end, inside & is_first
                )
                # Read the row of the table again: part of it may not have been written to the seat yet.
                index = at // BLOCK_SIZE
                block = _kept_or_new(
                    blocks_ptr, new_blocks_ptr, index, first_new_block, num_blocks, inside
                )
                slot = block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE
                tl.store(input_ids_ptr + first + token, token_id, mask=inside & is_first)
                tl.store(positions_ptr + first + token, at, mask=inside & is_first)
                tl.store(slot_mapping_ptr + first + token, slot, mask=inside)


def build_step(batch: DeviceBatch, *, num_rows: int, num_tokens: int) -> None:
    """Fill `input_ids`, `positions`, `slot_mapping` and `block_table` from the packed buffer and the
    seats, and write new entries to the seats.

    num_rows, num_tokens: the step's, or the padded numbers of a graph. Padding tokens have id 0, position 0
    and slot -1; for padding rows nothing is written.
    """
    if num_rows > batch.shape.max_seqs or num_tokens > batch.shape.max_tokens:
        raise KernelArgumentError(
            f"{num_rows} rows and {num_tokens} tokens do not fit {batch.shape}"
        )
    _build_step[(num_rows + 1, batch.shape.num_groups)](
        batch.packed,
        batch.section(Section.QUERY_START_LOC),
        batch.section(Section.SEQ_LENS),
        batch.section(Section.SEATS),
        batch.section(Section.NUM_BLOCKS),
        batch.section(Section.ID_START),
        batch.section(Section.ID_COUNT),
        batch.section(Section.BLOCK_START),
        batch.section(Section.BLOCK_COUNT),
        batch.token_ids, batch.seat_blocks,
        batch.input_ids, batch.positions, batch.slot_mapping, batch.block_table,
        num_tokens,
        MAX_LEN=batch.token_ids.shape[1], MAX_BLOCKS=batch.shape.max_blocks,
        MAX_SEQS=batch.shape.max_seqs, MAX_TOKENS=batch.shape.max_tokens,
        BLOCK_SIZE=batch.block_size, TILE=1024, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _append_tokens(
    seats_ptr, positions_ptr, sampled_ptr, token_ids_ptr, count,
    MAX_LEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    seat = tl.load(seats_ptr + row, mask=inside, other=-1).to(tl.int64)
    position = tl.load(positions_ptr + row, mask=inside, other=0)
    token_id = tl.load(sampled_ptr + row, mask=inside, other=0).to(tl.int32)
    tl.store(token_ids_ptr + seat * MAX_LEN + position, token_id, mask=seat >= 0)


def append_tokens(batch: DeviceBatch, sampled: Tensor) -> None:
    """Write sampled tokens to their seats; the packed buffer has the seat and position of entry r.

    sampled: [R] int32 or int64, where R is the number of sampled rows or its padded value in a graph. A
    token that will be discarded (the row's logits were NaN, or the request has ended) must be a valid id
    too, because the next step may compute it.
    """
    count, block = sampled.shape[0], 256
    if count > batch.shape.max_seqs:
        raise KernelArgumentError(f"{count} samples do not fit {batch.shape}")
    _append_tokens[(triton.cdiv(count, block),)](
        batch.section(Section.SAMPLE_SEATS),
        batch.section(Section.SAMPLE_POSITIONS),
        sampled, batch.token_ids, count,
        MAX_LEN=batch.token_ids.shape[1], BLOCK=block, num_warps=4,
    )  # fmt: skip


# --- copy-on-write ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=["sources_ptr", "destinations_ptr"])
def _copy_blocks(
    storage_ptr, sources_ptr, destinations_ptr, num_blocks,
    SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid: pairs, tiles of a block, layers' keys and values."""
    source = tl.load(sources_ptr + tl.program_id(0)).to(tl.int64)
    if source >= 0:
        destination = tl.load(destinations_ptr + tl.program_id(0)).to(tl.int64)
        item = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = item < SIZE
        blocks = tl.program_id(2).to(tl.int64) * num_blocks
        words = tl.load(storage_ptr + (blocks + source) * SIZE + item, mask=inside, other=0)
        tl.store(storage_ptr + (blocks + destination) * SIZE + item, words, mask=inside)


def copy_blocks(storage: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Copy whole blocks in every layer, for copy-on-write.

    storage: [layers, 2, num_blocks, kv_heads, block_size, D], contiguous, of any dtype. sources,
    destinations: [P] int32 or int64; no destination is a source or appears twice; a pair whose source
    is negative is padding.
    """
    if storage.dim() != 6 or storage.shape[1] != 2 or not storage.is_contiguous():
        raise KernelArgumentError(
            f"storage is {tuple(storage.shape)}; need [layers, 2, blocks, heads, block_size, D], dense"
        )
    if sources.dim() != 1 or sources.shape != destinations.shape:
        raise KernelArgumentError(
            f"{tuple(sources.shape)} sources and {tuple(destinations.shape)} destinations"
        )
    words = storage.view(torch.int32)  # the dtype does not matter for a copy
    planes, num_blocks, size = 2 * words.shape[0], words.shape[2], words.shape[3:].numel()
    tile = min(4096, triton.next_power_of_2(size))
    _copy_blocks[(sources.shape[0], triton.cdiv(size, tile), planes)](
        words, sources, destinations, num_blocks, SIZE=size, TILE=tile, num_warps=4
    )
