"""docs/metrics.md: every metric of /metrics, from the registry that the server makes."""

# ruff: noqa: E501 - rows of tables are as long as they are

from __future__ import annotations

from prometheus_client import CollectorRegistry

from quire.messages import SchedulerStats, StepOutputs, TenantStats, TierStats
from quire.metrics import HttpMetrics, create_metrics
from quire.metrics.key_metrics import KeyMetrics
from quire.metrics.trace_metrics import TraceMetrics
from quire.prefix_report import MissReason
from quire.server.keys import Keys

TIERS = ("ram", "disk", "peer", "staging", "export")
HEAD = """\
# Metrics

Written by `scripts/gen_docs.py` from `scripts/metrics_page.py` and the registry; do not edit.

`GET /metrics` answers in Prometheus' text format. Names that begin with `vllm:` are vLLM's and count as vLLM does, so
its dashboards work. Names that begin with `quire:` are Quire's own. `http_*` are those of
prometheus-fastapi-instrumentator, and `process_*`, `python_*` those of prometheus_client. Every `vllm:` and `quire:`
metric of the engine has the labels `model_name` and `engine`, the number of the replica. What vLLM has and Quire has not is in
[compat.md](compat.md#metrics).

## Why did prompts miss the cache?

For each prompt, the scheduler notes at the first admission how many tokens it found in the KV cache and outside it, and
the reason that stopped the match first. `quire:prefix_miss_total` counts prompts by that reason and
`quire:prefix_miss_tokens_total` the tokens that were computed for it.

| reason | meaning | what helps |
|---|---|---|
"""
HELP = {
    MissReason.BOUNDARY: (
        "the rest is shorter than a block, or is a last block that cannot be copied",
        "nothing is wrong; a smaller `--block-size` finds a little more",
    ),
    MissReason.OFF: ("the prefix cache is off", "`--enable-prefix-caching`"),
    MissReason.CAPPED: (
        "the request itself forbids it: `prompt_logprobs`, a mean over the prompt, `skip_reading_prefix_cache`",
        "ask for less",
    ),
    MissReason.EVICTED: (
        "it was cached, and its place was needed",
        "more KV cache (`--kv-cache-memory-bytes`), or a store outside it",
    ),
    MissReason.RESET: ("the prefix cache was reset, or the engine slept", "fewer resets"),
    MissReason.NOT_LOADED: (
        "a store outside the cache has it, but there were no free blocks to load it into, or loading would take longer than computing",
        "more KV cache, fewer requests at a time",
    ),
    MissReason.LOAD_LATE: ("a load was ended after its time limit", "a faster store"),
    MissReason.LOAD_FAILED: (
        "a store had lost it, or it was damaged",
        "see `quire:kv_tier_damaged_blocks_total` and the log",
    ),
    MissReason.ADAPTER: (
        "it is cached for another LoRA adapter, or for the model without one",
        "KV differs between adapters; nothing to share",
    ),
    MissReason.SALT: (
        "it is cached under another `cache_salt`",
        "one salt per group of clients that may share",
    ),
    MissReason.UNSEEN: (
        "it was never computed, or longer ago than the record of evicted blocks goes back",
        "prompts that begin alike: what changes belongs at the end",
    ),
}
TAIL = """
Only the beginning of a prompt can be found, so the reason is about one block: the first one that was not found. The
salt is looked for among the 32 that were used last. That another salt has the same prompt is told to operators only, in
metrics and the log; clients are told `never_seen`, and the time that the search takes does not depend on what it finds.

Useful queries:

- share of prompt tokens found: `rate(vllm:prompt_tokens_cached_total[5m]) / rate(vllm:prompt_tokens_total[5m])`
- by where they were: `sum by (source) (rate(vllm:prompt_tokens_by_source_total[5m]))`, or, with the stores outside the
  cache one by one, `sum by (source) (rate(vllm:prompt_tokens_cached_by_source_total[5m]))`
- what a larger cache would save: `rate(quire:prefix_miss_tokens_total{reason="evicted"}[5m])`
- hit rate of the stores outside: `rate(vllm:external_prefix_cache_hits_total[5m]) / rate(vllm:external_prefix_cache_queries_total[5m])`

For one request: `return_prefix_details` in its body adds `prefix` to the details of its usage, `RequestOutput.prefix` has
the same for `LLM`, and with `--enable-log-requests` the log has a line `request ...: prompt: ...`.

## All metrics

| name | type | other labels | meaning |
|---|---|---|---|
"""


def render() -> str:
    reasons = [f"| `{reason.value}` | {' | '.join(cells)} |" for reason, cells in HELP.items()]
    return HEAD + "\n".join(reasons) + "\n" + TAIL + "\n".join(_rows()) + "\n"


def registry() -> CollectorRegistry:
    """Of a server with replicas, adapters, drafts and all tiers, after a request."""
    registry = CollectorRegistry(auto_describe=True)
    metrics = create_metrics(
        registry, [{"block_size": "16"}] * 2, states=lambda: ["ok"] * 2, model_name="m",
        max_model_len=1024, max_adapters=1, max_drafts=1,
    )  # fmt: skip
    HttpMetrics(registry).on_response(method="GET", handler="/", status=200, seconds=0.0)
    registry.register(KeyMetrics(Keys(["k"])))
    registry.register(TraceMetrics())
    tiers = {tier: TierStats() for tier in TIERS}
    tenants = {"default": TenantStats()}
    metrics.on_step(StepOutputs(stats=SchedulerStats(kv_tiers=tiers, tenants=tenants)))
    return registry


def _rows() -> list[str]:
    assert set(HELP) == set(MissReason) - {MissReason.WHOLE}
    rows = []
    for family in sorted(registry().collect(), key=lambda family: family.name):
        labels: dict[str, list[str]] = {}
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label not in ("model_name", "engine", "le"):
                    values = labels.setdefault(label, [])
                    values.extend([value] * (value not in values))
        shown = ", ".join(_label(*each) for each in labels.items())
        suffix = "_total" if family.type == "counter" else ""
        rows.append(
            f"| `{family.name}{suffix}` | {family.type} | {shown} | {family.documentation} |"
        )
    return rows


def _label(name: str, values: list[str]) -> str:
    listed = name in ("reason", "source", "tier", "quota", "finished_reason", "sleep_state")
    return f"`{name}`: {' '.join(values)}" if listed else f"`{name}`"
