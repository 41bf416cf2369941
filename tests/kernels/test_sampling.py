from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.base import Kernels
from quire.kernels.checks import KernelArgumentError
from quire.kernels.cpu.native import NativeKernels
from quire.kernels.philox import gumbel_from_uniform, philox_words
from tests.kernels.cases import generator, randn, seeds


def test_philox_known_answers() -> None:
    """Random123's kat_vectors for philox4x32-10, as far as our counter layout reaches them."""
    assert [hex(w) for w in philox_words(0, 0, 4).tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    position=st.integers(0, 2**63),
    n=st.integers(0, 300),
)
def test_uniforms_are_the_same_bits(
    native: NativeKernels, reference: Kernels, seed: int, position: int, n: int
) -> None:
    u = native.philox_uniform(seed, position, n)
    assert torch.equal(u, reference.philox_uniform(seed, position, n))
    assert u.shape == (n,) and bool(((u > 0) & (u < 1)).all())


def test_uniforms_are_uniform_and_independent(native: NativeKernels) -> None:
    u = native.philox_uniform(7, 3, 200_000).double()
    assert abs(float(u.mean()) - 0.5) < 0.003 and abs(float(u.var()) - 1 / 12) < 0.001
    counts = torch.histc(u, 100, 0.0, 1.0)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 160  # chi-square, 99 degrees: p ~ 1e-4
    for other in (native.philox_uniform(7, 4, 200_000), native.philox_uniform(8, 3, 200_000)):
        assert abs(float(torch.corrcoef(torch.stack((u, other.double())))[0, 1])) < 0.01
    assert not torch.equal(native.philox_uniform(7, 3 + 2**32, 8), native.philox_uniform(7, 3, 8))


@given(rows=st.integers(0, 5), vocab=st.integers(1, 700), keep=st.floats(0.02, 1), seed=seeds)
def test_sample_is_the_argmax_of_score_plus_noise(
    native: NativeKernels, reference: Kernels, rows: int, vocab: int, keep: float, seed: int
) -> None:
    rng = generator(seed)
    scores = randn(rows, vocab + 3, rng=rng)[:, :vocab] * 4  # strided rows
    kept = torch.rand(rows, vocab, generator=rng) < keep
    kept[:, vocab // 2] = True
    scores[~kept] = -torch.inf
    row_seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=rng)
    positions = torch.randint(0, 2**40, (rows,), generator=rng)
    tokens = native.sample_gumbel(scores, row_seeds, positions)
    assert reference.sample_gumbel(scores, row_seeds, positions).shape == (rows,)
    for r in range(rows):
        u = reference.philox_uniform(int(row_seeds[r]), int(positions[r]), vocab)
        noisy = scores[r].double() + gumbel_from_uniform(u.double())
        assert bool(kept[r, tokens[r]])
        assert float(noisy[tokens[r]]) >= float(noisy.max()) - 1e-5
        alone = native.sample_gumbel(scores[r : r + 1], row_seeds[r : r + 1], positions[r : r + 1])
        assert int(alone) == int(tokens[r])


def test_frequencies_are_the_softmax(native: NativeKernels) -> None:
    draws, scores = 40_000, torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0])
    tokens = native.sample_gumbel(
        scores.expand(draws, 5).contiguous(), torch.full((draws,), 11), torch.arange(draws)
    )
    counts = torch.bincount(tokens, minlength=5) / draws
    torch.testing.assert_close(counts, torch.softmax(scores, 0), atol=0.01, rtol=0)
    assert counts[2] == 0


def test_native_and_reference_draw_the_same(native: NativeKernels, reference: Kernels) -> None:
    scores = randn(64, 3000, rng=generator(0)) * 2
    row_seeds, positions = torch.arange(64), torch.arange(64) * 7
    expected = reference.sample_gumbel(scores, row_seeds, positions)
    assert torch.equal(native.sample_gumbel(scores, row_seeds, positions), expected)


def test_ties_and_empty_rows_give_the_lowest_id(native: NativeKernels, reference: Kernels) -> None:
    for kernels in (native, reference):
        huge = torch.full((1, 200), 1e30)  # the noise rounds away: all scores tie
        assert int(kernels.sample_gumbel(huge, torch.tensor([1]), torch.tensor([1]))) == 0
        none = torch.full((1, 200), -torch.inf)
        assert int(kernels.sample_gumbel(none, torch.tensor([1]), torch.tensor([1]))) == 0
        one = none.clone()
        one[0, 199] = -1e30
        assert int(kernels.sample_gumbel(one, torch.tensor([1]), torch.tensor([1]))) == 199


def test_sample_refuses_wrong_tensors(native: NativeKernels, reference: Kernels) -> None:
    scores, longs = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    for kernels in (native, reference):
        for args in (
            (scores.half(), longs, longs),
            (scores, longs.int(), longs),
            (scores, longs, longs[:1]),
            (scores.t(), longs, longs),
            (scores[:, :0], longs, longs),
        ):
            with pytest.raises(KernelArgumentError):
                kernels.sample_gumbel(*args)
