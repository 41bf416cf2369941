"""Fields that vLLM or OpenAI know and Quire does not serve (yet).

Ignoring one would answer a question nobody asked: text that was to follow a schema and does not. So a
value that would have changed the output is refused by name; the neutral values that clients send by
habit pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from quire.server.errors import ApiError, bad_request

ANY: tuple[object, ...] = ()
"""No neutral value but null."""

_BOTH: dict[str, tuple[object, ...]] = {
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": ANY,
    "guided_regex": ANY,
    "guided_choice": ([],),
    "guided_grammar": ANY,
    "guided_decoding_backend": ANY,
    "guided_whitespace_pattern": ANY,
    "structural_tag": ANY,
    "prompt_logprobs": ANY,
    "prompt_logprob_token_ids": ([],),
    "logprob_token_ids": ([],),
    "prompt_logprob_start": (0,),
    "allowed_token_ids": ANY,
    "bad_words": ([],),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "thinking_token_budget": ANY,
    "repetition_detection": ({},),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "moderation": ANY,
}
COMPLETION = _BOTH | {"suffix": ("",), "prompt_embeds": ([], "")}
CHAT = _BOTH | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "chat_template": ANY,
    "documents": ([],),
    "echo": (False,),
    "audio": ANY,
    "modalities": (["text"],),
    "prediction": ANY,
    "web_search_options": ANY,
}

NO_EFFECT = frozenset(
    {
        "user", "session_id", "metadata", "store", "service_tier", "safety_identifier",
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "parallel_tool_calls", "include_reasoning", "verbosity",
    }
)  # fmt: skip
"""Fields that are about a provider's accounts, or only matter with others that are refused."""


def refuse_unsupported(body: Mapping[str, object], table: Mapping[str, tuple[object, ...]]) -> None:
    """Raise a 400 `ApiError` naming the first field whose value cannot be honoured."""
    for name in body:
        if name in table and not any(_same(body[name], neutral) for neutral in table[name]):
            raise refusal(name)


def refusal(name: str) -> ApiError:
    return bad_request(
        f"{name} is not supported yet, and ignoring it would change the answer. Leave it out.",
        param=name,
    )


def _same(value: object, neutral: object) -> bool:
    """Equal, and of the same type: True is not 1, but 1 is 1.0 only where the table says so."""
    return type(value) is type(neutral) and value == neutral
