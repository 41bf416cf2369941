"""From a request's fields to `SamplingParams`, with the model's own defaults beneath."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from quire.config import ServerConfig
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.server.engine_protocol import ServedModel, ServingEngine
from quire.server.errors import bad_request
from quire.server.requests import ChatCompletionRequest, CompletionRequest, SamplingFields
from quire.server.state import ServerState

DIRECT = (
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p",
    "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
)  # fmt: skip
"""Request fields that are `SamplingParams` fields of the same name."""

FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
"""What a model's generation_config.json may set (vLLM's list)."""

COMPLETION_MAX_TOKENS = 16


def completion_params(request: CompletionRequest, model: ServedModel) -> SamplingParams:
    """Raises `InvalidParameterError` (a 400) naming the field."""
    if request.echo and request.logprobs is not None:
        raise bad_request(
            "echo together with logprobs is not supported yet: it needs the prompt's logprobs.",
            param="echo",
        )
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = _model_max_tokens(model) or COMPLETION_MAX_TOKENS
    return _params(request, model, max_tokens=max_tokens, logprobs=request.logprobs)


def chat_params(request: ChatCompletionRequest, model: ServedModel) -> SamplingParams:
    """Raises `InvalidParameterError` (a 400) naming the field."""
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", param="top_logprobs")
    top = request.top_logprobs
    if top is not None and top < 0:
        raise bad_request(f"top_logprobs must be at least 0, got {top}.", param="top_logprobs")
    max_tokens = request.max_completion_tokens
    if max_tokens is None:
        max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = _model_max_tokens(model)
    logprobs = (top or 0) if request.logprobs else None
    return _params(request, model, max_tokens=max_tokens, logprobs=logprobs)


def _params(
    request: SamplingFields, model: ServedModel, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options needs stream: true.", param="stream_options")
    if logprobs is not None and model.max_logprobs >= 0:
        _check_logprobs(logprobs, model)
    values: dict[str, object] = {
        name: value for name, value in model.default_sampling.items() if name in FROM_MODEL
    }
    for name in DIRECT:
        value = getattr(request, name)
        if value is not None:
            values[name] = value
    values["max_tokens"] = max_tokens
    values["logprobs"] = logprobs
    values["output_kind"] = (
        RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    )
    return SamplingParams(**values)  # type: ignore[arg-type]


def _check_logprobs(logprobs: int, model: ServedModel) -> None:
    asked = model.vocab_size if logprobs == -1 else logprobs
    if asked > model.max_logprobs:
        raise bad_request(
            f"logprobs asks for {asked} per token; this server gives at most {model.max_logprobs} "
            "(--max-logprobs).",
            param="logprobs",
        )


def _model_max_tokens(model: ServedModel) -> int | None:
    value = model.default_sampling.get("max_tokens")
    return value if isinstance(value, int) and value > 0 else None


def fit_default_max_tokens(
    params: SamplingParams, *, asked: bool, prompt_tokens: int, model: ServedModel
) -> SamplingParams:
    """A default must not make a request fail: where the client did not ask for a length, what would
    not fit in the context is shortened to what does."""
    room = model.max_model_len - prompt_tokens
    if asked or params.max_tokens is None or room < 1 or params.max_tokens <= room:
        return params
    return params.replace(max_tokens=room, min_tokens=min(params.min_tokens, room))


async def admit(state: ServerState, prompts: int, params: SamplingParams) -> ServingEngine:
    """The engine, for a request within this server's limits, whose grammar (if it has one) is good.

    Grammars are tried in a thread: compiling one may take a while, and must not hold up others.
    """
    check_limits(prompts, params, state.config)
    if params.structured_outputs is not None:
        await asyncio.to_thread(state.serving_engine().check_grammar, params)
    return state.serving_engine()  # it may have gone while the request was being prepared


def check_limits(prompts: int, params: SamplingParams, config: ServerConfig) -> None:
    """What this server takes in one request, which may be less than `SamplingParams` does."""
    items = config.max_list_items
    for name, size, limit, option in (
        ("n", prompts * params.n, config.max_sequences_per_request, "max-sequences-per-request"),
        ("stop", len(params.stop_strings), config.max_stop_strings, "max-stop-strings"),
        ("bad_words", len(params.bad_words or ()), config.max_bad_words, "max-bad-words"),
        ("stop_token_ids", len(params.stop_token_ids or ()), items, "max-list-items"),
        ("allowed_token_ids", len(params.allowed_token_ids or ()), items, "max-list-items"),
        ("logit_bias", len(params.logit_bias or ()), items, "max-list-items"),
    ):
        if size > limit:
            what = f"{prompts} prompts times n" if name == "n" else name
            raise bad_request(
                f"{what} is {size}; this server takes at most {limit} in one request (--{option}).",
                param=name,
            )


def log_values(params: SamplingParams) -> Mapping[str, object]:
    """Parameters for the request log; never texts."""
    return {
        "n": params.n,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": params.seed,
    }
