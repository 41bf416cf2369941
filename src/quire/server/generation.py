"""Shared code of all generating endpoints: submitting, merging and collecting outputs, and the answer's
frame."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire.config import ServerConfig
from quire.errors import EngineDeadError, ModelNotFoundError, PoisonRequestError
from quire.outputs import RequestOutput
from quire.placement import Placement, Retain
from quire.sampling_params import PoolingParams, SamplingParams
from quire.server.beam import as_asked
from quire.server.deadlines import check_expired, deadline_of
from quire.server.engine_protocol import RequestStream, ServedAdapter, ServedModel, ServingEngine
from quire.server.errors import ApiError, bad_request, poison, replica_lost
from quire.server.live import Receive
from quire.server.middleware import Scope, owner_of, record_of, request_id_of, tenant_of
from quire.server.prompts import EncodedPrompt
from quire.server.record import Work
from quire.server.requests import DecodingFields, SamplingFields, StreamOptions
from quire.server.sampling import log_values
from quire.server.sse import Ending, EventStream
from quire.server.state import ServerState
from quire.structured.base import GrammarError, NoTokenLeftError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frame:
    """The fields that every chunk of one answer repeats."""

    id: str
    created: int
    model: str
    warnings: list[str]
    adapter: str | None = None
    """With which the answer is computed."""

    @classmethod
    def make(
        cls,
        prefix: str,
        model: ServedModel,
        warnings: list[str],
        *,
        name: str | None,
        separator: str = "-",
    ) -> Frame:
        """name: the model that was asked for, which `check_model` has found. The id is random and made here:
        text from a client is never used as a key."""
        adapter = None if name in model.names else name
        return cls(
            f"{prefix}{separator}{secrets.token_hex(16)}",
            int(time.time()),
            adapter or model.name,
            warnings,
            adapter,
        )


Params = SamplingParams | PoolingParams


class Queued(Protocol):
    """What every request may say about its place among the others."""

    @property
    def priority(self) -> int | None: ...
    @property
    def cache_salt(self) -> str | None: ...
    @property
    def timeout(self) -> float | None: ...


class Encoder(Protocol):
    """Turns outputs into JSON. Sans-IO, so that its tests need no server."""

    @property
    def frame(self) -> Frame: ...

    def chunk(self, prompt_index: int, output: RequestOutput) -> bytes:
        """Events for an output that holds only what is new; may be empty."""

    def last(self) -> bytes:
        """Events after all outputs: usage, if asked for."""

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The JSON of an answer that is not streamed; one finished output per prompt."""


def apply_server_flags(request: SamplingFields, config: ServerConfig) -> None:
    """Apply the server's flags that affect all requests."""
    if config.return_tokens_as_token_ids:
        request.return_tokens_as_token_ids = True
    if config.enable_force_include_usage and request.stream:
        options = request.stream_options or StreamOptions()
        request.stream_options = options.model_copy(update={"include_usage": True})


async def check_model(name: str | None, state: ServerState) -> ServedAdapter | None:
    """The adapter of this name; None for a name of the model, and for no name, which means the model.
    Raises `ModelNotFoundError` (a 404) for others."""
    engine = state.loaded_engine()
    names = engine.model.names
    if name is None or name in names:
        return None
    adapter = await engine.adapters.find(name)
    if adapter is None:
        raise ModelNotFoundError(
            f"The model `{name[:256]}` does not exist. Valid aliases: {', '.join(names)}.",
            param="model",
            value=name,
        )
    return adapter


def submit_all(
    engine: ServingEngine,
    prompts: Sequence[tuple[EncodedPrompt, Params]],
    request: Queued,
    frame: Frame,
    *,
    scope: Scope,
    retain: tuple[Retain, ...] = (),
) -> list[RequestStream]:
    """Submit all prompts or none: if one is refused, those before it are aborted. scope: of the HTTP request,
    which has the tenant, the deadline and the record. retain: of all of them.
    Raises a 429 `ApiError` if the tenant's quotas are used up."""
    record, tenant = record_of(scope), tenant_of(scope)
    record.streamed = isinstance(request, DecodingFields) and request.stream is True
    record.model, record.answer_id, record.params = frame.model, frame.id, prompts[0][1]
    deadline = deadline_of(record, request.timeout, streamed=record.streamed)
    base = Placement(
        priority=request.priority or 0, cache_salt=request.cache_salt, adapter=frame.adapter
    )
    lease = None
    if tenant is not None:
        base = tenant.place(base)
        lease = tenant.quotas.take(sum(most_tokens(prompt, params) for prompt, params in prompts))
    streams: list[RequestStream] = []
    try:
        for index, (prompt, params) in enumerate(prompts):
            wishes = prompt.retain + retain
            placement = msgspec.structs.replace(base, retain=wishes) if wishes else base
            stream = engine.submit(
                prompt.token_ids,
                as_asked(request, params, len(prompts)),
                request_id=f"{frame.id}-{index}" if len(prompts) > 1 else frame.id,
                placement=placement,
                thinking=prompt.thinking,
                deadline=deadline,
            )
            record.work.append(Work(stream, len(prompt.token_ids)))
            streams.append(
                stream if lease is None else lease.metered(stream, len(prompt.token_ids))
            )
    except BaseException:
        if lease is not None:
            lease.cancel()
        for stream in streams:
            stream.abort()
        raise
    record.on_work(record, request_id_of(scope))
    return streams


def most_tokens(prompt: EncodedPrompt, params: Params) -> int:
    """That a request may use."""
    n, output = (params.n, params.max_tokens or 0) if isinstance(params, SamplingParams) else (1, 0)
    return len(prompt.token_ids) + n * output


def log_request(
    state: ServerState,
    request: Request,
    frame: Frame,
    prompts: Sequence[tuple[EncodedPrompt, Params]],
) -> None:
    """One line per request when --enable-log-requests: sizes and parameters, never texts."""
    if state.config.enable_log_requests and prompts:
        params = prompts[0][1]
        logger.info(
            "request %s as %s: %d prompts, %d tokens, %s",
            request_id_of(request.scope),
            frame.id,
            len(prompts),
            sum(len(prompt.token_ids) for prompt, _ in prompts),
            log_values(params) if isinstance(params, SamplingParams) else params,
        )


async def respond(
    state: ServerState,
    request: Request,
    asked: SamplingFields,
    streams: Sequence[RequestStream],
    encoder: Encoder,
    *,
    events: AsyncGenerator[bytes, None] | None = None,
    ending: Ending | None = None,
) -> Response:
    """Run to the end, or stream. If the request ends early for any reason, it is aborted in the engine.

    events: what to stream instead of `encoded(streams, encoder)`.
    """
    headers = warning_headers(encoder.frame.warnings)
    if asked.stream:
        live = state.live.open(streams, answer_id=encoder.frame.id, owner=owner_of(request.scope))
        return EventStream(
            encoded(streams, encoder) if events is None else events,
            live=live,
            request_id=request_id_of(request.scope),
            keep_alive=state.config.sse_keep_alive_interval,
            headers=headers,
            ending=ending,
        )
    outputs = await run_to_end(state, request, streams, encoder.frame)
    return Response(encoder.whole(outputs), media_type="application/json", headers=headers)


async def run_to_end(
    state: ServerState,
    request: Request,
    streams: Sequence[RequestStream],
    frame: Frame,
    receive: Receive | None = None,
) -> list[RequestOutput]:
    """The final output of each stream. If the request ends early for any reason, all are aborted.

    receive: reports that the client has disconnected; the request's own if None.
    """
    live = state.live.open(streams, answer_id=frame.id, owner=owner_of(request.scope))
    try:
        return await live.run(_collect(streams), receive or request.receive)
    finally:
        live.close()


def warning_headers(warnings: list[str]) -> dict[str, str]:
    return {"x-quire-warnings": "; ".join(warnings)} if warnings else {}


async def _collect(streams: Sequence[RequestStream]) -> list[RequestOutput]:
    """The final output of each stream. One failure fails the request; the caller aborts the rest."""
    results = await asyncio.gather(*(_final(stream) for stream in streams))
    for output in results:
        raise_if_failed(output)
    check_expired(results)
    return results


async def _final(stream: RequestStream) -> RequestOutput:
    last: RequestOutput | None = None
    async for output in stream:
        last = output
    if last is None or not last.finished:
        raise ApiError(500, "The engine ended this request without an answer.")
    return last


def raise_if_failed(output: RequestOutput) -> None:
    """Raise an error for a request that failed in the engine. Constraints that leave no token may show up
    only during sampling; that is the client's mistake, so it is a 400 and not a 500."""
    if any(part.finish_reason == "error" for part in output.outputs):
        reason = output.error or "The engine failed on this request."
        if reason.startswith(GrammarError.BEGINNING):
            raise bad_request(reason, param="structured_outputs")
        if reason.startswith(EngineDeadError.REPLICA_LOST):
            raise replica_lost()
        if reason.startswith(PoisonRequestError.BEGINNING):
            raise poison(reason)
        if reason.startswith(NoTokenLeftError.BEGINNING):
            raise bad_request(reason, param=None)
        raise ApiError(500, reason)


async def encoded(
    streams: Sequence[RequestStream], encoder: Encoder
) -> AsyncGenerator[bytes, None]:
    answered = False
    async with aclosing(merge(streams)) as outputs:
        async for index, output in outputs:
            raise_if_failed(output)
            check_expired([output], answered=answered)
            answered = True
            data = encoder.chunk(index, output)
            if data:
                yield data
    data = encoder.last()
    if data:
        yield data


async def merge(
    streams: Sequence[RequestStream],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of all streams as they come, each with its stream's index."""
    if len(streams) == 1:  # the usual case needs no queue
        async for output in streams[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput] | BaseException | None] = asyncio.Queue(
        maxsize=2 * len(streams)
    )

    async def pump(index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                await queue.put((index, output))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
