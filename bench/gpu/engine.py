"""How fast the engine is, from token ids to token ids, against the roofline; and transformers beside it.

Weights are random and made on the GPU; requests are greedy and run to their ends. A rate counts tokens
sampled a second; share is of the roofline of the very same work.
"""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from bench.gpu import engines, roofline
from bench.gpu.lab import BF16, DEVICE, SIZES, Sizes, config_of, spec_of
from bench.gpu.roofline import Ceilings, measured
from bench.gpu.suite import Case, Entry, Options, Values

from quire.engine.core import EngineCore
from quire.models.spec import ModelSpec

Lengths = Sequence[tuple[int, int]]
"""Prompt and output of each request."""

FULL_LIMITS = engines.Limits(seqs=256, tokens=8192, length=9216, cached=256 * 2112)
SMOKE_LIMITS = engines.Limits(seqs=4, tokens=64, length=128, cached=4 * 128)


@dataclass(frozen=True, slots=True)
class Subject:
    model: str
    spec: ModelSpec
    sizes: Sizes
    limits: engines.Limits
    ceilings: Ceilings
    invariant: bool = False


def cases(options: Options, entries: Sequence[Entry]) -> list[Case]:
    sizes, small = SIZES[options.sizes], options.sizes == "smoke"
    limits, ceilings = SMOKE_LIMITS if small else FULL_LIMITS, measured(entries)
    found = []
    for model in options.models:
        of = Subject(model, spec_of(model, options.sizes), sizes, limits, ceilings)
        found += [
            Case(f"{model} start", partial(start, of), 150),
            *(
                Case(f"{model} decode {n} x {sizes.long}", partial(decode, of, n))
                for n in sizes.batches
            ),
            Case(f"{model} prefill {sizes.long}", partial(prefill, of, sizes.long)),
            Case(f"{model} prefill {sizes.longer}", partial(prefill, of, sizes.longer)),
        ]
        for name, lengths in anchors(model, small=small).items():
            limit_s = 60 + 2 * sizes.anchor_s
            found.append(Case(f"{model} {name}", partial(workload, of, lengths), limit_s))
        if model == "qwen-0.6b":
            count, prompt, output = sizes.rival
            same = partial(workload, of, [(prompt, output)] * count)
            found.append(Case(f"{model} beside transformers", same))
            config = config_of(model, options.sizes)
            found.append(Case(f"{model} transformers", partial(transformers, of, config), 180))
        # Last of the model's own: what the switch costs, beside the same cases without it.
        even, middle = replace(of, invariant=True), sizes.batches[len(sizes.batches) // 2]
        found += [
            Case(f"{model} invariant start", partial(start, even), 150),
            Case(
                f"{model} invariant decode {middle} x {sizes.long}", partial(decode, even, middle)
            ),
            Case(f"{model} invariant prefill {sizes.long}", partial(prefill, even, sizes.long)),
        ]
    return found


def anchors(model: str, *, small: bool) -> dict[str, Lengths]:
    """Workloads of which others publish figures: nano-vllm's, SGLang's, TensorRT-LLM's."""
    count, scale = (4, 32) if small else (256, 1)
    if model == "llama-8b":
        return {f"256 x {n}/{n}": [(n // scale, n // scale)] * count for n in (1024, 1000)}
    drawn = random.Random(0)
    return {
        "256 mixed": [
            (drawn.randint(100, 1024) // scale, drawn.randint(100, 1024) // scale)
            for _ in range(count)
        ]
    }


_built: dict[tuple[str, bool], EngineCore] = {}
"""By model, and whether it is batch-invariant."""
_seeds = itertools.count(1)


def _engine(of: Subject) -> EngineCore:
    """Built at the first call; another model's is given up for it."""
    key = (of.model, of.invariant)
    if key not in _built:
        _free()
        _built[key] = engines.build(of.spec, of.limits, invariant=of.invariant)
    return _built[key]


def _free() -> None:
    _built.clear()
    gc.unfreeze()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def _drive(of: Subject, lengths: Lengths, *, limit_s: float = 1e9) -> engines.Driven:
    wanted = engines.requests(of.spec, lengths, seed=next(_seeds))
    return engines.drive(_engine(of), wanted, limit_s=limit_s)


def start(of: Subject) -> Values:
    """Build, record every size of a batch as an idle engine does, and run the lot once."""
    began = time.perf_counter()
    core = _engine(of)
    built = time.perf_counter()
    while core.prepare():
        pass
    _drive(of, [(16, 4)] * of.limits.seqs)
    gc.collect()
    gc.freeze()  # as the engine's process does
    kv = core.scheduler.kv
    return {
        "build_s": built - began,
        "warm_up_s": time.perf_counter() - built,
        "cached_tokens": kv.pool.num_usable * kv.block_size,
    }


def decode(of: Subject, batch: int) -> Values:
    """So many requests with a context a little over `Sizes.long`."""
    prompt, skipped = of.sizes.long, 3 if of.limits is SMOKE_LIMITS else 8
    # Prompts take turns. All decode together once the last is done, and until the first one ends.
    turns = -(-batch * prompt // of.limits.tokens)
    output = turns + skipped + of.sizes.steps + 4
    steps = _drive(of, [(prompt, output)] * batch).steady(batch, skipped)
    keys = prompt + turns / 2 + skipped + len(steps) / 2
    floor = roofline.decode_s(of.spec, batch, batch * keys, of.ceilings)
    took = statistics.fmean(steps)
    return {
        "tok_s": batch / took,
        "share": floor / took,
        "floor_tok_s": batch / floor,
        "step_ms": 1e3 * statistics.median(steps),
        "longest_ms": 1e3 * max(steps),
        "steps": len(steps),
    }


def prefill(of: Subject, tokens: int) -> Values:
    """One prompt and its first token: the median of five, after one that compiles."""
    took = statistics.median([_drive(of, [(tokens, 1)]).seconds for _ in range(6)][1:])
    floor = roofline.prefill_s(of.spec, [tokens], of.ceilings)
    return {
        "tok_s": tokens / took,
        "share": floor / took,
        "ttft_ms": 1e3 * took,
        "floor_ms": 1e3 * floor,
    }


def workload(of: Subject, lengths: Lengths) -> Values:
    """All requests at once; what is done by `Sizes.anchor_s` counts, against the floor of that much."""
    driven = _drive(of, lengths, limit_s=of.sizes.anchor_s)
    done = [len(tokens) for tokens in driven.tokens.values()]
    work = [(prompt, count) for (prompt, _), count in zip(lengths, done, strict=True)]
    whole_s = roofline.workload_s(of.spec, lengths, of.ceilings)
    return {
        "tok_s": sum(done) / driven.seconds,
        "share": roofline.workload_s(of.spec, work, of.ceilings) / driven.seconds,
        "floor_tok_s": sum(output for _, output in lengths) / whole_s,
        "seconds": driven.seconds,
        "tokens": sum(done),
        "complete": driven.complete,
    }


def transformers(of: Subject, config: dict[str, object]) -> Values:
    """Its continuous batching, on as many requests of the same lengths."""
    from transformers import (
        AutoModelForCausalLM,
        ContinuousBatchingConfig,
        GenerationConfig,
        Qwen3Config,
    )

    _free()
    count, prompt, output = of.sizes.rival
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**config), dtype=BF16).eval()
    contents = random.Random(0)
    prompts = [contents.choices(range(of.spec.vocab_size), k=prompt) for _ in range(2 * count)]
    wanted = GenerationConfig(
        max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    sizing = None  # its own, by the GPU's memory
    if DEVICE.type == "cpu":
        sizing = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64)
    generate = partial(
        model.generate_batch, generation_config=wanted, continuous_batching_config=sizing
    )
    generate(inputs=prompts[:count])  # warms up
    began = time.perf_counter()
    answers = generate(inputs=prompts[count:])
    took = time.perf_counter() - began
    done = [len(answer.generated_tokens) for answer in answers.values()]
    return {
        "ok": done == [output] * count,
        "tok_s": sum(done) / took,
        "seconds": took,
        "tokens": sum(done),
        "attention": model.config._attn_implementation,
    }
