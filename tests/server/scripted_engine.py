"""An engine that says what a test tells it to: words as tokens, and a valve to hold it back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from quire.config import LoRAConfig
from quire.engine.adapters import AdapterRegistry
from quire.engine.async_adapters import AsyncAdapters
from quire.engine.input_processor import InputProcessor
from quire.errors import (
    EngineDeadError,
    InvalidParameterError,
    QueueFullError,
    QuireError,
)
from quire.messages import ControlAction, CoreInput, EngineReady, SchedulerStats, StepOutputs
from quire.metrics import MetricsSink, NullMetrics
from quire.outputs import CompletionOutput, Logprob, RequestOutput
from quire.placement import Placement
from quire.prefix_report import PrefixReport
from quire.sampling_params import (
    BeamSearchParams,
    PoolingParams,
    RequestOutputKind,
    SamplingParams,
)
from quire.structured.base import DEFAULT_LIMITS, Limits
from quire.text.parsing import ThinkingTokens
from quire.text.tokenizer_config import TokenizerConfig, TokenSpec

ANSWER = ["Hello", " there", ",", " world", "!"]


class WordTokenizer:
    """Every piece of text up to and including the next space is a token; id 1 is special."""

    special_texts = frozenset({"<eos>", "<bos>"})
    special_ids = frozenset({0, 1})

    def __init__(self) -> None:
        self.words: list[str] = ["<eos>", "<bos>"]
        self.threads: list[str] = []
        self.config = TokenizerConfig(named_tokens={"eos_token": TokenSpec("<eos>")})

    def encode(self, text, *, add_special_tokens=True, truncate_to=None, truncation_side="left"):
        self.threads.append(threading.current_thread().name)
        ids = [self.id(word) for word in _split(text)]
        if add_special_tokens and ids:
            ids = [1, *ids]
        if truncate_to is not None and len(ids) > truncate_to:
            ids = ids[-truncate_to:] if truncation_side == "left" else ids[:truncate_to]
        return ids

    def id(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def decode(self, ids, *, skip_special_tokens=True):
        return "".join(
            self.words[i]
            for i in ids
            if i < len(self.words) and not (skip_special_tokens and i < 2)
        )

    def token_str(self, token_id):
        return self.words[token_id] if token_id < len(self.words) else None

    def decode_token(self, token_id):
        return self.words[token_id] if token_id < len(self.words) else ""

    def token_bytes(self, token_id):
        return self.decode_token(token_id).encode()


def _split(text: str) -> list[str]:
    parts = text.split(" ")
    return [p + " " for p in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


class PlainTemplate:
    source = "{{ messages }}"
    prompt_end = "assistant:"

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []

    def render(
        self, messages, *, add_generation_prompt=True, continue_final_message=False, tools=None,
        documents=None, **kwargs,
    ):  # fmt: skip
        self.calls.append(kwargs | {"add_generation_prompt": add_generation_prompt})
        self.tools = tools
        for message in messages:
            if message["role"] == "villain":
                raise InvalidParameterError("Roles must alternate.", param="messages")
        text = "".join(f"{m['role']}: {m.get('content') or ''}\n" for m in messages)
        return text + (self.prompt_end if add_generation_prompt else "")


@dataclass
class FakeModel:
    names: tuple[str, ...] = ("tiny", "alias")
    max_model_len: int = 64
    vocab_size: int = 1000
    max_logprobs: int = 5
    created: int = 1_700_000_000
    eos_token_ids: tuple[int, ...] = (0,)
    grammars: Limits = DEFAULT_LIMITS
    default_sampling: dict[str, object] = field(default_factory=dict)
    tokenizer: WordTokenizer = field(default_factory=WordTokenizer)
    chat_template: PlainTemplate | None = field(default_factory=PlainTemplate)
    spec: None = None
    kv_transfer: None = None

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass
class FakeHealth:
    alive: bool = True
    heartbeat_age: float = 0.01
    reason: str = "ok"
    replicas: tuple[str, ...] = ("ok",)


@dataclass
class Submitted:
    prompt: list[int]
    params: SamplingParams | PoolingParams | BeamSearchParams
    request_id: str | None
    placement: Placement
    thinking: ThinkingTokens | None = None
    deadline: float | None = None


class FakeStream:
    def __init__(self, engine: ScriptedEngine, request_id: str, prompt: list[int], params) -> None:
        self.request_id = request_id
        n = getattr(params, "n", 1) if not isinstance(params, BeamSearchParams) else 0
        self.sequence_ids = [engine.num_sequences + index + 1 for index in range(n)]
        engine.num_sequences += n
        self.prompt, self.params, self.engine = prompt, params, engine
        self.aborted = asyncio.Event()
        self.aborts = 0
        self.ended = False
        self.last: RequestOutput | None = None

    def abort(self) -> None:
        if not self.ended:
            self.aborts += 1
            self.ended = True
            self.aborted.set()

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        try:
            async for output in self._outputs():
                self.last, self.ended = output, output.finished
                yield output
        finally:
            if not self.ended:
                self.abort()

    async def _outputs(self) -> AsyncIterator[RequestOutput]:
        if isinstance(self.params, PoolingParams):
            await self.engine.next_token()
            vector = None if self.aborts else self.engine.embed(self.prompt, self.params)
            yield RequestOutput(
                request_id=self.request_id, prompt=None, prompt_token_ids=self.prompt, outputs=[],
                finished=True, num_cached_tokens=0, embedding=vector,
            )  # fmt: skip
            return
        engine, params = self.engine, self.params
        n = params.n or (params.beam_width if isinstance(params, BeamSearchParams) else 1)
        if self.params.max_tokens == 0:
            await engine.next_token()
            nothing = [CompletionOutput(i, "", [], finish_reason="length") for i in range(n)]
            yield self._output(nothing, finished=True)
            return
        words = engine.answer[: self.params.max_tokens]
        ids = [engine.model.tokenizer.id(word) for word in words]
        # Beams are known at the end.
        if (
            getattr(params, "output_kind", RequestOutputKind.FINAL_ONLY)
            is RequestOutputKind.FINAL_ONLY
        ):
            await engine.next_token()
            if self.aborts:
                yield self._aborted(n)
                return
            parts = [self._part(i, "".join(words), ids, "stop") for i in range(n)]
            yield self._output(parts, finished=True)
            return
        for position, (word, token) in enumerate(zip(words, ids, strict=True)):
            await engine.next_token(position)
            if self.aborts:
                yield self._aborted(n)
                return
            last = position == len(words) - 1
            parts = [self._part(i, word, [token], "stop" if last else None) for i in range(n)]
            yield self._output(parts, finished=last)

    def _aborted(self, n: int) -> RequestOutput:
        parts = [
            CompletionOutput(index=i, text="", token_ids=[], finish_reason="abort")
            for i in range(n)
        ]
        return self._output(parts, finished=True)

    def _part(self, index, text, ids, finish) -> CompletionOutput:
        reason = self.engine.finish_reason if finish else None
        logprobs = None
        if getattr(self.params, "logprobs", None) is not None:  # beams have none
            asked = self.params.logprob_token_ids or ()
            logprobs = [_position(i, self.params.logprobs, asked) for i in ids]
        return CompletionOutput(
            index=index, text=text, token_ids=ids, logprobs=logprobs, finish_reason=reason
        )

    def _output(self, parts, *, finished) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id, prompt=None, prompt_token_ids=self.prompt, outputs=parts,
            finished=finished, num_cached_tokens=2, error=self.engine.error_text,
            prompt_logprobs=self._prompt_logprobs(), prefix=self.engine.prefix,
            kv_transfer_params=self.engine.kv_transfer_params if finished else None,
        )  # fmt: skip

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        top = getattr(self.params, "prompt_logprobs", None)
        if top is None:
            return None
        start = self.params.prompt_logprob_start or 1
        return [
            _position(token, top) if index >= max(1, start) else None
            for index, token in enumerate(self.prompt)
        ]


def _position(token: int, top: int, asked: Sequence[int] = ()) -> dict[int, Logprob]:
    """The sampled token ranks second; token 0 first; the third is impossible."""
    best = {0: Logprob(-0.1, 1), token: Logprob(-0.7, 2), 1: Logprob(float("-inf"), 3)}
    kept = {i: best[i] for i in [*list(best)[:top], *asked] if i in best}
    return kept | {token: best[token]}


class ScriptedEngine:
    """Implements `ServingEngine`.

    `hold()` closes the valve: no token comes until `release()`. `fail_at` raises at that token.
    """

    def __init__(self, *, lora: LoRAConfig = LoRAConfig(), **model: object) -> None:
        self.model = FakeModel(**model)
        self.checks = InputProcessor(self.model)  # the real one: rules are nobody's to script
        self.ready = EngineReady(
            num_blocks=101, block_size=16, max_model_len=64, vocab_size=1000, ledger=[]
        )
        self.stats = SchedulerStats()
        self.registry = AdapterRegistry(lora, self.model)
        self.sent: list[CoreInput] = []
        self.controls: list[ControlAction] = []
        self.adapters = AsyncAdapters(
            self.registry, self.model.names, self.sent.extend, self._control
        )
        self.health_now = FakeHealth()
        self.is_dead = False
        self.answer = list(ANSWER)
        self.finish_reason = "stop"
        self.prefix: PrefixReport | None = None
        self.error_text: str | None = None
        self.submitted: list[Submitted] = []
        self.streams: list[FakeStream] = []
        self.metrics: MetricsSink = NullMetrics()
        self.refuse: QuireError | Exception | None = None
        self.refuse_after = 0
        self.grammar_warnings: Sequence[str] = ()
        self.kv_transfer_params: dict[str, object] | None = None
        """Of the answer to a request that asks to hold KV."""
        self.grammar_threads: list[str] = []
        self.fail_at: int | None = None
        self.failure: Exception = EngineDeadError("core exited: secret detail")
        self.shut_down = False
        self.resets = 0
        self.num_sequences = 0
        self.kept_records: list[bytes] = []
        self._open = asyncio.Event()
        self._open.set()

    async def _control(self, action: ControlAction) -> None:
        self.controls.append(action)

    async def records(self) -> list[bytes]:
        return self.kept_records

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def next_token(self, position: int = 0) -> None:
        await asyncio.sleep(0)
        if self.fail_at is not None and position >= self.fail_at:
            raise self.failure
        await self._open.wait()
        if self.is_dead:
            raise self.failure

    def die(self, reason: str) -> None:
        self.is_dead = True
        self.failure = EngineDeadError(reason)
        self.health_now = FakeHealth(alive=False, reason=reason)
        self._open.set()

    def submit(
        self,
        prompt,
        params,
        *,
        request_id=None,
        placement=Placement(),
        thinking=None,
        deadline=None,
    ) -> FakeStream:
        if self.refuse is not None and len(self.submitted) >= self.refuse_after:
            raise self.refuse
        sampled = params if isinstance(params, SamplingParams) else SamplingParams(max_tokens=1)
        self.checks.process(prompt, sampled, placement=placement)
        self.submitted.append(Submitted(prompt, params, request_id, placement, thinking, deadline))
        stream = FakeStream(self, request_id or "r", prompt, params)
        self.streams.append(stream)
        return stream

    def embed(self, prompt: list[int], params: PoolingParams) -> list[float]:
        """Which of the first eight words a prompt has, counted; token ids from 2 on."""
        vector = [float(sum(i % 8 == d for i in prompt if i > 1)) for d in range(8)]
        vector = vector[: params.dimensions]
        length = sum(x * x for x in vector) ** 0.5 if params.normalize else 1.0
        return [x / (length or 1.0) for x in vector]

    async def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    def check_grammar(self, params: SamplingParams) -> Sequence[str]:
        self.grammar_threads.append(threading.current_thread().name)
        if params.structured_outputs.regex == "(":
            raise InvalidParameterError("regex is broken.", param="structured_outputs")
        if "broken" in str(params.structured_outputs.structural_tag):
            raise InvalidParameterError("a schema is broken.", param="structured_outputs")
        return self.grammar_warnings

    def health(self, timeout: float) -> FakeHealth:
        if self.health_now.heartbeat_age > timeout:
            return FakeHealth(False, self.health_now.heartbeat_age, "silent")
        return self.health_now

    def add_stats_listener(self, callback: Callable[[StepOutputs], None]) -> None:
        self.stats_listener = callback

    def attach_metrics(self, metrics: MetricsSink, *, log_prefixes: bool = False) -> None:
        self.metrics = metrics

    async def shutdown(self) -> None:
        self.shut_down = True


def queue_full() -> QueueFullError:
    return QueueFullError("The queue is full: 5 of 5.", retry_after=2.4)


def data_lines(body: str | bytes) -> list[str]:
    """The payloads of an SSE body, in order; asserts that it is well formed."""
    text = body.decode() if isinstance(body, bytes) else body
    assert text.endswith("\n\n")
    events = text.split("\n\n")[:-1]
    assert all(e.startswith(("data: ", ":")) for e in events), events
    return [e.removeprefix("data: ") for e in events if e.startswith("data: ")]


def texts(chunks: Sequence[dict]) -> dict[int, str]:
    """Choice index -> text of a completion stream."""
    out: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            out[choice["index"]] = out.get(choice["index"], "") + choice["text"]
    return out
