"""Whether it is right: kernels against float64, rows alone against rows in a batch, the engine against
transformers."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench.gpu import engines
from bench.gpu.lab import BF16, DEVICE, FP8, Batch, Cache, error, int32, matrices, randn, spec_of
from bench.gpu.suite import Case, Entry, Options, Values
from torch import Tensor

from quire.decoding import Decoding
from quire.kernels.reference import ReferenceKernels
from quire.kernels.sampling import sample_row
from quire.kernels.triton import layers
from quire.kernels.triton.batch import copy_blocks
from quire.kernels.triton.logits import edit_logits, history_row
from quire.kernels.triton.logprobs import logprobs
from quire.kernels.triton.matmul import matmul
from quire.kernels.triton.sampling import SampleWorkspace, sample
from quire.kernels.triton.seats import as_words
from quire.layers.rotary import cos_sin_table
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec

ROWS = (2, 8, 16, 64, 65, 128, 129, 256, 300, 1100)
LIMITS = {"bf16": 1e-2, "fp8": 4e-2, "absolute": 1e-3}
"""Of relative errors of numbers rounded to bf16, or to e4m3 (three bits after the first); of differences
between float32 log-probabilities."""


def cases(options: Options, entries: Sequence[Entry]) -> list[Case]:
    small = options.sizes == "smoke"
    found: list[Case] = []
    for model in options.models:
        spec = spec_of(model, options.sizes)
        for dtype, block_size in ((BF16, 16), (BF16, 64), (FP8, 16)):
            name = f"attention {model} {'fp8' if dtype is FP8 else 'bf16'} blocks of {block_size}"
            found.append(Case(name, partial(attention, spec, dtype, block_size, small=small)))
        found += [
            Case(f"layers {model}", partial(layer_kernels, spec)),
            Case(f"sampling {model}", partial(sampling, spec, rows=5 if small else 64)),
            Case(f"batch-invariant {model}", partial(invariance, spec, small=small), 120),
        ]
    for dtype in ("float32", "bfloat16"):
        found.append(Case(f"tokens in {dtype}", partial(tokens, dtype, small=small), 120))
    return [*found, Case("graphs", partial(graphs, small=small), 120)]


def verdict(errors: dict[str, float], same: dict[str, bool], limit: str = "bf16") -> Values:
    """same: what must be equal bit for bit. An error whose name has "fp8" in it has that limit."""
    right = all(e <= LIMITS["fp8" if "fp8" in name else limit] for name, e in errors.items())
    return {"ok": right and all(same.values()), "error": errors, "same": same}


# --- kernels ----------------------------------------------------------------------------------------


@torch.inference_mode()
def attention(spec: ModelSpec, dtype: torch.dtype, block_size: int, *, small: bool) -> Values:
    """Decodes, prompts, chunks and a padded row in one call; each alone; a prompt in two pieces; and with
    invariance, a prompt's last token decoded."""
    full = [(300, 300), (1, 1), (1, 17), (1, 1000), (1, 8000), (128, 1500), (7, 4000), (0, 0)]
    requests = [(9, 9), (1, 1), (1, 45), (5, 20), (0, 0)] if small else full
    room = len(requests) * (max(keys for _, keys in requests) + block_size)
    cache = Cache.create(spec, room, block_size=block_size, dtype=dtype)
    batch = Batch.create(spec, cache, requests)
    outs = batch.attend()().split(batch.queries)
    real = [i for i, (queries, _) in enumerate(requests) if queries]
    errors = {
        f"{requests[i][0]} of {requests[i][1]}": error(outs[i], batch.expected(i)) for i in real
    }
    prompt, third = requests[0][0], requests[0][0] // 3
    pieces = [batch.part(0, 0, third), batch.part(0, third, prompt)]
    whole = batch.part(0, 0, prompt).attend(invariant=True)()
    last = batch.part(0, prompt - 1, prompt).attend(invariant=True)()
    same = {
        "alone": all(
            torch.equal(batch.part(i, 0, batch.queries[i]).attend()(), outs[i]) for i in real
        ),
        "chunked": torch.equal(torch.cat([piece.attend()() for piece in pieces]), outs[0]),
        "decoded": torch.equal(whole[-1:], last),
    }
    return verdict(errors, same)


@torch.inference_mode()
def layer_kernels(spec: ModelSpec) -> Values:
    """What stands between the products, and the copy of blocks."""
    rows, hidden, eps = 70, spec.hidden_size, spec.norm.eps
    x, residual, weight = randn(rows, hidden), randn(rows, hidden), randn(hidden)
    gate_up, table = (
        randn(rows, 2 * spec.layers[0].mlp.intermediate_size),
        randn(spec.vocab_size, hidden),
    )
    ids = torch.randint(0, spec.vocab_size, (rows,), device=DEVICE)
    storage = randn(2, 2, 9, spec.heads.num_kv_heads, 16, spec.heads.head_dim)

    normed = layers.rms_norm(x, weight, eps, out=torch.full_like(x, math.nan))
    total = residual.clone()
    added = layers.add_rms_norm(x, total, weight, eps, out=torch.full_like(x, math.nan))
    gated = layers.gated(gate_up, "silu", out=torch.full_like(gate_up.chunk(2, -1)[0], math.nan))
    copied = storage.clone()
    copy_blocks(copied, int32([3, -1, 5]), int32([7, 1, 2]))
    storage[:, :, [7, 2]] = storage[:, :, [3, 5]]

    gate, up = gate_up.double().chunk(2, -1)
    errors = {
        "rms_norm": error(normed, _normed(x.double(), weight, eps)),
        "add_rms_norm": error(added, _normed((x + residual).double(), weight, eps)),
        "gated": error(gated, F.silu(gate) * up),
        **_rope(spec, BF16, "bf16"),
        **_rope(spec, FP8, "fp8"),
    }
    same = {
        "alone": torch.equal(layers.rms_norm(x[5:6], weight, eps), normed[5:6]),
        "residual": torch.equal(total, x + residual),
        "embedding": torch.equal(layers.embedding(ids, table), table[ids]),
        "copy_blocks": torch.equal(copied, storage),
    }
    return verdict(errors, same)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight.double() * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _rope(spec: ModelSpec, dtype: torch.dtype, label: str) -> dict[str, float]:
    """Errors of queries, keys and values. Slots are scattered; the last token is padding."""
    rows, d, slot_count = 33, spec.heads.head_dim, 41 * 16
    cache = Cache.create(spec, slot_count - 16, dtype=dtype)
    qkv = randn(rows, spec.heads.q_size + 2 * spec.heads.kv_size)
    before = qkv.double().unflatten(1, (-1, d))
    q, k, v = before.split(
        [spec.heads.num_heads, spec.heads.num_kv_heads, spec.heads.num_kv_heads], 1
    )
    positions = torch.randint(0, 4000, (rows,), device=DEVICE)
    slots = torch.randperm(slot_count, device=DEVICE)[:rows]
    slots[-1] = -1
    cos_sin = cos_sin_table(spec.ropes[0], max_model_len=4000, dtype=BF16).to(DEVICE)
    cos, sin = cos_sin[positions][:, None].double().chunk(2, -1)
    q_norm, k_norm = (
        (randn(d), randn(d)) if spec.layers[0].attention.qk_norm == "head" else (None, None)
    )

    def rotated(x: Tensor, weight: Tensor | None) -> Tensor:
        left, right = (x if weight is None else _normed(x, weight, spec.norm.eps)).chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    layers.rope_write_kv(
        qkv, positions, cos_sin, cache.k, cache.v, slots, q_norm=q_norm, k_norm=k_norm,
        eps=spec.norm.eps, k_scale=cache.scales[0], v_scale=cache.scales[1],
    )  # fmt: skip
    blocks = torch.arange(len(cache.k), device=DEVICE)
    keys, values = (cache.dense(which, blocks)[slots[:-1]] for which in (0, 1))
    return {
        f"{label} queries": error(
            qkv[:, : spec.heads.q_size].unflatten(1, (-1, d)), rotated(q, q_norm)
        ),
        f"{label} keys": error(keys, rotated(k, k_norm)[:-1]),
        f"{label} values": error(values, v[:-1]),
    }


@torch.inference_mode()
def sampling(spec: ModelSpec, *, rows: int) -> Values:
    """Tokens against the CPU's reference; a row alone; log-probabilities; penalties."""
    vocab = spec.vocab_size
    logits = 3 * randn(rows, vocab)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
    ]
    wants = [{**kinds[i % len(kinds)], "seed": 1000 + i} for i in range(rows)]
    records = np.stack([sample_row(Decoding(**want)) for want in wants])  # type: ignore[arg-type]
    records["position"] = 7 + np.arange(rows)
    expected = ReferenceKernels().sample(logits.float().cpu(), records).token_ids

    table = torch.from_numpy(as_words(records)).to(DEVICE)
    seats, positions = int32(range(rows)), torch.arange(7, 7 + rows, device=DEVICE)
    workspace = SampleWorkspace.create(rows, vocab, DEVICE)
    drawn = sample(logits, table, seats, positions, workspace)
    chosen = drawn.token_ids.clone()
    alone = sample(logits[3:4], table, seats[3:4], positions[3:4], workspace).token_ids
    agree = chosen.cpu().numpy() == expected
    top = logprobs(logits, seats, chosen, 20)
    exact = logits.double().log_softmax(-1)
    errors = {
        "logprob": _largest(top.logprob - exact.gather(1, chosen[:, None])[:, 0]),
        "top logprobs": _largest(top.top_logprobs - exact.topk(20).values),
        "penalties": _penalties(logits[:1]),
    }
    same = {
        "valid": bool(drawn.valid.all()),
        "greedy": bool(agree[::5].all()),
        # Sums and logarithms are rounded differently, so one near tie may fall the other way.
        "drawn": int(agree.sum()) >= rows - 1,
        "alone": torch.equal(alone, chosen[3:4]),
    }
    return verdict(errors, same, "absolute")


def _largest(difference: Tensor) -> float:
    found = float(difference.abs().max())
    return found if math.isfinite(found) else math.inf


def _penalties(logits: Tensor) -> float:
    vocab, contents = logits.shape[1], random.Random(1)
    prompt, output = contents.choices(range(vocab), k=40), contents.choices(range(60), k=90)
    decoding = Decoding(repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.4)
    table = torch.from_numpy(as_words(sample_row(decoding).reshape(1))).to(DEVICE)
    history = torch.from_numpy(history_row([*prompt, *output], 40, vocab))[None]
    edited = edit_logits(
        logits, table, int32([0]), torch.tensor([130], device=DEVICE),
        out=torch.full(logits.shape, math.nan, device=DEVICE), history=history.to(DEVICE),
    )  # fmt: skip
    count = torch.bincount(torch.tensor(output), minlength=vocab).to(DEVICE)
    repeated = count > 0
    repeated[prompt] = True
    x = logits[0].double()
    x = torch.where(repeated, torch.where(x > 0, x / 1.3, x * 1.3), x)
    return _largest(edited[0] - (x - 0.2 * count - 0.4 * (count > 0)))


# --- the engine -------------------------------------------------------------------------------------


def _checkpoint(folder: str, *, small: bool) -> ModelSpec:
    """A Qwen3 with random weights, large enough that its tokens vary."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(
        hidden_size=64 if small else 512, intermediate_size=96 if small else 1024,
        num_hidden_layers=2 if small else 4, num_attention_heads=4 if small else 8,
        num_key_value_heads=2, head_dim=16 if small else 64, vocab_size=499 if small else 8000,
        max_position_embeddings=2048, initializer_range=0.12, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return resolve_spec(config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})


def tokens(dtype: str, *, small: bool) -> Values:
    """Greedy tokens as transformers generates them, of prompts of several lengths: the longest in chunks."""
    from transformers import Qwen3ForCausalLM

    count, lengths = (4, (1, 21, 70)) if small else (96, (1, 21, 100, 333, 540))
    prompts = [random.Random(n).choices(range(3, 490), k=n) for n in lengths]
    limits = engines.Limits(seqs=8, tokens=64 if small else 256, length=640, cached=8192)
    with tempfile.TemporaryDirectory() as folder:
        spec = _checkpoint(folder, small=small)
        core = engines.build(spec, limits, folder=Path(folder), dtype=getattr(torch, dtype))
        theirs = Qwen3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(DEVICE)
    wanted = [engines.request(i, prompt, count) for i, prompt in enumerate(prompts)]
    mine = engines.drive(core, wanted).tokens
    theirs.generation_config.eos_token_id = None
    agreeing = []
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=DEVICE)
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        agreeing.append(next((n for n in range(count) if mine[i][n] != out[n]), count))
    return {
        "ok": dtype != "float32" or min(agreeing) == count,
        "of": count,
        "agreeing_from_the_start": agreeing,
        "different_tokens": len({token for row in mine.values() for token in row}),
    }


def graphs(*, small: bool) -> Values:
    """Replayed graphs have the bits of launches one by one: tokens, and logprobs of each. Eight requests of
    one length, so that no step is padded; twice with graphs, since the first time captures them."""
    limits = engines.Limits(seqs=8, tokens=512, length=640, cached=16384)
    runs, recorded = [], 0
    with tempfile.TemporaryDirectory() as folder:
        spec = _checkpoint(folder, small=small)
        for eager in (True, False):
            core = engines.build(
                spec, limits, folder=Path(folder), dtype=torch.float32, eager=eager
            )
            lengths = [(30, 6 if small else 48)] * 8
            wanted = engines.requests(spec, lengths, seed=1, logprobs=5)
            for _ in range(1 if eager else 2):
                core.scheduler.reset_prefix_cache()
                runs.append(engines.drive(core, wanted))
            recorded = len(core.executor.runner.backend.graphs.recorded)  # type: ignore[attr-defined]
    return compared(runs, recorded)


def compared(runs: Sequence[engines.Driven], recorded: int) -> Values:
    """The first run is without graphs. Nothing is shown if none was captured."""
    same_tokens = all(run.tokens == runs[0].tokens for run in runs)
    same_bits = all(run.logprobs == runs[0].logprobs for run in runs)
    return {
        "ok": same_tokens and same_bits and recorded > 0,
        "same_tokens": same_tokens,
        "same_bits": same_bits,
        "recorded": recorded,
    }


def invariance(spec: ModelSpec, *, small: bool) -> Values:
    """With --batch-invariant, the bits of one request's twenty best log-probabilities: alone, among others,
    beside a prompt that arrives. And its product: right, and a row's bits for every number of rows before
    it; beside it those numbers for which cuBLAS's differ."""
    spec = replace(spec, layers=spec.layers[:2])
    limits = engines.Limits(
        seqs=16, tokens=64 if small else 2048, length=200 if small else 4096, cached=40_000
    )
    count, length = (6, 30) if small else (40, 700)
    prompt = random.Random(2).choices(range(spec.vocab_size), k=length)
    subject = engines.request(0, prompt, count, logprobs=20)
    others = engines.requests(spec, [(11 * i, count) for i in range(1, 4 if small else 15)], seed=1)
    long = engines.requests(spec, [(100 if small else 3000, 2)], seed=2)
    runs: dict[str, engines.Driven] = {}
    for name, beside, later in (("alone", [], []), ("batch", others, []), ("prompt", [], long)):
        core = engines.build(spec, limits, invariant=True)
        runs[name] = engines.drive(core, [subject, *beside], later=later)
    same = {name: run.logprobs[0] == runs["alone"].logprobs[0] for name, run in runs.items()}
    errors, uneven, cublas = _products(matrices(spec))
    same["products"] = not any(uneven.values())
    return {**verdict(errors, same), "uneven": uneven, "uneven_cublas": cublas}


@torch.inference_mode()
def _products(
    shapes: dict[str, tuple[int, int]], rows: Sequence[int] = ROWS
) -> tuple[dict[str, float], dict[str, list[int]], dict[str, list[int]]]:
    """Errors of our product; numbers of rows for which the last row's bits are not those it has alone, of
    ours and of cuBLAS's."""
    errors: dict[str, float] = {}
    uneven: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for name, (n, k) in shapes.items():
        weight, x = randn(n, k), randn(max(70, *rows), k)
        errors[name] = error(matmul(x[:70], weight), x[:70].double() @ weight.double().T)
        for product, found in zip((matmul, F.linear), uneven, strict=True):
            alone = product(x[-1:], weight)
            found[name] = [m for m in rows if not torch.equal(product(x[-m:], weight)[-1:], alone)]
    return errors, *uneven
