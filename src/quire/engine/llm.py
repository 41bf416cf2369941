"""Offline inference: `LLM(...).generate(prompts, params)`."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from operator import mul
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from quire.config import EngineConfig, from_flat, without_foreign
from quire.engine.beam_search import BeamSearch, BeamSearchOutput, candidates, step_params
from quire.engine.controls import Controls
from quire.engine.core_client import CoreProcess, InlineCore
from quire.engine.failures import error_of
from quire.engine.input_processor import EngineRequest, InputProcessor, PromptInput
from quire.engine.output_processor import OutputProcessor
from quire.engine.setup import ServedModel, locate, resolve, serve_model
from quire.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    EngineSleepingError,
    InvalidParameterError,
)
from quire.messages import (
    AbortRequests,
    Answer,
    ControlAction,
    CoreFailed,
    CoreOutput,
    EngineReady,
    ResetPrefixCache,
    SchedulerStats,
    Sleep,
    StepOutputs,
    WakeUp,
    describe_ledger,
)
from quire.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from quire.placement import Placement
from quire.sampling_params import (
    BeamSearchParams,
    PoolingParams,
    SamplingParams,
)
from quire.structured.checker import GrammarChecker

if TYPE_CHECKING:
    from quire.metrics.reader import Metric

logger = logging.getLogger(__name__)

Message = Mapping[str, object]
Params = SamplingParams | PoolingParams


class LLM:
    """A model for offline use, with vLLM's interface.

    `LLM("path/or/hub-id", max_model_len=4096, ...)`; without a model, the built-in one. Keywords are the
    flags of `quire serve` with underscores, and vLLM's where they ask for nothing we do not do; an unknown
    one raises `ConfigError`.

    engine: "inline" runs the model in this process; "process" gives it one of its own.

    Not thread-safe. Close it, or use it as a context manager, to give its memory back; without, that happens
    when it is garbage-collected. Ctrl-C ends a call between two steps, and the next call works.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        engine: Literal["inline", "process"] = "inline",
        **options: object,
    ) -> None:
        own, notes = without_foreign(options)
        for note in notes:
            logger.warning(note)
        given = {name: value for name, value in own.items() if value is not None}
        config = locate(from_flat({"model": model, **given}))
        self.config: EngineConfig = config
        resolved = resolve(config)
        self._core: InlineCore | CoreProcess | None = None
        if engine == "process":
            process = CoreProcess(kernels=config.runtime.kernels)
            self._core = process
            weakref.finalize(self, process.close)  # a name bound anew must not leave it running
            try:
                process.configure(config)
                self.model: ServedModel = serve_model(config, resolved)
                self.ready: EngineReady = process.wait_ready()
            except BaseException:
                process.close()
                raise
        elif engine == "inline":
            from quire.engine.assemble import build_core

            self.model = serve_model(config, resolved)
            core, self.ready = build_core(config, resolved)
            self._core = InlineCore(core)
        else:
            raise InvalidParameterError(
                f"engine must be inline or process, got {engine!r}.", param="engine", value=engine
            )
        self.model = dataclasses.replace(self.model, max_model_len=self.ready.max_model_len)
        logger.info("memory: %s", describe_ledger(self.ready))
        self._input = InputProcessor(self.model, has_head=self.model.spec.has_head)
        self._output = OutputProcessor(self.model.tokenizer, final_only=True)
        self._num_submitted = 0
        self._enqueued: list[str] = []
        self._finished: dict[str, RequestOutput] = {}
        self._controls = Controls()
        self._grammars: GrammarChecker | None = None
        self._metrics = None
        if (
            given.get("disable_log_stats") is False
        ):  # as in vLLM: counting costs a small model a tenth
            from prometheus_client import CollectorRegistry

            from quire.metrics.engine_metrics import EngineMetrics

            self._metrics = CollectorRegistry(auto_describe=True)
            self._output.metrics = EngineMetrics(
                self._metrics,
                model_name=self.model.name,
                max_model_len=self.model.max_model_len,
            )
        self.stats = SchedulerStats()
        """The scheduler's state after the last step."""

    # --- generation -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt. Outputs come in the order of the prompts.

        prompts: one, or a sequence: text, token ids, or a mapping (see `PromptInput`).
        sampling_params: one for all, or one per prompt; None is the model's defaults.
        lora_request: only None; adapters are not served.
        tokenization_kwargs: `add_special_tokens` is all it may hold.
        Raises `RequestError` before anything runs if any prompt or parameter is wrong.
        """
        ids = self._queue(
            prompts, sampling_params, priority, lora_request, tokenization_kwargs or {}
        )
        return self._wait(ids, use_tqdm=use_tqdm)

    def enqueue(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, object] | None = None,
    ) -> list[str]:
        """As `generate`, without waiting: the requests' ids. `wait_for_completion` has their outputs."""
        ids = self._queue(
            prompts, sampling_params, priority, lora_request, tokenization_kwargs or {}
        )
        self._enqueued += ids
        return ids

    def wait_for_completion(self, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """The outputs of all that was enqueued, in that order."""
        ids, self._enqueued = self._enqueued, []
        return self._wait(ids, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template, which may show the model
        `tools`. What it calls is in the text; only the server takes that apart."""
        template = self.model.chat_template
        if template is None:
            raise InvalidParameterError(
                "The model has no chat template; pass chat_template=... to LLM.", param="messages"
            )
        conversations: list[Sequence[Message]] = (
            [messages]  # type: ignore[list-item]
            if isinstance(messages, str) or (messages and isinstance(messages[0], (str, Mapping)))
            else list(messages)  # type: ignore[arg-type]
        )
        batch: list[PromptInput] = [
            template.render(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **dict(chat_template_kwargs or {}),  # type: ignore[arg-type]
            )
            for conversation in conversations
        ]
        params = self._params_for(batch, sampling_params)
        ids = self._submit(
            batch, params, add_special_tokens=False, fit_max_tokens=sampling_params is None
        )
        return self._wait(ids, use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: BeamSearchParams,
        *,
        lora_request: None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` likeliest continuations of each prompt that a beam search finds, best first.

        concurrency_limit: most prompts that are searched from at once.
        """
        _refuse_lora(lora_request)
        batch = _as_batch(prompts)
        limit = concurrency_limit or max(1, len(batch))
        outputs: list[BeamSearchOutput] = []
        with _Progress(len(batch), enabled=use_tqdm) as progress:
            for start in range(0, len(batch), limit):
                outputs += self._search(batch[start : start + limit], params)
                progress.advance(len(outputs) - start)
        return outputs

    # --- vectors ----------------------------------------------------------------------------------

    def embed(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per prompt: the last token's hidden state (or the mean of all), of length 1."""
        return [
            EmbeddingRequestOutput(
                output.request_id,
                EmbeddingOutput(_vector(output)),
                output.prompt_token_ids,
                num_cached_tokens=output.num_cached_tokens,
            )
            for output in self._pool(prompts, pooling_params, use_tqdm, lora_request)
        ]

    def encode(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        pooling_task: Literal["embed"] = "embed",
    ) -> list[PoolingRequestOutput]:
        """The vectors of `embed`, in the shape of vLLM's `encode`."""
        if pooling_task != "embed":
            raise InvalidParameterError(
                f"pooling_task must be embed, got {pooling_task!r}: there is one vector per prompt.",
                param="pooling_task", value=pooling_task,
            )  # fmt: skip
        return [
            PoolingRequestOutput(
                output.request_id,
                PoolingOutput(_vector(output)),
                output.prompt_token_ids,
                num_cached_tokens=output.num_cached_tokens,
            )
            for output in self._pool(prompts, pooling_params, use_tqdm, lora_request)
        ]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
    ) -> list[ScoringRequestOutput]:
        """How alike texts are: the cosine of their vectors. 1:1, 1:N or N:N."""
        lefts = [data_1] if isinstance(data_1, str) else list(data_1)
        rights = [data_2] if isinstance(data_2, str) else list(data_2)
        if len(lefts) not in (1, len(rights)):
            raise InvalidParameterError(
                f"data_1 and data_2 must be 1:1, 1:N or N:N, got {len(lefts)}:{len(rights)}.",
                param="data_2",
            )
        outputs = self._pool([*lefts, *rights], pooling_params, use_tqdm, lora_request)
        pairs = zip(
            outputs[: len(lefts)] * (len(rights) // len(lefts)), outputs[len(lefts) :], strict=True
        )
        return [
            ScoringRequestOutput(
                right.request_id,
                ScoringOutput(max(-1.0, min(1.0, sum(map(mul, _vector(left), _vector(right)))))),
                [*left.prompt_token_ids, *right.prompt_token_ids],
                num_cached_tokens=(left.num_cached_tokens or 0) + (right.num_cached_tokens or 0),
            )
            for left, right in pairs
        ]

    # --- the engine -------------------------------------------------------------------------------

    def get_default_sampling_params(self) -> SamplingParams:
        """What requests get that bring no parameters: the model's own, else neutral."""
        return SamplingParams(**self.model.default_sampling)  # type: ignore[arg-type]

    def get_tokenizer(self) -> object:
        return self.model.tokenizer

    def get_metrics(self) -> list[Metric]:
        """Every metric that the server's /metrics has of an engine, as values.

        Raises `ConfigError` unless `disable_log_stats=False` was given, as in vLLM.
        """
        if self._metrics is None:
            raise ConfigError("get_metrics needs disable_log_stats=False.")
        from quire.metrics.reader import read_metrics

        return read_metrics(self._metrics)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. Returns True."""
        self._control(ResetPrefixCache())
        return True

    def sleep(self, level: int = 1) -> None:
        """Give back the KV cache's memory (1), or the weights' too (2), until `wake_up`."""
        if level not in (1, 2):
            raise InvalidParameterError(
                f"level must be 1 or 2, got {level!r}.", param="level", value=level
            )
        if self._output.requests:
            raise InvalidParameterError(
                "sleep while requests run: wait_for_completion first.", param="level"
            )
        self._control(Sleep(level))

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Serve again. tags: vLLM's names of what to wake, "weights" and "kv_cache"; all is woken at once."""
        for tag in tags or ():
            if tag not in ("weights", "kv_cache"):
                raise InvalidParameterError(
                    f"tags may hold weights and kv_cache, got {tag!r}.", param="tags", value=tag
                )
        self._control(WakeUp())

    def close(self) -> None:
        """Free the model and the KV cache. Idempotent."""
        core, self._core = self._core, None
        if core is not None:
            core.close()
        if self._grammars is not None:
            self._grammars.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- inside -----------------------------------------------------------------------------------

    def _queue(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        lora_request: None,
        tokenization: Mapping[str, object],
    ) -> list[str]:
        _refuse_lora(lora_request)
        if tokenization.keys() - {"add_special_tokens"}:
            raise InvalidParameterError(
                f"tokenization_kwargs may hold add_special_tokens, got {sorted(tokenization)}.",
                param="tokenization_kwargs",
            )
        batch = _as_batch(prompts)
        params = self._params_for(batch, sampling_params)
        if priority is not None and len(priority) != len(batch):
            raise InvalidParameterError(
                f"priority has {len(priority)} entries for {len(batch)} prompts.",
                param="priority",
            )
        special = tokenization.get("add_special_tokens", True) is not False
        return self._submit(
            batch, params, priority,
            add_special_tokens=special, fit_max_tokens=sampling_params is None,
        )  # fmt: skip

    def _run(
        self,
        prompts: Sequence[PromptInput],
        params: Sequence[Params],
        *,
        add_special_tokens: bool = True,
        use_tqdm: bool = False,
        max_logprobs: int | None = None,
    ) -> list[RequestOutput]:
        ids = self._submit(
            prompts, params, add_special_tokens=add_special_tokens, max_logprobs=max_logprobs
        )
        return self._wait(ids, use_tqdm=use_tqdm)

    def _submit(
        self,
        prompts: Sequence[PromptInput],
        params: Sequence[Params],
        priorities: Sequence[int] | None = None,
        *,
        add_special_tokens: bool = True,
        max_logprobs: int | None = None,
        fit_max_tokens: bool = False,
    ) -> list[str]:
        """All or none: a request is sent when every one has been checked."""
        core = self._alive()
        if self._controls.is_sleeping:
            raise EngineSleepingError("The engine sleeps; call wake_up() first.")
        requests: list[EngineRequest] = []
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            request = self._input.process(
                prompt,
                param,
                request_id=str(self._num_submitted + index),
                placement=Placement(priority=priorities[index] if priorities is not None else 0),
                add_special_tokens=add_special_tokens,
                max_logprobs=max_logprobs,
                fit_max_tokens=fit_max_tokens,
            )
            if isinstance(param, SamplingParams):
                self._check_grammar(param)
            requests.append(request)
        self._num_submitted += len(requests)
        try:
            for request in requests:
                self._output.add(request)
                for sequence in request.sequences:
                    core.send(sequence)
        except BaseException:  # Ctrl-C: nobody would wait for those that were sent
            self._abort(core, [request.request_id for request in requests])
            raise
        return [request.request_id for request in requests]

    def _wait(self, ids: Sequence[str], *, use_tqdm: bool) -> list[RequestOutput]:
        """Outputs of others, which were enqueued, are kept for whoever waits for them."""
        core = self._alive()
        missing = set(ids) - self._finished.keys()
        try:
            with _Progress(len(ids), enabled=use_tqdm) as progress:
                progress.advance(len(ids) - len(missing))
                while missing:
                    for output in self._process(core, core.receive()):
                        self._finished[output.request_id] = output
                        if output.request_id in missing:
                            missing.discard(output.request_id)
                            progress.advance(1, output)
        except BaseException:
            self._abort(core, list(self._output.requests))
            self._finished.clear()
            self._enqueued.clear()
            raise
        return [self._finished.pop(request_id) for request_id in ids]

    def _check_grammar(self, params: SamplingParams) -> None:
        """Raises `InvalidParameterError` for one that cannot be compiled; each is tried once."""
        wanted = self._input.grammar(params)
        if wanted is None:
            return
        if self._grammars is None:
            self._grammars = GrammarChecker(
                self.model.tokenizer,
                vocab_size=self.model.vocab_size,
                eos_token_ids=self.model.eos_token_ids,
            )
            weakref.finalize(self, self._grammars.close)
        self._grammars.check(wanted.spec)
        for warning in wanted.warnings:
            logger.warning("%s", warning)

    def _search(
        self, prompts: Sequence[PromptInput], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """One search per prompt, all of them a token further in each round."""
        searches, salts = [], []
        for prompt in prompts:
            request = self._input.process(prompt, params)
            searches.append(
                BeamSearch(
                    request.prompt_token_ids, params, self.model.eos_token_ids, request.max_tokens
                )
            )
            salt = request.placement.cache_salt
            salts.append({} if salt is None else {"cache_salt": salt})
        step = step_params(params, self.model.vocab_size)
        while active := [(s, salt) for s, salt in zip(searches, salts, strict=True) if not s.done]:
            beams: list[PromptInput] = [
                {"prompt_token_ids": beam.tokens, **salt} for s, salt in active for beam in s.live
            ]
            outputs = iter(self._run(beams, [step] * len(beams), max_logprobs=-1))
            for search, _ in active:
                search.advance([candidates(next(outputs)) for _ in search.live])
        results = [BeamSearchOutput(search.best()) for search in searches]
        for result in results:
            for beam in result.sequences:
                beam.text = self.model.tokenizer.decode(beam.tokens, skip_special_tokens=False)
        return results

    def _pool(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: PoolingParams | Sequence[PoolingParams] | None,
        use_tqdm: bool,
        lora_request: None,
    ) -> list[RequestOutput]:
        _refuse_lora(lora_request)
        batch = _as_batch(prompts)
        if params is None or isinstance(params, PoolingParams):
            params = [params or PoolingParams()] * len(batch)
        elif len(params) != len(batch):
            raise InvalidParameterError(
                f"pooling_params has {len(params)} entries for {len(batch)} prompts; "
                "pass one for all, or one per prompt.",
                param="pooling_params",
            )
        return self._run(batch, params, use_tqdm=use_tqdm)

    def _control(self, action: ControlAction) -> None:
        """Carry out a control call. Raises what it raised."""
        core = self._alive()
        control = self._controls.new(action)
        for call in self._controls.start(control, busy=False):
            core.send(call)
        while True:
            message = core.receive()
            for output in self._process(core, message):
                self._finished[output.request_id] = output
            # The answer of another id is to a call that Ctrl-C ended.
            if isinstance(message, Answer) and message.id == control.id:
                break
        if message.failure is not None:
            raise error_of(message.failure)

    def _process(
        self, core: InlineCore | CoreProcess, message: CoreOutput | None
    ) -> list[RequestOutput]:
        if isinstance(message, CoreFailed):
            self._output.fail_all(message.failure.message)
            raise error_of(message.failure)
        if isinstance(message, Answer):
            self._controls.take(message)
            self._output.metrics.on_sleep_state(message.sleep_level)
        if not isinstance(message, StepOutputs):
            return []
        self.stats = message.stats or self.stats
        processed = self._output.process(message)
        if processed.aborts:
            core.send(AbortRequests(processed.aborts))
        return processed.outputs

    def _abort(self, core: InlineCore | CoreProcess, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if request_id not in self._output.requests:
                continue
            ids, _ = self._output.abort(request_id)
            try:
                core.send(AbortRequests(ids))
            except Exception:  # the engine is gone: nothing is left to abort
                return

    def _alive(self) -> InlineCore | CoreProcess:
        if self._core is None:
            raise EngineDeadError("This LLM is closed.")
        return self._core

    def _params_for(
        self,
        batch: Sequence[PromptInput],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> Sequence[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * len(batch)
        if isinstance(params, (str, Mapping)) or not isinstance(params, Sequence):
            raise InvalidParameterError(
                "sampling_params must be SamplingParams(...) or a list of them, "
                f"got {type(params).__name__}.",
                param="sampling_params",
            )
        if len(params) != len(batch):
            raise InvalidParameterError(
                f"sampling_params has {len(params)} entries for {len(batch)} prompts; "
                "pass one for all, or one per prompt.",
                param="sampling_params",
            )
        return params


def _refuse_lora(lora_request: object) -> None:
    if lora_request is not None:
        raise InvalidParameterError(
            "lora_request is not supported; merge the adapter into the checkpoint.",
            param="lora_request",
        )


def _vector(output: RequestOutput) -> list[float]:
    if output.embedding is None:
        raise EngineError(output.error or "The request ended without a vector.")
    return output.embedding


def _as_batch(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    """A lone prompt becomes a batch of one. A sequence of ints is a prompt, of anything else a batch."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise InvalidParameterError(
            "prompts must be text, token ids, a mapping with one of these, or a list of such prompts, "
            f"got {type(prompts).__name__}.",
            param="prompts",
        )
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


class _Progress:
    """tqdm with tokens per second, or nothing."""

    def __init__(self, count: int, *, enabled: bool) -> None:
        self._bar = None
        self._tokens = 0
        if enabled:
            import warnings

            # A widget in a notebook that can show one; having none is nothing to warn of.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from tqdm.auto import tqdm

            self._bar = tqdm(total=count, desc="Processed prompts", dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int, output: RequestOutput | None = None) -> None:
        if self._bar is None:
            return
        if output is not None:
            self._tokens += sum(len(sequence.token_ids) for sequence in output.outputs)
            elapsed = self._bar.format_dict["elapsed"]
            if elapsed > 0 and self._tokens:
                rate = f"{self._tokens / elapsed:.1f} output tok/s"
                self._bar.set_postfix_str(rate, refresh=False)
        self._bar.update(count)
