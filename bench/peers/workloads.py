"""The workloads W1-W5 (W6 is in `agents`) that every engine is measured with, as token ids.

Lengths are drawn once from a fixed seed, so that every engine and every run does the same amount of work;
contents are drawn anew for each repeat, so that no prefix cache helps except inside W3, which is about it.
Only the standard library: this file is imported in every rival's own environment.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NUM_SPECIAL_TOKENS = 259
"""Ids below are special or single bytes (see `models.build_tokenizer`); prompts use none of them."""

WARM_UP = -1
"""The repeat that warms an engine up: the same work with contents of its own."""

WorkloadName = Literal["W1", "W2", "W3", "W4"]
WORKLOADS: tuple[WorkloadName, ...] = ("W1", "W2", "W3", "W4")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model of the comparison. The floors in `report` hold for these two shapes in bf16."""

    name: str
    title: str
    vocab_size: int
    kv_cache_bytes: int
    """Room for W1 (14.4k tokens) and for W3 without sharing (17.4k tokens); the same for all."""
    kv_bytes_per_token: int
    max_model_len: int = 2304
    w5_rate: float = 2.0
    server_slots: int = 64
    slot_tokens: int = 256
    """Of a server that divides its KV cache among slots: how many, and how long each is."""

    @property
    def kv_cache_tokens(self) -> int:
        return self.kv_cache_bytes // self.kv_bytes_per_token


MODELS: dict[str, ModelShape] = {
    "M2": ModelShape(
        name="M2",
        title="Llama 110M",
        vocab_size=32000,
        kv_cache_bytes=512 << 20,
        kv_bytes_per_token=12 * 2 * 4 * 64 * 2,
    ),
    "M1": ModelShape(
        name="M1",
        title="Qwen3 0.6B shape",
        vocab_size=151936,
        kv_cache_bytes=9 << 28,
        kv_bytes_per_token=28 * 2 * 8 * 128 * 2,
        # At 2 requests a second (128 output tokens a second) every engine would only build a queue.
        w5_rate=0.5,
    ),
}


@dataclass(frozen=True, slots=True)
class Request:
    """One request: its prompt's ids, and exactly how many tokens to generate (EOS is ignored)."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """What an engine reports of one workload. Seconds count from submitting everything at once."""

    seconds: float
    """Until the last token of the last request."""
    first_token: float | None
    """Until the first token; only W2 needs it."""
    num_generated: list[int]
    """Tokens generated for each request, to be compared with what was asked."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Full size, or a smoke's: the same shapes of work, small enough to only see that all works."""

    w1_requests: int = 64
    w1_prompt: tuple[int, int] = (32, 256)
    w1_output: tuple[int, int] = (16, 128)
    w2: tuple[int, int] = (128, 128)
    w3_requests: int = 32
    w3_prefix: int = 512
    w3_suffix: int = 16
    w3_output: int = 16
    w4_prompt: int = 2048
    w5_requests: int = 60
    w5: tuple[int, int] = (128, 64)


FULL = Scale()
SMOKE = Scale(
    w1_requests=4,
    w1_prompt=(8, 24),
    w1_output=(4, 8),
    w2=(16, 8),
    w3_requests=3,
    w3_prefix=64,
    w3_suffix=4,
    w3_output=4,
    w4_prompt=64,
    w5_requests=4,
    w5=(16, 8),
)


def build(name: str, vocab_size: int, repeat: int, scale: Scale = FULL) -> list[Request]:
    """The requests of W1, W2, W3 or W4 (W5's are `w5_requests`), for one repeat of the run."""
    contents = random.Random(f"{name}/{repeat}")
    if name == "W1":
        return [
            Request(random_tokens(contents, vocab_size, prompt), output)
            for prompt, output in w1_lengths(scale)
        ]
    if name == "W2":
        return [Request(random_tokens(contents, vocab_size, scale.w2[0]), scale.w2[1])]
    if name == "W3":
        prefix = random_tokens(contents, vocab_size, scale.w3_prefix)
        return [
            Request(prefix + random_tokens(contents, vocab_size, scale.w3_suffix), scale.w3_output)
            for _ in range(scale.w3_requests)
        ]
    if name == "W4":
        return [Request(random_tokens(contents, vocab_size, scale.w4_prompt), 1)]
    raise ValueError(f"workload must be one of {', '.join(WORKLOADS)}, got {name!r}.")


def w1_lengths(scale: Scale = FULL) -> list[tuple[int, int]]:
    """(prompt, output) lengths of W1: 9,801 + 4,540 tokens in all at full size."""
    lengths = random.Random(0)
    prompts = [lengths.randint(*scale.w1_prompt) for _ in range(scale.w1_requests)]
    outputs = [lengths.randint(*scale.w1_output) for _ in range(scale.w1_requests)]
    return list(zip(prompts, outputs, strict=True))


def w5_requests(vocab_size: int, repeat: int, scale: Scale = FULL) -> list[Request]:
    contents = random.Random(f"W5/{repeat}")
    prompt, output = scale.w5
    return [
        Request(random_tokens(contents, vocab_size, prompt), output)
        for _ in range(scale.w5_requests)
    ]


def w5_arrivals(rate: float, count: int) -> list[float]:
    """Seconds after the start at which each request is sent: Poisson, the same for every server."""
    gaps = random.Random(0)
    now, arrivals = 0.0, []
    for _ in range(count):
        arrivals.append(now)
        now += gaps.expovariate(rate)
    return arrivals


def measures(name: str, requests: Sequence[Request], timing: Timing) -> dict[str, float]:
    """What is compared. Raises ValueError if the engine did not do exactly the work asked for."""
    asked = [request.max_tokens for request in requests]
    if timing.num_generated != asked:
        wrong = [
            f"{i}: {got} for {want}"
            for i, (got, want) in enumerate(zip(timing.num_generated, asked, strict=False))
            if got != want
        ]
        raise ValueError(f"{name}: tokens generated differ from those asked for: {wrong[:4]}.")
    if name == "W1":
        return {"output_tok_s": sum(asked) / timing.seconds}
    if name == "W2":
        if timing.first_token is None:
            raise ValueError("W2 needs the time of the first token.")
        return {
            "ttft_ms": timing.first_token * 1e3,
            "decode_tok_s": (asked[0] - 1) / (timing.seconds - timing.first_token),
        }
    if name == "W3":
        return {"seconds": timing.seconds}
    if name == "W4":
        return {"prefill_tok_s": len(requests[0].prompt) / timing.seconds}
    raise ValueError(f"workload must be one of {', '.join(WORKLOADS)}, got {name!r}.")


def random_tokens(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randrange(NUM_SPECIAL_TOKENS, vocab_size) for _ in range(count)]
