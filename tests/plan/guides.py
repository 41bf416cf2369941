"""Numbers that go round in guides, checked: the data of `test_guides.py` and of a table in docs/plan.md.

    python -m tests.plan.guides        writes the table

A check compares a number computed here with one that was computed by hand (reference page
simulate-plan-explain.md, section 4). `plan` is what `quire plan` says.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from quire.errors import MemoryFitError
from quire.plan.devices import find_gpu
from quire.plan.load import Lengths
from quire.plan.model import Layout, Sized, find_model, place
from quire.plan.report import Report
from quire.plan.roofline import BOUND, PUBLISHED, Efficiency
from quire.plan.search import Wish
from quire.scheduler.cost_model import Work

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
BEGIN, END = "<!-- guides: generated -->", "<!-- guides: end -->"
GIB, GB, K8 = 2**30, 1e9, 8192
SMALL, LARGE = "llama-3.1-8b", "llama-3.1-70b"


class Check(NamedTuple):
    what: str
    by_hand: float
    computed: float


class Row(NamedTuple):
    says: str
    """The guide, with its number in the reference."""
    checks: tuple[Check, ...]
    plan: str
    why: str


def sized(
    name: str = SMALL, gpu: str = "h100", ranks: int = 1, form: str | None = None, context: int = K8
) -> Sized:
    layout = Layout(find_gpu(gpu), ranks, form)
    return place(find_model(name), layout, {"max_model_len": context, "block_size": 16})


def rate(of: Sized, rows: int, context: int, efficiency: Efficiency = BOUND) -> float:
    """Tokens a second that are generated."""
    return rows / of.time(efficiency).seconds(Work(rows, rows * context))


def rule(of: Sized, rows: int = 1, context: int = 0, *, weights: float | None = None) -> float:
    """The usual rule: all weights and all KV, divided by the bandwidth."""
    spec = of.prepared.resolved.spec
    read = (
        2 * spec.num_parameters() if weights is None else weights
    ) + rows * context * of.kv_token_bytes
    return rows * of.layout.gpu.bandwidth / read


def rows() -> Iterator[Row]:
    small, large = sized(), sized(LARGE, ranks=2)
    token = small.kv_token_bytes
    params = small.prepared.resolved.spec.num_parameters()
    yield Row(
        "0: 8B, 16 sequences of 2,048: 8.5 GB of KV",
        (Check("GiB", 4.0, 16 * 2048 * token / GIB),),
        f"{16 * 2048 * token / GIB:.1f} GiB",
        "twice what grouped-query attention needs: 131,072 bytes a token",
    )
    card = sized(gpu="rtx4090")
    fp8, awq = sized(gpu="rtx4090", form="fp8"), sized(gpu="rtx4090", form="awq")
    yield Row(
        "0: RTX 4090, 8B in bf16, one request: 169 tokens/s",
        (
            Check("all weights", 62.8, rule(card)),
            Check("all weights, 8K of context", 58.8, rule(card, 1, K8)),
        ),
        f"bound {rate(card, 1, 0):.1f}, {rate(card, 1, K8):.1f} at 8K; "
        f"estimate {rate(card, 1, 0, PUBLISHED):.0f}",
        "impossible: 15 GB have to be read for each token, at 1,008 GB/s. The rule of thumb that reads the "
        "embedding too (16 GB) says 62.8; an untied embedding is only looked up",
    )
    yield Row(
        "0: the same in fp8: 155",
        (
            Check("a byte a parameter", 125, rule(card, weights=params)),
            Check("plan", 125, rate(fp8, 1, 0)),
        ),
        f"bound {rate(fp8, 1, 0):.0f}; estimate {rate(fp8, 1, 0, PUBLISHED):.0f}",
        "impossible: above the bound",
    )
    yield Row(
        "0: the same in AWQ: 175",
        (Check("all weights", 176, rule(card, weights=awq.rank.weight_bytes)),),
        f"bound {rate(awq, 1, 0):.0f}; estimate {rate(awq, 1, 0, PUBLISHED):.0f}",
        f"{175 / rate(awq, 1, 0):.0%} of the bound: optimistic. By the rule of thumb, 100 %",
    )
    prompt = small.time().terms(Work(prompt_tokens=500, prompt_contexts=500 * 250))
    waste = max(small.blocks_for(n) * 16 - n for n in range(1, 2049))
    yield Row(
        "0: a prompt of 500 tokens is 500 FLOP; no fragmentation",
        (
            Check("TFLOP, 2 a parameter and token", 8.03, 2 * params * 500 / 1e12),
            Check("slots lost, at most", 15, waste),
        ),
        f"{prompt.prompt_flop / 1e12:.2f} TFLOP; up to {waste} slots of a sequence's last block",
        "2 FLOP for each parameter and token. plan leaves out embedding and head, which are not multiplied "
        "with the tokens of a prompt, and adds attention",
    )
    yield Row(
        "1: 8K of context is 1 GiB; 16 GB a request",
        (
            Check("GiB of 8K", 1.0, K8 * token / GIB),
            Check("GiB of 128K", 16.0, 131072 * token / GIB),
        ),
        f"{K8 * token / GIB:.1f} GiB; {131072 * token / GIB:.0f} GiB",
        "the first is right; the second is that of 128K, not of 8K",
    )
    page = small.block_bytes
    yield Row(
        "1: a page is 32 KB",
        (Check("KiB a layer", 64, page / 32 / 1024), Check("MiB in all layers", 2, page / 2**20)),
        f"{page / 32 / 1024:.0f} KiB a layer, {page / 2**20:.0f} MiB in all",
        "keys and values both count: 16 x 2 x 8 x 128 x 2 bytes",
    )
    most = small.sequences(K8)
    yield Row(
        "1: 64 sequences of 8K on 80 GB",
        (
            Check("at 0.9 of 80 GB", 52, (0.9 * 80 * GB - 2 * params) // (K8 * token)),
            Check("at 0.9 of 80 GiB", 57, (0.9 * 80 * GIB - 2 * params) // (K8 * token)),
        ),
        f"{most} on an H100",
        "at 0.9 of the memory; GB or GiB make 52 or 57, and an H100 has 79.6 GiB",
    )
    yield Row(
        "1: one request: 80 tokens/s",
        (
            Check("all weights, 8K", 195, rule(small, 1, K8)),
            Check("share", 0.41, 80 / rule(small, 1, K8)),
        ),
        f"bound {rate(small, 1, K8):.0f} at 8K, estimate {rate(small, 1, K8, PUBLISHED):.0f}",
        f"plausible: {80 / rate(small, 1, K8):.0%} of the bound",
    )
    contexts = (1024, 4096, 8192)
    for count, says, hand in ((32, 3000, (5267, 3225, 2126)), (64, 4500, (8698, 4252, 2529))):
        bound = [rate(small, count, context) for context in contexts]
        yield Row(
            f"1: {count} requests: {says:,} tokens/s",
            tuple(
                Check(f"all weights, {context:,}", value, rule(small, count, context))
                for context, value in zip(contexts, hand, strict=True)
            ),
            f"bound {', '.join(f'{each:,.0f}' for each in bound)} at 1, 4 and 8K",
            "possible at 1K of context, not at 8K"
            + ("; nor do 64 such sequences fit" if count == 64 else ""),
        )
    weights = 2 * large.prepared.resolved.spec.num_parameters()
    each, two = K8 * 327680, sized(LARGE, "h200", 2)
    yield Row(
        "1: 70B: 8K is 0.25 GB, one H200 holds it, two H100 serve 200 users",
        (
            Check("GiB of 8K", 2.5, K8 * 2 * large.kv_token_bytes / GIB),
            Check("GB of weights", 141, weights / GB),
            Check("sequences on 2 x 80 GiB", 5, (0.9 * 160 * GIB - weights) // each),
            Check("on 2 x 141 GB", 42, (0.9 * 282 * GB - weights) / each),
        ),
        f"2.5 GiB; {_fit(sized(LARGE, 'h200'))} on one H200; {large.sequences(K8)} on two H100, "
        f"{two.sequences(K8)} on two H200",
        "ten times too little KV; weights alone are 141 GB. plan also counts activations (5 sequences become "
        '4), and what an H200 of "141 GB" really has, 150.8 GB (42 become 48)',
    )
    dollars = [2.5 / 3600 / speed * 1e6 for speed in (3000, 4500)]
    yield Row(
        "1: $0.23 for a million tokens",
        (Check("at 3,000/s", 0.2315, dollars[0]), Check("at 4,500/s", 0.1543, dollars[1])),
        f"${dollars[0]:.2f}; ${dollars[1]:.3f} at 4,500/s",
        "right for $2.50 an hour, 3,000 tokens/s and a GPU that is never idle",
    )
    kv = 2 * 80 * 128 * 2 * 4096
    yield Row(
        "3: 70B, 4,096 tokens: 5.2 GB; 166 GB for 32",
        (
            Check("GiB, 64 KV heads", 10.0, 64 * kv / GIB), Check("8 heads", 1.25, 8 * kv / GIB),
            Check("32 x, 64 heads", 320, 32 * 64 * kv / GIB), Check("32 x, 8 heads", 40, 32 * 8 * kv / GIB),
        ),
        f"{2 * large.kv_token_bytes * 4096 / GIB:.2f} GiB; {64 * large.kv_token_bytes * 4096 / GIB:.0f} GiB",
        "half of what 64 KV heads would take (10 and 320 GiB), four times what the model's 8 take",
    )  # fmt: skip
    pair = sized(LARGE, "a100", 2)
    yield Row(
        "3: reserving the longest wastes 62.5 %; 70B needs two A100",
        (
            Check("3 of 8 slots used", 0.625, 1 - 3 / 8),
            Check("GiB left of 160", 12.6, 0.9 * 160 - weights / GIB),
        ),
        f"at most {waste} slots a sequence; {2 * pair.kv_budget / GIB:.1f} GiB left for KV",
        "both right; plan also counts activations",
    )
    old = sized(gpu="a100")
    times = [1e3 / rate(old, 1, 0, each) for each in (BOUND, PUBLISHED)]
    yield Row(
        "3: A100, 8B: ITL 8 ms",
        (
            Check("all weights, ms", 7.87, 1e3 / rule(old)),
            Check("share", 0.98, 1 / rule(old) / 8e-3),
        ),
        f"bound {times[0]:.2f} ms, estimate {times[1]:.1f} ms",
        f"optimistic: {times[0] / 8:.0%} of the bandwidth, with no context at all",
    )


def _fit(of: Sized) -> str:
    try:
        return f"{of.sequences(K8)} sequences"
    except MemoryFitError:
        return "does not fit"


def table() -> str:
    lines = ["| a guide says | `quire plan` says | why |", "|---|---|---|"]
    lines += [f"| {row.says} | {row.plan} | {row.why} |" for row in rows()]
    return "\n".join(lines)


def page(text: str) -> str:
    """docs/plan.md with the table of today."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def report() -> Report:
    """Of an example, for tests."""
    return Report(sized(), Wish(Lengths(1000, 200), 5.0, {"ttft": 0.5, "itl": 0.05}))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(table() + "\n")
