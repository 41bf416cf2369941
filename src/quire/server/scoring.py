"""Scores of pairs of texts (/score, in vLLM's format), and documents ranked by them (/rerank, in Jina's
and Cohere's formats).

A decoder has no scoring head, so a score is the cosine of two embeddings, as vLLM computes it for
embedding models. Models that read a pair of texts and score it (cross-encoders) are not served yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from operator import mul

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from quire.sampling_params import PoolingParams
from quire.server.body import read_json
from quire.server.errors import bad_request, malformed
from quire.server.generation import Frame
from quire.server.openapi import request_body
from quire.server.pooling import encode_all, make_vectors, parse_pooling
from quire.server.pooling_schemas import (
    PoolingFields,
    RerankDocument,
    RerankRequest,
    RerankResponse,
    RerankResult,
    Score,
    ScoreRequest,
    ScoreResponse,
    Texts,
)
from quire.server.prompts import check_count
from quire.server.state import ServerState

SIDES = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"))


def scoring_router(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.post("/score", openapi_extra=request_body(ScoreRequest))
    @router.post("/v1/score", openapi_extra=request_body(ScoreRequest))
    async def create_score(request: Request) -> Response:
        """The similarity of texts: the cosine of their embeddings, -1 to 1."""
        model = state.serving_engine().model
        parsed = await parse_pooling(ScoreRequest, await read_json(request), state)
        asked = parsed.request
        lefts, rights = sides(asked)
        check_count(len(lefts) + len(rights), state.config.max_prompts_per_request, param="text_2")
        prompts = [
            *await encode_all(lefts, asked, model, param="text_1"),
            *await encode_all(rights, asked, model, param="text_2"),
        ]
        frame = Frame.make("score", model, parsed.warnings, name=asked.model)
        made = await make_vectors(state, request, asked, prompts, score_params(asked), frame)
        scores = await cosines(made.vectors[: len(lefts)], made.vectors[len(lefts) :])
        return made.answer(
            ScoreResponse(
                id=frame.id,
                created=frame.created,
                model=frame.model,
                data=[Score(index, score) for index, score in enumerate(scores)],
                usage=made.usage,
                warnings=frame.warnings or UNSET,
            )
        )

    @router.post("/rerank", openapi_extra=request_body(RerankRequest))
    @router.post("/v1/rerank", openapi_extra=request_body(RerankRequest))
    @router.post("/v2/rerank", openapi_extra=request_body(RerankRequest))
    async def rerank(request: Request) -> Response:
        """Documents ordered by similarity to the query: by the cosine of embeddings."""
        model = state.serving_engine().model
        parsed = await parse_pooling(RerankRequest, await read_json(request), state)
        asked = parsed.request
        if (asked.top_n or 0) < 0:
            raise bad_request(f"top_n must be at least 0, got {asked.top_n}.", param="top_n")
        texts = [d if isinstance(d, str) else d.text for d in asked.documents]
        check_count(len(texts), state.config.max_prompts_per_request, param="documents")
        prompts = [
            *await encode_all([asked.query], asked, model, param="query"),
            *await encode_all(texts, asked, model, param="documents"),
        ]
        frame = Frame.make("rerank", model, parsed.warnings, name=asked.model)
        made = await make_vectors(state, request, asked, prompts, score_params(asked), frame)
        scores = await cosines(made.vectors[:1], made.vectors[1:])
        best = sorted(range(len(texts)), key=lambda i: -scores[i])[: asked.top_n or None]
        shown = asked.return_documents is not False
        results = [
            RerankResult(
                index=i,
                document=RerankDocument(texts[i]) if shown else UNSET,
                relevance_score=scores[i],
            )
            for i in best
        ]
        return made.answer(
            RerankResponse(
                id=frame.id,
                model=frame.model,
                usage=made.usage,
                results=results,
                warnings=frame.warnings or UNSET,
            )
        )

    return router


def sides(asked: ScoreRequest) -> tuple[list[str], list[str]]:
    """The two lists of texts to compare. Raises a 400 unless their lengths are 1:1, 1:N or N:N."""
    for one, other in SIDES:
        left: Texts | None = getattr(asked, one)
        right: Texts | None = getattr(asked, other)
        if left is None or right is None:
            continue
        lefts = [left] if isinstance(left, str) else left
        rights = [right] if isinstance(right, str) else right
        if len(lefts) not in (1, len(rights)):
            raise bad_request(
                f"{one} and {other} must be 1:1, 1:N or N:N, got {len(lefts)}:{len(rights)}.",
                param=other,
            )
        return lefts, rights
    names = ", ".join(f"{one} and {other}" for one, other in SIDES)
    raise malformed(f"Give two sides to compare: one of {names}.", param="body.text_1")


def score_params(asked: PoolingFields) -> PoolingParams:
    return PoolingParams(pooling=asked.pooling or "last")


async def cosines(lefts: Sequence[list[float]], rights: Sequence[list[float]]) -> list[float]:
    """Cosines of pairs of vectors of length 1; a single vector on the left is compared with all on the
    right. Lets the event loop run other requests in between."""
    scores = []
    for i, right in enumerate(rights):
        left = lefts[i] if len(lefts) > 1 else lefts[0]
        scores.append(max(-1.0, min(1.0, sum(map(mul, left, right)))))
        await asyncio.sleep(0)
    return scores
