from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.checks import KernelArgumentError
from quire.kernels.triton.logprobs import MAX_LOGPROBS, DeviceLogprobs, logprobs
from tests.kernels.cases import generator, randn, seeds

# NumPy warns of what a kernel computes and then does not choose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


def of_rows(
    logits: torch.Tensor,
    rows: list[int],
    tokens: list[int],
    k: int,
    asked: torch.Tensor | None = None,
) -> DeviceLogprobs:
    return logprobs(logits, torch.tensor(rows, dtype=torch.int32), torch.tensor(tokens), k, asked)


@settings(max_examples=25)
@given(
    vocab=st.sampled_from([1, 2, 33, 400, 4096, 4097, 9001]),
    k=st.sampled_from([0, 1, 5, MAX_LOGPROBS]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 1e3]),
    grain=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=seeds,
)
def test_is_log_softmax_and_its_top(
    vocab: int, k: int, spread: float, grain: float, dtype: torch.dtype, seed: int
) -> None:
    rng = generator(seed)
    logits = (randn(3, vocab + 1, rng=rng)[:, :vocab] * spread).to(dtype)
    if grain:
        logits = (logits / grain).round() * grain
    logits[torch.rand(3, vocab, generator=rng) < 0.1] = -torch.inf
    logits[:, 0] = 0.0
    tokens = torch.randint(vocab, (3,), generator=rng).tolist()
    rows, k = [2, 0], min(k, vocab)
    asked = torch.randint(vocab, (2, 70), generator=rng) if k else None
    result = of_rows(logits, rows, tokens, k, asked)
    for i, r in enumerate(rows):
        x = logits[r].double()
        want = torch.log_softmax(x, dim=0)
        torch.testing.assert_close(
            result.logprob[i].double(), want[tokens[r]], rtol=2e-6, atol=4e-6
        )
        assert int(result.rank[i]) == int((x > x[tokens[r]]).sum()) + 1
        ids = x.sort(descending=True, stable=True).indices[:k]
        assert torch.equal(result.top_ids[i], ids)
        torch.testing.assert_close(result.top_logprobs[i].double(), want[ids], rtol=2e-6, atol=4e-6)
        if asked is not None:
            torch.testing.assert_close(
                result.asked[i].double(), want[asked[i]], rtol=2e-6, atol=4e-6
            )
        alone = of_rows(logits[r : r + 1].clone(), [0], [tokens[r]], k)
        assert torch.equal(alone.logprob[0], result.logprob[i])
        assert torch.equal(alone.top_logprobs[0], result.top_logprobs[i])


def test_the_logits_themselves_where_they_are_asked_for() -> None:
    logits = randn(2, 5000, rng=generator(3))
    logits[1, 7:] = -torch.inf  # more than a tile of nothing
    asked = torch.tensor([[4, 4999], [3, 9]])
    rows, tokens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([9, 5])
    found = logprobs(logits, rows, tokens, 9, asked, normalized=False)
    order = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found.top_ids, order.indices[:, :9])
    assert torch.equal(found.top_logprobs, order.values[:, :9])
    assert torch.equal(found.asked, logits.gather(1, asked))
    assert torch.equal(found.logprob, logits[[0, 1], tokens])
    assert found.rank.tolist() == [
        int((x > x[t]).sum()) + 1 for x, t in zip(logits, tokens, strict=True)
    ]


def test_infinite_logits_share_all_there_is() -> None:
    logits = torch.zeros(2, 5000)
    logits[0, [3, 4500]] = torch.inf
    logits[1] = -torch.inf
    result = of_rows(logits, [0, 1], [4500, 9], 3)
    assert result.logprob.tolist() == pytest.approx([-0.693147, -8.517193], abs=1e-5)
    assert result.rank.tolist() == [1, 1]
    assert result.top_ids.tolist() == [[3, 4500, 0], [0, 1, 2]]
    assert result.top_logprobs[0, 2] == -torch.inf


def test_wrong_arguments_are_refused() -> None:
    logits = torch.zeros(2, 10)
    assert of_rows(logits, [], [0, 0], 3).top_ids.shape == (0, 3)
    for rows, tokens, k in (([0], [0], 1), ([0], [0, 0], -1), ([0], [0, 0], 11)):
        with pytest.raises(KernelArgumentError):
            of_rows(logits, rows, tokens, k)
    with pytest.raises(KernelArgumentError):
        of_rows(logits, [0], [0, 0], 1, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(KernelArgumentError):
        of_rows(torch.zeros(2, 100), [0], [0, 0], MAX_LOGPROBS + 1)
