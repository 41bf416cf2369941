"""Sampling, edits of logits and logprobs at real vocabularies, as the engine would launch them."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.triton.logits import edit_logits
from quire.kernels.triton.logprobs import MAX_LOGPROBS, logprobs
from quire.kernels.triton.sampling import SamplerLevel, SampleWorkspace, processed, sample
from quire.kernels.triton.seats import SEAT_WORDS
from tests.triton.harness import ARCHES, Report, compile_launches

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
