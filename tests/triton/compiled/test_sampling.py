"""Sampling, edits of logits and logprobs at real vocabularies, as the engine would launch them."""

from __future__ import annotations

import itertools

import pytest
import torch

from quire.kernels.triton.logits import edit_logits
from quire.kernels.triton.logprobs import MAX_LOGPROBS, logprobs
from quire.kernels.triton.sampling import (
    SAMPLER_LEVELS,
    SamplerLevel,
    SampleWorkspace,
    processed,
    sample,
)
from quire.kernels.triton.seats import SEAT_WORDS
from tests.triton.harness import ARCHES, Report, compile_launches, variants

ROWS, SEATS = 48, 256


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(vocab: int, dtype: torch.dtype, level: SamplerLevel) -> None:
    logits, edited = meta(ROWS, vocab, dtype=dtype), meta(ROWS, vocab, dtype=torch.float32)
    table, seats = meta(SEATS, SEAT_WORDS), meta(ROWS)
    positions = meta(ROWS)
    space = SampleWorkspace.create(ROWS, vocab, "meta")
    if level != "filter":
        sample(logits, table, seats, positions, space, level=level)
        return
    history = meta(SEATS, vocab, dtype=torch.int16)
    edit_logits(
        logits, table, seats, positions, out=edited, history=history,
        bitmask=meta(ROWS, (vocab + 31) // 32), bitmask_rows=meta(ROWS),
        biased_ids=meta(SEATS, 300), biases=meta(SEATS, 300, dtype=torch.float32),
        banned_ids=meta(SEATS, 16),
    )  # fmt: skip
    sample(edited, table, seats, positions, space, history=history)
    tokens, asked = meta(ROWS, dtype=torch.int64), meta(7, 128, dtype=torch.int64)
    logprobs(logits, meta(7), tokens, MAX_LOGPROBS, asked)
    processed(edited, meta(7), table, seats, space, out=edited)
    logprobs(edited, meta(7), tokens, MAX_LOGPROBS, asked, normalized=False)


def check(reports: list[Report], arch: int, names: list[str]) -> None:
    assert [report.kernel for report in reports] == names
    for report in reports:
        report.assert_fits(arch)


@pytest.mark.parametrize(
    ("arch", "vocab"), [(90, 32000), (90, 128256), (90, 151936), (80, 151936), (100, 151936)]
)
def test_all_that_a_batch_may_want(arch: int, vocab: int) -> None:
    reports = compile_launches(lambda: launch(vocab, torch.bfloat16, "filter"), arch=arch)
    check(
        reports,
        arch,
        ["_edit", "_scan", "_spread", "_finish", "_part", "_merge", "_process", "_part", "_merge"],
    )


@pytest.mark.parametrize("arch", ARCHES)
def test_batches_that_want_less(arch: int) -> None:
    greedy = compile_launches(lambda: launch(128256, torch.bfloat16, "greedy"), arch=arch)
    check(greedy, arch, ["_scan", "_finish"])
    draws = compile_launches(lambda: launch(128256, torch.float32, "draw"), arch=arch)
    check(draws, arch, ["_scan", "_spread", "_finish"])


def test_requests_of_every_kind_are_served_by_few_kernels() -> None:
    """A kernel that a request is the first to need is compiled while every other request waits."""
    vocab = 128256
    space = SampleWorkspace.create(ROWS, vocab, "meta")
    table, seats, positions = meta(SEATS, SEAT_WORDS), meta(ROWS), meta(ROWS, dtype=torch.int64)

    def launch() -> None:
        logits, edited = (meta(ROWS, vocab, dtype=of) for of in (torch.bfloat16, torch.float32))
        history = meta(SEATS, vocab, dtype=torch.int16)
        for kinds in itertools.product((False, True), repeat=4):
            for width in (1, 16, 300):
                edits = {
                    "history": history,
                    "bitmask": meta(3, (vocab + 31) // 32),
                    "biased_ids": meta(SEATS, width),
                    "banned_ids": meta(SEATS, width),
                }
                edits = {name: x for (name, x), of in zip(edits.items(), kinds, strict=True) if of}
                if "bitmask" in edits:
                    edits["bitmask_rows"] = meta(ROWS)
                if "biased_ids" in edits:
                    edits["biases"] = meta(SEATS, width, dtype=torch.float32)
                edit_logits(logits, table, seats, positions, out=edited, **edits)
        for level in SAMPLER_LEVELS:
            sample(logits, table, seats, positions, space, level=level)
            for past in (None, history):
                sample(edited, table, seats, positions, space, level=level, history=past)
        tokens = meta(ROWS, dtype=torch.int64)
        for x, k, asked in itertools.product((logits, edited), range(MAX_LOGPROBS + 1), (0, 1, 16)):
            ids = meta(7, asked, dtype=torch.int64) if asked else None
            logprobs(x, meta(7), tokens, k, ids, normalized=x is logits or k % 2 == 0)
        processed(edited, meta(7), table, seats, space, out=edited)

    assert variants(launch) == sorted([
        "_edit", "_process",
        *["_scan"] * 4,  # dtypes; with or without filters
        *["_spread"] * 2, *["_finish"] * 6, *["_part"] * 2,
        *["_merge"] * 3,  # bfloat16; float32, and not normalized
    ])  # fmt: skip
