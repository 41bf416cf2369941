"""Every family and config variant against transformers: logits, greedy tokens, and bit-equality
with itself.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quire.kernels.base import Kernels
from quire.kernels.reference import ReferenceKernels
from quire.models.eager_pass import EagerPass
from tests.models.conftest import Pair
from tests.models.harness import PagedHarness, Request
from tests.models.variants import VARIANTS, prompt_tokens, reference_logits

NEW_TOKENS = 64
DISTINCT = [
    "llama", "mistral-window", "qwen2-windows", "qwen3", "gemma2", "gemma3", "olmo3",
    "phi3-longrope-long", "granite", "smollm3", "ministral3",
]  # fmt: skip
"""One variant for each path through a layer; the slow reference kernels prove invariance on these."""


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_tokens_equal_transformers(
    name: str, pair: Callable[..., Pair], kernels: Kernels
) -> None:
    """Greedy equality by induction: given our tokens so far, transformers picks our next one, 64 times."""
    reference, model = pair(name, kernels)
    prompt = prompt_tokens(45)
    harness = PagedHarness(model)
    assert isinstance(harness.one_call, EagerPass) == isinstance(kernels, ReferenceKernels)
    tokens = prompt + harness.greedy(prompt, max_new_tokens=NEW_TOKENS, chunk=16)
    theirs = reference_logits(reference, tokens)
    assert tokens[len(prompt) :] == theirs.argmax(dim=-1)[len(prompt) - 1 : -1].tolist()
    ours = harness.prefill(Request(tokens), chunk=10**6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours.std() > 0.3  # the comparison means something: the logits are not all alike


@pytest.mark.parametrize(
    ("kernels", "name"),
    [("native", name) for name in VARIANTS] + [("reference", name) for name in DISTINCT],
    indirect=["kernels"],
)
def test_logits_do_not_depend_on_chunking_or_company(
    name: str, pair: Callable[..., Pair], kernels: Kernels
) -> None:
    _, model = pair(name, kernels)
    assert_invariant(PagedHarness(model))


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_thirty_two_requests_decode_together_as_they_do_alone(
    dtype: torch.dtype, pair: Callable[..., Pair], kernels: Kernels
) -> None:
    _, model = pair("mistral-window", kernels, dtype)
    harness = PagedHarness(model, num_blocks=160)
    requests = [Request(prompt_tokens(2 * i + 9, seed=i)) for i in range(32)]
    batches = [harness.step([(request, request.num_left - 6) for request in requests])]
    batches += [harness.step([(request, 1) for request in requests]) for _ in range(6)]
    for index, request in enumerate(requests):
        together = torch.cat([logits[index] for logits in batches])
        harness.free_sequence(request)
        assert torch.equal(harness.prefill(request, chunk=10**6), together)
        harness.free_sequence(request)


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, pair: Callable[..., Pair], kernels: Kernels
) -> None:
    _, model = pair("qwen3", kernels, dtype)
    tokens = prompt_tokens(100, seed=1)
    one = PagedHarness(model).prefill(Request(list(tokens)), chunk=64)
    torch.set_num_threads(2)
    try:
        assert torch.equal(PagedHarness(model).prefill(Request(list(tokens)), chunk=64), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", DISTINCT)
def test_half_precision_is_close_and_invariant(
    name: str, dtype: torch.dtype, pair: Callable[..., Pair], kernels: Kernels
) -> None:
    """Close: our error against the float32 model is no more than the reference's own in this dtype
    (x 1.5).
    """
    reference, model = pair(name, kernels, dtype)
    tokens = prompt_tokens(90)
    harness = PagedHarness(model)
    logits = harness.prefill(Request(list(tokens)), chunk=10**6)
    theirs = reference_logits(reference, tokens)
    exact = reference_logits(reference.float(), tokens)
    reference.to(dtype)
    assert (logits - exact).pow(2).mean().sqrt() <= 1.5 * (theirs - exact).pow(2).mean().sqrt()
    assert_invariant(harness)


def assert_invariant(harness: PagedHarness) -> None:
    """Bit-equal logits: alone and whole, in chunks, token by token, and beside strangers in a mixed batch."""
    tokens = prompt_tokens(100, seed=1)
    whole = harness.prefill(Request(list(tokens)), chunk=10**6)
    assert torch.isfinite(whole).all()
    for chunk in (7, 16, 64):
        assert torch.equal(harness.prefill(Request(list(tokens)), chunk=chunk), whole), chunk
    by_one = harness.prefill(Request(tokens[:40]), chunk=1)
    assert torch.equal(by_one, whole[:40])
    mine = Request(list(tokens))
    strangers = [Request(prompt_tokens(length, seed=length)) for length in (1, 5, 33, 64, 90)]
    rows = []
    for step, mine_now in enumerate((16, 1, 1, 30, 2, 50)):
        work = [(other, min(3 * step + 1, other.num_left)) for other in strangers if other.num_left]
        work.insert(step % (len(work) + 1), (mine, mine_now))
        logits = harness.step(work)
        rows.append(logits[[request is mine for request, _ in work].index(True)])
    assert torch.equal(torch.cat(rows), whole), "mixed batch"
