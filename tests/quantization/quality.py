"""The KL divergence of a quantized built-in model to the one in bfloat16, on texts that it knows."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from quire.builtin import MODEL_DIR
from quire.kernels.select import create_kernels
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.quantization.base import LinearMethod
from quire.weights.source import ModelSource, open_source
from tests.models.harness import PagedHarness, Request

FAQ = Path(__file__).parents[2] / "training" / "faq.txt"
NUM_TOKENS = 1024


class Quality(NamedTuple):
    kl: float
    top1: float
    """Share of the tokens whose likeliest successor is the same."""


@functools.cache
def tokens() -> list[int]:
    """Conversations of the model's training."""
    items = re.findall(r"^Q: (.+)\n(?:Q: .+\n)*A: (.+)$", FAQ.read_text(), re.MULTILINE)
    text = "".join(
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        for question, answer in items
    )
    return open_source(MODEL_DIR).tokenizer().encode(text)[:NUM_TOKENS]


@functools.cache
def logprobs_of_original() -> torch.Tensor:
    return _logprobs(open_source(MODEL_DIR), None)


def quality(source: ModelSource | None = None, method: LinearMethod | None = None) -> Quality:
    """Of a checkpoint of the built-in model, or of the built-in one read by another method."""
    found = _logprobs(source or open_source(MODEL_DIR), method)
    original = logprobs_of_original()
    kl = (original.exp() * (original - found)).sum(-1).mean()
    return Quality(kl.item(), (original.argmax(-1) == found.argmax(-1)).float().mean().item())


def _logprobs(source: ModelSource, method: LinearMethod | None) -> torch.Tensor:
    """Computed in float32: bfloat16's own rounding is as large as that of int8."""
    spec = resolve_spec(source.config())
    spec = replace(spec, quantization=method or spec.quantization)
    model = load_model(
        spec, source, dtype=torch.float32, kernels=create_kernels(), max_model_len=NUM_TOKENS
    )
    harness = PagedHarness(model, num_blocks=NUM_TOKENS // 16 + 1)
    logits = harness.prefill(Request(list(tokens())), chunk=NUM_TOKENS)
    return logits.log_softmax(-1)
