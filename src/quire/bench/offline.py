"""Measures the engine without a server: `throughput` of many requests, `latency` of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from quire.bench.datasets import BenchRequest
from quire.sampling_params import SamplingParams

if TYPE_CHECKING:
    from quire.engine.llm import LLM

LATENCY_PERCENTILES = (10, 25, 50, 75, 90, 99)


def throughput(
    llm: LLM,
    requests: Sequence[BenchRequest],
    *,
    n: int = 1,
    temperature: float = 1.0,
    show_progress: bool = False,
) -> dict[str, object]:
    """Submits all requests at once and ignores EOS. vLLM's keys, then ours. A few short requests run
    first, so that everything that is created on first use exists."""
    warm = [request.token_ids[:16] for request in requests[:4]]
    llm.generate(warm, SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    prompts = [request.token_ids for request in requests]
    params = [
        SamplingParams(n=n, temperature=temperature, max_tokens=r.output_len, ignore_eos=True)
        for r in requests
    ]
    start = perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=show_progress)
    elapsed = perf_counter() - start
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(part.token_ids) for output in outputs for part in output.outputs)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(requests),
        "total_num_tokens": num_prompt + num_output,
        "requests_per_second": len(requests) / elapsed,
        "tokens_per_second": (num_prompt + num_output) / elapsed,
        "output_tokens_per_second": num_output / elapsed,
        "total_prompt_tokens": num_prompt,
        "total_output_tokens": num_output,
    }


def compare(
    plain: LLM, drafting: LLM, run: Callable[[LLM], dict[str, object]], rounds: int
) -> dict[str, object]:
    """`run` by turns with an engine without speculation and one with it, so that what else the machine does
    disturbs both alike. Before each turn an engine forgets prompts and outputs. The result is the run of
    the median ratio."""
    found = []
    for number in range(rounds):
        figures = {}
        for llm in ((plain, drafting), (drafting, plain))[number % 2]:
            llm.sleep(1)
            llm.wake_up()
            figures[llm] = run(llm)
        off, on = (number_of(figures[llm], "output_tokens_per_second") for llm in (plain, drafting))
        found.append((on / off, figures[plain], figures[drafting]))
    ratio, off_figures, on_figures = sorted(found, key=lambda each: each[0])[(rounds - 1) // 2]
    return on_figures | {
        "without_speculation": off_figures,
        "speculation_ratio": ratio,
        "speculation_ratios": [each[0] for each in found],
    }


def number_of(figures: dict[str, object], key: str) -> float:
    value = figures[key]
    assert isinstance(value, int | float)
    return float(value)


def latency(
    llm: LLM,
    *,
    input_len: int,
    output_len: int,
    batch_size: int,
    num_iters_warmup: int,
    num_iters: int,
    n: int = 1,
    seed: int = 0,
) -> dict[str, object]:
    """Seconds from submitting a batch to its last token, `num_iters` times. Each iteration has new
    prompts, so that the prefix cache does not change the work."""
    import numpy as np

    rng = np.random.default_rng(seed)
    vocab_size = llm.model.vocab_size
    params = SamplingParams(n=n, temperature=1.0, max_tokens=output_len, ignore_eos=True)
    seconds = []
    for number in range(num_iters_warmup + num_iters):
        prompts: list[list[int]] = rng.integers(0, vocab_size, (batch_size, input_len)).tolist()
        start = perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        if number >= num_iters_warmup:
            seconds.append(perf_counter() - start)
    values = np.percentile(seconds, LATENCY_PERCENTILES).tolist()
    return {
        "avg_latency": float(np.mean(seconds)),
        "latencies": seconds,
        "percentiles": dict(zip(map(str, LATENCY_PERCENTILES), values, strict=True)),
    }
