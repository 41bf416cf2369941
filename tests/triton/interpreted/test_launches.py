"""What a layer costs in launches: nodes of a CUDA graph, or calls of the host where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from quire.attention.base import AttentionMetadata, KVCache
from quire.kernels.triton.backend import TritonKernels
from quire.models.decoder import DecoderModel
from quire.models.registry import resolve_spec
from tests.models.published import QWEN3_06B

MAX_LEN, BLOCK_SIZE = 4096, 64
FREE = {"view", "_unsafe_view", "t", "slice", "select", "empty", "new_empty", "unsqueeze", "alias"}
"""Operations of PyTorch that launch nothing."""


class Operations(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.seen.append(name)
        return func(*args, **kwargs or {})


def launches(
    layers: int, tokens: list[int], monkeypatch: pytest.MonkeyPatch, **known: int
) -> list[str]:
    """Of a step with these numbers of tokens of its requests, without what they compute."""
    config = {**QWEN3_06B, "num_hidden_layers": layers, "hidden_size": 64, "vocab_size": 100}
    config |= {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    spec = resolve_spec({**config, "head_dim": 32})
    kernels = TritonKernels(torch.device("cpu"))
    model = DecoderModel(spec, dtype=torch.bfloat16, kernels=kernels, max_model_len=MAX_LEN)
    for target in model.targets():
        target.load(0, torch.zeros(target.shape, dtype=torch.bfloat16))
    model.bind()
    cache = KVCache(
        num_parts=layers, num_blocks=2, num_kv_heads=1, head_dim=32, block_size=BLOCK_SIZE,
        dtype=torch.bfloat16, kernels=kernels,
    )  # fmt: skip
    kernels.reserve(cache.parts[0].k, q_heads=2, max_requests=4, max_len=MAX_LEN, windows=[0])
    starts = torch.tensor([0, *tokens]).cumsum(0).int()
    ids = torch.zeros(sum(tokens), dtype=torch.int64)
    metadata = AttentionMetadata(
        positions=ids,
        slot_mapping=ids,
        query_start_loc=starts,
        seq_lens=torch.tensor(tokens).int(),
        block_table=torch.zeros(len(tokens), MAX_LEN // BLOCK_SIZE, dtype=torch.int32),
        max_query_len=max(tokens),
        **known,
    )
    seen: list[str] = []
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *_, **__: seen.append(self.fn.__name__)
    )
    with torch.inference_mode(), Operations(seen):
        model.compute(ids, [metadata], cache)
    return seen


def of_a_layer(tokens: list[int], monkeypatch: pytest.MonkeyPatch, **known: int) -> list[str]:
    one, two = (launches(n, tokens, monkeypatch, **known) for n in (1, 2))
    for name in one:
        two.remove(name)
    return sorted(two)


LAYER = ["_add_rms_norm"] * 2 + ["_gated", "_rope_write_kv"] + ["linear"] * 4


def test_a_layer_that_decodes_is_nine_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a request may have many splits: the program that ends last merges them."""
    assert of_a_layer([1, 1], monkeypatch) == sorted([*LAYER, "split_kernel"])


def test_a_step_of_prompts_alone_launches_no_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_a_layer([5, 3], monkeypatch, min_query_len=3) == sorted([*LAYER, "tile_kernel"])


def test_a_step_that_may_have_both_launches_both(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_a_layer([5, 1], monkeypatch) == sorted([*LAYER, "split_kernel", "tile_kernel"])
