"""Against the edits of `sampling.sampler`, and plain torch for what the CPU does not have yet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.decoding import Decoding
from quire.kernels.checks import KernelArgumentError
from quire.kernels.sampling import sample_row
from quire.kernels.triton.logits import edit_logits, history_row
from quire.kernels.triton.seats import as_words
from quire.messages import AdmittedRequest
from quire.sampling.sampler import SamplingState
from tests.kernels.cases import generator, randn

VOCAB = 4133  # two tiles, the second of 37; 130 words of mask, the last of 5 bits


def record(fields: dict[str, Any] | np.void) -> np.void:
    if isinstance(fields, np.void):
        return fields
    row = sample_row(Decoding())
    for name, value in fields.items():
        row[name] = value
    return row


def edit(logits: Tensor, seats: list[dict[str, Any] | np.void], **options: Any) -> Tensor:
    """Row i in seat n - 1 - i."""
    count = len(seats)
    positions = options.pop("positions", [0] * count)
    options.setdefault("out", torch.full(logits.shape, 55.0))
    return edit_logits(
        logits,
        torch.from_numpy(as_words(np.stack([record(fields) for fields in reversed(seats)]))),
        torch.arange(count - 1, -1, -1, dtype=torch.int32),
        torch.tensor(positions),
        **options,
    )


def some_logits(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    logits = (randn(rows, VOCAB + 1, rng=generator(rows))[:, :VOCAB] * 4).to(dtype)
    logits[0, [5, 4100]] = torch.tensor([-torch.inf, torch.inf]).to(dtype)
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_wants_nothing_is_copied(dtype: torch.dtype) -> None:
    logits = some_logits(2, dtype)
    history = torch.ones(2, VOCAB, dtype=torch.int16)  # of requests long gone
    out = edit(logits, [{}, {"temperature": 1.0, "seed": 5}], history=history)
    assert torch.equal(out, logits.float())


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.4},
        {"presence_penalty": -0.7},
        {"repetition_penalty": 0.8, "frequency_penalty": -1.1, "presence_penalty": 2.0},
        {"repetition_penalty": 1.1, "min_tokens": 6, "stop_token_ids": frozenset({4132, 0, 7})},
    ],
)
@pytest.mark.parametrize("position", [14, 15])
def test_penalties_and_bans_are_those_of_the_sampler(params: dict[str, Any], position: int) -> None:
    prompt, output = [1, 2, 3, 4130, 4130, 7, 0, 9, 9], [7, 7, 7, 4131, 2]
    given = Decoding(end_token_ids=frozenset({11}), **params)
    request = AdmittedRequest(
        request_id=0,
        token_ids=prompt + output,
        num_prompt_tokens=len(prompt),
        block_ids=([],),
        decoding=given,
    )
    state = SamplingState(request, VOCAB)
    logits = some_logits(2)
    want = logits.clone()
    state.edit(want[1], position, None)
    history = torch.zeros(2, VOCAB, dtype=torch.int16)
    history[0] = torch.from_numpy(history_row(prompt + output, len(prompt), VOCAB))
    banned = torch.zeros(2, 70, dtype=torch.int32)
    banned[0, : len(state.final_ids)] = torch.tensor(state.final_ids)
    fields = sample_row(given, len(prompt))
    out = edit(logits, [{}, fields], positions=[3, position], history=history, banned_ids=banned)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
    alone = edit(
        logits[1:], [fields], positions=[position], history=history[:1], banned_ids=banned[:1]
    )
    assert torch.equal(alone[0], out[1])


def test_a_grammar_leaves_out_before_all_else() -> None:
    allowed = torch.rand(3, VOCAB, generator=generator(1)) < 0.5
    padded = torch.zeros(3, 130 * 32, dtype=torch.bool)
    padded[:, :VOCAB] = allowed
    words = (padded.view(3, 130, 32).long() << torch.arange(32)).sum(-1)
    bitmask = words.to(torch.uint32).view(torch.int32)
    logits = some_logits(3)
    which = torch.tensor([2, -1, 0], dtype=torch.int32)
    biased = torch.tensor([[8, 9]] * 3, dtype=torch.int32)
    fields = {"num_biased": 2}
    out = edit(
        logits, [{}, {}, fields], bitmask=bitmask, bitmask_rows=which,
        biased_ids=biased, biases=torch.full((3, 2), 100.0),
    )  # fmt: skip
    logits[2, [8, 9]] += 100.0
    want = logits.clone()
    want[0, ~allowed[2]] = -torch.inf
    want[2, ~allowed[0]] = -torch.inf
    assert torch.equal(out, want)


def test_biases_come_before_penalties_and_bans_after() -> None:
    """70 biases, more than are looked at together, in both tiles; one of them is banned."""
    logits = some_logits(1, torch.bfloat16)
    ids = torch.arange(70, dtype=torch.int32) * 59
    biases = randn(70, rng=generator(8)) * 5
    history = torch.from_numpy(history_row([59, 4071, 12], 1, VOCAB))[None]
    fields = {"num_biased": 70, "repetition_penalty": 2.0, "num_banned": 1, "banned_until": 9}
    lists = {
        "biased_ids": ids[None],
        "biases": biases[None],
        "banned_ids": torch.tensor([[118, 5]], dtype=torch.int32),
        "history": history,
    }
    want = logits.float()
    want[0, ids.long()] += biases
    repeated = want[0, [59, 4071, 12]]
    want[0, [59, 4071, 12]] = torch.where(repeated > 0, repeated / 2.0, repeated * 2.0)
    assert torch.equal(edit(logits, [fields], positions=[9], **lists), want)
    want[0, 118] = -torch.inf
    assert torch.equal(edit(logits, [fields], positions=[8], **lists), want)


def test_padding_is_left_alone() -> None:
    out = torch.full((1, 10), 3.0)
    edit_logits(
        torch.zeros(1, 10),
        torch.from_numpy(as_words(sample_row(Decoding()).reshape(1))),
        torch.tensor([-1], dtype=torch.int32),
        torch.tensor([0]),
        out=out,
    )
    assert torch.equal(out, torch.full((1, 10), 3.0))


def test_history_of_a_request() -> None:
    row = history_row([3, 3, 5, 1, 1, 5], 3, 8)
    assert row.tolist() == [0, 2, 0, -32768, 0, -32768 + 1, 0, 0]
    assert history_row([0] * 40_000, 0, 2).tolist() == [32767, 0]


def test_wrong_arguments_are_refused() -> None:
    logits, ids = torch.zeros(1, 64), torch.zeros(1, 4, dtype=torch.int32)
    for wrong in (
        {"out": torch.zeros(1, 64, dtype=torch.bfloat16)},
        {"history": torch.zeros(1, 64, dtype=torch.int32)},
        {"bitmask": torch.zeros(1, 2, dtype=torch.int32)},
        {"bitmask": torch.zeros(1, 3, dtype=torch.int32), "bitmask_rows": ids[0, :1]},
        {"biased_ids": ids},
        {"biased_ids": ids, "biases": torch.zeros(1, 3)},
        {"banned_ids": ids.long()},
    ):
        with pytest.raises(KernelArgumentError):
            edit(logits, [{}], **wrong)
