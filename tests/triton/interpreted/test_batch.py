from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.checks import KernelArgumentError
from quire.kernels.triton.batch import DeviceBatch, append_tokens, build_step, copy_blocks
from quire.kernels.triton.packing import BatchShape, Section, StepPacker

CPU = torch.device("cpu")
MAX_LEN = 90
SHAPE = BatchShape(max_seqs=5, max_tokens=40, max_blocks=6, num_groups=2)
SHIFT = 1000
"""Between a request's blocks in the first group of layers and in the second."""


@dataclass
class Request:
    """What the host knows, and (`token_ids`) what it may not know yet."""

    seat: int
    token_ids: list[int]
    admitted: int
    computed: int
    blocks: list[int] = field(default_factory=list)
    sent: int = 0

    def new_blocks(self) -> list[int]:
        new = self.blocks[self.sent :]
        return new + [block + SHIFT for block in new]


class Engine:
    """A host that plans at random, beside a device that is launched as the runner would."""

    def __init__(self, rng: random.Random, block_size: int) -> None:
        self.rng, self.block_size = rng, block_size
        self.packer = StepPacker(SHAPE, np.full(SHAPE.packed_size, -7, dtype=np.int32))
        self.batch = DeviceBatch.create(
            SHAPE, max_model_len=MAX_LEN, block_size=block_size, device=CPU
        )
        self.requests: list[Request] = []
        self.next_block = 1

    def release_and_admit(self) -> None:
        self.requests = [request for request in self.requests if self.rng.random() < 0.85]
        free = sorted(set(range(SHAPE.max_seqs)) - {request.seat for request in self.requests})
        for seat in free:
            if self.rng.random() < 0.5:
                tokens = [self.rng.randrange(1000) for _ in range(self.rng.randint(1, 60))]
                cached = self.rng.choice([0, self.rng.randrange(len(tokens))])
                self.requests.append(Request(seat, tokens, len(tokens), cached))
        self.rng.shuffle(self.requests)

    def plan(self) -> list[tuple[Request, int]]:
        """Rows, each with the number of tokens it computes; blocks, for some of them early."""
        budget, rows = SHAPE.max_tokens, []
        for request in self.requests:
            known = len(request.token_ids)
            most = min(budget, known - request.computed)
            if most == 0 or known >= MAX_LEN or self.rng.random() < 0.2:
                continue
            count = self.rng.choice([most, self.rng.randint(1, most)])
            needed = -(-(request.computed + count) // self.block_size) + self.rng.choice([0, 0, 1])
            while len(request.blocks) < min(needed, SHAPE.max_blocks):
                request.blocks.append(self.next_block)
                self.next_block += 1
            budget -= count
            rows.append((request, count))
        return rows

    def step(self) -> None:
        rows, batch = self.plan(), self.batch
        if not rows:
            return
        ends = [request.computed + count for request, count in rows]
        sampling = [b for b, (request, _) in enumerate(rows) if ends[b] == len(request.token_ids)]
        used = self.packer.pack(
            seats=np.array([request.seat for request, _ in rows]),
            counts=np.array([count for _, count in rows]),
            seq_lens=np.array(ends),
            num_blocks=np.array([len(request.blocks) for request, _ in rows]),
            sampling=np.array(sampling, dtype=np.int64),
            positions=np.array(ends)[sampling],
            new_ids=[
                (b, request.token_ids[request.computed : min(ends[b], request.admitted)])
                for b, (request, _) in enumerate(rows)
                if request.computed < request.admitted
            ],
            new_blocks=[
                (b, request.new_blocks())
                for b, (request, _) in enumerate(rows)
                if request.sent < len(request.blocks)
            ],
        )
        batch.packed[:used] = torch.from_numpy(self.packer.buffer[:used])
        num_tokens = sum(count for _, count in rows)
        num_rows = self.rng.randint(len(rows), SHAPE.max_seqs)
        padded = self.rng.randint(num_tokens, SHAPE.max_tokens)
        batch.input_ids.fill_(-5)
        batch.block_table.fill_(-5)
        build_step(batch, num_rows=num_rows, num_tokens=padded)
        self.check(rows, num_rows, padded)
        self.sample(rows, sampling)
        for (request, _), end in zip(rows, ends, strict=True):
            request.computed, request.sent = end, len(request.blocks)

    def check(self, rows: list[tuple[Request, int]], num_rows: int, padded: int) -> None:
        batch, size = self.batch, self.block_size
        ids, positions, slots = [], [], []
        for b, (request, count) in enumerate(rows):
            span = range(request.computed, request.computed + count)
            ids += request.token_ids[span.start : span.stop]
            positions += span
            slots += [request.blocks[p // size] * size + p % size for p in span]
            for group, table in enumerate(batch.block_table):
                expected = [block + group * SHIFT for block in request.blocks]
                assert table[b, : len(request.blocks)].tolist() == expected
            assert batch.section(Section.SEQ_LENS)[b] == span.stop
        padding = padded - len(ids)
        assert batch.input_ids[:padded].tolist() == ids + [0] * padding
        assert batch.positions[:padded].tolist() == positions + [0] * padding
        for group, mapping in enumerate(batch.slot_mapping):
            moved = [slot + group * SHIFT * size for slot in slots]
            assert mapping[:padded].tolist() == moved + [-1] * padding
        assert (batch.input_ids[padded:] == -5).all()
        assert (batch.block_table[:, len(rows) :] == -5).all()
        starts = np.cumsum([0] + [count for _, count in rows]).tolist()
        padding_rows = num_rows - len(rows)
        assert batch.section(Section.QUERY_START_LOC)[: num_rows + 1].tolist() == (
            starts + [len(ids)] * padding_rows
        )
        assert (batch.section(Section.SEQ_LENS)[len(rows) : num_rows] == 1).all()

    def sample(self, rows: list[tuple[Request, int]], sampling: list[int]) -> None:
        batch, padded = self.batch, self.rng.randint(len(sampling), SHAPE.max_seqs)
        starts = batch.section(Section.QUERY_START_LOC)
        logit_rows = batch.section(Section.LOGIT_ROWS)[:padded].tolist()
        assert logit_rows == [starts[b + 1] - 1 for b in sampling] + [0] * (padded - len(sampling))
        sampled = torch.tensor([self.rng.randrange(1000) for _ in range(padded)])
        before = batch.token_ids.clone()
        append_tokens(batch, sampled)
        for b, token in zip(sampling, sampled.tolist()[: len(sampling)], strict=True):
            request = rows[b][0]
            before[request.seat, len(request.token_ids)] = token
            request.token_ids.append(token)
        assert batch.token_ids.equal(before)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    block_size=st.sampled_from([16, 32]),
    steps=st.integers(1, 15),
)
def test_the_device_follows_a_host_that_does_not_know_what_was_sampled(
    seed: int, block_size: int, steps: int
) -> None:
    engine = Engine(random.Random(seed), block_size)
    for _ in range(steps):
        engine.release_and_admit()
        engine.step()


def test_a_chunk_and_a_table_longer_than_a_tile() -> None:
    shape = BatchShape(max_seqs=1, max_tokens=2500, max_blocks=1300)
    packer = StepPacker(shape, np.zeros(shape.packed_size, dtype=np.int32))
    batch = DeviceBatch.create(shape, max_model_len=1300 * 16, block_size=16, device=CPU)
    ids, blocks = np.arange(2100) * 3, np.arange(1300)[::-1] + 1
    start = 1290 * 16 - 2000
    used = packer.pack(
        seats=np.array([0]), counts=np.array([2100]), seq_lens=np.array([start + 2100]),
        num_blocks=np.array([1300]), sampling=np.array([0]), positions=np.array([start + 2100]),
        new_ids=[(0, ids)], new_blocks=[(0, blocks)],
    )  # fmt: skip
    assert used == shape.tail + 2100 + 1300
    batch.packed[:used] = torch.from_numpy(packer.buffer[:used])
    build_step(batch, num_rows=1, num_tokens=2500)
    positions = np.arange(start, start + 2100)
    assert batch.input_ids.tolist() == ids.tolist() + [0] * 400
    assert batch.token_ids[0, positions].tolist() == ids.tolist()
    assert batch.slot_mapping[0, :2100].tolist() == (
        blocks[positions // 16] * 16 + positions % 16
    ).tolist()  # fmt: skip
    assert (batch.slot_mapping[0, 2100:] == -1).all()
    assert batch.block_table[0, 0].tolist() == batch.seat_blocks[0, 0].tolist() == blocks.tolist()


def test_a_step_that_does_not_fit_raises() -> None:
    packer = StepPacker(SHAPE, np.zeros(SHAPE.packed_size, dtype=np.int32))
    for rows, count in ((6, 1), (1, 41)):
        each = np.ones(rows, dtype=np.int64)
        with pytest.raises(KernelArgumentError, match="does not fit"):
            packer.pack(
                seats=each, counts=each * count, seq_lens=each * 50, num_blocks=each * 6,
                sampling=each[:0], positions=each[:0], new_ids=[], new_blocks=[],
            )  # fmt: skip
    one = np.ones(1, dtype=np.int64)
    with pytest.raises(KernelArgumentError, match="new ids and blocks"):
        packer.pack(
            seats=one, counts=one, seq_lens=one, num_blocks=one, sampling=one[:0], positions=one[:0],
            new_ids=[(0, np.zeros(SHAPE.packed_size))], new_blocks=[],
        )  # fmt: skip
    batch = DeviceBatch.create(SHAPE, max_model_len=MAX_LEN, block_size=16, device=CPU)
    with pytest.raises(KernelArgumentError):
        build_step(batch, num_rows=6, num_tokens=6)
    with pytest.raises(KernelArgumentError):
        append_tokens(batch, torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=["fp32", "bf16", "fp8"]
)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_copied_blocks_are_copies_and_nothing_else_changes(
    dtype: torch.dtype, head_dim: int
) -> None:
    storage = torch.randn(2, 2, 6, 3, 32, head_dim).to(dtype)
    expected = storage.view(torch.uint8).clone()
    expected[:, :, [4, 1]] = expected[:, :, [2, 5]]
    sources, destinations = torch.tensor([2, -1, 5, -1]), torch.tensor([4, -1, 1, 0])
    copy_blocks(storage, sources, destinations)
    assert storage.view(torch.uint8).equal(expected)
    with pytest.raises(KernelArgumentError):
        copy_blocks(storage, sources, destinations[:2])
    with pytest.raises(KernelArgumentError):
        copy_blocks(storage[0], sources, destinations)
