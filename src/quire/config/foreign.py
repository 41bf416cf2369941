"""vLLM's options that Quire does not have, so that command lines, YAML files and `LLM(...)` calls written
for vLLM work, or fail with one sentence that says what to do. No other file has these names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from quire.config.options import OptionInfo
from quire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Foreign:
    """An option of vLLM that Quire does not have, and how it is handled."""

    why: str
    """The reason, or what to do instead: the end of the sentence that the user gets."""
    default: object = None
    """vLLM's default, which is accepted silently. A bool is a switch, () takes several words."""
    also: tuple[object, ...] = ()
    """Other values that are accepted silently, because Quire already does the same."""
    refused: bool = True
    """Whether any other value is an error, because it would change the result; else it is a warning."""
    short: tuple[str, ...] = ()


def _idle(why: str, default: object = None, *short: str) -> Foreign:
    """An option that does not change the result."""
    return Foreign(why, default, refused=False, short=short)


_NO_EXPERTS = "no model here has experts"
_ONE_MACHINE = "all copies of --data-parallel-size are processes of this machine"
_ONE_DOOR = (
    "the server itself chooses among its copies; behind a balancer of your own, start servers without "
    "--data-parallel-size"
)
_TEXT_ONLY = "models read text only"
_AS_FILED = "an adapter is held in the model's dtype"
_NO_MOE_ADAPTERS = "adapters apply to dense layers only"
_ONE_KIND_OF_TRACES = "spans of requests are all there are; see --otlp-traces-endpoint"
_OWN_KERNELS = "nothing is compiled but kernels; see --enforce-eager"
_ONE_GRAMMAR_BACKEND = "there is one backend, llguidance"
_NO_CODE = "the server runs no code of others; put a proxy in front"
_DROPPED = "vLLM has dropped it too"

FOREIGN: dict[str, Foreign] = {
    # What the model is, and how its files are read.
    "runner": Foreign("one engine generates and embeds", "auto", ("generate", "pooling")),
    "convert": Foreign("every model can embed; none classifies", "auto", ("none", "embed")),
    "task": Foreign("no model here classifies", "auto", ("generate", "embed", "embedding")),
    "tokenizer_mode": Foreign("there is one way to read a tokenizer", "auto", ("hf", "slow")),
    "skip_tokenizer_init": Foreign(
        "the tokenizer is needed; send token ids, and detokenize=False to LLM", False
    ),
    "trust_remote_code": _idle("no code of a checkpoint is ever run", False),
    "tokenizer_revision": Foreign("pass tokenizer as a local directory"),
    "code_revision": _idle("no code of a checkpoint is ever run"),
    "config_format": Foreign("config.json is read", "auto", ("hf",)),
    "hf_config_path": Foreign(
        "the config is read from the model's files, GGUF too; see --hf-overrides"
    ),
    "model_loader_extra_config": Foreign("safetensors need no settings", {}),
    "ignore_patterns": _idle(
        "only safetensors or the named GGUF file, and what describes them, are fetched", ()
    ),
    "use_tqdm_on_load": _idle("loading shows no bar", True),
    "quantization_config": Foreign("see --quantization", None, ({},)),
    "pooler_config": Foreign("say pooling per request, or with PoolingParams", None, ({},)),
    "logits_processors": Foreign(
        "see logit_bias, allowed_token_ids and bad_words of SamplingParams", ()
    ),
    "disable_sliding_window": _idle("a model's window is never ignored", False),
    "enable_sleep_mode": _idle(
        "sleep always works; over HTTP with --enable-admin-endpoints", False
    ),
    # Media.
    "limit_mm_per_prompt": _idle(_TEXT_ONLY, {}),
    "mm_processor_kwargs": _idle(_TEXT_ONLY),
    "mm_processor_cache_gb": _idle(_TEXT_ONLY),
    "media_io_kwargs": _idle(_TEXT_ONLY, {}),
    "language_model_only": _idle(_TEXT_ONLY, False),
    "allowed_local_media_path": _idle(_TEXT_ONLY, ""),
    "allowed_media_domains": _idle(_TEXT_ONLY, ()),
    # Several devices.
    "enable_expert_parallel": _idle(_NO_EXPERTS, False, "-ep"),
    "all2all_backend": _idle(_NO_EXPERTS),
    "enable_eplb": _idle(_NO_EXPERTS, False),
    "enable_dbo": _idle(_NO_EXPERTS, False),
    "decode_context_parallel_size": Foreign("a token's keys are on one rank", 1, short=("-dcp",)),
    "prefill_context_parallel_size": Foreign(
        "a prompt is computed on all ranks", 1, short=("-pcp",)
    ),
    "disable_custom_all_reduce": _idle("ranks exchange columns; nothing is reduced", False),
    "data_parallel_size_local": Foreign(_ONE_MACHINE, short=("-dpl",)),
    "data_parallel_rank": Foreign(_ONE_DOOR, short=("-dpn",)),
    "data_parallel_start_rank": Foreign(_ONE_MACHINE, None, (0,), short=("-dpr",)),
    "data_parallel_address": _idle(_ONE_MACHINE, None, "-dpa"),
    "data_parallel_rpc_port": _idle(_ONE_MACHINE, None, "-dpp"),
    "data_parallel_backend": Foreign(
        _ONE_MACHINE + "; see quire.integrations.ray for a cluster", "mp", short=("-dpb",)
    ),
    "data_parallel_hybrid_lb": Foreign(_ONE_DOOR, False, short=("-dph",)),
    "data_parallel_external_lb": Foreign(_ONE_DOOR, False, short=("-dpe",)),
    "data_parallel_multi_port_external_lb": Foreign(_ONE_DOOR, False, short=("-dpm",)),
    "api_server_count": Foreign("one process serves HTTP", 1, short=("-asc",)),
    "max_parallel_loading_workers": _idle("weights are read in one pass"),
    # Memory and scheduling.
    "prefix_caching_hash_algo": _idle(
        "prefixes are found by SHA-256 and compared token by token", "sha256"
    ),
    "preemption_mode": _idle(
        "preempted requests find their KV in the cache or in a tier, and compute the rest"
    ),
    "cpu_offload_gb": Foreign("weights stay on the device", 0, (0.0,)),
    "max_num_partial_prefills": _idle("a step takes as many prompts as its budget holds", 1),
    "max_long_partial_prefills": _idle("see --long-prefill-token-threshold", 1),
    "num_scheduler_steps": _idle(_DROPPED),
    "use_v2_block_manager": _idle(_DROPPED, False),
    # How the device is used.
    "compilation_config": _idle(_OWN_KERNELS, {}, "-cc"),
    "optimization_level": _idle(_OWN_KERNELS, 2, "-O"),
    "cuda_graph_sizes": _idle("CUDA graphs are captured for the sizes that occur", ()),
    "max_seq_len_to_capture": _idle("CUDA graphs do not depend on lengths"),
    "attention_config": Foreign("see attention_backend", None, ({},)),
    "profiler_config": Foreign("see quire bench", None, ({},)),
    # Decoding.
    "structured_outputs_config": Foreign(
        _ONE_GRAMMAR_BACKEND + "; see --json-whitespace none for its disable_any_whitespace",
        None,
        ({}, *({"backend": name} for name in ("auto", "guidance"))),
    ),
    "guided_decoding_backend": _idle(_ONE_GRAMMAR_BACKEND, "auto"),
    "enable_reasoning": _idle("see --reasoning-parser", False),
    "tool_parser_plugin": Foreign(_NO_CODE, ""),
    "reasoning_parser_plugin": Foreign(_NO_CODE, ""),
    # Adapters.
    "lora_dtype": Foreign(_AS_FILED, "auto"),
    "fully_sharded_loras": _idle(
        "B of an adapter is divided as its matrix is, A is on every rank", False
    ),
    "lora_target_modules": Foreign("an adapter applies to every module that its file has", ()),
    "lora_extra_vocab_size": Foreign("adapters add no tokens", 0, (256,)),
    "enable_lora_bias": Foreign(_DROPPED, False),
    "default_mm_loras": _idle(_TEXT_ONLY, {}),
    "enable_tower_connector_lora": _idle(_TEXT_ONLY, False),
    "specialize_active_lora": _idle("a step computes the adapters that it has", False),
    "enable_mixed_moe_lora_format": Foreign(_NO_MOE_ADAPTERS, False),
    "enable_moe_shared_loras": Foreign(_NO_MOE_ADAPTERS, False),
    "max_lora_cls_labels": _idle("no model here classifies"),
    # The server and its logs and metrics.
    "middleware": Foreign(_NO_CODE, ()),
    "enable_prompt_tokens_details": _idle("usage always has them", False),
    "enable_request_id_headers": _idle("X-Request-Id is always sent", False),
    "enable_server_load_tracking": _idle("/load always works", False),
    "enable_per_request_metrics": _idle("see /metrics", False),
    "max_log_len": _idle("no text of a request is ever logged"),
    "enable_log_outputs": _idle("no text of an answer is ever logged", False),
    "enable_log_deltas": _idle("no text of an answer is ever logged", True),
    "aggregate_engine_logging": _idle("the log has a line for each copy of the model", False),
    "disable_log_requests": _idle("requests are logged only with --enable-log-requests", False),
    "log_config_file": Foreign("see --log-format and QUIRE_LOG_LEVEL"),
    "disable_frontend_multiprocessing": _idle(_DROPPED, False),
    "collect_detailed_traces": _idle(_ONE_KIND_OF_TRACES, ()),
    "kv_cache_metrics": _idle("blocks are counted in quire:kv_*", False),
    "show_hidden_metrics_for_version": _idle("old names are always there"),
}


def foreign_flags() -> list[OptionInfo]:
    """Command line flags that accept any value; `without_foreign` checks it."""
    return [
        OptionInfo(
            name, "vLLM's options", bool if isinstance(option.default, bool)
            else tuple[str, ...] if option.default == () else object,
            option.default, option.why, option.short, parse=_value, hidden=True,
        )
        for name, option in FOREIGN.items()
    ]  # fmt: skip


def without_foreign(values: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """`values` without vLLM's options, and a warning for each that has no effect.

    Raises `ConfigError` for an option whose effect Quire does not have.
    """
    rest: dict[str, object] = {}
    notes = []
    for name, value in values.items():
        option = FOREIGN.get(name)
        if option is None:
            rest[name] = value
            continue
        given = tuple(value) if isinstance(value, list) else value
        if any(_same(given, neutral) for neutral in (None, option.default, *option.also)):
            continue
        if option.refused:
            raise ConfigError(f"{name}={value!r} is not supported: {option.why}. Leave it out.")
        notes.append(f"{name} has no effect: {option.why}.")
    return rest, notes


def _same(value: object, neutral: object) -> bool:
    """Equal, and not True for 1."""
    return type(value) is type(neutral) and value == neutral


def _value(text: str) -> object:
    """The words of a flag, converted to the value that YAML or Python would have."""
    try:
        return json.loads(text)
    except ValueError:
        return text
