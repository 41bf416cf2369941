"""POST /v1/chat/completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from quire.outputs import CompletionOutput, RequestOutput
from quire.sampling_params import SamplingParams
from quire.server import unsupported
from quire.server.body import parse, read_json
from quire.server.engine_protocol import RequestStream, ServedModel
from quire.server.generation import (
    Frame,
    apply_server_flags,
    check_model,
    log_request,
    respond,
    submit_all,
)
from quire.server.logprobs import LogprobFormatter, Position, prompt_logprobs
from quire.server.openapi import request_body
from quire.server.prompts import EncodedPrompt, encode_text, render_chat, truncation
from quire.server.requests import ChatCompletionRequest
from quire.server.retention import Mark, asked_retention, locate
from quire.server.sampling import admit, chat_params, effective_params, fit_default_max_tokens
from quire.server.sse import event
from quire.server.state import ServerState
from quire.server.tools import (
    AnswerReader,
    ToolUse,
    blaming_tools,
    served_format,
    tool_use,
)
from quire.server.usage import UsageMeter
from quire.server.wire import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
    Delta,
    FunctionCall,
    FunctionDelta,
    Metrics,
    StreamUsage,
    ToolCall,
    ToolCallDelta,
    Usage,
    encode,
)
from quire.text.parsing import Event, gathered


def chat_router(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=request_body(ChatCompletionRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        model = state.serving_engine().model
        body = await read_json(request)
        parsed = parse(ChatCompletionRequest, body, unsupported=unsupported.CHAT)
        asked = parsed.request
        apply_server_flags(asked, state.config)
        await check_model(asked.model, state)
        frame = Frame.make("chatcmpl", model, parsed.warnings, name=asked.model)
        chat = await start_chat(state, request, asked, frame)
        role = answer_role(asked, state.config.response_role)
        drafts = state.config.per_request_spec_decode_metrics
        encoder = ChatEncoder(asked, chat.frame, model, chat.prompt, chat.reader, role, drafts)
        return await respond(state, request, asked, chat.streams, encoder)

    return router


@dataclass(frozen=True, slots=True)
class StartedChat:
    frame: Frame
    """Includes the warnings about tools."""
    prompt: EncodedPrompt
    reader: AnswerReader
    streams: list[RequestStream]


async def start_chat(
    state: ServerState,
    request: Request,
    asked: ChatCompletionRequest,
    frame: Frame,
    marks: Sequence[Mark] = (),
) -> StartedChat:
    """Submit a conversation. Requests of other endpoints are translated and submitted here too. marks: what
    the client wants to stay in the cache."""
    model = state.serving_engine().model
    params = chat_params(asked, model)
    use = tool_use(asked, served_format(state, model), params)
    prompt, reader = await prepare_chat(asked, use, params, model)
    if marks:
        prompt = dataclasses.replace(prompt, retain=await locate(marks, prompt, model))
    frame = dataclasses.replace(frame, warnings=[*frame.warnings, *use.warnings])
    with blaming_tools(use):
        engine = await admit(state, 1, reader.params, frame.warnings)
        log_request(state, request, frame, [(prompt, reader.params)])
        work, retain = [(prompt, reader.params)], asked_retention(asked)
        streams = submit_all(engine, work, asked, frame, scope=request.scope, retain=retain)
    return StartedChat(frame, prompt, reader, streams)


async def encode_chat(request: ChatCompletionRequest, model: ServedModel) -> EncodedPrompt:
    """Tokenize the prompt. Templates write their own special tokens, so none are added unless asked for."""
    text = render_chat(request, model)
    ids = await encode_text(
        model.tokenizer,
        text,
        add_special_tokens=request.add_special_tokens is True,
        cut=truncation(request.truncate_prompt_tokens, request.truncation_side, model),
    )
    return EncodedPrompt(ids, text)


async def prepare_chat(
    request: ChatCompletionRequest, use: ToolUse, params: SamplingParams, model: ServedModel
) -> tuple[EncodedPrompt, AnswerReader]:
    """The prompt, and the reader of its outputs, which has the parameters to submit the prompt with."""
    prompt = await encode_chat(request, model)
    fitted = fit_default_max_tokens(
        params,
        asked=request.max_tokens is not None or request.max_completion_tokens is not None,
        prompt_tokens=len(prompt.token_ids),
        model=model,
    )
    last = request.messages[-1].content
    reader = AnswerReader(
        use,
        fitted,
        model,
        prompt=prompt.text or "",
        continued=last if request.continue_final_message and isinstance(last, str) else None,
        reasoning=request.include_reasoning is not False,
    )
    return dataclasses.replace(prompt, thinking=reader.thinking), reader


def answer_role(request: ChatCompletionRequest, response_role: str) -> str:
    """The role of the answer: that of the last message if the answer continues it, as in vLLM."""
    if request.continue_final_message or request.add_generation_prompt is False:
        return request.messages[-1].role
    return response_role


class ChatEncoder:
    """Writes outputs as OpenAI's chat completions.

    A stream has, for each choice: a chunk with the role (sent with the first output, so that the time to
    the first byte is the time to the first token), chunks of content, reasoning and calls, and one with the
    finish reason.
    """

    def __init__(
        self,
        request: ChatCompletionRequest,
        frame: Frame,
        model: ServedModel,
        prompt: EncodedPrompt,
        reader: AnswerReader,
        role: str,
        drafts: str = "none",
    ) -> None:
        self.frame = frame
        self._role = role
        self._tokenizer = model.tokenizer
        self._effective = effective_params(request, [(prompt, reader.params)], model)
        self._return_prompt_logprobs = request.prompt_logprobs is not None
        self._return_ids = request.return_token_ids is True
        self._prompt = prompt
        self._reader = reader
        self._meter = UsageMeter(drafts, prefixes=request.return_prefix_details)
        options = request.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._usage_in_each = bool(options and options.continuous_usage_stats)
        self._shows_tokens = self._return_ids or bool(request.logprobs)
        """Whether there is a chunk even for a token whose text is held or hidden."""
        self._started: set[int] = set()
        self._first_chunk = True
        self._logprobs = (
            LogprobFormatter(
                model.tokenizer,
                top=request.top_logprobs or 0,
                as_ids=request.return_tokens_as_token_ids is True,
                always=request.logprob_token_ids or (),
            )
            if request.logprobs
            else None
        )

    def chunk(self, prompt_index: int, output: RequestOutput) -> bytes:
        self._meter.add(prompt_index, output)
        return b"".join(self._part(part) for part in output.outputs)

    def _part(self, part: CompletionOutput) -> bytes:
        chunks = []
        delta = self._delta(self._reader.events(part))
        if part.index not in self._started:
            self._started.add(part.index)
            chunks.append(self._event(part.index, Delta(role=self._role, content="")))
        if delta is None and part.token_ids and self._shows_tokens:
            delta = Delta(content="")
        if delta is not None:
            chunks.append(
                self._event(
                    part.index,
                    delta,
                    logprobs=self._shape_logprobs(part),
                    token_ids=part.token_ids if self._return_ids else UNSET,
                )
            )
        if part.finished:
            chunks.append(
                self._event(
                    part.index,
                    Delta(),
                    finish_reason=self._reader.finish_reason(part),
                    stop_reason=part.stop_reason,
                )
            )
        return b"".join(chunks)

    def _delta(self, events: Sequence[Event]) -> Delta | None:
        answer = gathered(events)
        if not (answer.content or answer.reasoning or answer.calls):
            return None
        return Delta(
            content=answer.content or UNSET,
            reasoning=answer.reasoning or UNSET,
            reasoning_content=answer.reasoning or UNSET,
            tool_calls=[
                ToolCallDelta(
                    index=call.index,
                    id=UNSET if call.name is None else self._reader.call_id(),
                    type=UNSET if call.name is None else "function",
                    function=FunctionDelta(name=call.name or UNSET, arguments=call.arguments),
                )
                for call in answer.calls
            ]
            or UNSET,
        )

    def _event(self, index: int, delta: Delta, **fields: object) -> bytes:
        choice = ChatChunkChoice(index=index, delta=delta, **fields)  # type: ignore[arg-type]
        return self._chunk([choice], self._chunk_usage())

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: StreamUsage, metrics: Metrics = UNSET
    ) -> bytes:
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
                    effective_params=self._effective if first else UNSET,
                    warnings=frame.warnings if first and frame.warnings else UNSET,
                    metrics=metrics,
                    kv_transfer_params=self._meter.handed(choices),
                )
            )
        )

    def _chunk_usage(self) -> StreamUsage:
        if not self._include_usage:
            return UNSET
        return self._usage() if self._usage_in_each else None

    def _usage(self) -> Usage:
        self._meter.reasoning_tokens = self._reader.reasoning_tokens
        return self._meter.usage()

    def _shape_logprobs(self, part: CompletionOutput) -> ChatLogprobs | None:
        if self._logprobs is None or part.logprobs is None:
            return None
        return self._logprobs.chat(part.token_ids, part.logprobs)

    def last(self) -> bytes:
        if not self._include_usage:
            return b""
        return self._chunk([], self._usage(), self._meter.metrics())

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        choices = []
        positions: Sequence[Position | None] = [None] * len(self._prompt.token_ids)
        for output in outputs:
            positions = output.prompt_logprobs or positions
            self._meter.add(0, output)
            choices += [
                ChatChoice(
                    index=part.index,
                    message=self._message(self._reader.events(part)),
                    logprobs=self._shape_logprobs(part),
                    finish_reason=self._reader.finish_reason(part),
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
                usage=self._usage(),
                prompt_token_ids=self._prompt.token_ids if self._return_ids else UNSET,
                prompt_logprobs=(
                    prompt_logprobs(positions, self._tokenizer)
                    if self._return_prompt_logprobs
                    else UNSET
                ),
                effective_params=self._effective,
                warnings=self.frame.warnings or UNSET,
                metrics=self._meter.metrics(),
                kv_transfer_params=self._meter.handed(choices),
            )
        )

    def _message(self, events: Sequence[Event]) -> ChatMessage:
        answer = gathered(events)
        calls = [
            ToolCall(self._reader.call_id(), FunctionCall(call.name or "", call.arguments))
            for call in answer.calls
        ]
        return ChatMessage(
            role=self._role,
            content=answer.content or (None if calls or answer.reasoning else ""),
            reasoning=answer.reasoning or UNSET,
            reasoning_content=answer.reasoning or UNSET,
            tool_calls=calls or UNSET,
        )
