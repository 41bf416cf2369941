"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from msgspec import UNSET, Raw
from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.responses import Response

from quire.outputs import CompletionOutput, RequestOutput
from quire.server import unsupported
from quire.server.body import ignored, parse, read_json, warn_of
from quire.server.chat import StartedChat, encode_chat, start_chat
from quire.server.dialect_schemas import CountTokensRequest, MessagesRequest
from quire.server.dialects import (
    Change,
    Extended,
    Opened,
    Piece,
    Pieces,
    Turns,
    as_object,
    renaming,
    to_chat,
)
from quire.server.errors import ANTHROPIC_PATH, ApiError, bad_request
from quire.server.generation import Frame, check_model, respond, warning_headers
from quire.server.messages_input import ToolSet, add_messages, add_system
from quire.server.openapi import request_body
from quire.server.requests import ChatCompletionRequest
from quire.server.retention import created, marks_of
from quire.server.sse import Ending, named_event
from quire.server.state import ServerState
from quire.server.tools import served_format
from quire.server.usage import UsageMeter
from quire.server.wire import encode

Object = dict[str, object]

NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "parallel_tool_calls": "tool_choice",
    "thinking_token_budget": "thinking.budget_tokens",
}
"""Field of a chat completion -> its name here."""
THINKING = ("enabled", "disabled", "adaptive", "between_tools")
STOP_REASONS = {
    "stop": "end_turn", "repetition": "end_turn", "tool_calls": "tool_use", "length": "max_tokens",
    "timeout": "max_tokens",
}  # fmt: skip
"""finish_reason -> stop_reason; an aborted request has none."""


def messages_router(state: ServerState) -> APIRouter:
    router = APIRouter()
    caches = state.engine_config.cache.enable_prefix_caching

    @router.post(ANTHROPIC_PATH, openapi_extra=request_body(MessagesRequest))
    async def create_message(request: Request) -> Response:
        """Answer a conversation, in Anthropic's format."""
        asked, chat_request, warnings = await read(request, MessagesRequest)
        model = state.serving_engine().model
        frame = Frame.make("msg", model, warnings, name=asked.model, separator="_")
        with renaming(_names(asked)):
            marks = marks_of(asked) if caches else []
            chat = await start_chat(state, request, chat_request, frame, marks)
        encoder = MessagesEncoder(chat, prefixes=asked.return_prefix_details)

        def on_error(error: ApiError) -> bytes:
            return named_event("error", encode(error.anthropic(request.scope)))

        ending = Ending(done=b"", on_error=on_error)
        return await respond(state, request, chat_request, chat.streams, encoder, ending=ending)

    @router.post(f"{ANTHROPIC_PATH}/count_tokens", openapi_extra=request_body(CountTokensRequest))
    async def count_tokens(request: Request) -> Response:
        """The number of tokens in the prompt of such a request."""
        asked, chat_request, warnings = await read(request, CountTokensRequest)
        with renaming(_names(asked)):
            prompt = await encode_chat(chat_request, state.serving_engine().model)
        return Response(
            encode({"input_tokens": len(prompt.token_ids)}),
            media_type="application/json",
            headers=warning_headers(warnings),
        )

    async def read(
        request: Request, kind: type[CountTokensRequest]
    ) -> tuple[CountTokensRequest, ChatCompletionRequest, list[str]]:
        model = state.serving_engine().model
        body = await read_json(request)
        parsed = parse(kind, body, unsupported=unsupported.MESSAGES)
        asked = parsed.request
        await check_model(asked.model, state)
        thinks = served_format(state, model).reasoning is not None
        turns, tools = Turns(), ToolSet(asked.tools or ())
        add_system(turns, asked.system)
        idle = [*add_messages(turns, asked.messages), *tools.idle]
        with renaming(_names(asked)):
            chat_request = _to_chat(asked, turns, tools, thinks=thinks)
        idle += [
            ignored(f"output_config.{name}")
            for name in asked.output_config or ()
            if name not in ("effort", "format")
        ]
        if not thinks and (asked.thinking or {}).get("type") == "enabled":
            idle.append(("thinking", "field thinking has no effect on this model"))
        return asked, chat_request, [*parsed.warnings, *warn_of(body, idle)]

    return router


def _names(asked: CountTokensRequest) -> dict[str, str]:
    """Names for errors of the grammar: it comes from `output_config.format`, if that is set."""
    own = {"structured_outputs": "output_config.format"} if _format(asked) else {}
    return NAMES | own


# --- request to chat completion -------------------------------------------------------------------


def _to_chat(
    asked: CountTokensRequest, turns: Turns, tools: ToolSet, *, thinks: bool
) -> ChatCompletionRequest:
    thinking = asked.thinking or {}
    if thinking and thinking.get("type") not in THINKING:
        raise bad_request(f"thinking.type must be one of {', '.join(THINKING)}.", param="thinking")
    kwargs = dict(asked.chat_template_kwargs or {})
    if thinking.get("type") in ("enabled", "disabled"):
        kwargs.setdefault("enable_thinking", thinking["type"] == "enabled")
    fields: Object = {
        "messages": turns.messages,
        "continue_final_message": _is_open(turns.messages) or None,
        "tools": tools.functions or None,
        **tools.choice(asked.tool_choice or {}),
        "chat_template_kwargs": kwargs or None,
        "include_reasoning": thinking.get("display") != "omitted",
        "reasoning_effort": (asked.output_config or {}).get("effort"),
        "response_format": _format(asked),
    }
    if thinks and thinking.get("type") == "enabled":
        fields["thinking_token_budget"] = thinking.get("budget_tokens")
    if isinstance(asked, MessagesRequest):
        fields |= {"max_tokens": asked.max_tokens, "stop": asked.stop_sequences}
    return to_chat(asked, fields)


def _is_open(messages: Sequence[Object]) -> bool:
    """Whether the last message is an assistant's text, which the model is to continue."""
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and "content" in last and "tool_calls" not in last


def _format(asked: CountTokensRequest) -> Object | None:
    form = (asked.output_config or {}).get("format") or asked.output_format
    if form is None:
        return None
    given = as_object(form, "output_config.format")
    schema: Object = {"name": "output", "schema": given.get("schema")}
    return {"type": given.get("type"), "json_schema": schema}


# --- outputs to answer ----------------------------------------------------------------------------


class MessagesEncoder:
    """Writes outputs as Anthropic's message: content blocks, one after the other.

    A stream begins with the first output, as for chat completions, because message_start has the number of
    cached tokens.
    """

    def __init__(self, chat: StartedChat, *, prefixes: bool | None = False) -> None:
        self.frame = chat.frame
        self._reader = chat.reader
        self._pieces = Pieces(chat.reader)
        self._retain = chat.prompt.retain
        self._meter = UsageMeter(prefixes=prefixes)
        self._stop: Object = {"stop_reason": None, "stop_sequence": None}
        self._started = False

    def chunk(self, prompt_index: int, output: RequestOutput) -> bytes:
        if not self._started:
            self._started = True
            begun = RequestOutput(
                output.request_id, None, output.prompt_token_ids, [], False,
                num_cached_tokens=output.num_cached_tokens, prefix=output.prefix,
            )  # fmt: skip
            self._meter.add(prompt_index, begun)
            start = _event("message_start", message=self._message([])) + _event("ping")
        else:
            start = b""
        self._meter.add(prompt_index, output)
        return start + b"".join(self._part(part) for part in output.outputs)

    def last(self) -> bytes:
        return _event("message_delta", delta=self._stop, usage=self._usage()) + _event(
            "message_stop"
        )

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        for output in outputs:
            self._meter.add(0, output)
            for part in output.outputs:
                self._part(part)
        message = self._message([_block(piece) for piece in self._pieces.all])
        return encode(message | self._meter.handed_on())

    def _part(self, part: CompletionOutput) -> bytes:
        events = b"".join(self._change_event(change) for change in self._pieces.read(part))
        if part.finished:
            stopped = part.finish_reason == "stop" and isinstance(part.stop_reason, str)
            reason = STOP_REASONS.get(self._reader.finish_reason(part) or "")
            self._stop = {
                "stop_reason": "stop_sequence" if stopped else reason,
                "stop_sequence": part.stop_reason if stopped else None,
            }
        return events

    def _message(self, content: list[Object]) -> Object:
        message: Object = {
            "id": self.frame.id,
            "type": "message",
            "role": "assistant",
            "model": self.frame.model,
            "content": content,
            "usage": self._usage(),
        }
        warnings: Object = {"warnings": self.frame.warnings} if self.frame.warnings else {}
        return message | self._stop | warnings

    def _usage(self) -> Object:
        """Anthropic's counts: input_tokens includes neither the cached tokens nor those that this request has
        marked to be cached."""
        usage = self._meter.usage()
        details = usage.prompt_tokens_details
        cached = details.cached_tokens
        new = created(self._retain, cached)
        counted: Object = {
            "input_tokens": usage.prompt_tokens - cached - sum(new.values()),
            "cache_creation_input_tokens": sum(new.values()),
            "cache_read_input_tokens": cached,
            "output_tokens": usage.completion_tokens,
        }
        if details.prefix is not UNSET:
            counted["prefix"] = details.prefix
        if new:
            hours = sum(count for seconds, count in new.items() if seconds >= 3600)
            counted["cache_creation"] = {
                "ephemeral_5m_input_tokens": sum(new.values()) - hours,
                "ephemeral_1h_input_tokens": hours,
            }
        thought = self._reader.reasoning_tokens
        if thought is not None:
            counted["output_tokens_details"] = {"thinking_tokens": thought}
        return counted

    def _change_event(self, change: Change) -> bytes:
        piece = change.piece
        if isinstance(change, Opened):
            return _event("content_block_start", index=piece.index, content_block=_block(piece))
        if isinstance(change, Extended):
            kind, name = DELTAS[piece.kind]
            delta = {"type": kind, name: change.text}
            return _event("content_block_delta", index=piece.index, delta=delta)
        return _event("content_block_stop", index=piece.index)


DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


def _block(piece: Piece) -> Object:
    if piece.kind == "reasoning":
        return {"type": "thinking", "thinking": piece.text, "signature": ""}
    if piece.kind == "text":
        return {"type": "text", "text": piece.text}
    return {
        "type": "tool_use",
        "id": piece.call_id,
        "name": piece.name,
        "input": _as_far_as_it_went(piece.text),
    }


def _as_far_as_it_went(arguments: str) -> Raw:
    """A JSON object, completed if the output was cut inside it."""
    try:
        value = from_json(arguments, allow_inf_nan=False, allow_partial=True)
    except ValueError:
        return Raw(b"{}")
    return Raw(to_json(value) if isinstance(value, dict) else b"{}")


def _event(name: str, **fields: object) -> bytes:
    return named_event(name, encode({"type": name} | fields))
