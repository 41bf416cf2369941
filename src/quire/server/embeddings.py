"""POST /v1/embeddings in OpenAI's format, and /pooling in vLLM's."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from quire.sampling_params import PoolingParams
from quire.server.body import read_json
from quire.server.engine_protocol import ServedModel
from quire.server.errors import bad_request, malformed
from quire.server.generation import Frame
from quire.server.openapi import request_body
from quire.server.pooling import Vectors, encode_all, make_vectors, parse_pooling
from quire.server.pooling_schemas import (
    Embedding,
    EmbeddingChatRequest,
    EmbeddingRequest,
    EmbeddingResponse,
    EncodingFields,
    Pooled,
    PoolingResponse,
)
from quire.server.prompts import EncodedPrompt, render_chat, split_prompts
from quire.server.state import ServerState

BODY = request_body(EmbeddingRequest, EmbeddingChatRequest)


def embeddings_router(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings", openapi_extra=BODY)
    async def create_embedding(request: Request) -> Response:
        """A vector for each text: the hidden state of the last token after the final norm (or the mean
        over all tokens), scaled to length 1."""
        made, asked = await _vectors(state, request, "embd")
        frame = made.frame
        data = [Embedding(i, write(vector, asked)) for i, vector in enumerate(made.vectors)]
        return made.answer(
            EmbeddingResponse(
                id=frame.id,
                created=frame.created,
                model=frame.model,
                data=data,
                usage=made.usage,
                warnings=frame.warnings or UNSET,
            )
        )

    @router.post("/pooling", openapi_extra=BODY)
    async def pool(request: Request) -> Response:
        """The same vectors, in the format of vLLM's /pooling."""
        made, asked = await _vectors(state, request, "pool")
        frame = made.frame
        data = [Pooled(i, write(vector, asked)) for i, vector in enumerate(made.vectors)]
        return made.answer(
            PoolingResponse(
                id=frame.id,
                created=frame.created,
                model=frame.model,
                data=data,
                usage=made.usage,
                warnings=frame.warnings or UNSET,
            )
        )

    return router


async def _vectors(
    state: ServerState, request: Request, prefix: str
) -> tuple[Vectors, EncodingFields]:
    model = state.serving_engine().model
    body = await read_json(request)
    if ("input" in body) == ("messages" in body):
        raise malformed("Give either input or messages.", param="body.input")
    asked: EmbeddingChatRequest | EmbeddingRequest
    if "messages" in body:
        chat = await parse_pooling(EmbeddingChatRequest, body, state)
        asked, warnings = chat.request, chat.warnings
        prompts = await _encode_chat(chat.request, model)
    else:
        plain = await parse_pooling(EmbeddingRequest, body, state)
        asked, warnings = plain.request, plain.warnings
        texts = split_prompts(
            plain.request.input, limit=state.config.max_prompts_per_request, param="input"
        )
        special = asked.add_special_tokens is not False
        prompts = await encode_all(texts, asked, model, param="input", add_special_tokens=special)
    params = encoding_params(asked)
    frame = Frame.make(prefix, model, warnings, name=asked.model)
    return await make_vectors(state, request, asked, prompts, params, frame), asked


async def _encode_chat(asked: EmbeddingChatRequest, model: ServedModel) -> list[EncodedPrompt]:
    """Tokenize a conversation. No answer follows, so the template adds no beginning of one unless asked
    to."""
    if asked.add_generation_prompt is None:
        asked = asked.model_copy(update={"add_generation_prompt": False})
    text = render_chat(asked, model)
    special = asked.add_special_tokens is True
    return await encode_all([text], asked, model, param="messages", add_special_tokens=special)


def encoding_params(asked: EncodingFields) -> PoolingParams:
    """Raises a 400 for a task that needs a head which decoders do not have."""
    if asked.task not in (None, "embed"):
        raise bad_request(
            f"task {asked.task!r} is not supported: this server makes one vector per text (embed).",
            param="task",
        )
    normalize = asked.use_activation if asked.normalize is None else asked.normalize
    return PoolingParams(
        pooling=asked.pooling or "last",
        normalize=normalize is not False,
        dimensions=asked.dimensions,
    )


def write(vector: Sequence[float], asked: EncodingFields) -> list[float] | str:
    """base64 encodes little-endian float32, as OpenAI's client expects."""
    if asked.encoding_format != "base64":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
