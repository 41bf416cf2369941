"""Keywords of `vllm.LLM` that are no options of ours: taken where nothing depends on them, else explained."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from quire.config import engine_options
from quire.errors import ConfigError

logger = logging.getLogger(__name__)

_KNOWN: dict[str, tuple[tuple[object, ...], str]] = {
    "runner": (("auto", "generate", "pooling"), "one engine generates and embeds"),
    "convert": (("auto", "none", "embed"), "every model can embed; none classifies"),
    "tokenizer_mode": (("auto", "hf"), "there is one tokenizer"),
    "skip_tokenizer_init": ((False,), "pass token ids and SamplingParams(detokenize=False)"),
    "trust_remote_code": ((False, True), "no code of a checkpoint is ever run"),
    "allowed_local_media_path": (("",), "models read text only"),
    "allowed_media_domains": ((None, []), "models read text only"),
    "limit_mm_per_prompt": ((None, {}), "models read text only"),
    "mm_processor_kwargs": ((None, {}), "models read text only"),
    "tensor_parallel_size": ((1,), "one device serves a model"),
    "pipeline_parallel_size": ((1,), "one device serves a model"),
    "data_parallel_size": ((1,), "start one engine per device"),
    "distributed_executor_backend": ((None, "uni", "mp"), "one device serves a model"),
    "enable_expert_parallel": ((False,), "one device serves a model"),
    "quantization": ((None,), "give a checkpoint in plain floats"),
    "quantization_config": ((None, {}), "give a checkpoint in plain floats"),
    "tokenizer_revision": ((None,), "pass tokenizer as a local directory"),
    "cpu_offload_gb": ((0,), "weights stay on the device"),
    "disable_custom_all_reduce": ((False, True), "one device serves a model"),
    "pooler_config": ((None, {}), "pass PoolingParams to LLM.embed"),
    "structured_outputs_config": ((None, {}), "there is one backend for structured_outputs"),
    "profiler_config": ((None, {}), "see quire bench"),
    "attention_config": ((None, {}), "see attention_backend"),
    "compilation_config": ((None, {}, 0, 1, 2, 3), "nothing is compiled but kernels; see enforce_eager"),
    "logits_processors": ((None, []), "see logit_bias, allowed_token_ids and bad_words of SamplingParams"),
    "speculative_config": ((None,), "there is no speculative decoding"),
    "spec_method": ((None,), "there is no speculative decoding"),
    "spec_model": ((None,), "there is no speculative decoding"),
    "spec_tokens": ((None,), "there is no speculative decoding"),
    "kv_transfer_config": ((None,), "KV is not moved between engines"),
    "enable_lora": ((False,), "adapters are not served; merge them into the checkpoint"),
    "enable_sleep_mode": ((False, True), "LLM.sleep always works"),
    "task": (("auto", "generate", "embed", "embedding"), "no model here classifies"),
    "guided_decoding_backend": ((None, "auto"), "there is one backend for structured_outputs"),
}  # fmt: skip
"""Name -> the values that ask for nothing we do not do, and what to know or do instead."""

_DROPPED = {
    "swap_space": "preempted requests are computed again",
    "max_seq_len_to_capture": "CUDA graphs are recorded as far as memory allows",
    "use_v2_block_manager": "there is one block manager",
}
"""Options that vLLM itself no longer has; old scripts still set them."""


def own_options(given: Mapping[str, object]) -> dict[str, object]:
    """`given` without vLLM's keywords that change nothing here. Raises `ConfigError` for those that would."""
    ours = {info.name for info in engine_options()}
    rest = {}
    for name, value in given.items():
        if name in ours or name not in _KNOWN | _DROPPED:
            rest[name] = value
        elif name in _DROPPED:
            logger.warning("%s has no effect: %s", name, _DROPPED[name])
        elif not any(
            type(value) is type(neutral) and value == neutral for neutral in _KNOWN[name][0]
        ):
            raise ConfigError(
                f"{name}={value!r} is not supported: {_KNOWN[name][1]}. Leave it out."
            )
    return rest
