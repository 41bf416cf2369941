"""Fields that vLLM or OpenAI know and Quire does not serve.

If such a field were ignored, the answer could be wrong without notice: text that should match a schema,
for example. So a value that would have changed the output is refused, with the field's name; neutral
values pass (see `neutral`). The tables do not apply to a field that a request model declares: it is
served there.
"""

from __future__ import annotations

from collections.abc import Mapping

from quire.server.errors import ApiError, bad_request
from quire.server.neutral import ONLY_NULL, Neutral

_ADAPTERS = {"lora_path": Neutral("", []), "lora_request": Neutral({}), "lora": Neutral([])}
_BOTH: dict[str, Neutral] = _ADAPTERS | {
    "guided_json": ONLY_NULL,
    "guided_regex": Neutral(""),
    "guided_choice": Neutral([]),
    "guided_grammar": Neutral(""),
    "guided_decoding_backend": Neutral("", "auto"),
    "guided_whitespace_pattern": Neutral(""),
    "structural_tag": Neutral(""),
    "prompt_logprob_token_ids": Neutral([]),
    "use_beam_search": Neutral(False),
    "length_penalty": Neutral(1, 1.0),
    "logits_processors": Neutral([]),
    "ec_transfer_params": Neutral({}),
    "mm_processor_kwargs": Neutral({}),
    "media_io_kwargs": Neutral({}),
    "moderation": ONLY_NULL,
}
COMPLETION = _BOTH | {"suffix": Neutral(""), "prompt_embeds": Neutral([], "")}
CHAT = _BOTH | {
    "functions": Neutral([]),
    "function_call": Neutral("", "none", "auto"),
    "chat_template": Neutral(""),
    "echo": Neutral(False),
    "audio": ONLY_NULL,
    "modalities": Neutral([], ["text"]),
    "prediction": ONLY_NULL,
    "web_search_options": ONLY_NULL,
}

RESPONSES = _BOTH | {
    "conversation": Neutral(""),
    "prompt": ONLY_NULL,
    "context_management": Neutral([]),
    "n": Neutral(1),
    "messages": ONLY_NULL,
    "max_tokens": ONLY_NULL,
    "response_format": Neutral({"type": "text"}),
}
MESSAGES = _BOTH | {
    "n": Neutral(1),
    "mcp_servers": Neutral([]),
    "container": Neutral(""),
    "stop": Neutral("", []),
}
POOLING: dict[str, Neutral] = _ADAPTERS | {
    "embed_dtype": Neutral("float32"),
    "endianness": Neutral("native", "little"),
    "padding": Neutral("do_not_pad", False),
    "mm_processor_kwargs": Neutral({}),
    "media_io_kwargs": Neutral({}),
    "chat_template": Neutral(""),
    "instruction": Neutral(""),
    "label_token_ids": ONLY_NULL,
    "max_tokens_per_query": Neutral(0),
    "max_tokens_per_doc": Neutral(0),
}
"""Field -> its neutral values. Other values are refused."""

_RENAMED = 'vLLM removed it; use structured_outputs: {{"{}": ...}}.'
WHY: dict[str, str] = {
    **dict.fromkeys(_ADAPTERS, "an adapter is chosen by its name; give that as model."),
    "guided_json": _RENAMED.format("json"),
    "guided_regex": _RENAMED.format("regex"),
    "guided_choice": _RENAMED.format("choice"),
    "guided_grammar": _RENAMED.format("grammar"),
    "guided_whitespace_pattern": _RENAMED.format("whitespace_pattern"),
    "structural_tag": _RENAMED.format("structural_tag"),
    "guided_decoding_backend": "vLLM removed it; leave it out, there is one backend.",
    "logits_processors": "vLLM removed it: it would run a client's code. logit_bias may do.",
    "suffix": "only models trained to fill in the middle can use it, and none is served.",
    "conversation": "conversations are not kept here; previous_response_id goes on with a response.",
    "messages": "it is input here.",
    "max_tokens": "it is max_output_tokens here.",
    "response_format": "it is text.format here.",
    "stop": "it is stop_sequences here.",
    "prompt_embeds": "prompts are text or token ids here; send them as prompt.",
}
"""Field -> a specific reason instead of the general one."""

NO_EFFECT = frozenset(
    {
        "user", "session_id", "metadata", "store", "service_tier", "safety_identifier",
        "prompt_cache_key", "prompt_cache_options", "client_metadata",
        "betas", "diagnostics", "user_profile_id", "workspace_id",
    }
)  # fmt: skip
"""Fields for a provider's billing, or that only matter with others that are refused. They are accepted
without a warning, also with --strict-requests: clients send them to every server."""

IDLE: dict[str, Neutral] = {
    "vllm_xargs": Neutral({}),
    "verbosity": Neutral("", "medium"),
    "context_management": Neutral({}, {"edits": []}),
    "speed": Neutral("standard"),
}
"""Field with a meaning on other servers -> its neutral values. Other values are accepted with a warning."""
UNREAD = frozenset(IDLE)


def refuse_unsupported(body: Mapping[str, object], table: Mapping[str, Neutral]) -> None:
    """Raise a 400 `ApiError` naming the first field of `table`. `body` is without neutral values."""
    for name in body:
        if name in table:
            raise refusal(name)


def refusal(name: str) -> ApiError:
    reason = WHY.get(name, "ignoring it would change the answer. Leave it out.")
    return bad_request(f"{name} is not supported: {reason}", param=name)
