"""From a request's fields to `SamplingParams`, with the model's own defaults beneath."""

from __future__ import annotations

from collections.abc import Mapping

from quire.sampling_params import MAX_N, RequestOutputKind, SamplingParams
from quire.server.engine_protocol import ServedModel
from quire.server.errors import bad_request
from quire.server.requests import ChatCompletionRequest, CompletionRequest, SamplingFields

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


def check_sequences(prompts: int, params: SamplingParams) -> None:
    """Bound prompts x n: each is a slot in the queue, and a request must not be a thousand."""
    if prompts * params.n > MAX_N:
        raise bad_request(
            f"{prompts} prompts with n = {params.n} are {prompts * params.n} sequences; one request "
            f"may have at most {MAX_N}.",
            param="n",
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
