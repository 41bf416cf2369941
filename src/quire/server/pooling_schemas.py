"""Requests and answers of the endpoints for vectors and scores."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Struct, UnsetType
from pydantic import Field

from quire.server.neutral import EMPTY_HAS_MEANING
from quire.server.requests import ChatFields, Name, Prompt, Strict, Timeout
from quire.server.wire import Usage, Warnings

Texts = str | Annotated[list[str], Field(fail_fast=True, min_length=1)]
"""Their number is limited by the server's limit on prompts."""
Side = Annotated[Texts | None, EMPTY_HAS_MEANING]
"""An empty text is not neutral: it is an error, since it cannot be compared."""


class PoolingFields(Strict):
    """How texts become vectors; the same for all these endpoints."""

    model: Name | None = None
    pooling: Literal["last", "mean"] | None = None
    """The last token's hidden state (the default), or the mean of all tokens'. Not in vLLM."""
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[
        Annotated[str, Field(min_length=1, max_length=1024)] | None, EMPTY_HAS_MEANING
    ] = None
    timeout: Timeout | None = None
    request_id: Name | None = None


class EncodingFields(PoolingFields):
    """The format of a vector."""

    encoding_format: Literal["float", "base64"] | None = None
    """base64: of little-endian float32."""
    dimensions: int | None = None
    """Keep this many numbers, before normalizing."""
    normalize: bool | None = None
    """To length 1, the default."""
    use_activation: bool | None = None
    """vLLM's newer name for `normalize`."""
    task: Name | None = None
    """Only "embed", the default."""


class EmbeddingRequest(EncodingFields):
    input: Prompt
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    add_special_tokens: bool | None = None


class EmbeddingChatRequest(EncodingFields, ChatFields):
    """One vector for a whole conversation."""


class ScoreRequest(PoolingFields):
    """One text against one, one against many, or as many against as many. The two sides have four pairs of
    names in vLLM."""

    text_1: Side = None
    """One side, or `data_1`, `queries`."""
    text_2: Side = None
    """The other, or `data_2`, `documents`, `items`."""
    data_1: Side = None
    """`text_1`."""
    data_2: Side = None
    """`text_2`."""
    queries: Side = None
    """`text_1`."""
    documents: Side = None
    """`text_2`."""
    items: Side = None
    """`text_2`."""


class Document(Strict):
    text: str


class RerankRequest(PoolingFields):
    query: str
    """The text with which the documents are compared."""
    documents: Annotated[list[str | Document], Field(fail_fast=True, min_length=1)]
    """Texts, or objects with a text."""
    top_n: int | None = None
    """0, the default, means all."""
    return_documents: bool | None = None
    """The default, as in vLLM."""


class Embedding(Struct, frozen=True):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingResponse(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: Usage
    warnings: Warnings = UNSET


class Pooled(Struct, frozen=True):
    index: int
    data: list[float] | str
    object: str = "pooling"


class PoolingResponse(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: Usage
    warnings: Warnings = UNSET


class Score(Struct, frozen=True):
    index: int
    score: float
    object: str = "score"


class ScoreResponse(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage
    warnings: Warnings = UNSET


class RerankDocument(Struct, frozen=True):
    text: str


class RerankResult(Struct, frozen=True, kw_only=True):
    index: int
    document: RerankDocument | UnsetType = UNSET
    relevance_score: float


class RerankResponse(Struct, frozen=True, kw_only=True):
    id: str
    model: str
    usage: Usage
    results: list[RerankResult]
    warnings: Warnings = UNSET
