"""What the parts share: shapes, random inputs, timing, a paged cache.

Without a GPU everything is on the CPU, for a smoke run in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench.gpu.roofline import Ceilings
from tests.models.published import LLAMA_3_1_8B, QWEN3_06B
from torch import Tensor
from triton import knobs
from triton.testing import do_bench

from quire.kernels.triton import attention
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec

CONFIGS = {"qwen-0.6b": QWEN3_06B, "llama-8b": LLAMA_3_1_8B}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
PAST_L2 = 256e6
"""Bytes of inputs to go round in: four times the L2 of an H200."""

if knobs.runtime.interpret:
    from tests.triton.harness import fix_interpreter

    fix_interpreter()


@dataclass(frozen=True, slots=True)
class Sizes:
    """long, longer: contexts and prompts, in tokens. steps: decode steps to measure. anchor_s: an anchor
    workload is cut short after that long. rival: requests, prompt and output of the comparison with
    transformers."""

    batches: tuple[int, ...] = (1, 8, 64, 256)
    long: int = 1024
    longer: int = 8192
    steps: int = 64
    anchor_s: float = 40.0
    rival: tuple[int, int, int] = (256, 512, 128)


SIZES = {
    "full": Sizes(),
    "quick": Sizes(steps=32, anchor_s=8.0, rival=(128, 256, 64)),
    "smoke": Sizes(batches=(1, 3), long=40, longer=70, steps=6, anchor_s=15.0, rival=(2, 9, 3)),
}


def config_of(model: str, sizes: str) -> dict[str, Any]:
    """The model's config.json; for a smoke run with another, tiny shape."""
    config = dict(CONFIGS[model])
    if sizes == "smoke":
        config |= {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "head_dim": 16,
        }
        config |= {"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 4999}
        config |= {"bos_token_id": 1, "eos_token_id": 2}
    return config


def spec_of(model: str, sizes: str) -> ModelSpec:
    return resolve_spec(config_of(model, sizes))


def matrices(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """[out, in] features of a layer's matrices, and of the head."""
    inner = spec.layers[0].mlp.intermediate_size
    return {
        "qkv": (spec.heads.q_size + 2 * spec.heads.kv_size, spec.hidden_size),
        "o": (spec.hidden_size, spec.heads.q_size),
        "gate_up": (2 * inner, spec.hidden_size),
        "down": (spec.hidden_size, inner),
        "head": (spec.vocab_size, spec.hidden_size),
    }


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Fresh normal numbers on the device."""
    return torch.empty(shape, dtype=BF16, device=DEVICE).normal_().to(dtype)


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||; infinite if out is not finite."""
    out, expected = out.double(), expected.double()
    found = float((out - expected).norm() / expected.norm())
    return found if math.isfinite(found) else math.inf


# --- timing ---------------------------------------------------------------------------------------


def copies(moved: float) -> int:
    """How many sets of inputs of so many bytes to rotate among, for none to be found in the L2."""
    return max(1, min(64, math.ceil(PAST_L2 / moved))) if DEVICE.type == "cuda" else 1


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of a call on the device. They are recorded one after another as a CUDA graph, as the
    engine's are, and at least eight of them, so that the graph's own launch hardly counts."""
    for call in calls:
        call()
    if DEVICE.type == "cpu":
        return 1.0
    torch.cuda.synchronize()
    rounds = math.ceil(8 / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            call()
    ms = do_bench(graph.replay, warmup=10, rep=60, return_mode="median")
    return float(ms) / 1e3 / len(calls) / rounds


def rate(
    took: float, ceilings: Ceilings, *, moved: float = 0.0, flops: float = 0.0
) -> dict[str, Any]:
    """Of a call that takes so many seconds. share: of the ceiling that bounds it."""
    found = {"us": took * 1e6, "share": ceilings.seconds(moved=moved, flops=flops) / took}
    found |= {"gb_s": moved / took / 1e9} if moved else {}
    return found | ({"tflop_s": flops / took / 1e12} if flops else {})


# --- a paged cache --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cache:
    """One layer's, of random numbers. scales: of an fp8 cache's keys and values."""

    k: Tensor
    v: Tensor
    scales: tuple[Tensor, Tensor] | tuple[None, None]

    @classmethod
    def create(
        cls, spec: ModelSpec, tokens: int, *, block_size: int = 16, dtype: torch.dtype = BF16
    ) -> Cache:
        """For at least so many tokens beside the null block."""
        shape = (
            1 + -(-tokens // block_size),
            spec.heads.num_kv_heads,
            block_size,
            spec.heads.head_dim,
        )
        k_scale, v_scale = (
            torch.rand(spec.heads.num_kv_heads, device=DEVICE) + 0.5 for _ in range(2)
        )
        scales = (k_scale, v_scale) if dtype is FP8 else (None, None)
        return cls(randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), scales)

    def dense(self, which: int, blocks: Tensor) -> Tensor:
        """Keys (0) or values (1) in these blocks: [tokens, kv_heads, D] float64."""
        stored, scale = (self.k, self.v)[which].float()[blocks.long()].double(), self.scales[which]
        if scale is not None:
            stored = stored * scale.double()[:, None, None]
        return stored.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's requests. queries: tokens of each."""

    cache: Cache
    q: Tensor
    table: Tensor
    queries: Sequence[int]
    starts: Tensor
    lens: Tensor

    @classmethod
    def create(cls, spec: ModelSpec, cache: Cache, requests: Sequence[tuple[int, int]]) -> Batch:
        """requests: (query tokens, keys). Blocks are anywhere in the cache, none twice."""
        queries, keys = zip(*requests, strict=True)
        width = -(-max(keys) // cache.k.shape[2])
        blocks = torch.randperm(cache.k.shape[0] - 1, device=DEVICE)[: width * len(requests)] + 1
        q = randn(sum(queries), spec.heads.num_heads, spec.heads.head_dim)
        return cls._of(cache, q, blocks.view(-1, width).int(), queries, int32(keys))

    @classmethod
    def _of(
        cls, cache: Cache, q: Tensor, table: Tensor, queries: Sequence[int], lens: Tensor
    ) -> Batch:
        ends = [sum(queries[:i]) for i in range(len(queries) + 1)]
        return cls(cache, q, table, queries, int32(ends), lens)

    def part(self, request: int, first: int, last: int) -> Batch:
        """Query tokens first to last of one request, alone in a step."""
        start, length = int(self.starts[request]), int(self.lens[request])
        return self._of(
            self.cache, self.q[start + first : start + last], self.table[request : request + 1],
            [last - first], int32([length - self.queries[request] + last]),
        )  # fmt: skip

    def attend(self, *, invariant: bool = False) -> Callable[[], Tensor]:
        """The call, with memory that holds NaN before it."""
        out = torch.full_like(self.q, math.nan, memory_format=torch.contiguous_format)
        k_scale, v_scale = self.cache.scales
        requests, width = self.table.shape
        floats = attention.workspace_floats(
            self.cache.k, q_heads=self.q.shape[1], max_requests=requests,
            max_len=width * self.cache.k.shape[2], invariant=invariant,
        )  # fmt: skip
        workspace = torch.full((floats,), math.nan, device=DEVICE)
        arrived = torch.zeros(requests * self.cache.k.shape[1], dtype=torch.int32, device=DEVICE)

        def call() -> Tensor:
            attention.paged_attention(
                self.q, self.cache.k, self.cache.v, self.table, self.starts, self.lens,
                scale=self.q.shape[2] ** -0.5, max_query_len=max(self.queries), out=out,
                workspace=workspace, arrived=arrived, k_scale=k_scale, v_scale=v_scale, invariant=invariant,
            )  # fmt: skip
            return out

        return call

    def expected(self, request: int) -> Tensor:
        """By the definition, in float64: [query tokens, heads, D]."""
        start, length = int(self.starts[request]), int(self.lens[request])
        k, v = (self.cache.dense(which, self.table[request])[:length] for which in (0, 1))
        q = self.q[start : start + self.queries[request]].double().unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("nhgd,lhd->hgnl", q, k) * q.shape[-1] ** -0.5
        position = torch.arange(length - len(q), length, device=DEVICE)
        hidden = torch.arange(length, device=DEVICE) > position[:, None]
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("hgnl,lhd->nhgd", weights, v).flatten(1, 2)
