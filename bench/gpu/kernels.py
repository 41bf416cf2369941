"""How fast the kernels are, against the machine's ceilings and PyTorch's own.

Every case gives {label: figures}; a rival's are beside ours, `over_` how many times ours is faster.
`invariant` is the same with --batch-invariant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench.gpu.lab import (
    BF16,
    DEVICE,
    FP8,
    SIZES,
    Batch,
    Cache,
    Sizes,
    copies,
    int32,
    matrices,
    randn,
    rate,
    seconds,
    spec_of,
)
from bench.gpu.roofline import Ceilings, measured
from bench.gpu.suite import Case, Entry, Options, Values
from torch import Tensor

from quire.decoding import Decoding
from quire.kernels.sampling import sample_row
from quire.kernels.triton import layers
from quire.kernels.triton.batch import DeviceBatch, append_tokens, build_step
from quire.kernels.triton.logprobs import logprobs
from quire.kernels.triton.matmul import matmul
from quire.kernels.triton.packing import BatchShape, Section, StepPacker
from quire.kernels.triton.sampling import SamplerLevel, SampleWorkspace, sample
from quire.kernels.triton.seats import as_words
from quire.layers.rotary import cos_sin_table
from quire.models.spec import ModelSpec

Call = Callable[[], object]


def cases(options: Options, entries: Sequence[Entry]) -> list[Case]:
    sizes, ceilings = SIZES[options.sizes], measured(entries)
    found = []
    for model in options.models:
        given = (spec_of(model, options.sizes), sizes, ceilings)
        found += [
            Case(f"{model} decode attention", partial(decode, *given), 120),
            Case(f"{model} prefill attention", partial(prefill, *given)),
            Case(f"{model} products", partial(products, *given)),
            Case(f"{model} layers", partial(elementwise, *given)),
            Case(f"{model} sampling", partial(sampling, *given)),
            Case(f"{model} batch", partial(batch, *given)),
        ]
    for name, other in (("blocks of 64", {"block_size": 64}), ("fp8", {"dtype": FP8})):
        found.append(
            Case(f"{model} decode attention, {name}", partial(decode, *given, **other), 120)
        )
    return found


def against(ours: dict[str, Any], **rivals: Sequence[Call]) -> dict[str, Any]:
    """With the rivals' figures, or why there are none: that must not cost ours. Without calls: not here."""
    for name, calls in rivals.items():
        try:
            took = seconds(calls) if calls else None
        except Exception as error:
            ours[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
        else:
            if took is not None:
                ours |= {f"{name}_us": took * 1e6, f"over_{name}": took * 1e6 / ours["us"]}
    return ours


# --- attention --------------------------------------------------------------------------------------


@torch.inference_mode()
def decode(
    spec: ModelSpec,
    sizes: Sizes,
    ceilings: Ceilings,
    *,
    dtype: torch.dtype = BF16,
    block_size: int = 16,
) -> Values:
    """One layer, one token for each request. Rivals' keys and values lie in one piece, not in blocks."""
    found: Values = {}
    for keys in (sizes.long, sizes.longer):
        for requests in sizes.batches:
            moved = 2 * requests * keys * spec.heads.kv_size * dtype.itemsize
            sets = copies(moved)
            room = sets * requests * (keys + block_size)
            cache = Cache.create(spec, room, block_size=block_size, dtype=dtype)
            steps = [Batch.create(spec, cache, [(1, keys)] * requests) for _ in range(sets)]
            ours = rate(seconds([step.attend() for step in steps]), ceilings, moved=moved)
            against(ours, invariant=[step.attend(invariant=True) for step in steps])
            del cache, steps
            if dtype is BF16 and block_size == 16:
                against(ours, **_rivals(spec, requests, 1, keys, sets))
            found[f"{requests} x {keys}"] = ours
    return found


@torch.inference_mode()
def prefill(spec: ModelSpec, sizes: Sizes, ceilings: Ceilings) -> Values:
    """One layer, one prompt. FLOPs: those that the mask leaves."""
    found: Values = {}
    for tokens in (sizes.long, sizes.longer):
        cache = Cache.create(spec, 4 * tokens)
        steps = [Batch.create(spec, cache, [(tokens, tokens)]) for _ in range(4)]
        took = seconds([step.attend() for step in steps])
        ours = rate(took, ceilings, flops=2 * spec.heads.q_size * tokens**2)
        invariant: list[Call] = [step.attend(invariant=True) for step in steps]
        rivals = _rivals(spec, 1, tokens, tokens, 4)
        found[str(tokens)] = against(ours, invariant=invariant, **rivals)
    return found


def _rivals(
    spec: ModelSpec, requests: int, queries: int, keys: int, sets: int
) -> dict[str, list[Call]]:
    """PyTorch's attention, and FlashAttention-3 where it is installed."""
    causal = queries > 1
    sdpa: list[Call] = []
    fa3: list[Call] = []
    for _ in range(sets):
        q = randn(requests, spec.heads.num_heads, queries, spec.heads.head_dim)
        k, v = (
            randn(requests, spec.heads.num_kv_heads, keys, spec.heads.head_dim) for _ in range(2)
        )
        attend = F.scaled_dot_product_attention
        sdpa.append(partial(attend, q, k, v, is_causal=causal, enable_gqa=True))
    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except ImportError:
        return {"sdpa": sdpa}
    for call in sdpa:
        q, k, v = (x.transpose(1, 2).contiguous() for x in call.args)  # type: ignore[attr-defined]
        lens = int32([keys] * requests)
        fa3.append(partial(flash_attn_with_kvcache, q, k, v, cache_seqlens=lens, causal=causal))
    return {"sdpa": sdpa, "fa3": fa3}


# --- products, and what stands between them ---------------------------------------------------------


@torch.inference_mode()
def products(spec: ModelSpec, sizes: Sizes, ceilings: Ceilings) -> Values:
    """cuBLAS, by matrix and rows; invariant: what --batch-invariant multiplies by, `over_` its cost."""
    found: Values = {}
    for name, (n, k) in matrices(spec).items():
        weights = [randn(n, k) for _ in range(copies(2 * n * k))]
        for m in (*sizes.batches, sizes.longer):
            x = randn(m, k)
            took = seconds([partial(F.linear, x, weight) for weight in weights])
            moved = 2 * (n * k + m * k + m * n)
            theirs = rate(took, ceilings, moved=moved, flops=2 * m * n * k)
            ours = [partial(matmul, x, weight) for weight in weights]
            found[f"{name} {m}"] = against(theirs, invariant=ours)
    return found


@torch.inference_mode()
def elementwise(spec: ModelSpec, sizes: Sizes, ceilings: Ceilings) -> Values:
    found: Values = {}
    for rows in (*sizes.batches, sizes.longer):
        for name, (elements, make) in _elementwise(spec, rows).items():
            moved = 2 * rows * elements
            calls = [make() for _ in range(copies(moved))]
            found[f"{name} {rows}"] = rate(seconds(calls), ceilings, moved=moved)
    return found


def _elementwise(spec: ModelSpec, rows: int) -> dict[str, tuple[int, Callable[[], Call]]]:
    """Elements read and written for a row, and what makes a call with inputs of its own."""
    hidden, inner, eps, d = (
        spec.hidden_size,
        spec.layers[0].mlp.intermediate_size,
        spec.norm.eps,
        spec.heads.head_dim,
    )
    width, weight, cache = (
        spec.heads.q_size + 2 * spec.heads.kv_size,
        randn(hidden),
        Cache.create(spec, rows),
    )
    slots = torch.arange(rows, device=DEVICE)
    cos_sin = cos_sin_table(spec.ropes[0], max_model_len=rows, dtype=BF16).to(DEVICE)
    norms = (
        {"q_norm": randn(d), "k_norm": randn(d), "eps": eps}
        if spec.layers[0].attention.qk_norm == "head"
        else {}
    )
    return {
        "rms_norm": (2 * hidden, lambda: partial(layers.rms_norm, randn(rows, hidden), weight, eps)),
        "add_rms_norm": (4 * hidden, lambda: partial(
            layers.add_rms_norm, randn(rows, hidden), randn(rows, hidden), weight, eps,
        )),
        "rope_write_kv": (2 * width, lambda: partial(
            layers.rope_write_kv, randn(rows, width), slots, cos_sin, cache.k, cache.v, slots, **norms,
        )),
        "gated": (3 * inner, lambda: partial(layers.gated, randn(rows, 2 * inner), "silu")),
    }  # fmt: skip


# --- a step's ends ----------------------------------------------------------------------------------


@torch.inference_mode()
def sampling(spec: ModelSpec, sizes: Sizes, ceilings: Ceilings) -> Values:
    """By what rows ask for. torch: argmax, and what engines without a kernel for it do to filter."""
    found: Values = {}
    vocab = spec.vocab_size
    kinds: list[tuple[str, SamplerLevel, dict[str, Any]]] = [
        ("greedy", "greedy", {}),
        ("draw", "draw", {"temperature": 1.0}),
        ("top-k and top-p", "filter", {"temperature": 1.0, "top_k": 50, "top_p": 0.9}),
        ("top-p", "filter", {"temperature": 1.0, "top_p": 0.9}),
    ]
    for rows in sizes.batches:
        moved = 2 * rows * vocab  # the logits once: a row that draws is read twice
        inputs = [3 * randn(rows, vocab) for _ in range(copies(moved))]
        seats, positions = int32(range(rows)), torch.arange(rows, device=DEVICE)
        workspace = SampleWorkspace.create(rows, vocab, DEVICE)
        rivals: dict[str, Callable[[Tensor], Tensor]] = {
            "greedy": partial(torch.argmax, dim=-1),
            "top-k and top-p": _filtered,
        }
        for name, level, want in kinds:
            records = np.stack([sample_row(Decoding(**want, seed=i)) for i in range(rows)])
            table = torch.from_numpy(as_words(records)).to(DEVICE)
            calls = [
                partial(sample, x, table, seats, positions, workspace, level=level) for x in inputs
            ]
            ours = rate(seconds(calls), ceilings, moved=moved)
            rival = rivals.get(name)
            found[f"{name} {rows}"] = against(
                ours, torch=[partial(rival, x) for x in inputs] if rival else []
            )
        chosen = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        took = seconds([partial(logprobs, x, seats, chosen, 20) for x in inputs])
        found[f"logprobs {rows}"] = rate(took, ceilings, moved=moved)
    return found


def _filtered(logits: Tensor) -> Tensor:
    """Top-k 50 and top-p 0.9 by a sort; drawn by exponential noise."""
    values, ids = logits.float().sort(dim=-1, descending=True)
    values[:, 50:] = -math.inf
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= 0.9, 0.0)
    noise = torch.empty_like(kept).exponential_()
    return ids.gather(1, (kept / noise).argmax(-1, keepdim=True))


@torch.inference_mode()
def batch(spec: ModelSpec, sizes: Sizes, ceilings: Ceilings) -> Values:
    """What stands before and after the model in a decode step."""
    found: Values = {}
    for rows in sizes.batches:
        keys, block_size = sizes.long, 16
        shape = BatchShape(rows, max(rows, 64), -(-(keys + 1) // block_size))
        step = DeviceBatch.create(
            shape, max_model_len=keys + 1, block_size=block_size, device=DEVICE
        )
        packer = StepPacker(shape, np.zeros(shape.packed_size, dtype=np.int32))
        every = np.arange(rows)
        packer.pack(
            seats=every, counts=np.ones(rows, dtype=np.int64), seq_lens=np.full(rows, keys),
            num_blocks=np.full(rows, shape.max_blocks), sampling=every,
            positions=np.full(rows, keys), new_ids=[], new_blocks=[],
        )  # fmt: skip
        step.packed.copy_(torch.from_numpy(packer.buffer))
        sampled = step.section(Section.SAMPLE_SEATS)[:rows].long()
        build = partial(build_step, step, num_rows=rows, num_tokens=rows)
        found[f"build_step {rows}"] = {"us": seconds([build]) * 1e6}
        append = partial(append_tokens, step, sampled)
        found[f"append_tokens {rows}"] = {"us": seconds([append]) * 1e6}
    return found
