"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from quire.outputs import CompletionOutput, RequestOutput
from quire.sampling_params import SamplingParams
from quire.server import unsupported
from quire.server.body import parse, read_json
from quire.server.engine_protocol import ServedModel
from quire.server.generation import (
    Frame,
    apply_server_flags,
    check_model,
    log_request,
    respond,
    submit_all,
)
from quire.server.logprobs import LogprobFormatter, Position, joined, prompt_logprobs
from quire.server.openapi import request_body
from quire.server.prompts import EncodedPrompt, encode_prompt, split_prompts, truncation
from quire.server.requests import CompletionRequest
from quire.server.retention import asked_retention
from quire.server.sampling import admit, completion_params, effective_params, fit_default_max_tokens
from quire.server.sse import event
from quire.server.state import ServerState
from quire.server.usage import UsageMeter
from quire.server.wire import (
    CompletionChoice,
    CompletionResponse,
    Metrics,
    StreamUsage,
    encode,
)


def completions_router(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=request_body(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Complete a prompt, or several."""
        model = state.serving_engine().model
        body = await read_json(request)
        parsed = parse(CompletionRequest, body, unsupported=unsupported.COMPLETION)
        apply_server_flags(parsed.request, state.config)
        await check_model(parsed.request.model, state)
        params = completion_params(parsed.request, model)
        prompts = await _prompts(parsed.request, params, model, state)
        frame = Frame.make("cmpl", model, parsed.warnings, name=parsed.request.model)
        drafts = state.config.per_request_spec_decode_metrics
        encoder = CompletionEncoder(parsed.request, frame, model, prompts, drafts)
        engine = await admit(state, len(prompts), params, frame.warnings)
        log_request(state, request, frame, prompts)
        streams = submit_all(engine, prompts, parsed.request, frame,
            scope=request.scope, retain=asked_retention(parsed.request),
        )  # fmt: skip
        return await respond(state, request, parsed.request, streams, encoder)

    return router


async def _prompts(
    request: CompletionRequest, params: SamplingParams, model: ServedModel, state: ServerState
) -> list[tuple[EncodedPrompt, SamplingParams]]:
    texts = split_prompts(request.prompt, limit=state.config.max_prompts_per_request)
    cut = truncation(request.truncate_prompt_tokens, request.truncation_side, model)
    encoded = []
    for text in texts:
        prompt = await encode_prompt(
            text, model, add_special_tokens=request.add_special_tokens is not False, cut=cut
        )
        fitted = fit_default_max_tokens(
            params,
            asked=request.max_tokens is not None,
            prompt_tokens=len(prompt.token_ids),
            model=model,
        )
        encoded.append((prompt, fitted))
    return encoded


class CompletionEncoder:
    """Writes outputs as OpenAI's text completions. Choice `i` of prompt `p` has index `p * n + i`.

    The parts that each choice has once (the echo, the prompt's ids and logprobs) are in its first chunk,
    or in the whole answer if that is not streamed.
    """

    def __init__(
        self,
        request: CompletionRequest,
        frame: Frame,
        model: ServedModel,
        prompts: Sequence[tuple[EncodedPrompt, SamplingParams]],
        drafts: str = "none",
    ) -> None:
        self.frame = frame
        self._n = request.n or 1
        self._tokenizer = model.tokenizer
        self._return_ids = request.return_token_ids is True
        self._return_prompt_logprobs = request.prompt_logprobs is not None
        self._prompts = [prompt for prompt, _ in prompts]
        self._effective = effective_params(request, prompts, model)
        self._meter = UsageMeter(drafts, prefixes=request.return_prefix_details)
        options = request.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._usage_in_each = bool(options and options.continuous_usage_stats)
        self._shows_tokens = self._return_ids or request.logprobs is not None
        """Whether there is a chunk even for a token whose text is held or hidden."""
        self._offsets: dict[int, int] = {}
        """Choice index -> number of characters so far, for choices that have begun."""
        self._echo = _echo_texts(self._prompts, model) if request.echo else None
        self._prompt_positions: dict[int, list[Position | None]] = {}
        self._first_chunk = True
        self._logprobs = (
            LogprobFormatter(
                model.tokenizer,
                top=request.logprobs,
                as_ids=request.return_tokens_as_token_ids is True,
                always=request.logprob_token_ids or (),
            )
            if request.logprobs is not None
            else None
        )

    def chunk(self, prompt_index: int, output: RequestOutput) -> bytes:
        self._note(prompt_index, output)
        return b"".join(
            self._event([self._choice(prompt_index, part)], self._chunk_usage())
            for part in output.outputs
            if part.text
            or part.finished
            or (part.token_ids and self._shows_tokens)
            or prompt_index * self._n + part.index not in self._offsets
        )

    def last(self) -> bytes:
        if not self._include_usage:
            return b""
        return event(self._response([], self._meter.usage(), self._meter.metrics()))

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        choices = []
        for prompt_index, output in enumerate(outputs):
            self._note(prompt_index, output)
            parts = sorted(output.outputs, key=lambda part: part.index)
            choices += [self._choice(prompt_index, part) for part in parts]
        return self._response(choices, self._meter.usage(), self._meter.metrics())

    def _note(self, prompt_index: int, output: RequestOutput) -> None:
        self._meter.add(prompt_index, output)
        if output.prompt_logprobs is not None:
            self._prompt_positions[prompt_index] = output.prompt_logprobs

    def _choice(self, prompt_index: int, part: CompletionOutput) -> CompletionChoice:
        index = prompt_index * self._n + part.index
        first = index not in self._offsets
        prompt = self._prompts[prompt_index]
        echo = self._echo[prompt_index] if first and self._echo is not None else None
        offset = self._offsets.get(index, 0) + len(echo or "")
        logprobs, self._offsets[index] = None, offset + len(part.text)
        if self._logprobs is not None and (part.logprobs or echo is not None):
            logprobs, self._offsets[index] = self._logprobs.completion(
                part.token_ids, part.logprobs or (), offset
            )
            if echo is not None:
                positions = self._positions(prompt_index)
                logprobs = joined(self._logprobs.echo(prompt.token_ids, positions, echo), logprobs)
        return CompletionChoice(
            index=index,
            text=(echo or "") + part.text,
            logprobs=logprobs,
            finish_reason=part.finish_reason,
            stop_reason=part.stop_reason,
            token_ids=part.token_ids if self._return_ids else UNSET,
            prompt_token_ids=prompt.token_ids if self._return_ids and first else UNSET,
            prompt_logprobs=(
                prompt_logprobs(self._positions(prompt_index), self._tokenizer)
                if self._return_prompt_logprobs
                else UNSET
            ),
        )

    def _positions(self, prompt_index: int) -> Sequence[Position | None]:
        missing = [None] * len(self._prompts[prompt_index].token_ids)
        return self._prompt_positions.get(prompt_index, missing)

    def _chunk_usage(self) -> StreamUsage:
        if not self._include_usage:
            return UNSET
        return self._meter.usage() if self._usage_in_each else None

    def _event(self, choices: list[CompletionChoice], usage: StreamUsage) -> bytes:
        return event(self._response(choices, usage))

    def _response(
        self, choices: list[CompletionChoice], usage: StreamUsage, metrics: Metrics = UNSET
    ) -> bytes:
        frame, first = self.frame, self._first_chunk
        self._first_chunk = False
        return encode(
            CompletionResponse(
                id=frame.id,
                created=frame.created,
                model=frame.model,
                choices=choices,
                usage=usage,
                effective_params=self._effective if first else UNSET,
                warnings=frame.warnings if first and frame.warnings else UNSET,
                metrics=metrics,
                kv_transfer_params=self._meter.handed(choices),
            )
        )


def _echo_texts(prompts: Sequence[EncodedPrompt], model: ServedModel) -> list[str]:
    return [
        prompt.text if prompt.text is not None else model.tokenizer.decode(prompt.token_ids)
        for prompt in prompts
    ]
