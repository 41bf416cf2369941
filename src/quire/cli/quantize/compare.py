"""How far a checkpoint's predictions are from another's, of the same model, on a text.

The KL divergence is the mean over the text's tokens of sum(p * log(p / q)), with p the original's
distribution of the next token. It is what a change of the weights does; perplexity on a short text moves both
ways.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quire.attention.base import AttentionMetadata, KVCache
from quire.kernels.select import create_kernels
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.models.registry import resolve_spec, text_config
from quire.models.spec import ModelSpec
from quire.weights.source import ModelSource, open_source

TEXTS = Path(__file__).with_name("texts.txt")
MOST_BYTES = 1 << 29
"""Of the original's log-probabilities, which are kept: the text is cut to fit."""
CHUNK = 256
BLOCK_SIZE = 16


class Comparison(NamedTuple):
    num_tokens: int
    kl: float
    top1: float
    """Share of the tokens after which both models' likeliest next one is the same."""
    perplexity: float
    original_perplexity: float


@torch.inference_mode()
def compare(original: Path, other: Path, text: str | None = None) -> Comparison:
    """Both computed on the CPU, one after the other, in the original's dtype."""
    source, quantized = open_source(original), open_source(other)
    spec = resolve_spec(text_config(source.config()))
    ids = source.tokenizer().encode(text or TEXTS.read_text(encoding="utf-8"))
    ids = ids[: min(spec.context_length, max(2, MOST_BYTES // (4 * spec.vocab_size)))]
    expected = logprobs(source, spec, ids)
    found = logprobs(quantized, resolve_spec(text_config(quantized.config())), ids)
    own = measure(expected, expected, ids)
    return Comparison(len(ids), *measure(expected, found, ids), own[-1])


def measure(expected: Tensor, found: Tensor, ids: list[int]) -> tuple[float, float, float]:
    """Of log-probabilities of the original and of another model, [num_tokens, vocab_size]: the KL divergence,
    the share of equal best tokens, and the other's perplexity."""
    kl = same = 0.0
    for p, q in zip(expected.split(CHUNK), found.split(CHUNK), strict=True):
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    chosen = found[:-1].gather(1, torch.tensor(ids[1:])[:, None])
    return kl / len(ids), same / len(ids), float(chosen.mean().neg().exp())


def logprobs(
    source: ModelSource,
    spec: ModelSpec,
    ids: list[int],
    *,
    dtype: str | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Tensor:
    """Of every token's successor: [num_tokens, vocab_size] float32. dtype: None: the checkpoint's own.
    kv_dtype: of the KV cache; None: the same."""
    model = load_model(
        spec,
        source,
        dtype=getattr(torch, dtype or spec.checkpoint_dtype or "bfloat16"),
        kernels=create_kernels(),
        max_model_len=len(ids),
    )
    return _logprobs(model, ids, kv_dtype or model.dtype)


def _logprobs(model: DecoderModel, ids: list[int], kv_dtype: torch.dtype) -> Tensor:
    spec = model.spec
    num_blocks, num_groups = -(-len(ids) // BLOCK_SIZE), len(spec.kv.groups)
    cache = KVCache(
        num_parts=spec.kv.layers_per_page,
        num_blocks=1 + num_groups * num_blocks,
        num_kv_heads=spec.heads.num_kv_heads,
        head_dim=spec.heads.head_dim,
        block_size=BLOCK_SIZE,
        dtype=kv_dtype,
    )
    out = torch.empty(len(ids), spec.vocab_size)
    tokens, positions = torch.tensor(ids), torch.arange(len(ids))
    tables = torch.arange(1, 1 + num_groups * num_blocks, dtype=torch.int32).view(num_groups, 1, -1)
    for first in range(0, len(ids), CHUNK):
        part = slice(first, min(first + CHUNK, len(ids)))
        metadata = [
            AttentionMetadata(
                positions=positions[part],
                slot_mapping=int(table[0, 0]) * BLOCK_SIZE + positions[part],
                query_start_loc=torch.tensor([0, part.stop - first], dtype=torch.int32),
                seq_lens=torch.tensor([part.stop], dtype=torch.int32),
                block_table=table,
            )
            for table in tables
        ]
        hidden = model.compute(tokens[part], metadata, cache)
        out[part] = model.compute_logits(hidden).log_softmax(-1)
    return out
