"""vLLM 0.32's names: there, or said to be absent on docs/compat.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample

import quire
from quire.metrics import EngineMetrics
from quire.outputs import RequestStateStats

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "compat.md").read_text()

NAMES = {
    "SamplingParams": """
        n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop
        stop_token_ids ignore_eos max_tokens min_tokens logprobs prompt_logprobs logprob_token_ids
        prompt_logprob_token_ids prompt_logprob_start flat_logprobs detokenize skip_special_tokens
        spaces_between_special_tokens include_stop_str_in_output output_kind stream_interval
        structured_outputs logit_bias allowed_token_ids bad_words thinking_token_budget repetition_detection
        skip_reading_prefix_cache watermarking routed_experts_prompt_start trace_decode_token_ids skip_clone
        extra_args""",
    "BeamSearchParams": """
        beam_width max_tokens ignore_eos temperature length_penalty include_stop_str_in_output
        structured_outputs""",
    "RequestOutput": """
        request_id prompt prompt_token_ids prompt_logprobs outputs finished metrics lora_request
        encoder_prompt encoder_prompt_token_ids num_cached_tokens num_cache_creation_tokens
        prompt_token_id_logprobs kv_transfer_params ec_transfer_params""",
    "CompletionOutput": """
        index text token_ids cumulative_logprob logprobs routed_experts finish_reason stop_reason
        lora_request sampling_mask spec_decode_metrics weight_versions""",
    "RequestStateStats": """
        num_generation_tokens num_preemptions arrival_time queued_ts scheduled_ts first_token_ts
        last_token_ts first_token_latency is_corrupted""",
    "LLM": """
        generate chat beam_search encode embed classify score enqueue wait_for_completion collective_rpc
        apply_model start_profile stop_profile reset_prefix_cache sleep wake_up get_metrics get_tokenizer
        get_default_sampling_params""",
    "metrics": """
        num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc
        engine_sleep_state cache_config_info lora_requests_info prefix_cache_queries prefix_cache_hits
        external_prefix_cache_queries external_prefix_cache_hits mm_cache_queries mm_cache_hits
        num_preemptions prompt_tokens prompt_tokens_by_source prompt_tokens_cached
        prompt_tokens_cached_by_source generation_tokens request_success admission_rejections
        corrupted_requests spec_decode_num_drafts spec_decode_num_draft_tokens
        spec_decode_num_accepted_tokens spec_decode_num_accepted_tokens_per_pos estimated_flops_per_gpu
        estimated_read_bytes_per_gpu estimated_write_bytes_per_gpu time_to_first_token_seconds
        inter_token_latency_seconds request_time_per_output_token_seconds e2e_request_latency_seconds
        request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds
        request_decode_time_seconds request_prompt_tokens request_generation_tokens
        request_max_num_generation_tokens request_params_n request_params_max_tokens
        iteration_tokens_total request_num_preemptions request_prefill_kv_computed_tokens
        kv_block_lifetime_seconds kv_block_idle_before_evict_seconds kv_block_reuse_gap_seconds
        time_per_output_token_seconds gpu_cache_usage_perc gpu_prefix_cache_queries
        gpu_prefix_cache_hits""",
}


def ours(kind: str) -> set[str]:
    if kind == "metrics":
        registry = CollectorRegistry(auto_describe=True)
        options = {"cache_info": {"block_size": 16}, "max_adapters": 2, "max_drafts": 2}
        EngineMetrics(registry, model_name="m", max_model_len=8, **options)
        samples: list[Sample] = [s for family in registry.collect() for s in family.samples]
        assert {"model_name", "engine"} <= set.intersection(*(set(s.labels) for s in samples))
        return {family.name.partition(":")[2] for family in registry.collect()}
    found = RequestStateStats if kind == "RequestStateStats" else getattr(quire, kind)
    if dataclasses.is_dataclass(found):
        return {field.name for field in dataclasses.fields(found)}
    return set(getattr(found, "__struct_fields__", dir(found)))


@pytest.mark.parametrize("kind", NAMES)
def test_each_is_there_or_said_to_be_absent(kind: str) -> None:
    there = ours(kind)
    absent = [name for name in NAMES[kind].split() if name not in there]
    silent = [name for name in absent if f"`{name}`" not in PAGE]
    assert not silent, "say so in scripts/compat_page.py"
