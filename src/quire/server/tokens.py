"""POST /tokenize and /detokenize, in vLLM's formats, and GET /v1/models."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from quire.server import unsupported
from quire.server.body import parse, read_json
from quire.server.engine_protocol import ServedAdapter, ServedModel
from quire.server.errors import malformed
from quire.server.generation import check_model, warning_headers
from quire.server.openapi import request_body
from quire.server.prompts import INLINE_CHARS, Truncation, check_ids, encode_text, render_chat
from quire.server.requests import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from quire.server.state import ServerState
from quire.server.wire import (
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
    encode,
)


def tokens_router(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/tokenize", openapi_extra=request_body(TokenizeCompletionRequest, TokenizeChatRequest)
    )
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt, or of messages rendered by the chat template."""
        model = state.loaded_engine().model
        body = await read_json(request)
        if ("prompt" in body) == ("messages" in body):
            raise malformed("Give either prompt or messages.", param="body.prompt")
        asked: TokenizeChatRequest | TokenizeCompletionRequest
        if "messages" in body:
            chat = parse(TokenizeChatRequest, body, unsupported=unsupported.CHAT)
            asked, warnings = chat.request, chat.warnings
            await check_model(asked.model, state)
            text, special = render_chat(chat.request, model), asked.add_special_tokens is True
        else:
            plain = parse(TokenizeCompletionRequest, body)
            asked, warnings = plain.request, plain.warnings
            await check_model(asked.model, state)
            text, special = plain.request.prompt, asked.add_special_tokens is not False
        ids = await encode_text(model.tokenizer, text, add_special_tokens=special, cut=Truncation())
        strings = [model.tokenizer.token_str(i) for i in ids] if asked.return_token_strs else None
        answer = TokenizeResponse(
            count=len(ids),
            max_model_len=model.max_model_len,
            tokens=ids,
            token_strs=strings,
            warnings=warnings or UNSET,
        )
        return _json(answer, warnings)

    @router.post("/detokenize", openapi_extra=request_body(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens included."""
        model = state.loaded_engine().model
        parsed = parse(DetokenizeRequest, await read_json(request))
        await check_model(parsed.request.model, state)
        ids = parsed.request.tokens
        check_ids(ids, model, param="tokens")
        if len(ids) <= INLINE_CHARS:
            text = model.tokenizer.decode(ids, skip_special_tokens=False)
        else:
            text = await asyncio.to_thread(model.tokenizer.decode, ids, skip_special_tokens=False)
        return _json(
            DetokenizeResponse(prompt=text, warnings=parsed.warnings or UNSET), parsed.warnings
        )

    return router


def models_router(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> Response:
        """All names of the model, and the adapters."""
        engine = state.loaded_engine()
        cards = [model_card(engine.model, name) for name in engine.model.names]
        cards += [adapter_card(engine.model, adapter) for adapter in engine.adapters]
        return _json(ModelList(data=cards), [])

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> Response:
        """One model, by name."""
        engine = state.loaded_engine()
        adapter = await check_model(model_id, state)
        if adapter is None:
            return _json(model_card(engine.model, model_id), [])
        return _json(adapter_card(engine.model, adapter), [])

    return router


def model_card(model: ServedModel, name: str) -> ModelCard:
    return ModelCard(
        id=name, created=model.created, root=model.name, max_model_len=model.max_model_len
    )


def adapter_card(model: ServedModel, adapter: ServedAdapter) -> ModelCard:
    """As vLLM's, but the root is the name of its directory, without the path."""
    return ModelCard(
        id=adapter.name,
        created=model.created,
        root=adapter.path.name,
        parent=adapter.request.base_model_name or model.name,
        max_model_len=model.max_model_len,
    )


def _json(answer: object, warnings: list[str]) -> Response:
    return Response(
        encode(answer), media_type="application/json", headers=warning_headers(warnings)
    )
