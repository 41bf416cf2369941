"""POST /v1/chat/completions/batch: several conversations in one request, as in vLLM.

Each is answered as by /v1/chat/completions, with the same options. The answer has the choices of all
conversations in order. It is not streamed, as in vLLM.
"""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from quire.outputs import RequestOutput
from quire.server import unsupported
from quire.server.body import parse, read_json
from quire.server.chat import ChatEncoder, answer_role, prepare_chat
from quire.server.errors import bad_request
from quire.server.generation import (
    Frame,
    check_model,
    log_request,
    run_to_end,
    submit_all,
    warning_headers,
)
from quire.server.openapi import request_body
from quire.server.prompts import check_count
from quire.server.requests import ChatBatchRequest
from quire.server.retention import asked_retention
from quire.server.sampling import admit, chat_params
from quire.server.state import ServerState
from quire.server.tools import blaming_tools, served_format, tool_use
from quire.server.usage import UsageMeter


def chat_batch_router(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions/batch", openapi_extra=request_body(ChatBatchRequest))
    async def create_chat_batch(request: Request) -> Response:
        """Answer several conversations; choice i of conversation c has index c * n + i."""
        model = state.serving_engine().model
        parsed = parse(ChatBatchRequest, await read_json(request), unsupported=unsupported.CHAT)
        asked = parsed.request
        await check_model(asked.model, state)
        if asked.stream:
            raise bad_request("A batch cannot be streamed; leave stream out.", param="stream")
        count = len(asked.messages)
        check_count(count, state.config.max_prompts_per_request, param="messages")
        params = chat_params(asked, model)
        use = tool_use(asked, served_format(state, model), params)
        frame = Frame.make("chatcmpl", model, [*parsed.warnings, *use.warnings], name=asked.model)
        work, encoders = [], []
        for conversation in asked.messages:
            one = asked.model_copy(update={"messages": conversation})
            prompt, reader = await prepare_chat(one, use, params, model)
            role = answer_role(one, state.config.response_role)
            work.append((prompt, reader.params))
            encoders.append(ChatEncoder(one, frame, model, prompt, reader, role))
        with blaming_tools(use):
            engine = await admit(state, count, work[0][1], frame.warnings)
            log_request(state, request, frame, work)
            streams = submit_all(engine, work, asked, frame,
            scope=request.scope, retain=asked_retention(asked),
        )  # fmt: skip
        outputs = await run_to_end(state, request, streams, frame)
        return Response(
            join(encoders, outputs, n=asked.n or 1, prefixes=asked.return_prefix_details),
            media_type="application/json",
            headers=warning_headers(frame.warnings),
        )

    return router


def join(
    encoders: list[ChatEncoder],
    outputs: list[RequestOutput],
    *,
    n: int,
    prefixes: bool | None = False,
) -> bytes:
    """Join the answers of the conversations into one."""
    meter = UsageMeter(prefixes=prefixes)
    answer, choices = {}, []
    for index, (encoder, output) in enumerate(zip(encoders, outputs, strict=True)):
        meter.add(index, output)
        answer = msgspec.json.decode(encoder.whole([output]))
        prompt_ids = answer.pop("prompt_token_ids", None)
        for choice in answer["choices"]:
            choice["index"] += index * n
            if prompt_ids is not None:
                choice["prompt_token_ids"] = prompt_ids
        choices += answer["choices"]
    return msgspec.json.encode(answer | {"choices": choices, "usage": meter.usage()})
