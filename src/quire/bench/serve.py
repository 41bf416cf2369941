"""`quire bench serve`: one run against a server, from options to figures."""

from __future__ import annotations

import asyncio
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec

from quire.bench.agents import Session, interactivity, schedule
from quire.bench.arrivals import arrival_times
from quire.bench.client import Exchange, HttpPool
from quire.bench.datasets import BenchRequest
from quire.bench.datasets.agents import AgentContents
from quire.bench.drafts import draft_figures, read_counts
from quire.bench.load import (
    LoadResult,
    Script,
    allow_many_sockets,
    run_async,
    run_load,
    run_sessions,
)
from quire.bench.metrics import RequestTimes, request_times, summary
from quire.bench.options import DatasetOptions, LoadOptions, TargetOptions
from quire.builtin import MODEL_DIR, MODEL_NAME
from quire.errors import CheckpointError, ConfigError, EngineError

if TYPE_CHECKING:
    from quire.text import Tokenizer

WARMUP_SEED = 0x5EED
WARMUP_CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class Target:
    """A server, the name of its model, and the tokenizer that makes and counts prompts."""

    options: TargetOptions
    model: str
    tokenizer_id: str
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class ServeRun:
    """The result of a run: `figures` by key, and the times and the text of each request."""

    figures: dict[str, object]
    times: list[RequestTimes]
    texts: list[str]


def find_target(options: TargetOptions) -> Target:
    """Ask the server for its model if none is given, and load the tokenizer.

    Raises `EngineError` if the server does not answer, `ConfigError` if there is no tokenizer.
    """
    model = options.model
    if model is None or options.ready_check_timeout_sec:
        listed = run_async(_first_model(options))
        model = model or listed
    tokenizer_id = options.tokenizer or model
    return Target(options, model, tokenizer_id, load_tokenizer(tokenizer_id))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a directory, a hub id, or the built-in model's name. Raises `ConfigError`."""
    from quire.text import Tokenizer
    from quire.weights.resolve import resolve_tokenizer
    from quire.weights.source import open_source

    try:
        if name == MODEL_NAME:
            return Tokenizer.from_directory(MODEL_DIR)
        return open_source(resolve_tokenizer(name)).tokenizer()
    except CheckpointError as error:
        raise ConfigError(
            f"no tokenizer for {name!r}: {error}. Give --tokenizer a directory or hub id; "
            f"{MODEL_NAME} is always there, and counts roughly."
        ) from None


def run_serve(
    target: Target,
    requests: Sequence[BenchRequest],
    load: LoadOptions,
    *,
    seed: int,
    percentiles: Sequence[float],
    slos: dict[str, float],
    send_ids: bool = False,
    on_done: Callable[[Exchange], None] = lambda exchange: None,
) -> ServeRun:
    """Send `requests` with the schedule of `load`, and compute the figures. Failures are counted, not
    raised."""
    _check_send_ids(target, send_ids)
    times = _due_times(requests, load, seed)
    pool = make_pool(target.options)

    def prepare(request: BenchRequest) -> bytes:
        return pool.prepare(target.options.path, request_body(target, request, send_ids=send_ids))

    drafts: dict[str, object] = {}
    prepared = [prepare(request) for request in requests]
    warmups = [prepare(request) for request in _warmups(target, requests, load.num_warmups)]

    async def main() -> LoadResult:
        zeros = [0.0] * len(warmups)
        await run_load(pool, warmups, zeros, max_concurrency=WARMUP_CONCURRENCY)
        before = await read_counts(pool)
        result = await run_load(
            pool, prepared, times, max_concurrency=load.max_concurrency, on_done=on_done
        )
        drafts.update(draft_figures(before, await read_counts(pool)))
        pool.close()
        return result

    allow_many_sockets()
    prompt_lens = [request.prompt_len for request in requests]
    run = _figures(target, prompt_lens, run_async(main()), percentiles, slos)
    return replace(run, figures=run.figures | drafts)


def run_agents(
    target: Target,
    dataset: DatasetOptions,
    load: LoadOptions,
    *,
    percentiles: Sequence[float],
    slos: dict[str, float],
    on_done: Callable[[Exchange], None] = lambda exchange: None,
) -> ServeRun:
    """As `run_serve`, for the dataset `agents`: closed-loop sessions. The requests of the result are all
    turns, session by session, and the figures have `interactivity`."""
    if load.request_rate != math.inf or load.ramp_up_strategy is not None:
        raise ConfigError(
            "request_rate and ramp_up_strategy do not go with agents, whose turns follow the answers; "
            "change --agents-sessions or --agents-think-time."
        )
    send_ids = dataset.prompt_token_ids
    _check_send_ids(target, send_ids)
    contents = AgentContents(target.tokenizer, dataset.seed)
    sessions = schedule(dataset.agents, dataset.seed)
    pool = make_pool(target.options)

    def request(session: Session, turn: int, answers: Sequence[str]) -> bytes:
        prompt: dict[str, object]
        if target.options.chat:
            prompt = {"messages": contents.messages(session, turn, answers)}
        elif send_ids:
            prompt = {"prompt": contents.token_ids(session, turn)}
        else:
            prompt = {"prompt": contents.text(session, turn, answers)}
        body = _encode_body(target, prompt, session.turns[turn].output_len)
        return pool.prepare(target.options.path, body)

    scripts = [Script(s.start, len(s.turns), partial(request, s)) for s in sessions]
    firsts = [
        BenchRequest("", contents.token_ids(session, 0), session.turns[0].output_len)
        for session in sessions
    ]
    warmups = [
        pool.prepare(target.options.path, request_body(target, warmup, send_ids=send_ids))
        for warmup in _warmups(target, firsts, load.num_warmups)
    ]

    async def main() -> LoadResult:
        await run_load(pool, warmups, [0.0] * len(warmups), max_concurrency=WARMUP_CONCURRENCY)
        before = await read_counts(pool)
        result = await run_sessions(
            pool,
            scripts,
            think_time=dataset.agents_think_time,
            max_concurrency=load.max_concurrency,
            on_done=on_done,
        )
        figures.update(draft_figures(before, await read_counts(pool)))
        pool.close()
        return result

    allow_many_sockets()
    figures: dict[str, object] = {}
    prompt_lens = [s.prompt_len(turn) for s in sessions for turn in range(len(s.turns))]
    run = _figures(target, prompt_lens, run_async(main()), percentiles, slos)
    done = [times for times in run.times if not times.error]
    figures |= {
        "sessions": len(sessions),
        "interactivity": interactivity([(t.e2el + t.sent - t.due, t.output_len) for t in done]),
    }
    return replace(run, figures=run.figures | figures)


def request_body(target: Target, request: BenchRequest, *, send_ids: bool = False) -> bytes:
    """The body of a request. Options that were not set are not sent."""
    if target.options.chat:
        prompt: dict[str, object] = {"messages": [{"role": "user", "content": request.text}]}
    else:
        prompt = {"prompt": request.token_ids if send_ids else request.text}
    return _encode_body(target, prompt, request.output_len)


def _encode_body(target: Target, prompt: dict[str, object], output_len: int) -> bytes:
    options = target.options
    body: dict[str, object] = {"model": options.served_model_name or target.model, **prompt}
    body["max_completion_tokens" if options.chat else "max_tokens"] = output_len
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    sampling = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "ignore_eos": options.ignore_eos or None,
    }
    body |= {name: value for name, value in sampling.items() if value is not None}
    return msgspec.json.encode(body | options.extra_body)


def make_pool(options: TargetOptions) -> HttpPool:
    headers = dict(pair.split("=", 1) for pair in options.header)
    key = options.api_key or os.environ.get("QUIRE_API_KEY") or os.environ.get("OPENAI_API_KEY")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return HttpPool(
        options.url, headers=headers, insecure=options.insecure, timeout=options.request_timeout
    )


async def _first_model(options: TargetOptions) -> str:
    """The first model of /v1/models. Waits for an answer up to the timeout of the ready check."""
    pool = make_pool(options)
    deadline = perf_counter() + options.ready_check_timeout_sec
    while True:
        answer = await pool.ask(pool.prepare("/v1/models"))
        if not answer.error and answer.status == 200:
            break
        if perf_counter() > deadline:
            raise EngineError(f"{options.url}/v1/models: {answer.error}.")
        await asyncio.sleep(0.2)
    pool.close()
    try:
        listed = msgspec.json.decode(bytes(answer.body), type=_Models).data
    except msgspec.DecodeError:
        listed = []
    if not listed:
        raise EngineError(f"{options.url}/v1/models lists no model; name one with --model.")
    return listed[0].id


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _check_send_ids(target: Target, send_ids: bool) -> None:
    if send_ids and target.options.chat:
        raise ConfigError("prompt_token_ids needs a completions endpoint; chat takes only text.")


def _due_times(requests: Sequence[BenchRequest], load: LoadOptions, seed: int) -> list[float]:
    if requests[0].due is None:
        return arrival_times(load, len(requests), seed=seed)
    if load.request_rate != math.inf or load.ramp_up_strategy is not None:
        raise ConfigError(
            "request_rate and ramp_up_strategy do not go with timed_trace, which has its own times; "
            "stretch those with --timed-trace-sec-multiplier."
        )
    return [request.due or 0.0 for request in requests]


def _warmups(target: Target, requests: Sequence[BenchRequest], count: int) -> list[BenchRequest]:
    """Warm-up requests: prompts of the same lengths with other words, so that the prefix cache has no
    hits."""
    if not count:
        return []
    from quire.bench.datasets.prompts import PromptMaker

    maker = PromptMaker(target.tokenizer, WARMUP_SEED)
    warmups = []
    for number in range(count):
        model = requests[number % len(requests)]
        text, ids = maker.prompt(maker.draw(maker.body_len(model.prompt_len)))
        warmups.append(BenchRequest(text, ids, model.output_len))
    return warmups


def _figures(
    target: Target,
    prompt_lens: Sequence[int],
    result: LoadResult,
    percentiles: Sequence[float],
    slos: dict[str, float],
) -> ServeRun:
    def count(text: str) -> int:
        return len(target.tokenizer.encode(text, add_special_tokens=False))

    times = [
        request_times(exchange, due=due, zero=result.start, prompt_len=prompt_len, count=count)
        for exchange, due, prompt_len in zip(result.exchanges, result.due, prompt_lens, strict=True)
    ]
    figures = summary(times, result.duration, percentiles=percentiles, slos=slos)
    done = [exchange for exchange in result.exchanges if not exchange.error]
    counted = all(exchange.completion_tokens is not None for exchange in done)
    figures["output_tokens_from"] = "usage" if counted else "tokenizer"
    figures["cached_input_tokens"] = sum(exchange.cached_tokens or 0 for exchange in done)
    figures["error_counts"] = dict(Counter(t.error for t in times if t.error).most_common(20))
    return ServeRun(figures, times, [exchange.text for exchange in result.exchanges])
