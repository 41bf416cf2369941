"""The engine's Prometheus metrics, named and counted as vLLM's.

Counting rule of `vllm:iteration_tokens_total`, from vLLM's own test: k serial requests of P prompt and G
generated tokens give a sum of k(P + G) and a count of kG. So an iteration's size is the prompt
tokens it brought in, computed or found in the prefix cache, plus the tokens it sampled; a step
that samples nothing (a middle chunk of a long prompt) is carried over to the next one that does.
A decode step also *computes* one token per request, the one sampled before; that one was counted
when it was sampled, and is subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Gauge

from quire.metrics import buckets
from quire.metrics.family import Family
from quire.metrics.kv_metrics import KVMetrics
from quire.metrics.request_stats import FinishedRequest
from quire.metrics.tenant_metrics import TenantMetrics

if TYPE_CHECKING:
    from quire.messages import DraftCounts, SchedulerStats, StepOutputs

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition", "timeout", "expired")
WAIT_REASONS = ("capacity", "deferred")
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
"""Name by level of sleep."""
REJECT_REASONS = ("max_num_queued_reqs", "max_num_queued_tokens")


class EngineMetrics:
    """A `MetricsSink` over one registry."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        model_name: str,
        max_model_len: int,
        engine: str = "0",
        cache_info: Mapping[str, object] | None = None,
        max_adapters: int | None = None,
        max_drafts: int = 0,
        families: EngineMetrics | None = None,
    ) -> None:
        """max_adapters: that requests use at once; None if adapters are not served. max_drafts: of a request
        in a step; 0 without speculative decoding. families: of another core in this registry."""
        self._made: dict[str, Any] = {} if families is None else families._made
        make = Family(registry, model_name, engine, self._made)
        self._carried_tokens = 0
        self._make_gauges(make)
        self._make_counters(make)
        self._kv = KVMetrics(make)
        self._tenants = TenantMetrics(make)
        self._make_latencies(make)
        self._make_sizes(make, buckets.one_two_five(max(1, max_model_len)))
        self._drafts = _DraftCounters(make, max_drafts) if max_drafts else None
        self._adapters: Gauge | None = None
        if max_adapters is not None:
            self._adapter_labels = {**make.base, "max_lora": str(max_adapters)}
            self._shown: tuple[str, ...] | None = None
            self._adapters = make.family(
                Gauge,
                "vllm:lora_requests_info",
                "Adapters of running and waiting requests, as labels; the value is the time.",
                [*self._adapter_labels, "running_lora_adapters", "waiting_lora_adapters"],
            )
            self._show_adapters((), ())
        if cache_info is not None:
            make.info("vllm:cache_config_info", "The KV cache, as labels.", cache_info)

    def _make_gauges(self, make: Family) -> None:
        self._running = make.gauge("vllm:num_requests_running", "Requests that run.")
        self._waiting = make.gauge("vllm:num_requests_waiting", "Requests that wait.")
        self._waiting_by = {
            reason: make.gauge(
                "vllm:num_requests_waiting_by_reason", "Requests that wait, by why.", reason=reason
            )
            for reason in WAIT_REASONS
        }
        self._kv_usage = (
            make.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1."),
            make.gauge("vllm:gpu_cache_usage_perc", "Old name of vllm:kv_cache_usage_perc."),
        )
        self._sleep_state = [
            make.gauge("vllm:engine_sleep_state", "1 for the state it is in.", sleep_state=state)
            for state in SLEEP_STATES
        ]
        self.on_sleep_state(0)
        self._slots_allocated = make.gauge(
            "quire:kv_slots_allocated", "Token slots in blocks that requests hold."
        )
        self._slots_used = make.gauge("quire:kv_slots_used", "Token slots that hold KV.")
        self._blocks_shared = make.gauge(
            "quire:kv_blocks_shared", "KV blocks that more than one request holds."
        )

    def _make_counters(self, make: Family) -> None:
        self._prefix_queries = (
            make.counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache."),
            make.counter("vllm:gpu_prefix_cache_queries", "Old name of vllm:prefix_cache_queries."),
        )
        self._prefix_hits = (
            make.counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache."),
            make.counter("vllm:gpu_prefix_cache_hits", "Old name of vllm:prefix_cache_hits."),
        )
        self._preemptions = make.counter("vllm:num_preemptions", "Requests sent back to wait.")
        self._blocks_copied = make.counter("quire:kv_blocks_copied", "Copy-on-write block copies.")
        self._rows_held = make.counter(
            "quire:rows_held", "Times a request sat out a step until its last token was known."
        )
        self._rows_discarded = make.counter(
            "quire:rows_discarded", "Sampled tokens of requests that had already ended."
        )
        self._prompt_tokens = make.counter("vllm:prompt_tokens", "Prompt tokens prefilled.")
        self._prompt_cached = make.counter(
            "vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache or outside it."
        )
        sources = "Prompt tokens by where their KV came from."
        self._prompt_sources = [
            make.counter("vllm:prompt_tokens_by_source", sources, source=source)
            for source in ("local_cache_hit", "external_kv_transfer", "local_compute")
        ]
        self._generation_tokens = make.counter("vllm:generation_tokens", "Tokens generated.")
        self._success = {
            reason: make.counter(
                "vllm:request_success", "Requests ended, by why.", finished_reason=reason
            )
            for reason in FINISH_REASONS
        }
        self._restarts = make.counter(
            "quire:core_restarts", "Times that a dead engine core was started again."
        )
        self._resumed = make.counter(
            "quire:requests_resumed", "Sequences that went on after their engine core had died."
        )
        self._poison = make.counter(
            "quire:poison_requests", "Sequences that ended because engine cores died of them."
        )
        self._rejections = {
            reason: make.counter(
                "vllm:admission_rejections", "Requests refused at the door.", reason=reason
            )
            for reason in REJECT_REASONS
        }

    def _make_latencies(self, make: Family) -> None:
        self._ttft = make.histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", buckets.TTFT
        )
        self._itl = (
            make.histogram("vllm:inter_token_latency_seconds", "Between tokens.", buckets.ITL),
            make.histogram(
                "vllm:time_per_output_token_seconds",
                "Old name of vllm:inter_token_latency_seconds.",
                buckets.ITL,
            ),
        )
        self._tpot = make.histogram(
            "vllm:request_time_per_output_token_seconds",
            "A request's mean time per token after the first.",
            buckets.ITL,
        )
        self._spans = {
            attribute: make.histogram(f"vllm:{name}_seconds", text, buckets.LATENCY)
            for attribute, name, text in (
                ("e2e_seconds", "e2e_request_latency", "Arrival to end."),
                ("queue_seconds", "request_queue_time", "Waiting before the first step."),
                ("inference_seconds", "request_inference_time", "First step to last token."),
                ("prefill_seconds", "request_prefill_time", "First step to first token."),
                ("decode_seconds", "request_decode_time", "First to last token."),
            )
        }

    def _make_sizes(self, make: Family, token_buckets: tuple[int, ...]) -> None:
        self._request_prompt = make.histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", token_buckets
        )
        self._request_generation = make.histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request.", token_buckets
        )
        self._request_longest = make.histogram(
            "vllm:request_max_num_generation_tokens",
            "Tokens of a request's longest sequence.",
            token_buckets,
        )
        self._request_max_tokens = make.histogram(
            "vllm:request_params_max_tokens", "max_tokens of a request.", token_buckets
        )
        self._request_computed = make.histogram(
            "vllm:request_prefill_kv_computed_tokens",
            "Prompt tokens of a request that were computed, not found in the cache.",
            token_buckets,
        )
        self._request_n = make.histogram(
            "vllm:request_params_n", "n of a request.", buckets.NUM_SEQUENCES
        )
        self._request_preemptions = make.histogram(
            "vllm:request_num_preemptions", "Preemptions of a request.", buckets.PREEMPTIONS
        )
        self._iteration = make.histogram(
            "vllm:iteration_tokens_total",
            "Prompt and sampled tokens of a step that sampled.",
            buckets.ITERATION_TOKENS,
        )

    # --- events -----------------------------------------------------------------------------------

    def on_step(self, outputs: StepOutputs) -> None:
        """A message of the engine core: tokens of one step, and the scheduler's state after it."""
        sampled = decode_rows = cached = 0
        if outputs.recovery is not None:
            self._restarts.inc(outputs.recovery.restarts)
            self._resumed.inc(outputs.recovery.resumed)
            self._poison.inc(outputs.recovery.poison)
        if outputs.stats is not None:
            self._kv.on_tiers(outputs.stats.kv_tiers)
            if outputs.stats.tenants:
                self._tenants.on_tenants(outputs.stats.tenants)
        for update in outputs.updates:
            sampled += len(update.new_token_ids)
            if update.prefix is not None:
                cached += update.prefix.cached
                self._kv.on_prefix(update.prefix)
            elif update.new_token_ids:
                decode_rows += 1
        computed = outputs.stats.step_tokens if outputs.stats is not None else 0
        self._carried_tokens += max(0, computed - decode_rows) + cached
        if sampled:
            self._generation_tokens.inc(sampled)
            self._iteration.observe(self._carried_tokens + sampled)
            self._carried_tokens = 0
        if outputs.stats is not None:
            self._on_stats(outputs.stats)

    def _on_stats(self, stats: SchedulerStats) -> None:
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        for reason, gauge in self._waiting_by.items():
            gauge.set(stats.waiting_by_reason.get(reason, 0))
        for gauge in self._kv_usage:
            gauge.set(stats.kv_usage)
        self._slots_allocated.set(stats.kv_slots_allocated)
        self._slots_used.set(stats.kv_slots_used)
        self._blocks_shared.set(stats.blocks_shared)
        for counter in self._prefix_queries:
            counter.inc(stats.prefix_queries)
        for counter in self._prefix_hits:
            counter.inc(stats.prefix_hits)
        self._preemptions.inc(stats.num_preemptions)
        self._blocks_copied.inc(stats.blocks_copied)
        self._rows_held.inc(stats.rows_held)
        self._rows_discarded.inc(stats.rows_discarded)
        if self._drafts is not None and stats.drafts is not None:
            self._drafts.add(stats.drafts)
        self._show_adapters(stats.running_adapters, stats.waiting_adapters)

    def _show_adapters(self, running: Sequence[str], waiting: Sequence[str]) -> None:
        """One sample, so that the labels do not pile up."""
        if self._adapters is not None:
            labels = (*self._adapter_labels.values(), ",".join(running), ",".join(waiting))
            if self._shown not in (None, labels):
                self._adapters.remove(*self._shown)
            self._shown = labels
            self._adapters.labels(*labels).set_to_current_time()

    def on_first_token(
        self,
        ttft_seconds: float | None,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        external_tokens: int = 0,
    ) -> None:
        if ttft_seconds is not None:
            self._ttft.observe(ttft_seconds)
        self._prompt_tokens.inc(prompt_tokens)
        self._prompt_cached.inc(cached_tokens)
        computed = max(0, prompt_tokens - cached_tokens)
        counts = (cached_tokens - external_tokens, external_tokens, computed)
        for counter, count in zip(self._prompt_sources, counts, strict=True):
            counter.inc(count)

    def on_token_gap(self, seconds: float) -> None:
        for histogram in self._itl:
            histogram.observe(seconds)

    def on_finished(self, request: FinishedRequest) -> None:
        if request.finish_reason in self._success:
            self._success[request.finish_reason].inc()
        for attribute, histogram in self._spans.items():
            seconds = getattr(request, attribute)
            if seconds is not None:
                histogram.observe(seconds)
        if request.time_per_output_token is not None:
            self._tpot.observe(request.time_per_output_token)
        self._request_prompt.observe(request.prompt_tokens)
        self._request_generation.observe(request.generation_tokens)
        self._request_longest.observe(request.longest_sequence)
        self._request_computed.observe(max(0, request.prompt_tokens - request.cached_tokens))
        self._request_n.observe(request.n)
        self._request_preemptions.observe(request.num_preemptions)
        if request.max_tokens is not None:
            self._request_max_tokens.observe(request.max_tokens)

    def on_rejected(self, reason: str) -> None:
        """A request was refused because of a queue limit. Unknown reasons are not counted: label values are
        fixed, so that clients cannot make the registry grow."""
        if reason in self._rejections:
            self._rejections[reason].inc()

    def on_sleep_state(self, level: int) -> None:
        for state, gauge in enumerate(self._sleep_state):
            gauge.set(state == level)


class _DraftCounters:
    """There only with speculative decoding, as in vLLM."""

    def __init__(self, make: Family, max_drafts: int) -> None:
        self._drafts = make.counter(
            "vllm:spec_decode_num_drafts", "Times that a request's drafts were verified."
        )
        self._tokens = make.counter("vllm:spec_decode_num_draft_tokens", "Drafts verified.")
        self._accepted = make.counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafts that were right."
        )
        self._per_position = [
            make.counter(
                "vllm:spec_decode_num_accepted_tokens_per_pos",
                "Right drafts, by their place.",
                position=str(position),
            )
            for position in range(max_drafts)
        ]

    def add(self, counts: DraftCounts) -> None:
        self._drafts.inc(counts.num_drafts)
        self._tokens.inc(counts.num_draft_tokens)
        self._accepted.inc(counts.num_accepted_tokens)
        for counter, count in zip(self._per_position, counts.accepted_per_position, strict=False):
            counter.inc(count)
