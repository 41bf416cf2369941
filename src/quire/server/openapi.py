"""OpenAPI for routes that parse their own bodies.

FastAPI documents what it validates itself; our bodies are read by `body.read_json` (streamed limit,
strict JSON, nulls), so their schemas are attached here.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from quire.server.dialect_schemas import CountTokensRequest, MessagesRequest, ResponsesRequest
from quire.server.pooling_schemas import (
    EmbeddingChatRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
)
from quire.server.requests import (
    AbortRequest,
    ChatBatchRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    UnloadAdapterRequest,
)

MODELS: tuple[type[BaseModel], ...] = (
    CompletionRequest,
    ChatCompletionRequest,
    ChatBatchRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
    TokenizeCompletionRequest,
    TokenizeChatRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    EmbeddingChatRequest,
    ScoreRequest,
    RerankRequest,
    AbortRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
_REF = "#/components/schemas/{model}"


def request_body(*models: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes one of `models`."""
    references = [{"$ref": _REF.format(model=model.__name__)} for model in models]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def install_openapi(app: FastAPI) -> None:
    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, definitions = models_json_schema(
                [(model, "validation") for model in MODELS], ref_template=_REF
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions.get("$defs", {}))
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]
