"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from quire.outputs import CompletionOutput, RequestOutput
from quire.sampling_params import SamplingParams
from quire.server import unsupported
from quire.server.body import parse, read_json
from quire.server.engine_protocol import ServedModel
from quire.server.generation import (
    Frame,
    check_model,
    log_request,
    respond,
    submit_all,
)
from quire.server.logprobs import LogprobFormatter
from quire.server.openapi import request_body
from quire.server.prompts import EncodedPrompt, encode_prompt, split_prompts, truncation
from quire.server.requests import CompletionRequest
from quire.server.responses import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    StreamUsage,
    encode,
)
from quire.server.sampling import admit, completion_params, fit_default_max_tokens
from quire.server.sse import event
from quire.server.state import ServerState
from quire.server.usage import UsageMeter


def completions_router(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=request_body(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Complete a prompt, or several."""
        model = state.serving_engine().model
        body = await read_json(request)
        parsed = parse(CompletionRequest, body, unsupported=unsupported.COMPLETION)
        check_model(parsed.request.model, model)
        params = completion_params(parsed.request, model)
        prompts = await _prompts(parsed.request, params, model, state)
        frame = Frame.make("cmpl", model, parsed.warnings)
        encoder = CompletionEncoder(parsed.request, frame, model, [p for p, _ in prompts])
        engine = await admit(state, len(prompts), params)
        log_request(state, request, frame, prompts)
        streams = submit_all(engine, prompts, parsed.request, frame)
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
    """Outputs as OpenAI's text completions. Choice `i` of prompt `p` has index `p * n + i`."""

    def __init__(
        self,
        request: CompletionRequest,
        frame: Frame,
        model: ServedModel,
        prompts: Sequence[EncodedPrompt],
    ) -> None:
        self.frame = frame
        self._n = request.n or 1
        self._return_ids = request.return_token_ids is True
        self._prompts = prompts
        self._meter = UsageMeter()
        options = request.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._usage_in_each = bool(options and options.continuous_usage_stats)
        self._shows_tokens = self._return_ids or request.logprobs is not None
        """Whether a token without text (held back, or hidden) still makes a chunk."""
        self._started: dict[int, int] = {}
        """Choice index -> characters sent, for those that have begun."""
        self._echo = _echo_texts(prompts, model) if request.echo else None
        self._warned = False
        self._logprobs = (
            LogprobFormatter(
                model.tokenizer,
                top=request.logprobs,
                as_ids=request.return_tokens_as_token_ids is True,
            )
            if request.logprobs is not None
            else None
        )

    def chunk(self, prompt_index: int, output: RequestOutput) -> bytes:
        self._meter.add(prompt_index, output)
        return b"".join(self._part(prompt_index, part) for part in output.outputs)

    def _part(self, prompt_index: int, part: CompletionOutput) -> bytes:
        index = prompt_index * self._n + part.index
        begun = index in self._started
        shown = part.text or part.finished or (part.token_ids and self._shows_tokens)
        if begun and not shown:
            return b""
        echo = self._echo[prompt_index] if self._echo is not None and not begun else ""
        offset = self._started.get(index, 0) + len(echo)
        logprobs, offset = self._shape_logprobs(part, offset)
        self._started[index] = offset
        choice = CompletionChoice(
            index=index,
            text=echo + part.text,
            logprobs=logprobs,
            finish_reason=part.finish_reason,
            stop_reason=part.stop_reason,
            token_ids=part.token_ids if self._return_ids else UNSET,
            prompt_token_ids=self._prompt_ids(prompt_index) if not begun else UNSET,
        )
        return self._event([choice], self._chunk_usage())

    def _shape_logprobs(
        self, part: CompletionOutput, offset: int
    ) -> tuple[CompletionLogprobs | None, int]:
        """The logprobs, and the offset after them. Offsets add up token texts, not what is shown:
        the two differ where text is held back for a stop string."""
        if self._logprobs is None or not part.logprobs:
            return None, offset + len(part.text)
        shaped = self._logprobs.completion(part.token_ids, part.logprobs, offset)
        end = shaped.text_offset[-1] + len(shaped.tokens[-1]) if shaped.tokens else offset
        return shaped, end

    def _prompt_ids(self, prompt_index: int) -> list[int] | UnsetType:
        return self._prompts[prompt_index].token_ids if self._return_ids else UNSET

    def _chunk_usage(self) -> StreamUsage:
        if not self._include_usage:
            return UNSET
        return self._meter.usage() if self._usage_in_each else None

    def _event(self, choices: list[CompletionChoice], usage: StreamUsage) -> bytes:
        frame = self.frame
        warnings = frame.warnings if frame.warnings and not self._warned else UNSET
        self._warned = True
        return event(
            encode(
                CompletionResponse(
                    id=frame.id,
                    created=frame.created,
                    model=frame.model,
                    choices=choices,
                    usage=usage,
                    warnings=warnings,
                )
            )
        )

    def last(self) -> bytes:
        return self._event([], self._meter.usage()) if self._include_usage else b""

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        choices = []
        for prompt_index, output in enumerate(outputs):
            self._meter.add(prompt_index, output)
            echo = self._echo[prompt_index] if self._echo is not None else ""
            for part in sorted(output.outputs, key=lambda part: part.index):
                logprobs, _ = self._shape_logprobs(part, len(echo))
                choices.append(
                    CompletionChoice(
                        index=prompt_index * self._n + part.index,
                        text=echo + part.text,
                        logprobs=logprobs,
                        finish_reason=part.finish_reason,
                        stop_reason=part.stop_reason,
                        token_ids=part.token_ids if self._return_ids else UNSET,
                        prompt_token_ids=self._prompt_ids(prompt_index),
                    )
                )
        return encode(
            CompletionResponse(
                id=self.frame.id,
                created=self.frame.created,
                model=self.frame.model,
                choices=choices,
                usage=self._meter.usage(),
                warnings=self.frame.warnings or UNSET,
            )
        )


def _echo_texts(prompts: Sequence[EncodedPrompt], model: ServedModel) -> list[str]:
    return [
        prompt.text if prompt.text is not None else model.tokenizer.decode(prompt.token_ids)
        for prompt in prompts
    ]
