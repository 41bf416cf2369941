"""Every family on the GPU's kernels, interpreted: transformers' logits, in two chunks and then a token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quire.attention.base import AttentionMetadata, KVCache
from quire.kernels.triton.backend import TritonKernels
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.weights.source import open_source
from tests.models.variants import build_reference, prompt_tokens, reference_logits, save

BLOCK_SIZE = 16
CHUNKS = (21, 12, 1)  # the second chunk and the token are beyond the windows' 24
FAMILIES = [
    "llama", "qwen3", "gemma2", "gemma3", "olmo2", "olmo3", "phi3-longrope-long", "granite",
    "smollm3-windows-untied", "ministral3",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = build_reference(name)
    save(reference, tmp_path)
    kernels = TritonKernels(torch.device("cpu"))
    spec = resolve_spec(json.loads((tmp_path / "config.json").read_text()))
    model = load_model(
        spec, open_source(tmp_path), dtype=torch.float32, kernels=kernels, max_model_len=256
    )
    cache = KVCache(
        num_parts=spec.kv.layers_per_page,
        num_blocks=5 * len(spec.kv.groups),
        num_kv_heads=spec.heads.num_kv_heads,
        head_dim=spec.heads.head_dim,
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
        kernels=kernels,
    )
    kernels.reserve(
        cache.parts[0].k,
        q_heads=spec.heads.num_heads,
        max_requests=1,
        max_len=256,
        windows={window or 0 for window in spec.windows},
    )
    tokens = prompt_tokens(sum(CHUNKS))
    tables = [torch.tensor([3, 1, 4]) + 5 * group for group in range(len(spec.kv.groups))]
    ours, start = [], 0
    for count in CHUNKS:
        positions = torch.arange(start, start + count)
        metadata = [
            AttentionMetadata(
                positions=positions,
                slot_mapping=table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
                query_start_loc=torch.tensor([0, count], dtype=torch.int32),
                seq_lens=torch.tensor([start + count], dtype=torch.int32),
                block_table=table[None].int(),
                max_query_len=count,
            )
            for table in tables
        ]
        ids = torch.tensor(tokens[start : start + count])
        ours.append(model.compute_logits(model.compute(ids, metadata, cache)))
        start += count
    theirs = reference_logits(reference, tokens)
    torch.testing.assert_close(torch.cat(ours), theirs, rtol=1e-4, atol=1e-4)
