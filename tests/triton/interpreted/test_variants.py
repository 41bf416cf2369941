"""The start launches every variant of the sampling kernels that a request can need. Whole models are in
`test_device_parameters` and `test_device_runner`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from quire.decoding import Decoding
from quire.kernels.triton.sampling import SAMPLER_LEVELS
from quire.messages import AdmittedRequest
from quire.runner.device import Download, HostDevice
from quire.runner.gpu_sampling import GPUSampling, Logprobs
from quire.runner.prompt_work import score
from quire.structured.masks import Mask
from tests.triton.keys import Variants

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

ROWS, VOCAB = 4, 200
LISTS = (1, 16, 40)
"""Lengths of lists of ids."""


@pytest.mark.parametrize(
    ("mode", "dtype"), [("raw_logprobs", torch.bfloat16), ("processed_logits", torch.float32)]
)
def test_no_request_compiles(
    mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = Variants(monkeypatch)
    sampling = GPUSampling(ROWS, VOCAB, HostDevice(), logprobs_mode=mode)
    one = torch.full((1,), -1, dtype=torch.int32)
    sampling.compile_all(torch.randn(1, VOCAB, dtype=dtype), one, torch.zeros(1, dtype=torch.int64))
    known = set(variants.seen)
    assert known
    for rows in (1, 3):
        logits = torch.randn(rows, VOCAB, dtype=dtype)
        seats = torch.arange(rows, dtype=torch.int32)
        positions = torch.full((rows,), 9)
        for seat, length in zip(range(rows), LISTS, strict=False):
            sampling.admit(seat, request_with(length))
        sampling.upload()
        masks: dict[int, Mask] = {0: np.full(-(-VOCAB // 32), -1, dtype=np.int32)}
        for chosen in ({}, masks):
            edited = sampling.edit(logits, seats, positions, sampling.send(chosen, padded=rows))
            for each in (logits, edited):
                for level in SAMPLER_LEVELS:
                    tokens = sampling.sample(each, seats, positions, level)
                for count in (0, 1, 16, 20):
                    also = [list(range(rows + count)) for _ in range(rows)]
                    asking = {row: Logprobs(count, also[row]) for row in range(rows)}
                    sampling.logprobs(asking, logits, each.clone(), seats, tokens.token_ids)
        parts = [(torch.randn(n, VOCAB, dtype=dtype), [3] * n) for n in (4, 1)]
        for count in (0, 1, 16):
            assert len(sampling.score(parts, count, [7] * rows)) == 5
    assert not variants.since(known)


def request_with(length: int) -> AdmittedRequest:
    """With lists of that many ids, and all penalties."""
    decoding = Decoding(
        logit_bias=dict.fromkeys(range(length), 1.0),
        end_token_ids=frozenset(range(length)),
        min_tokens=20,
        repetition_penalty=1.1,
        presence_penalty=0.5,
    )
    return AdmittedRequest(
        request_id=length, token_ids=[1, 2], num_prompt_tokens=2, block_ids=[], decoding=decoding
    )


def test_a_new_variant_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes another one, and what does not."""
    from quire.kernels.triton.logprobs import logprobs

    variants = Variants(monkeypatch)
    logits, rows = torch.randn(4, VOCAB), torch.arange(4, dtype=torch.int32)
    tokens, asked = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 16, dtype=torch.int64)
    logprobs(logits, rows, tokens, 2, asked)
    known = set(variants.seen)
    logprobs(logits[:3], rows[:3], tokens[:3], 2, asked[:3])
    assert not variants.since(known)
    logprobs(logits.half(), rows, tokens, 2, asked)
    assert len(variants.since(known)) == 2
    known = set(variants.seen)
    logprobs(logits, rows, tokens, 2, asked, normalized=False)
    assert [each.split(":")[0] for each in variants.since(known)] == ["_merge"]


class Counting(HostDevice):
    downloads = 0

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        self.downloads += 1
        return super().download(tensors)


@pytest.mark.parametrize("count", [0, 5])
def test_prompt_logprobs_come_back_once(count: int) -> None:
    """The same as on the CPU, however many parts the prompt's logits are computed in."""
    device = Counting()
    sampling = GPUSampling(1, VOCAB, device, logprobs_mode="raw_logprobs")
    parts = [(torch.randn(n, VOCAB), list(range(n))) for n in (3, 3, 1)]
    found = sampling.score(parts, count, [7, 9])
    assert device.downloads == 1
    for ours, theirs in zip(found, score(parts, count, [7, 9]), strict=True):
        assert (ours.token_id, ours.rank, ours.top_ids) == (
            theirs.token_id,
            theirs.rank,
            theirs.top_ids,
        )
        for name in ("logprob", "top_logprobs", "asked_logprobs"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-4)
