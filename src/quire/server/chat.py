"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from quire.outputs import CompletionOutput, RequestOutput
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
from quire.server.prompts import EncodedPrompt, encode_text, render_chat, truncation
from quire.server.requests import ChatCompletionRequest
from quire.server.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
    Delta,
    StreamUsage,
    encode,
)
from quire.server.sampling import admit, chat_params, fit_default_max_tokens
from quire.server.sse import event
from quire.server.state import ServerState
from quire.server.usage import UsageMeter


def chat_router(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=request_body(ChatCompletionRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        model = state.serving_engine().model
        body = await read_json(request)
        parsed = parse(ChatCompletionRequest, body, unsupported=unsupported.CHAT)
        asked = parsed.request
        check_model(asked.model, model)
        params = chat_params(asked, model)
        prompt = await encode_chat(asked, model)
        params = fit_default_max_tokens(
            params,
            asked=asked.max_tokens is not None or asked.max_completion_tokens is not None,
            prompt_tokens=len(prompt.token_ids),
            model=model,
        )
        frame = Frame.make("chatcmpl", model, parsed.warnings)
        role = answer_role(asked, state.config.response_role)
        encoder = ChatEncoder(asked, frame, model, prompt, role)
        engine = await admit(state, 1, params)
        log_request(state, request, frame, [(prompt, params)])
        streams = submit_all(engine, [(prompt, params)], asked, frame)
        return await respond(state, request, asked, streams, encoder)

    return router


async def encode_chat(request: ChatCompletionRequest, model: ServedModel) -> EncodedPrompt:
    """Templates write their own special tokens, so none are added unless the client insists."""
    text = render_chat(request, model)
    ids = await encode_text(
        model.tokenizer,
        text,
        add_special_tokens=request.add_special_tokens is True,
        cut=truncation(request.truncate_prompt_tokens, request.truncation_side, model),
    )
    return EncodedPrompt(ids, text)


def answer_role(request: ChatCompletionRequest, response_role: str) -> str:
    """Who speaks: the last message's role where the answer goes on with it, as in vLLM."""
    if request.continue_final_message or request.add_generation_prompt is False:
        return request.messages[-1].role
    return response_role


class ChatEncoder:
    """Outputs as OpenAI's chat completions.

    A stream has, for each choice: a chunk with the role (sent with the first output, so that the
    first byte still means the first token), chunks of content, and one with the finish reason.
    """

    def __init__(
        self,
        request: ChatCompletionRequest,
        frame: Frame,
        model: ServedModel,
        prompt: EncodedPrompt,
        role: str,
    ) -> None:
        self.frame = frame
        self._role = role
        self._return_ids = request.return_token_ids is True
        self._prompt = prompt
        self._meter = UsageMeter()
        options = request.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._usage_in_each = bool(options and options.continuous_usage_stats)
        self._shows_tokens = self._return_ids or bool(request.logprobs)
        """Whether a token without text (held back, or hidden) still makes a chunk."""
        self._started: set[int] = set()
        self._first_chunk = True
        self._logprobs = (
            LogprobFormatter(
                model.tokenizer,
                top=request.top_logprobs or 0,
                as_ids=request.return_tokens_as_token_ids is True,
            )
            if request.logprobs
            else None
        )

    def chunk(self, prompt_index: int, output: RequestOutput) -> bytes:
        self._meter.add(prompt_index, output)
        return b"".join(self._part(part) for part in output.outputs)

    def _part(self, part: CompletionOutput) -> bytes:
        events = []
        if part.index not in self._started:
            self._started.add(part.index)
            events.append(self._event(part.index, Delta(role=self._role, content="")))
        if part.text or (part.token_ids and self._shows_tokens):
            events.append(
                self._event(
                    part.index,
                    Delta(content=part.text),
                    logprobs=self._shape_logprobs(part),
                    token_ids=part.token_ids if self._return_ids else UNSET,
                )
            )
        if part.finished:
            events.append(
                self._event(
                    part.index,
                    Delta(),
                    finish_reason=part.finish_reason,
                    stop_reason=part.stop_reason,
                )
            )
        return b"".join(events)

    def _event(self, index: int, delta: Delta, **fields: object) -> bytes:
        choice = ChatChunkChoice(index=index, delta=delta, **fields)  # type: ignore[arg-type]
        return self._chunk([choice], self._chunk_usage())

    def _chunk(self, choices: list[ChatChunkChoice], usage: StreamUsage) -> bytes:
        frame, first = self.frame, self._first_chunk
        self._first_chunk = False
        return event(
            encode(
                ChatChunk(
                    id=frame.id,
                    created=frame.created,
                    model=frame.model,
                    choices=choices,
                    usage=usage,
                    prompt_token_ids=(
                        self._prompt.token_ids if first and self._return_ids else UNSET
                    ),
                    warnings=frame.warnings if first and frame.warnings else UNSET,
                )
            )
        )

    def _chunk_usage(self) -> StreamUsage:
        if not self._include_usage:
            return UNSET
        return self._meter.usage() if self._usage_in_each else None

    def _shape_logprobs(self, part: CompletionOutput) -> ChatLogprobs | None:
        if self._logprobs is None or part.logprobs is None:
            return None
        return self._logprobs.chat(part.token_ids, part.logprobs)

    def last(self) -> bytes:
        return self._chunk([], self._meter.usage()) if self._include_usage else b""

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        choices = []
        for output in outputs:
            self._meter.add(0, output)
            choices += [
                ChatChoice(
                    index=part.index,
                    message=ChatMessage(self._role, part.text),
                    logprobs=self._shape_logprobs(part),
                    finish_reason=part.finish_reason,
                    stop_reason=part.stop_reason,
                    token_ids=part.token_ids if self._return_ids else UNSET,
                )
                for part in sorted(output.outputs, key=lambda part: part.index)
            ]
        return encode(
            ChatResponse(
                id=self.frame.id,
                created=self.frame.created,
                model=self.frame.model,
                choices=choices,
                usage=self._meter.usage(),
                prompt_token_ids=self._prompt.token_ids if self._return_ids else UNSET,
                warnings=self.frame.warnings or UNSET,
            )
        )
