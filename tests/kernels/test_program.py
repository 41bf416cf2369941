"""Recorded programs: which operations they hold, and which memory their buffers share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.checks import KernelArgumentError
from quire.kernels.ops import AttentionLayer, Head, NormWeight
from quire.kernels.program import Code, Op, Program, ProgramOps

HIDDEN, HEADS, DIM, INNER, VOCAB = 64, 2, 32, 96, 50


class Product:
    """A matrix that nobody multiplies with."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.in_features, self.out_features = in_features, out_features


NORM = NormWeight(torch.ones(HIDDEN), 1e-6)
HEAD_NORM = NormWeight(torch.ones(DIM), 1e-6)
QKV, OUT = Product(HIDDEN, 3 * HEADS * DIM), Product(HEADS * DIM, HIDDEN)
GATE_UP, DOWN = Product(HIDDEN, 2 * INNER), Product(INNER, HIDDEN)
HEAD = Head(Product(HIDDEN, VOCAB))  # type: ignore[arg-type]


def attention(index: int) -> AttentionLayer:
    return AttentionLayer(
        part=index,
        group=0,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        cos_sin=torch.empty(16, DIM),
        q_norm=None,
        k_norm=None,
        window=0,
        scale=1.0,
        softcap=0.0,
    )


def record(num_layers: int, *, sandwich: bool = False, scale: float = 1.0) -> Program:
    ops = ProgramOps(torch.float32)
    x = ops.embed(torch.empty(VOCAB, HIDDEN))
    for index in range(num_layers):
        layer = attention(index)
        qkv = ops.linear(ops.norm(x, NORM), QKV, "qkv")
        ops.rope_write_kv(qkv, layer)
        mixed = ops.attend(qkv, layer)
        if index == num_layers - 1:
            x, mixed = ops.keep_wanted(x, mixed)
        out = ops.linear(mixed, OUT, "o")
        x = ops.add(x, ops.norm(out, NORM) if sandwich else out, scale=scale)
        inner = ops.gated(ops.linear(ops.norm(x, NORM), GATE_UP, "gate_up"), "silu")
        out = ops.linear(inner, DOWN, "down")
        x = ops.add(x, ops.norm(out, NORM) if sandwich else out, scale=scale)
    return ops.finish(ops.norm(x, NORM), HEAD)


def record_part(rank: int, num_layers: int, *, sandwich: bool = False) -> Program:
    """The part of one of two ranks: a head, half of the columns, 32 or 18 tokens."""
    ops = ProgramOps(torch.float32, rank)
    tokens = (32, 18)[rank]
    x = ops.embed(torch.empty(tokens, HIDDEN), (0, 32))
    qkv_half, out = Product(HIDDEN, 3 * DIM), Product(HEADS * DIM, HIDDEN // 2)
    gate_up, down = Product(HIDDEN, INNER), Product(INNER, HIDDEN // 2)
    for index in range(num_layers):
        layer = replace(attention(index), num_heads=1, num_kv_heads=1)
        qkv = ops.linear(ops.norm(x, NORM), qkv_half, "qkv")
        if sandwich:  # and a norm of all queries together
            queries = ops.gather(ops.columns(qkv, 0, DIM), rank * DIM, HEADS * DIM)
            ops.put_columns(ops.norm(queries, NORM), rank * DIM, DIM, qkv, 0)
        ops.rope_write_kv(qkv, layer)
        mixed = ops.attend(qkv, layer)
        if index == num_layers - 1:
            x, mixed = ops.keep_wanted(x, mixed)
        y = ops.linear(ops.gather(mixed, rank * DIM, HEADS * DIM), out, "o")
        y = ops.gather(y, rank * HIDDEN // 2, HIDDEN)
        x = ops.add(x, ops.norm(y, NORM) if sandwich else y)
        inner = ops.gated(ops.linear(ops.norm(x, NORM), gate_up, "gate_up"), "silu")
        y = ops.linear(ops.gather(inner, rank * INNER // 2, INNER), down, "down")
        y = ops.gather(y, rank * HIDDEN // 2, HIDDEN)
        x = ops.add(x, ops.norm(y, NORM) if sandwich else y)
    head = Head(Product(HIDDEN, tokens), first=32 * rank, width=VOCAB)
    return ops.finish(ops.norm(x, NORM), head)


def test_an_operation_writes_its_columns_of_what_all_ranks_read() -> None:
    program = record_part(1, 1)
    written = [
        (op.code, op.first, op.width)
        for op in program.ops
        if op.target is not None and op.target.shared
    ]
    assert written == [
        (Code.EMBED, HIDDEN, HIDDEN), (Code.GATHER, HIDDEN, HIDDEN),
        (Code.ATTEND, DIM, DIM), (Code.KEEP, DIM, DIM), (Code.GATHER, DIM, DIM),
        (Code.LINEAR, 32, 32), (Code.GATHER, 32, 32),
        (Code.GATED, INNER // 2, INNER // 2), (Code.GATHER, INNER // 2, INNER // 2),
        (Code.LINEAR, 32, 32), (Code.GATHER, 32, 32),
    ]  # fmt: skip
    assert [(op.code, op.first, op.width) for op in program.ops[-2:]] == [
        (Code.LOGITS, 32, 18),
        (Code.GATHER, 32, 18),
    ]


@given(num_layers=st.integers(1, 4), sandwich=st.booleans())
def test_shared_memory_is_written_again_after_a_barrier(num_layers: int, sandwich: bool) -> None:
    """By another rank, which may be an operation behind or ahead between two barriers. All ranks have the
    same places."""
    programs = [record_part(rank, num_layers, sandwich=sandwich) for rank in (0, 1)]
    program = programs[0]
    shared = [
        [(number, each.offsets[number]) for number in sorted(each.shared)] for each in programs
    ]
    assert shared[0] == shared[1]
    assert programs[0].shared_bytes_per_token == programs[1].shared_bytes_per_token
    used: dict[
        int, tuple[int, int]
    ] = {}  # of each byte: the last buffer, and the barriers before it
    barriers = 0
    for op in program.ops:
        for buffer in (op.source, op.target):
            if buffer is None or not buffer.shared:
                continue
            start = program.offsets[buffer.number]
            assert start % 64 == 0
            assert start + 4 * buffer.width <= program.shared_bytes_per_token
            for place in range(start, start + 4 * buffer.width, 4):
                number, before = used.get(place, (buffer.number, -1))
                assert number == buffer.number or before < barriers
                used[place] = (buffer.number, barriers)
        barriers += op.code is Code.GATHER
    assert_nothing_is_overwritten(program)


def test_what_is_gathered_is_not_changed() -> None:
    ops = ProgramOps(torch.float32, 0)
    x = ops.embed(torch.empty(32, HIDDEN), (0, 32))
    whole = ops.gather(ops.linear(x, Product(HIDDEN, 32), "o"), 0, HIDDEN)  # type: ignore[arg-type]
    [x] = ops.keep_wanted(ops.scale(whole, 2.0))
    with pytest.raises(KernelArgumentError, match="not changed"):
        ops.finish(x, HEAD)


def test_a_product_that_is_added_at_once_is_one_operation() -> None:
    codes = [op.code for op in record(2).ops]
    layer = [Code.NORM, Code.LINEAR, Code.ROPE_WRITE, Code.ATTEND]
    rest = [Code.LINEAR_ADD, Code.NORM, Code.LINEAR, Code.GATED, Code.LINEAR_ADD]
    kept = [Code.KEEP, Code.KEEP, Code.NARROW]
    ends = [Code.NORM, Code.LOGITS]
    assert codes == [Code.EMBED, *layer, *rest, *layer, *kept, *rest, *ends]


@pytest.mark.parametrize("how", [{"sandwich": True}, {"scale": 0.5}])
def test_other_additions_stay_apart(how: dict[str, float]) -> None:
    codes = [op.code for op in record(1, **how).ops]  # type: ignore[arg-type]
    assert codes.count(Code.ADD) == 2 and Code.LINEAR_ADD not in codes


def test_a_step_that_wants_nothing_stops_after_the_last_write_to_the_cache() -> None:
    program = record(3)
    assert program.ops[program.num_cache_ops - 1].code is Code.ROPE_WRITE
    assert all(op.code is not Code.ROPE_WRITE for op in program.ops[program.num_cache_ops :])
    assert program.ops[program.num_hidden_ops].code is Code.LOGITS
    assert program.num_hidden_ops == len(program.ops) - 1


def test_a_step_that_wants_nothing_still_taps() -> None:
    ops = ProgramOps(torch.float32)
    x = ops.embed(torch.empty(VOCAB, HIDDEN))
    ops.tap(x)
    ops.tap(x)
    with pytest.raises(KernelArgumentError, match="all rows"):
        ops.keep_wanted(x)
        ops.tap(x)
    program = ops.finish(ops.norm(x, NORM), HEAD)
    assert program.num_cache_ops == 3 and program.tap_width == 2 * HIDDEN
    assert [op.first for op in program.ops if op.code is Code.TAP] == [0, HIDDEN]


def test_more_layers_take_no_more_memory() -> None:
    assert record(2).bytes_per_token == record(20).bytes_per_token


def assert_nothing_is_overwritten(program: Program) -> None:
    """Carries the program out on memory in which every byte names the buffer whose it is."""
    sizes = {
        buffer.number: buffer.width * program.dtype.itemsize
        for op in program.ops
        for buffer in (op.source, op.target)
        if buffer is not None and not buffer.shared
    }
    owner: dict[int, int] = {}

    def places(number: int) -> range:
        start = program.offsets[number]
        assert start % 64 == 0 and start + sizes[number] <= program.bytes_per_token
        return range(start, start + sizes[number], 4)

    def read(op: Op, number: int) -> None:
        for place in places(number):
            assert owner.get(place) == number, f"{op.label} reads what was overwritten"

    written: set[int] = set()
    for op in program.ops:
        source, target = (b if b and not b.shared else None for b in (op.source, op.target))
        if source is not None:
            read(op, source.number)
        if target is not None:
            if target.number in written:  # changed in place
                read(op, target.number)
            written.add(target.number)
            owner.update(dict.fromkeys(places(target.number), target.number))
        if source is not None:  # an operation may write before it has read everything
            read(op, source.number)


@given(
    num_layers=st.integers(1, 4),
    sandwich=st.booleans(),
    scale=st.sampled_from([1.0, 0.5]),
)
def test_buffers_that_live_at_once_share_no_memory(
    num_layers: int, sandwich: bool, scale: float
) -> None:
    assert_nothing_is_overwritten(record(num_layers, sandwich=sandwich, scale=scale))


def test_what_does_not_fit_is_refused() -> None:
    ops = ProgramOps(torch.bfloat16)
    x = ops.embed(torch.empty(VOCAB, HIDDEN))
    qkv = ops.linear(x, QKV, "qkv")
    wrong = (
        lambda: ops.norm(x, NormWeight(torch.ones(HIDDEN + 1), 1e-6)),
        lambda: ops.norm(x, NormWeight(torch.ones(HIDDEN, dtype=torch.float16), 1e-6)),
        lambda: ops.norm(x, NormWeight(torch.ones(HIDDEN - 1), 1e-6)),
        lambda: ops.norm_columns(x, NORM, 1),
        lambda: ops.rope_write_kv(qkv, replace(attention(0), k_norm=HEAD_NORM)),
        lambda: ops.rope_write_kv(qkv, replace(attention(0), q_norm=NORM, k_norm=NORM)),
        lambda: ops.rope_write_kv(
            qkv, replace(attention(0), q_norm=HEAD_NORM, k_norm=NormWeight(HEAD_NORM.weight, 1e-5))
        ),
        lambda: ops.linear(x, DOWN, "down"),
        lambda: ops.rope_write_kv(x, attention(0)),
        lambda: ops.scale_by_position(x, HIDDEN + 1, torch.ones(4)),
        lambda: ops.add(x, ops.gated(x, "silu")),
        lambda: ops.finish(x, HEAD),  # no row was left out
    )
    for call in wrong:
        with pytest.raises(KernelArgumentError):
            call()
