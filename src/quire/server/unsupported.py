"""Fields that vLLM or OpenAI know and Quire does not serve.

Ignoring one would answer a question nobody asked: text that was to follow a schema and does not. So a
value that would have changed the output is refused by name; the neutral values that clients send by
habit pass. A field that a request model declares is served there, and nothing here applies to it.
"""

from __future__ import annotations

from collections.abc import Mapping

from quire.server.errors import ApiError, bad_request

ANY: tuple[object, ...] = ()
"""No neutral value but null."""

_BOTH: dict[str, tuple[object, ...]] = {
    "guided_json": ANY,
    "guided_regex": ANY,
    "guided_choice": ([],),
    "guided_grammar": ANY,
    "guided_decoding_backend": ANY,
    "guided_whitespace_pattern": ANY,
    "structural_tag": ANY,
    "prompt_logprob_token_ids": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "moderation": ANY,
}
COMPLETION = _BOTH | {"suffix": ("",), "prompt_embeds": ([], "")}
CHAT = _BOTH | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "chat_template": ANY,
    "echo": (False,),
    "audio": ANY,
    "modalities": (["text"],),
    "prediction": ANY,
    "web_search_options": ANY,
}

RESPONSES = _BOTH | {
    "conversation": ANY,
    "prompt": ANY,
    "context_management": ([],),
    "n": (1,),
    "messages": ANY,
    "max_tokens": ANY,
    "response_format": ANY,
}
MESSAGES = _BOTH | {"n": (1,), "mcp_servers": ([],), "container": ANY, "stop": ANY}

_RENAMED = 'vLLM removed it; use structured_outputs: {{"{}": ...}}.'
WHY: dict[str, str] = {
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
"""Field -> a better reason than the usual one."""

NO_EFFECT = frozenset(
    {
        "user", "session_id", "metadata", "store", "service_tier", "safety_identifier",
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    }
)  # fmt: skip
"""Fields that are about a provider's accounts, or only matter with others that are refused. They pass
without a word, also under --strict-requests: clients send them to every server."""

UNREAD = frozenset({"vllm_xargs", "verbosity"})
"""Fields that would mean something elsewhere. They pass with a warning, or not at all."""


def refuse_unsupported(body: Mapping[str, object], table: Mapping[str, tuple[object, ...]]) -> None:
    """Raise a 400 `ApiError` naming the first field whose value cannot be honoured."""
    for name in body:
        if name in table and not any(_same(body[name], neutral) for neutral in table[name]):
            raise refusal(name)


def refusal(name: str) -> ApiError:
    reason = WHY.get(name, "ignoring it would change the answer. Leave it out.")
    return bad_request(f"{name} is not supported: {reason}", param=name)


def _same(value: object, neutral: object) -> bool:
    """Equal, and of the same type: True is not 1, but 1 is 1.0 only where the table says so."""
    return type(value) is type(neutral) and value == neutral
