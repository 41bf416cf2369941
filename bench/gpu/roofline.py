"""The least time that a GPU needs, from shapes and two ceilings.

A step multiplies by every weight: it takes the longer of reading them and of the arithmetic. Attention
comes after, one after the other: reading the keys and values for tokens decoded, arithmetic for
prompts. No engine that computes the same function in the same dtype is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from quire.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Ceilings:
    bytes_per_s: float
    """Of a device-to-device copy, bytes read and written."""
    flops_per_s: float
    """Of a large bf16 matrix product."""

    def seconds(self, *, moved: float = 0.0, flops: float = 0.0) -> float:
        return max(moved / self.bytes_per_s, flops / self.flops_per_s)


ASSUMED = Ceilings(4.3e12, 790e12)
"""An H200's, where the run has not measured its own."""


def measured(entries: Iterable[dict[str, Any]]) -> Ceilings:
    """What the run's first case found."""
    for entry in entries:
        if (entry["part"], entry["name"]) == ("machine", "ceilings") and entry["status"] == "ok":
            return Ceilings(entry["values"]["bytes_per_s"], entry["values"]["flops_per_s"])
    return ASSUMED


def layer_weights(spec: ModelSpec) -> int:
    """Elements of the layers' matrices."""
    heads, inner = spec.heads, spec.layers[0].mlp.intermediate_size
    width = 2 * heads.q_size + 2 * heads.kv_size + 3 * inner
    return spec.num_layers * spec.hidden_size * width


def step_weights(spec: ModelSpec) -> int:
    """Elements of every matrix a decode step multiplies by; an embedding of its own is only looked up."""
    return layer_weights(spec) + spec.vocab_size * spec.hidden_size


def decode_s(
    spec: ModelSpec, batch: int, keys: float, ceilings: Ceilings, *, kv_bytes: int = 2
) -> float:
    """One token for each of `batch` requests, that have so many keys in all."""
    weights = step_weights(spec)
    products = ceilings.seconds(moved=2 * weights, flops=2 * batch * weights)
    return products + keys * spec.kv_bytes_per_token(kv_bytes) / ceilings.bytes_per_s


def prefill_s(spec: ModelSpec, prompts: Sequence[int], ceilings: Ceilings) -> float:
    """Prompts together. Logits of their last tokens count nothing here."""
    weights = layer_weights(spec)
    products = ceilings.seconds(moved=2 * weights, flops=2 * sum(prompts) * weights)
    squares = sum(tokens**2 for tokens in prompts)
    attention = 2 * spec.num_layers * spec.heads.q_size * squares  # half of each square is masked
    return products + attention / ceilings.flops_per_s


def workload_s(
    spec: ModelSpec, requests: Sequence[tuple[int, int]], ceilings: Ceilings, *, kv_bytes: int = 2
) -> float:
    """(prompt, generated) tokens of requests that all begin at once: prompts, then steps of all that
    still want tokens."""
    total = prefill_s(spec, [prompt for prompt, generated in requests if generated], ceilings)
    for step in range(1, max((generated for _, generated in requests), default=0)):
        keys = [prompt + step for prompt, generated in requests if generated > step]
        total += decode_s(spec, len(keys), sum(keys), ceilings, kv_bytes=kv_bytes)
    return total
