"""From texts to vectors: shared code of embeddings and scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from quire.sampling_params import PoolingParams
from quire.server import unsupported
from quire.server.body import Parsed, parse
from quire.server.deadlines import timed_out
from quire.server.engine_protocol import ServedModel
from quire.server.errors import ApiError, bad_request
from quire.server.generation import (
    Frame,
    check_model,
    log_request,
    run_to_end,
    submit_all,
    warning_headers,
)
from quire.server.middleware import STATUS_CLIENT_GONE
from quire.server.pooling_schemas import PoolingFields
from quire.server.prompts import EncodedPrompt, encode_prompt, truncation
from quire.server.state import ServerState
from quire.server.usage import UsageMeter
from quire.server.wire import Usage, encode

P = TypeVar("P", bound=PoolingFields)


@dataclass(frozen=True, slots=True)
class Vectors:
    """One vector per prompt, in their order."""

    frame: Frame
    vectors: list[list[float]]
    usage: Usage

    def answer(self, body: BaseModel | object) -> Response:
        """`body` as JSON, with the warnings' header."""
        headers = warning_headers(self.frame.warnings)
        return Response(encode(body), media_type="application/json", headers=headers)


async def parse_pooling(kind: type[P], body: dict[str, object], state: ServerState) -> Parsed[P]:
    parsed = parse(kind, body, unsupported=unsupported.POOLING)
    await check_model(parsed.request.model, state)
    return parsed


async def encode_all(
    prompts: Iterable[str | list[int]],
    asked: PoolingFields,
    model: ServedModel,
    *,
    param: str,
    add_special_tokens: bool = True,
) -> list[EncodedPrompt]:
    """Token ids of all prompts. Raises a 400 for unknown ids, and for a prompt without tokens."""
    cut = truncation(asked.truncate_prompt_tokens, asked.truncation_side, model)
    encoded = [
        await encode_prompt(
            prompt, model, add_special_tokens=add_special_tokens, cut=cut, param=param
        )
        for prompt in prompts
    ]
    if not all(prompt.token_ids for prompt in encoded):
        raise bad_request(f"{param} holds an empty text, which has no vector.", param=param)
    return encoded


async def make_vectors(
    state: ServerState,
    request: Request,
    asked: PoolingFields,
    prompts: Sequence[EncodedPrompt],
    params: PoolingParams,
    frame: Frame,
) -> Vectors:
    """Run all prompts at once; all are aborted if the client disconnects or one fails."""
    work = [(prompt, params) for prompt in prompts]
    engine = state.serving_engine()  # tokenizing may have taken a while
    log_request(state, request, frame, work)
    streams = submit_all(engine, work, asked, frame, scope=request.scope)
    outputs = await run_to_end(state, request, streams, frame)
    meter = UsageMeter()
    vectors = []
    for index, output in enumerate(outputs):
        meter.add(index, output)
        if output.embedding is None:
            if output.error:
                raise ApiError(500, output.error)
            if any(part.finish_reason == "timeout" for part in output.outputs):
                raise timed_out()
            raise ApiError(STATUS_CLIENT_GONE, "The request was aborted.")
        vectors.append(output.embedding)
    return Vectors(frame, vectors, meter.usage())
