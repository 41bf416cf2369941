"""The residual at some layers, of all tokens of a step: what heads that draft read."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from quire.attention.base import KVCache
from quire.kernels.base import Kernels
from quire.kernels.program import StepRows
from quire.models.decoder import DecoderModel
from tests.models.conftest import Pair
from tests.models.variants import prompt_tokens

TOKENS = prompt_tokens(40)
CHUNKS = [(0, 17, 0), (17, 20, 1), (37, 3, 3)]
"""First token, number of tokens, and how many results are wanted."""


def run(model: DecoderModel) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The prompt in chunks. Returns what is tapped of each, and all logits."""
    cache = KVCache(
        num_parts=model.spec.kv.layers_per_page,
        num_blocks=1 + 3 * len(model.spec.kv.groups),
        num_kv_heads=model.spec.heads.num_kv_heads,
        head_dim=model.spec.heads.head_dim,
        block_size=16,
        dtype=model.dtype,
    )
    blocks = np.arange(1, cache.num_blocks, dtype=np.int32).reshape(-1, 1, 3)
    one_call = model.over(cache)
    tapped, logits = [], []
    for start, count, wanted in CHUNKS:
        rows = StepRows(
            token_ids=np.array([TOKENS]),
            block_ids=blocks,
            rows=np.array([[0, start, count, wanted]]),
            num_rows=1,
            num_wanted=wanted,
        )
        logits.append(one_call.forward(rows).clone())
        tapped.append(one_call.tapped.clone())
    return tapped, torch.cat(logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo3", "granite"])
def test_taps_give_the_residual_and_change_no_bit(
    name: str, pair: Callable[..., Pair], kernels: Kernels
) -> None:
    reference, model = pair(name, kernels)
    count = model.spec.num_layers
    nothing, plain = run(model)
    assert not any(each.numel() for each in nothing)
    model = copy.copy(model)
    with torch.no_grad():
        theirs = reference(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    for taps in [(0,), (0, count - 1), (1, count), (count,)]:
        model.taps = taps
        tapped, logits = run(model)
        assert torch.equal(logits.view(torch.int32), plain.view(torch.int32))
        assert [len(each) for each in tapped] == [size for _, size, _ in CHUNKS]
        ours = torch.cat(tapped).split(model.spec.hidden_size, dim=1)
        assert len(ours) == len(taps)
        for layer, states in zip(taps, ours, strict=True):
            expected = theirs[layer][0]
            if layer == count:  # transformers gives the last one after the final norm
                states = kernels.rms_norm(states, model.final_norm.weight, model.final_norm.eps)
            torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
