"""From a request's fields to `SamplingParams`, with the model's own defaults."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec
from msgspec import UNSET

from quire.config import ServerConfig
from quire.engine.handoff import KEY, read_handoff
from quire.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from quire.server.engine_protocol import ServedModel, ServingEngine
from quire.server.errors import bad_request
from quire.server.prompts import EncodedPrompt
from quire.server.requests import ChatCompletionRequest, CompletionRequest, SamplingFields
from quire.server.state import ServerState
from quire.server.wire import EffectiveParams
from quire.structured import response_format

DIRECT = (
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p",
    "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "prompt_logprobs",
    "prompt_logprob_start", "logprob_token_ids", "allowed_token_ids", "bad_words",
    "thinking_token_budget", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output", "stream_interval", "skip_reading_prefix_cache",
)  # fmt: skip
"""Request fields that are `SamplingParams` fields of the same name and type."""

FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
"""The fields that a model's generation_config.json may set (vLLM's list)."""

NOT_SHOWN = ("output_kind", "detokenize", "flat_logprobs", "extra_args")
"""Fields of `SamplingParams` that an HTTP client cannot set."""

COMPLETION_MAX_TOKENS = 16

S = TypeVar("S", bound=msgspec.Struct)


def completion_params(request: CompletionRequest, model: ServedModel) -> SamplingParams:
    """Raises `InvalidParameterError` (a 400) naming the field."""
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = _model_max_tokens(request, model) or COMPLETION_MAX_TOKENS
    return _params(
        request,
        model,
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        echoed_logprobs=echoed_logprobs(request),
    )


def echoed_logprobs(request: CompletionRequest) -> int | None:
    """The `prompt_logprobs` that echo needs. An echo alone, with max_tokens 0, needs none, but scoring
    the prompt is how the engine finishes a request without a token."""
    if not request.echo:
        return None
    return 0 if request.logprobs is None and request.max_tokens == 0 else request.logprobs


def chat_params(request: ChatCompletionRequest, model: ServedModel) -> SamplingParams:
    """Raises `InvalidParameterError` (a 400) naming the field."""
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", param="top_logprobs")
    top = request.top_logprobs
    if top is not None and top < -1:
        raise bad_request(
            f"top_logprobs must be at least 0, or -1 for all, got {top}.", param="top_logprobs"
        )
    max_tokens = request.max_completion_tokens
    if max_tokens is None:
        max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = _model_max_tokens(request, model)
    logprobs = (top or 0) if request.logprobs else None
    return _params(request, model, max_tokens=max_tokens, logprobs=logprobs)


def _params(
    request: SamplingFields,
    model: ServedModel,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    echoed_logprobs: int | None = None,
) -> SamplingParams:
    _check_combinations(request, logprobs)
    values: dict[str, object] = {
        name: value for name, value in model.default_sampling.items() if name in FROM_MODEL
    }
    if (request.n or 1) > 1 and values.get("temperature") == 0:
        del values["temperature"]  # a model's default of 0 must not make this request fail
    for name in DIRECT:
        value = getattr(request, name)
        if value is not None:
            values[name] = value
    if request.use_beam_search:  # see `beam`: nothing is drawn, unless a temperature is asked for
        values |= {"n": 1, "temperature": request.temperature or 0.0}
    elif request.length_penalty not in (None, 1.0):
        raise bad_request("length_penalty needs use_beam_search.", param="length_penalty")
    if request.prompt_logprobs is None:
        values["prompt_logprobs"] = echoed_logprobs
    if request.logit_bias:
        values["logit_bias"] = {_token_id(key): bias for key, bias in request.logit_bias.items()}
    repetition = _given(request.repetition_detection or {})
    if repetition:
        values["repetition_detection"] = _struct(
            RepetitionDetectionParams, repetition, "repetition_detection"
        )
    values["structured_outputs"] = _structured_outputs(request)
    if request.kv_transfer_params:
        values["extra_args"] = {KEY: request.kv_transfer_params}
    values["max_tokens"] = max_tokens
    values["logprobs"] = logprobs
    values["output_kind"] = (
        RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    )
    return SamplingParams(**values)  # type: ignore[arg-type]


def _check_combinations(request: SamplingFields, logprobs: int | None) -> None:
    """Rules that only HTTP has; the values themselves are checked by `SamplingParams` and the engine."""
    options = request.stream_options
    if options and not request.stream and any(options.model_dump().values()):
        raise bad_request("stream_options needs stream: true.", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise bad_request(
            "prompt_logprobs are not streamed. Leave out stream, or use echo with logprobs.",
            param="prompt_logprobs",
        )
    if request.logprob_token_ids and logprobs is None:
        raise bad_request("logprob_token_ids needs logprobs.", param="logprob_token_ids")
    if request.best_of not in (None, request.n or 1) and not request.use_beam_search:
        raise bad_request(
            f"best_of must equal n, got {request.best_of}: every sequence that is sampled is returned.",
            param="best_of",
        )


def _structured_outputs(request: SamplingFields) -> StructuredOutputsParams | None:
    wanted = None
    form = _given(request.response_format or {})
    if form:
        wanted = response_format.parse(form)
    given = _given(request.structured_outputs or {})
    if given:
        if wanted is not None:
            raise bad_request(
                "response_format and structured_outputs exclude each other.",
                param="response_format",
            )
        wanted = _struct(StructuredOutputsParams, given, "structured_outputs")
    return wanted


def _struct(kind: type[S], given: Mapping[str, object], param: str) -> S:
    """`given`, without nulls, as a struct. A misspelt key is an error."""
    known = kind.__struct_fields__
    for name in given:
        if name not in known:
            raise bad_request(
                f"{param} has no {name[:64]}; it takes {', '.join(known)}.", param=param
            )
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise bad_request(f"{param}: {error}", param=param) from None


def _given(fields: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _token_id(key: str) -> int:
    """A token id as a key: keys in JSON are strings."""
    if not (key.isascii() and key.isdigit() and len(key) < 11):
        raise bad_request(
            f"logit_bias must map token ids to numbers, got the key {key[:32]!r}.",
            param="logit_bias",
        )
    return int(key)


def _model_max_tokens(request: SamplingFields, model: ServedModel) -> int | None:
    """The model's default, but not less than the client's min_tokens."""
    value = model.default_sampling.get("max_tokens")
    return max(value, request.min_tokens or 0) if isinstance(value, int) else None


def fit_default_max_tokens(
    params: SamplingParams, *, asked: bool, prompt_tokens: int, model: ServedModel
) -> SamplingParams:
    """If the client did not set max_tokens, reduce the model's default to what fits in the context, so
    that the default does not make the request fail."""
    room = model.max_model_len - prompt_tokens
    if asked or params.max_tokens is None or room < 1 or params.max_tokens <= room:
        return params
    return params.replace(max_tokens=room, min_tokens=min(params.min_tokens, room))


async def admit(
    state: ServerState, prompts: int, params: SamplingParams, warnings: list[str]
) -> ServingEngine:
    """The engine, for a request within this server's limits, whose grammar (if it has one) compiles.

    warnings: of the request; those of the grammar and of `kv_transfer_params` are added.

    The grammar is checked in a thread: compiling it may take seconds, and must not delay other requests.
    """
    check_limits(prompts, params, state.config)
    if params.extra_args and prompts > 1:
        raise bad_request(f"{KEY} goes with one prompt; send a request for each.", param=KEY)
    handoff = read_handoff(params.extra_args, state.engine_config.kv_transfer.transfer)
    warnings += filter(None, [handoff.ignored])
    if params.structured_outputs is not None:
        warnings += await asyncio.to_thread(state.serving_engine().check_grammar, params)
    return state.serving_engine()  # it may have died while the request was being prepared


def check_limits(prompts: int, params: SamplingParams, config: ServerConfig) -> None:
    """Check this server's limits for one request, which may be stricter than `SamplingParams`."""
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


def effective_params(
    request: SamplingFields,
    prompts: Sequence[tuple[EncodedPrompt, SamplingParams]],
    model: ServedModel,
) -> EffectiveParams:
    """The sampling parameters in effect, if the client asked for them: with defaults filled in and
    max_tokens resolved (the smallest, of several prompts)."""
    if not request.return_effective_params:
        return UNSET
    params = prompts[0][1]
    shown = {name: getattr(params, name) for name in params.__struct_fields__}
    for name in NOT_SHOWN:
        del shown[name]
    shown["max_tokens"] = min(
        model.max_model_len - len(prompt.token_ids) if each.max_tokens is None else each.max_tokens
        for prompt, each in prompts
    )
    return shown


def log_values(params: SamplingParams) -> Mapping[str, object]:
    """Parameters for the request log; never texts."""
    return {
        "n": params.n,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": params.seed,
    }
