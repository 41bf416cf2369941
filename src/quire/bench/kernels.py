"""Each CPU kernel against the PyTorch reference, at a model's shapes.

Seconds are medians of interleaved repetitions. Repetitions use several copies of weights and caches in
turn, so that these are read from memory and not from the processor's cache, as in a model. GB/s counts
the bytes that must be read and written once, GFLOP/s the multiplications and additions of the products.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.kernels.base import Kernels
from quire.kernels.cpu.layout import kv_cache_shapes
from quire.kernels.cpu.linear import CPUProduct, dense_product
from quire.kernels.sampling import SAMPLE_ROW
from quire.kernels.select import create_kernels

COLD_BYTES = 96 << 20
"""More than the last-level caches of the machines that this is for."""
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Shapes:
    """A model's sizes, and the batch."""

    hidden: int = 1024
    ffn: int = 3072
    q_heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 32000
    rows: int = 1
    context: int = 512


@dataclass(frozen=True, slots=True)
class Case:
    """One operation: the functions to run, and the bytes and operations of a run. A run takes a number
    that selects one of the copies of its inputs."""

    name: str
    ours: Callable[[int], object]
    reference: Callable[[int], object]
    num_bytes: int
    flops: int = 0


def compare(shapes: Shapes, *, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    """A row per kernel: median seconds of the kernel and of the reference, ratio, GB/s, GFLOP/s."""
    kernels, reference = create_kernels(), create_kernels("reference")
    torch.manual_seed(0)
    cases = [
        *_linear_cases(shapes, dtype),
        *_row_cases(kernels, reference, shapes, dtype),
        _attention_case(kernels, reference, shapes, dtype),
        _sampling_case(kernels, reference, shapes),
    ]
    return [
        {**asdict(shapes), **_measure(case, repeats), "kernels": kernels.name} for case in cases
    ]


def _measure(case: Case, repeats: int) -> dict[str, object]:
    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    for number in range(repeats + 2):
        for name, run in (("ours", case.ours), ("reference", case.reference)):
            start = perf_counter()
            run(number)
            if number >= 2:
                seconds[name].append(perf_counter() - start)
    ours, reference = (statistics.median(seconds[name]) for name in ("ours", "reference"))
    return {
        "kernel": case.name,
        "us": ours * 1e6,
        "reference_us": reference * 1e6,
        "ratio": reference / ours,
        "gb_per_s": case.num_bytes / ours / 1e9,
        "gflop_per_s": case.flops / ours / 1e9,
    }


def _linear_cases(shapes: Shapes, dtype: torch.dtype) -> list[Case]:
    s = shapes
    qkv = (s.q_heads + 2 * s.kv_heads) * s.head_dim
    layers = {
        "linear qkv": (s.hidden, qkv),
        "linear o": (s.q_heads * s.head_dim, s.hidden),
        "linear gate_up": (s.hidden, 2 * s.ffn),
        "linear down": (s.ffn, s.hidden),
    }
    return [_linear_case(name, k, n, s.rows, dtype) for name, (k, n) in layers.items()]


def _linear_case(name: str, k: int, n: int, rows: int, dtype: torch.dtype) -> Case:
    size = k * n * dtype.itemsize
    copies = _copies(size)
    weights = [torch.randn(n, k).to(dtype) for _ in range(copies)]
    packed = [_packed(weight) for weight in weights]
    x = torch.randn(rows, k).to(dtype)
    return Case(
        f"{name} {rows}x{k}x{n}",
        lambda i: packed[i % copies](x),
        lambda i: F.linear(x, weights[i % copies]),
        size + rows * (k + n) * dtype.itemsize,
        2 * rows * k * n,
    )


def _packed(weight: torch.Tensor) -> CPUProduct:
    n, k = weight.shape
    product = dense_product(in_features=k, out_features=n, dtype=weight.dtype, bias=False)
    product.fill(0, weight)
    return product


def _row_cases(ours: Kernels, ref: Kernels, s: Shapes, dtype: torch.dtype) -> list[Case]:
    x, residual = (torch.randn(s.rows, s.hidden).to(dtype) for _ in range(2))
    weight = torch.ones(s.hidden, dtype=dtype)
    gate_up = torch.randn(s.rows, 2 * s.ffn).to(dtype)
    row = s.rows * dtype.itemsize
    return [
        Case(
            "rms_norm",
            lambda i: ours.rms_norm(x, weight, 1e-6),
            lambda i: ref.rms_norm(x, weight, 1e-6),
            2 * row * s.hidden,
        ),
        Case(
            "add_rms_norm",
            lambda i: ours.add_rms_norm(x, residual, weight, 1e-6),
            lambda i: ref.add_rms_norm(x, residual, weight, 1e-6),
            4 * row * s.hidden,
        ),
        Case(
            "gated",
            lambda i: ours.gated(gate_up, "silu"),
            lambda i: ref.gated(gate_up, "silu"),
            3 * row * s.ffn,
        ),
        _rope_case(ours, ref, s, dtype),
    ]


def _rope_case(ours: Kernels, ref: Kernels, s: Shapes, dtype: torch.dtype) -> Case:
    width = (s.q_heads + 2 * s.kv_heads) * s.head_dim
    qkv = torch.randn(s.rows, width).to(dtype)
    positions = torch.arange(s.rows)
    angles = torch.outer(torch.arange(s.rows).float(), torch.rand(s.head_dim // 2))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).contiguous()
    k_cache, v_cache = _caches(s, -(-s.rows // BLOCK_SIZE) + 1, dtype)

    def run(kernels: Kernels) -> None:
        kernels.rope_write_kv(qkv, positions, cos_sin, k_cache, v_cache, positions + BLOCK_SIZE)

    num_bytes = (2 * width) * s.rows * dtype.itemsize
    return Case("rope_write_kv", lambda i: run(ours), lambda i: run(ref), num_bytes)


def _attention_case(ours: Kernels, ref: Kernels, s: Shapes, dtype: torch.dtype) -> Case:
    """Decode: each row is a request with `context` keys in its own blocks."""
    blocks = -(-s.context // BLOCK_SIZE)
    kv_bytes = 2 * s.rows * s.context * s.kv_heads * s.head_dim * dtype.itemsize
    caches = [_caches(s, s.rows * blocks + 1, dtype) for _ in range(_copies(kv_bytes))]
    q = torch.randn(s.rows, s.q_heads, s.head_dim).to(dtype)
    table = torch.arange(1, s.rows * blocks + 1, dtype=torch.int32).reshape(s.rows, blocks)
    starts = torch.arange(s.rows + 1, dtype=torch.int32)
    lens = torch.full((s.rows,), s.context, dtype=torch.int32)

    def run(kernels: Kernels, number: int) -> Tensor:
        k_cache, v_cache = caches[number % len(caches)]
        return kernels.paged_attention(
            q, k_cache, v_cache, table, starts, lens, scale=s.head_dim**-0.5
        )

    return Case(
        f"paged_attention {s.rows}x{s.context}",
        lambda i: run(ours, i),
        lambda i: run(ref, i),
        kv_bytes,
        4 * s.rows * s.context * s.q_heads * s.head_dim,
    )


def _sampling_case(ours: Kernels, ref: Kernels, s: Shapes) -> Case:
    logits = torch.randn(s.rows, s.vocab) * 2
    rows = np.zeros(s.rows, dtype=SAMPLE_ROW)
    rows["temperature"], rows["top_p"], rows["top_k"] = 0.8, 0.95, 50
    rows["seed"] = rows["position"] = np.arange(s.rows)
    return Case(
        "sample t=0.8 top_p=0.95 top_k=50",
        lambda i: ours.sample(logits, rows),
        lambda i: ref.sample(logits, rows),
        logits.numel() * 4,
    )


def _caches(s: Shapes, num_blocks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shapes = kv_cache_shapes(
        num_blocks=num_blocks,
        num_kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        block_size=BLOCK_SIZE,
        dtype=dtype,
    )
    return torch.randn(shapes.k).to(dtype), torch.randn(shapes.v).to(dtype)


def _copies(num_bytes: int) -> int:
    return min(max(-(-COLD_BYTES // num_bytes), 1), 64)


def table(rows: Sequence[dict[str, object]]) -> str:
    lines = [f"{'kernel':<34}{'us':>10}{'PyTorch us':>12}{'ratio':>8}{'GB/s':>8}{'GFLOP/s':>9}"]
    for row in rows:
        numbers = "{us:>10.1f}{reference_us:>12.1f}{ratio:>8.2f}{gb_per_s:>8.1f}{gflop_per_s:>9.1f}"
        lines.append(f"{row['kernel']:<34}" + numbers.format(**row))
    return "\n".join(lines)
