"""The counting rules of vLLM's own test, against Prometheus' own parser."""

from __future__ import annotations

import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from quire.messages import (
    FinishReason,
    RecoveryCounts,
    RequestUpdate,
    SchedulerStats,
    StepOutputs,
    TierStats,
)
from quire.metrics import (
    EngineMetrics,
    FinishedRequest,
    HttpMetrics,
    create_metrics,
    new_registry,
    render,
)
from quire.metrics import buckets as bucket_tables
from quire.metrics.kv_metrics import TIER_COUNTERS, TIER_GAUGES
from quire.prefix_report import MissReason, PrefixReport

BOLD_NAMES = """
num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc
cache_config_info prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total
prompt_tokens_total generation_tokens_total request_success_total
time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds
request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds
request_decode_time_seconds request_prompt_tokens request_generation_tokens request_params_n
request_params_max_tokens iteration_tokens_total request_num_preemptions
gpu_cache_usage_perc time_per_output_token_seconds gpu_prefix_cache_queries_total gpu_prefix_cache_hits_total
engine_sleep_state prompt_tokens_by_source_total prompt_tokens_cached_total
prompt_tokens_cached_by_source_total admission_rejections_total request_time_per_output_token_seconds
request_max_num_generation_tokens request_prefill_kv_computed_tokens
""".split()


def make_metrics(max_model_len: int = 4096, max_adapters: int | None = None):
    registry = new_registry()
    metrics = EngineMetrics(
        registry,
        model_name="tiny",
        max_model_len=max_model_len,
        max_adapters=max_adapters,
        cache_info={
            "block_size": 16, "num_gpu_blocks": 100,
            "kv_cache_size_tokens": 1584, "kv_cache_max_concurrency": "0.39",
        },
    )  # fmt: skip
    return registry, metrics


def read(registry) -> dict[str, float]:
    """Every sample as name{labels without model_name and engine} -> value."""
    body, _ = render(registry)
    samples = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            shown = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            samples[sample.name + (f"{{{shown}}}" if shown else "")] = sample.value
    return samples


def step(*, tokens: int, updates=(), **stats) -> StepOutputs:
    return StepOutputs(updates=list(updates), stats=SchedulerStats(step_tokens=tokens, **stats))


def first(request_id: int = 1, cached: int = 0) -> RequestUpdate:
    prefix = PrefixReport(device=cached, computed=4, reason=MissReason.UNSEEN)
    return RequestUpdate(request_id=request_id, new_token_ids=[7], prefix=prefix)


def later(request_id: int = 1, finish: FinishReason | None = None) -> RequestUpdate:
    return RequestUpdate(request_id=request_id, new_token_ids=[8], finish_reason=finish)


def test_every_promised_name_exists_before_any_request():
    registry, _ = make_metrics()
    names = {key.split("{")[0] for key in read(registry)}
    for name in BOLD_NAMES:
        full = f"vllm:{name}"
        assert full in names or f"{full}_count" in names, full


@pytest.mark.parametrize(("prompt", "generated", "requests"), [(10, 5, 3), (1, 1, 2), (7, 2, 1)])
def test_serial_requests_count_as_vllm_counts_them(prompt, generated, requests):
    registry, metrics = make_metrics()
    for _ in range(requests):
        metrics.on_step(step(tokens=prompt, updates=[first()]))
        metrics.on_first_token(0.1, prompt_tokens=prompt, cached_tokens=0)
        for _ in range(generated - 1):
            metrics.on_step(step(tokens=1, updates=[later()]))
            metrics.on_token_gap(0.02)
        metrics.on_finished(
            FinishedRequest(
                prompt_tokens=prompt, generation_tokens=generated, cached_tokens=0,
                finish_reason="length", arrival_ts=1.0, queued_ts=1.0, scheduled_ts=1.1,
                first_token_ts=1.3, last_token_ts=2.0, max_tokens=generated,
            )
        )  # fmt: skip
    samples = read(registry)
    assert samples["vllm:iteration_tokens_total_sum"] == requests * (prompt + generated)
    assert samples["vllm:iteration_tokens_total_count"] == requests * generated
    assert samples["vllm:inter_token_latency_seconds_count"] == requests * (generated - 1)
    assert samples["vllm:time_per_output_token_seconds_count"] == requests * (generated - 1)
    assert samples["vllm:request_params_max_tokens_sum"] == requests * generated
    assert samples["vllm:prompt_tokens_total"] == requests * prompt
    assert samples["vllm:generation_tokens_total"] == requests * generated
    assert samples["vllm:request_success_total{finished_reason=length}"] == requests
    for name in (
        "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_inference_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens",
        "request_params_n", "request_params_max_tokens", "request_time_per_output_token_seconds",
        "request_num_preemptions", "request_max_num_generation_tokens",
    ):  # fmt: skip
        assert samples[f"vllm:{name}_count"] == requests, name


def test_chunked_prompt_is_one_iteration_with_its_first_token():
    registry, metrics = make_metrics()
    metrics.on_step(step(tokens=16))
    metrics.on_step(step(tokens=16))
    assert read(registry)["vllm:iteration_tokens_total_count"] == 0
    metrics.on_step(step(tokens=8, updates=[first()]))
    samples = read(registry)
    assert samples["vllm:iteration_tokens_total_count"] == 1
    assert samples["vllm:iteration_tokens_total_sum"] == 40 + 1


def test_cached_prompt_tokens_count_as_brought_in():
    registry, metrics = make_metrics()
    metrics.on_step(step(tokens=4, updates=[first(cached=32)]))
    metrics.on_first_token(0.1, prompt_tokens=36, cached_tokens=32)
    samples = read(registry)
    assert samples["vllm:iteration_tokens_total_sum"] == 36 + 1
    assert samples["vllm:prompt_tokens_total"] == 36
    assert samples["vllm:prompt_tokens_cached_total"] == 32
    assert samples["vllm:prompt_tokens_cached_by_source_total{source=device}"] == 32
    assert samples["vllm:prompt_tokens_by_source_total{source=local_compute}"] == 4
    assert samples["vllm:prompt_tokens_by_source_total{source=local_cache_hit}"] == 32


def test_where_prompts_were_found_and_why_the_rest_was_not():
    registry, metrics = make_metrics()
    whole = PrefixReport(device=9, computed=1, reason=MissReason.WHOLE)
    loaded = PrefixReport(device=16, ram=8, disk=4, peer=2, computed=5, reason=MissReason.EVICTED)
    capped = PrefixReport(computed=7, reason=MissReason.CAPPED)
    updates = [RequestUpdate(request_id=i, prefix=p) for i, p in enumerate((whole, loaded, capped))]
    metrics.on_step(step(tokens=0, updates=updates))
    assert read(registry)["vllm:external_prefix_cache_queries_total"] == 0, "there is no store"
    tier = TierStats(blocks=3, bytes=100, capacity_bytes=500, saved_blocks=4, damaged_blocks=1)
    for _ in range(2):
        metrics.on_step(step(tokens=0, updates=updates, kv_tiers={"ram": tier}))
    metrics.on_first_token(0.1, prompt_tokens=35, cached_tokens=30, external_tokens=14)
    samples = read(registry)
    found = dict.fromkeys(("device", "host", "disk", "p2p"), 0.0)
    for source in found:
        found[source] = samples[f"vllm:prompt_tokens_cached_by_source_total{{source={source}}}"]
    assert found == {"device": 75, "host": 24, "disk": 12, "p2p": 6}
    assert samples["vllm:external_prefix_cache_queries_total"] == 2 * (1 + 14 + 5)
    assert samples["vllm:external_prefix_cache_hits_total"] == 2 * 14
    assert samples["quire:prefix_miss_total{reason=evicted}"] == 3
    assert samples["quire:prefix_miss_tokens_total{reason=evicted}"] == 15
    assert samples["quire:prefix_miss_tokens_total{reason=capped}"] == 21
    assert samples["quire:prefix_miss_total{reason=other_salt}"] == 0
    assert not any("whole_prompt" in name for name in samples), "that is no miss"
    assert samples["vllm:prompt_tokens_by_source_total{source=local_cache_hit}"] == 16
    assert samples["vllm:prompt_tokens_by_source_total{source=external_kv_transfer}"] == 14
    assert samples["vllm:prompt_tokens_by_source_total{source=local_compute}"] == 5
    assert samples["quire:kv_tier_blocks{tier=ram}"] == 3
    assert samples["quire:kv_tier_capacity_bytes{tier=ram}"] == 500
    assert samples["quire:kv_tier_saved_blocks_total{tier=ram}"] == 8
    assert samples["quire:kv_tier_damaged_blocks_total{tier=ram}"] == 2
    assert samples["quire:kv_tier_off{tier=ram}"] == 0


def test_every_field_of_a_tier_is_reported():
    assert set(TierStats.__struct_fields__) == {*TIER_GAUGES, *TIER_COUNTERS}


def test_mixed_step_counts_each_decode_token_once():
    registry, metrics = make_metrics()
    # Two requests decode (one computed and one sampled token each) while a third prefills 20.
    metrics.on_step(step(tokens=22, updates=[later(1), later(2), first(3)]))
    samples = read(registry)
    assert samples["vllm:iteration_tokens_total_sum"] == 20 + 3
    assert samples["vllm:generation_tokens_total"] == 3


def test_gauges_follow_and_counters_add_up():
    registry, metrics = make_metrics()
    metrics.on_step(
        step(
            tokens=1, num_running=3, num_waiting=2, waiting_by_reason={"capacity": 2},
            kv_usage=0.5, prefix_queries=10, prefix_hits=4, num_preemptions=1,
            kv_slots_allocated=160, kv_slots_used=155, blocks_shared=2, blocks_copied=1, rows_held=3,
            rows_discarded=2,
        )
    )  # fmt: skip
    metrics.on_step(step(tokens=0, prefix_queries=5, prefix_hits=1))
    samples = read(registry)
    assert samples["vllm:num_requests_running"] == samples["vllm:num_requests_waiting"] == 0
    assert samples["vllm:num_requests_waiting_by_reason{reason=capacity}"] == 0
    assert samples["vllm:kv_cache_usage_perc"] == samples["vllm:gpu_cache_usage_perc"] == 0
    assert samples["vllm:prefix_cache_queries_total"] == 15
    assert samples["vllm:prefix_cache_hits_total"] == 5
    assert samples["vllm:gpu_prefix_cache_queries_total"] == 15
    assert samples["vllm:gpu_prefix_cache_hits_total"] == 5
    assert samples["vllm:num_preemptions_total"] == 1
    assert samples["quire:kv_blocks_copied_total"] == 1
    assert samples["quire:rows_held_total"] == 3
    assert samples["quire:rows_discarded_total"] == 2


def test_deaths_of_cores_are_counted_beside_what_it_was_before():
    registry, metrics = make_metrics()
    metrics.on_step(step(tokens=3, updates=[first()], num_running=4))
    counts = RecoveryCounts(resumed=4, poison=1)
    metrics.on_step(StepOutputs(stats=SchedulerStats(), recovery=counts))
    metrics.on_step(StepOutputs(stats=SchedulerStats(), recovery=RecoveryCounts(restarts=1)))
    found = read(registry)
    assert found["quire:core_restarts_total"] == 1
    assert found["quire:requests_resumed_total"] == 4
    assert found["quire:poison_requests_total"] == 1
    assert found["vllm:generation_tokens_total"] == 1
    assert found["vllm:num_requests_running"] == 0


def test_request_that_never_ran_observes_no_time_it_did_not_have():
    registry, metrics = make_metrics()
    metrics.on_finished(
        FinishedRequest(
            prompt_tokens=5, generation_tokens=0, cached_tokens=0, finish_reason="abort",
            arrival_ts=1.0, queued_ts=1.0, finished_ts=4.0,
        )
    )  # fmt: skip
    samples = read(registry)
    assert samples["vllm:request_success_total{finished_reason=abort}"] == 1
    assert samples["vllm:e2e_request_latency_seconds_sum"] == 3.0
    for name in ("queue", "prefill", "decode", "inference"):
        assert samples[f"vllm:request_{name}_time_seconds_count"] == 0
    assert samples["vllm:request_params_max_tokens_count"] == 0


def test_the_engine_is_in_one_state_of_sleep():
    registry, metrics = make_metrics()

    def states() -> dict[str, float]:
        found = {k: v for k, v in read(registry).items() if "engine_sleep_state" in k}
        return {key.partition("=")[2].rstrip("}"): value for key, value in found.items()}

    assert states() == {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
    metrics.on_sleep_state(1)
    assert states() == {"awake": 0, "weights_offloaded": 1, "discard_all": 0}
    metrics.on_sleep_state(2)
    assert states() == {"awake": 0, "weights_offloaded": 0, "discard_all": 1}
    metrics.on_sleep_state(0)
    assert states()["awake"] == 1


def test_rejections_have_fixed_labels():
    registry, metrics = make_metrics()
    metrics.on_rejected("max_num_queued_reqs")
    metrics.on_rejected('anything"}\n else')
    samples = read(registry)
    assert samples["vllm:admission_rejections_total{reason=max_num_queued_reqs}"] == 1
    assert sum(key.startswith("vllm:admission_rejections_total") for key in samples) == 2


def test_cache_config_labels_are_not_empty():
    registry, _ = make_metrics()
    [key] = [k for k in read(registry) if k.startswith("vllm:cache_config_info")]
    for part in ("kv_cache_size_tokens=1584", "kv_cache_max_concurrency=0.39", "block_size=16"):
        assert part in key


def test_two_engines_in_one_process_do_not_mix():
    one, metrics = make_metrics()
    two, _ = make_metrics()
    metrics.on_step(step(tokens=3, updates=[first()]))
    assert read(one)["vllm:generation_tokens_total"] == 1
    assert read(two)["vllm:generation_tokens_total"] == 0


def test_buckets():
    assert bucket_tables.one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)
    assert bucket_tables.one_two_five(1999)[-1] == 1000
    assert bucket_tables.one_two_five(1) == (1,)
    registry, _ = make_metrics(max_model_len=128)
    samples = read(registry)
    edges = [
        k.split("le=")[1].rstrip("}") for k in samples
        if k.startswith("vllm:request_prompt_tokens_bucket")
    ]  # fmt: skip
    assert edges == ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "+Inf"]


def test_text_format_keeps_the_colon_and_has_process_metrics():
    registry, metrics = make_metrics()
    metrics.on_step(step(tokens=3, updates=[first()]))
    body, content_type = render(registry)
    assert content_type.startswith("text/plain; version=")
    assert b"\nvllm:generation_tokens_total{" in body
    names = {family.name for family in text_string_to_metric_families(body.decode())}
    assert any(name.startswith("process_") for name in names)


def test_adapters_are_one_sample_whose_labels_change():
    def shown():
        return [name for name in read(registry) if "lora" in name]

    registry, metrics = make_metrics()
    metrics.on_step(step(tokens=1, running_adapters=["a"]))
    assert shown() == [], "adapters are not served"
    registry, metrics = make_metrics(max_adapters=2)
    name = "vllm:lora_requests_info{max_lora=2,running_lora_adapters=%s,waiting_lora_adapters=%s}"
    assert shown() == [name % ("", "")]
    metrics.on_step(step(tokens=1, running_adapters=["a", "b"], waiting_adapters=["c"]))
    assert shown() == [name % ("a,b", "c")] and read(registry)[shown()[0]] > 1.7e9
    metrics.on_step(step(tokens=1))
    assert shown() == [name % ("", "")]


def test_each_core_shows_its_own_adapters():
    registry = new_registry()
    metrics = create_metrics(
        registry, [None, None], model_name="tiny", max_model_len=8, max_adapters=2
    )
    for replica, names in ((0, ["a"]), (1, ["b"]), (0, ["c"])):
        stats = SchedulerStats(running_adapters=names)
        metrics.on_step(StepOutputs(stats=stats, replica=replica))
    body, _ = render(registry)
    shown = [
        (sample.labels["engine"], sample.labels["running_lora_adapters"])
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if family.name == "vllm:lora_requests_info"
    ]
    assert sorted(shown) == [("0", "c"), ("1", "b")]


def test_http_metrics_bound_their_labels():
    registry = new_registry()
    metrics = HttpMetrics(registry)
    metrics.on_response(method="POST", handler="/v1/completions", status=200, seconds=0.2)
    metrics.on_response(method="HACK1", handler=None, status=404, seconds=0.0)
    metrics.on_response(method="HACK2", handler=None, status=404, seconds=0.0)
    samples = read(registry)
    assert samples["http_requests_total{handler=/v1/completions,method=POST,status=2xx}"] == 1
    assert samples["http_requests_total{handler=none,method=OTHER,status=4xx}"] == 2
    key = "http_request_duration_seconds_count{handler=/v1/completions,method=POST}"
    assert samples[key] == 1


def test_importing_the_data_does_not_import_prometheus():
    code = "import quire.metrics, sys; raise SystemExit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
