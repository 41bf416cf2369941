"""OpenAI's Responses API: POST /v1/responses, and the requests about stored responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from quire.server import unsupported
from quire.server.body import ignored, parse, read_json, warn_of
from quire.server.chat import StartedChat, encode_chat, start_chat
from quire.server.dialect_schemas import ResponsesRequest
from quire.server.dialects import INSTRUCTIONS, Turns, as_object, renaming, to_chat
from quire.server.engine_protocol import ServedModel
from quire.server.errors import bad_request, to_api_error
from quire.server.generation import (
    Frame,
    check_model,
    encoded,
    respond,
    run_to_end,
    warning_headers,
)
from quire.server.middleware import owner_of, record_of
from quire.server.openapi import request_body
from quire.server.requests import ChatCompletionRequest
from quire.server.response_store import Item, ResponseStore, StoredResponse
from quire.server.responses_encoder import ResponsesEncoder
from quire.server.responses_input import add_items, read_input
from quire.server.responses_tools import ToolSet
from quire.server.sse import Ending
from quire.server.state import ServerState
from quire.server.unsupported import IDLE
from quire.server.wire import encode

SHOW_LOGPROBS = "message.output_text.logprobs"
NAMES = {
    "messages": "input",
    "logprobs": "top_logprobs",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Field of a chat completion -> its name here."""
MAX_PAGE = 100


def responses_router(state: ServerState) -> APIRouter:
    router = APIRouter()
    api = _Responses(state)

    @router.post("/v1/responses", openapi_extra=request_body(ResponsesRequest))
    async def create_response(request: Request) -> Response:
        """Answer an input, or continue a response, in OpenAI's newer format."""
        return await api.create(request)

    @router.post("/v1/responses/input_tokens", openapi_extra=request_body(ResponsesRequest))
    async def count_input_tokens(request: Request) -> Response:
        """The number of tokens in the input of such a response."""
        return await api.count_input_tokens(request)

    _add_stored_routes(router, api.store)
    return router


def _add_stored_routes(router: APIRouter, store: ResponseStore) -> None:
    def stored(request: Request, response_id: str) -> StoredResponse:
        return store.get(response_id, owner_of(request.scope), param="response_id")

    @router.get("/v1/responses/{response_id}")
    async def get_response(request: Request, response_id: str) -> Response:
        """A stored response in its current state. Events are not kept, so it cannot be streamed."""
        if request.query_params.get("stream", "false").lower() not in ("false", "0"):
            raise bad_request("A stored response cannot be streamed again.", param="stream")
        return _json(stored(request, response_id).response)

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> Response:
        """Cancel a response in progress. One that has ended does not change."""
        found = stored(request, response_id)
        if found.in_flight:
            streams = found.streams
            store.update(response_id, found.response | {"status": "cancelled"})
            for stream in streams:
                stream.abort()
        return _json(found.response)

    @router.delete("/v1/responses/{response_id}")
    async def delete_response(request: Request, response_id: str) -> Response:
        """Delete a stored response, and abort it if it is in progress."""
        store.remove(stored(request, response_id).id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    @router.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(request: Request, response_id: str) -> Response:
        """Its input, which includes the conversation before it: `limit`, `after`, `order`."""
        return _json(_page([_listed(i) for i in stored(request, response_id).items], request))


@dataclass(frozen=True, slots=True)
class _Read:
    """A request, read and translated."""

    asked: ResponsesRequest
    items: Sequence[Item]
    """Its whole input, with the conversation before it."""
    tools: ToolSet
    chat: ChatCompletionRequest
    """The same as a chat completion."""
    warnings: list[str]


class _Responses:
    """Makes responses, stores them, and runs those in the background."""

    def __init__(self, state: ServerState) -> None:
        config = state.config
        self.store = ResponseStore(config.max_stored_responses, config.max_stored_response_bytes)
        self._state = state
        self._in_background: set[asyncio.Task[None]] = set()

    async def create(self, request: Request) -> Response:
        read = await self._read(request)
        asked, chat_request = read.asked, read.chat
        model = self._state.serving_engine().model
        frame = Frame.make("resp", model, read.warnings, name=asked.model, separator="_")
        record_of(request.scope).is_background = asked.background is True
        with renaming(_names(asked)):
            if asked.truncation == "auto":
                chat_request = await shortened(chat_request, model)
            chat = await start_chat(self._state, request, chat_request, frame)
        encoder = ResponsesEncoder(
            asked,
            chat,
            model,
            offers=read.tools.offers,
            logprobs=chat_request.logprobs is True,
            on_change=self.store.update,
        )
        if asked.store is not False:
            owner = owner_of(request.scope)
            self.store.add(
                StoredResponse(frame.id, owner, read.items, encoder.response(), tuple(chat.streams))
            )
        if asked.background:
            task = asyncio.ensure_future(_run_alone(self._state, request, chat, encoder))
            self._in_background.add(task)
            task.add_done_callback(self._in_background.discard)
            return _json(encoder.response() | {"status": "queued"}, chat.frame.warnings)
        if asked.stream:
            return await respond(
                self._state,
                request,
                chat_request,
                chat.streams,
                encoder,
                events=_events(chat, encoder),
                ending=Ending(done=b"", on_error=encoder.failed),
            )
        with encoder.settling():
            return await respond(self._state, request, chat_request, chat.streams, encoder)

    async def count_input_tokens(self, request: Request) -> Response:
        read = await self._read(request)
        with renaming(_names(read.asked)):
            prompt = await encode_chat(read.chat, self._state.loaded_engine().model)
        count = len(prompt.token_ids)
        return _json({"object": "response.input_tokens", "input_tokens": count}, read.warnings)

    async def _read(self, request: Request) -> _Read:
        self._state.serving_engine()  # raises if it cannot take a request
        body = await read_json(request)
        parsed = parse(ResponsesRequest, body, unsupported=unsupported.RESPONSES)
        asked = parsed.request
        await check_model(asked.model, self._state)
        _check_modes(asked)
        owner = owner_of(request.scope)
        before = self._before(asked.previous_response_id, owner)
        own = read_input(asked.input, self.store, owner)
        turns, tools = Turns(), ToolSet.read(asked.tools or ())
        if asked.instructions:
            turns.say("system", [asked.instructions])
        add_items(turns, before, start=-len(before))
        idle = [*add_items(turns, own), *tools.idle]
        with renaming(_names(asked)):
            chat_request = _to_chat(asked, turns, tools)
        idle += [ignored(name) for name in _unread(asked)]
        warnings = [*parsed.warnings, *warn_of(body, idle)]
        return _Read(asked, [*before, *own], tools, chat_request, warnings)

    def _before(self, previous_response_id: str | None, owner: bytes | None) -> list[Item]:
        """The conversation that the request continues."""
        if previous_response_id is None:
            return []
        previous = self.store.get(previous_response_id, owner, param="previous_response_id")
        if previous.in_flight:
            raise bad_request("The response is still in progress.", param="previous_response_id")
        return previous.conversation


def _check_modes(asked: ResponsesRequest) -> None:
    if asked.background and asked.stream:
        raise bad_request("A response in the background is not streamed.", param="background")
    if asked.background and asked.store is False:
        raise bad_request(
            "A response in the background must be stored, to be retrieved.", param="store"
        )


def _names(asked: ResponsesRequest) -> dict[str, str]:
    """Names for errors of the grammar: it comes from `text.format`, if that is set."""
    own = {"structured_outputs": "text.format"} if "format" in _given(asked.text) else {}
    return NAMES | own


def _given(fields: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (fields or {}).items() if value is not None}


# --- request to chat completion -------------------------------------------------------------------


def _unread(asked: ResponsesRequest) -> list[str]:
    """Parts of fields that have no effect."""
    text, reasoning = _given(asked.text), _given(asked.reasoning)
    unread = [
        f"text.{name}"
        for name in text
        if name != "format" and not (name == "verbosity" and IDLE[name].holds(text[name]))
    ]
    unread += [f"reasoning.{name}" for name in reasoning if name != "effort"]
    return unread + [f"include.{name}" for name in asked.include or () if name != SHOW_LOGPROBS]


def _to_chat(asked: ResponsesRequest, turns: Turns, tools: ToolSet) -> ChatCompletionRequest:
    fields = {
        "messages": turns.messages,
        "tools": tools.functions or None,
        "tool_choice": tools.choice(asked.tool_choice),
        "response_format": _response_format(asked.text),
        "reasoning_effort": _given(asked.reasoning).get("effort"),
        "max_completion_tokens": asked.max_output_tokens,
        "logprobs": asked.top_logprobs is not None or SHOW_LOGPROBS in (asked.include or ()),
        **{
            name: getattr(asked, name)
            for name in (
                "stop", "parallel_tool_calls", "top_logprobs", "chat_template_kwargs",
            )
        },
    }  # fmt: skip
    return to_chat(asked, fields)


def _response_format(text: dict[str, Any] | None) -> dict[str, object] | None:
    """In a chat completion, the parts of a schema are one level deeper."""
    form = _given(text).get("format")
    if form is None:
        return None
    given = _given(as_object(form, "text.format"))
    if given.get("type") != "json_schema":
        return given
    return {"type": given.pop("type"), "json_schema": given}


async def shortened(chat: ChatCompletionRequest, model: ServedModel) -> ChatCompletionRequest:
    """The messages without the oldest turns, so that they fit. A turn begins with a user's message;
    system messages at the beginning stay. Found by bisection, because each attempt must be rendered."""
    messages = chat.messages
    kept = next((i for i, m in enumerate(messages) if m.role not in INSTRUCTIONS), len(messages))
    cuts = [kept, *(i for i, m in enumerate(messages) if i > kept and m.role == "user")]
    room = model.max_model_len - (chat.max_completion_tokens or 1)

    def cut(at: int) -> ChatCompletionRequest:
        return chat.model_copy(update={"messages": messages[:kept] + messages[at:]})

    low, high = 0, len(cuts) - 1
    while low < high:
        middle = (low + high) // 2 if low else 0  # first try all messages: most conversations fit
        if len((await encode_chat(cut(cuts[middle]), model)).token_ids) <= room:
            high = middle
        else:
            low = middle + 1
    return cut(cuts[low])


# --- outputs to answer ----------------------------------------------------------------------------


async def _events(chat: StartedChat, encoder: ResponsesEncoder) -> AsyncGenerator[bytes, None]:
    with encoder.settling():
        yield encoder.opening()
        async with aclosing(encoded(chat.streams, encoder)) as events:
            async for data in events:
                yield data


async def _run_alone(
    state: ServerState, request: Request, chat: StartedChat, encoder: ResponsesEncoder
) -> None:
    """Run a response to its end without a client; `settling` stores its final state."""

    async def nobody() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    try:
        with encoder.settling():
            encoder.whole(await run_to_end(state, request, chat.streams, chat.frame, nobody))
    except Exception as error:
        to_api_error(error, chat.frame.id)  # for its log entry; there is no client
    finally:
        record_of(request.scope).finish()


def _listed(item: Item) -> dict[str, object]:
    """An input item with the fields that clients may leave out."""
    content, role = item.get("content"), item.get("role")
    full: dict[str, object] = {"type": "message", "status": "completed", **item}
    if isinstance(content, str):
        part: dict[str, object] = {"type": "input_text", "text": content}
        if role == "assistant":
            part = {"type": "output_text", "text": content, "annotations": []}
        full["content"] = [part]
    return full


def _page(items: list[dict[str, object]], request: Request) -> dict[str, object]:
    query = request.query_params
    limit = query.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_PAGE):
        raise bad_request(f"limit must be between 1 and {MAX_PAGE}.", param="limit")
    if query.get("order", "desc") not in ("asc", "desc"):
        raise bad_request("order must be asc or desc.", param="order")
    if query.get("order", "desc") == "desc":
        items = items[::-1]
    if "after" in query:
        at = next((i for i, item in enumerate(items) if item["id"] == query["after"]), None)
        if at is None:
            raise bad_request("There is no such item in the input.", param="after")
        items = items[at + 1 :]
    page = items[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": len(page) < len(items),
    }


def _json(answer: object, warnings: list[str] | None = None) -> Response:
    return Response(
        encode(answer), media_type="application/json", headers=warning_headers(warnings or [])
    )
