"""Offline inference: `LLM(...).generate(prompts, params)`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import msgspec

from quire.config import EngineConfig, from_flat, without_foreign
from quire.engine.beam_search import BeamSearchOutput
from quire.engine.core_client import CoreProcess, InlineCore
from quire.engine.front_end import Effects, FrontEnd
from quire.engine.input_processor import EngineRequest, PromptInput
from quire.engine.offline import (
    Message,
    as_batch,
    as_beams,
    as_conversations,
    as_embedding,
    as_pairs,
    as_pooling,
    as_scores,
    for_each,
    lora_for_each,
    wants_special_tokens,
)
from quire.engine.progress import Progress
from quire.engine.replica_cores import ReplicaCores, start_cores
from quire.engine.setup import ServedModel, locate, resolve, serve_model
from quire.errors import ConfigError, EngineDeadError, InvalidParameterError
from quire.lora.request import LoRARequest
from quire.messages import (
    Answer,
    ControlAction,
    CoreFailed,
    EngineReady,
    LoadAdapter,
    ReadRecord,
    ResetPrefixCache,
    SchedulerStats,
    Sleep,
    WakeUp,
    describe_ledger,
)
from quire.messages.failures import error_of
from quire.outputs import (
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from quire.placement import Placement
from quire.sampling_params import (
    BeamSearchParams,
    PoolingParams,
    SamplingParams,
)
from quire.util.collector import collector_paused

if TYPE_CHECKING:
    from quire.metrics.reader import Metric
    from quire.scheduler.explanation import Explanation
    from quire.scheduler.history import History

logger = logging.getLogger(__name__)

MOST_KNOWN = 65_536
"""Requests that `LLM.explain` finds."""

Adapters = LoRARequest | Sequence[LoRARequest | None] | None
"""One for all prompts, or one or None per prompt."""


class LLM:
    """A model for offline use, with vLLM's interface.

    `LLM("path/or/hub-id", max_model_len=4096, ...)`; without a model, the built-in one. Keywords are the
    flags of `quire serve` with underscores, and those of vLLM that have no effect here. An unknown
    keyword raises `ConfigError`.

    engine: "inline" runs the model in this process, "process" in a child process. With
    `data_parallel_size` above 1 there are always child processes.

    Not thread-safe. Close it, or use it as a context manager, to free its memory; else that happens when
    it is garbage-collected. Ctrl-C ends a call between two steps, and the next call works.
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
        self._core: InlineCore | CoreProcess | ReplicaCores | None = None
        if engine == "process" or (engine == "inline" and config.parallel.data_parallel_size > 1):
            process = start_cores(config)
            self._core = process
            weakref.finalize(
                self, process.close
            )  # it must end when the last reference to the LLM is gone
            try:
                process.configure(config)
                self.model: ServedModel = serve_model(config, resolved)
                self.ready: EngineReady = process.wait_ready()
            except BaseException:
                process.close()
                raise
        elif engine == "inline":
            from quire.engine.assemble import build_core

            with collector_paused():
                self.model = serve_model(config, resolved)
                core, self.ready = build_core(config, resolved)
            self._core = InlineCore(core)
        else:
            raise InvalidParameterError(
                f"engine must be inline or process, got {engine!r}.", param="engine", value=engine
            )
        self.model = dataclasses.replace(self.model, max_model_len=self.ready.max_model_len)
        logger.info("memory: %s", describe_ledger(self.ready))
        self._front = FrontEnd(self.model, config.scheduler, final_only=True, lora=config.lora)
        weakref.finalize(self, self._front.close)
        self._num_submitted = 0
        self._sequence_ids: dict[str, list[int]] = {}
        """The core's ids of the latest requests."""
        self._enqueued: list[str] = []
        self._finished: dict[str, RequestOutput] = {}
        self._metrics = None
        if (
            given.get("disable_log_stats") is False
        ):  # as in vLLM: metrics take a tenth of a small model's time
            from prometheus_client import CollectorRegistry

            from quire.metrics import create_metrics

            self._metrics = CollectorRegistry(auto_describe=True)
            self._front.report_to(
                create_metrics(
                    self._metrics,
                    [None] * config.parallel.data_parallel_size,
                    model_name=self.model.name,
                    max_model_len=self.model.max_model_len,
                    max_adapters=config.lora.max_loras if config.lora.enable_lora else None,
                    max_drafts=config.max_drafts,
                )
            )
        try:
            self._load_modules()
        except BaseException:
            self.close()
            raise

    @property
    def stats(self) -> SchedulerStats:
        """The scheduler's state after the last step."""
        return self._front.stats

    # --- generation -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt. Outputs come in the order of the prompts.

        prompts: one, or a sequence: text, token ids, or a mapping (see `PromptInput`).
        sampling_params: one for all, or one per prompt; None is the model's defaults.
        lora_request: an adapter for all, or one or None per prompt; needs `enable_lora=True`.
        tokenization_kwargs: `add_special_tokens` is all it may hold.
        Raises `RequestError` before anything runs if any prompt or parameter is wrong, and `ModelError` if an
        adapter is.
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
        lora_request: Adapters = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, object] | None = None,
    ) -> list[str]:
        """As `generate`, without waiting: returns the requests' ids. `wait_for_completion` returns their
        outputs."""
        ids = self._queue(
            prompts, sampling_params, priority, lora_request, tokenization_kwargs or {}
        )
        self._enqueued += ids
        return ids

    def wait_for_completion(self, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """The outputs of all enqueued requests, in order."""
        ids, self._enqueued = self._enqueued, []
        return self._wait(ids, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answer one or more conversations with the model's chat template, which may show the model
        `tools`. Calls are part of the text; only the server parses them."""
        template = self.model.chat_template
        if template is None:
            raise InvalidParameterError(
                "The model has no chat template; pass chat_template=... to LLM.", param="messages"
            )
        batch: list[PromptInput] = [
            template.render(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **dict(chat_template_kwargs or {}),  # type: ignore[arg-type]
            )
            for conversation in as_conversations(messages)
        ]
        params = self._params_for(batch, sampling_params)
        ids = self._submit(
            batch,
            params,
            lora_request=lora_request,
            add_special_tokens=False,
            fit_max_tokens=sampling_params is None,
        )
        return self._wait(ids, use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: BeamSearchParams,
        *,
        lora_request: Adapters = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` likeliest continuations of each prompt, found by beam search, best first.

        concurrency_limit: most prompts that are searched at once.
        """
        batch = as_batch(prompts)
        limit = concurrency_limit or max(1, len(batch))
        adapters = lora_for_each(lora_request, len(batch))
        outputs: list[RequestOutput] = []
        with Progress(len(batch), enabled=use_tqdm) as progress:
            for start in range(0, len(batch), limit):
                part = batch[start : start + limit]
                loras = adapters[start : start + limit]
                ids = self._submit(part, [params] * len(part), lora_request=loras)
                outputs += self._wait(ids, use_tqdm=False)
                progress.advance(len(part))
        return [as_beams(output, self.model.tokenizer) for output in outputs]

    # --- vectors ----------------------------------------------------------------------------------

    def embed(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per prompt: the last token's hidden state (or the mean of all), of length 1."""
        outputs = self._pool(prompts, pooling_params, use_tqdm, lora_request)
        return [as_embedding(output) for output in outputs]

    def encode(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        pooling_task: Literal["embed"] = "embed",
    ) -> list[PoolingRequestOutput]:
        """The vectors of `embed`, in the format of vLLM's `encode`."""
        if pooling_task != "embed":
            raise InvalidParameterError(
                f"pooling_task must be embed, got {pooling_task!r}: there is one vector per prompt.",
                param="pooling_task", value=pooling_task,
            )  # fmt: skip
        outputs = self._pool(prompts, pooling_params, use_tqdm, lora_request)
        return [as_pooling(output) for output in outputs]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
    ) -> list[ScoringRequestOutput]:
        """The similarity of texts: the cosine of their vectors. 1:1, 1:N or N:N."""
        lefts, rights = as_pairs(data_1, data_2)
        outputs = self._pool([*lefts, *rights], pooling_params, use_tqdm, lora_request)
        return as_scores(outputs[: len(lefts)], outputs[len(lefts) :])

    # --- the engine -------------------------------------------------------------------------------

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of requests that have none: the model's defaults, else neutral ones."""
        return SamplingParams(**self.model.default_sampling)  # type: ignore[arg-type]

    def get_tokenizer(self) -> object:
        return self.model.tokenizer

    def get_metrics(self) -> list[Metric]:
        """The engine's metrics of the server's /metrics, as values.

        Raises `ConfigError` unless `disable_log_stats=False` was given, as in vLLM.
        """
        if self._metrics is None:
            raise ConfigError("get_metrics needs disable_log_stats=False.")
        from quire.metrics.reader import read_metrics

        return read_metrics(self._metrics)

    def explain(self, request: RequestOutput | str, index: int = 0) -> Explanation:
        """Why a request took the time that it took: `print(llm.explain(output))`. request: an output, its
        `request_id`, or the core's id ("r17"). index: of its n sequences.

        Raises `InvalidParameterError` if the decision record has nothing of it.
        """
        from quire.scheduler.explain import explain, parse_id

        name = request.request_id if isinstance(request, RequestOutput) else request
        own = parse_id(name) if name.startswith("r") else None
        ids = [own] if own is not None else self._sequence_ids.get(name, [])[index : index + 1]
        found = (explain(history, each) for history in self._histories() for each in ids)
        explanation = next((each for each in found if each is not None), None)
        if explanation is None:
            raise InvalidParameterError(
                f"the decision record has nothing of request {name!r}.", param="request", value=name
            )
        return explanation

    def timeline(
        self, path: str | os.PathLike[str] | None = None, *, seconds: float | None = None
    ) -> dict[str, object]:
        """What the engine did, as Chrome's trace events; written to `path`, which https://ui.perfetto.dev
        opens. seconds: the last ones only."""
        from quire.scheduler.timeline import timeline

        trace = timeline(self._histories(), seconds=seconds)
        if path is not None:
            Path(path).write_bytes(msgspec.json.encode(trace))
        return trace

    def _histories(self) -> list[History]:
        from quire.scheduler.record_reader import read

        return [read(each) for each in self.records()]

    def reset_prefix_cache(self) -> bool:
        """Drop all cached prefixes. Returns True."""
        self._control(ResetPrefixCache())
        return True

    def records(self) -> list[bytes]:
        """The record of decisions of each core, for `quire.scheduler.record_reader`."""
        return self._control(ReadRecord()).records

    def sleep(self, level: int = 1) -> None:
        """Free the memory of the KV cache (level 1) or also of the weights (2), until `wake_up`."""
        if level not in (1, 2):
            raise InvalidParameterError(
                f"level must be 1 or 2, got {level!r}.", param="level", value=level
            )
        if self._front.is_busy:
            raise InvalidParameterError(
                "sleep while requests run: wait_for_completion first.", param="level"
            )
        self._control(Sleep(level))

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Allocate the memory again. tags: vLLM's "weights" and "kv_cache"; both are always woken."""
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
        self._front.close()

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
        lora_request: Adapters,
        tokenization: Mapping[str, object],
    ) -> list[str]:
        batch = as_batch(prompts)
        params = self._params_for(batch, sampling_params)
        if priority is not None and len(priority) != len(batch):
            raise InvalidParameterError(
                f"priority has {len(priority)} entries for {len(batch)} prompts.",
                param="priority",
            )
        return self._submit(
            batch,
            params,
            priority,
            lora_request=lora_request,
            add_special_tokens=wants_special_tokens(tokenization),
            fit_max_tokens=sampling_params is None,
        )

    def _params_for(
        self,
        batch: Sequence[PromptInput],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> Sequence[SamplingParams]:
        given = self.get_default_sampling_params() if params is None else params
        return for_each(given, len(batch), SamplingParams, "sampling_params")

    def _pool(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: PoolingParams | Sequence[PoolingParams] | None,
        use_tqdm: bool,
        lora_request: Adapters,
    ) -> list[RequestOutput]:
        batch = as_batch(prompts)
        given = PoolingParams() if params is None else params
        each = for_each(given, len(batch), PoolingParams, "pooling_params")
        ids = self._submit(batch, each, lora_request=lora_request)
        return self._wait(ids, use_tqdm=use_tqdm)

    def _submit(
        self,
        prompts: Sequence[PromptInput],
        params: Sequence[SamplingParams | PoolingParams | BeamSearchParams],
        priorities: Sequence[int] | None = None,
        *,
        lora_request: Adapters = None,
        add_special_tokens: bool = True,
        fit_max_tokens: bool = False,
    ) -> list[str]:
        """Submit all requests or none: they are sent after all have been checked."""
        self._alive()
        requests: list[EngineRequest] = []
        adapters = lora_for_each(lora_request, len(prompts))
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            adapter = adapters[index]
            place = Placement(
                priority=priorities[index] if priorities is not None else 0,
                adapter=None if adapter is None else self._use(adapter),
            )
            request = self._front.read(
                prompt,
                param,
                request_id=str(self._num_submitted + index),
                placement=place,
                add_special_tokens=add_special_tokens,
                fit_max_tokens=fit_max_tokens,
            )
            if isinstance(param, SamplingParams):
                for warning in self._front.check_grammar(param):
                    logger.warning("%s", warning)
            requests.append(request)
        self._num_submitted += len(requests)
        for request in requests:
            sequences = [message.request_id for message in request.sequences]
            self._sequence_ids[request.request_id] = sequences
        while len(self._sequence_ids) > MOST_KNOWN:
            del self._sequence_ids[next(iter(self._sequence_ids))]
        ids = [request.request_id for request in requests]
        try:
            for request in requests:
                self._apply(self._front.start(request))
        except BaseException:  # Ctrl-C: no caller would wait for those that were sent
            self._abort(ids)
            raise
        return ids

    def _use(self, lora_request: LoRARequest) -> str:
        """The name under which the next request finds this adapter, which is read if it is new. Raises
        `InvalidParameterError` or `ModelError`."""
        registry = self._front.adapters
        adapter = registry.of(lora_request) or registry.read(lora_request)
        self._apply(Effects(send=registry.publish(adapter, replaces=False)))
        return adapter.name

    def _load_modules(self) -> None:
        """The adapters of `lora_modules`: proof that they can be served."""
        lora = self.config.lora
        for index, module in enumerate(lora.modules):
            request = self._front.adapters.new_request(module.name, module.path)
            self._use(request)
            if index < lora.capacity:
                adapter = self._front.adapters.named(module.name)
                self._control(LoadAdapter(adapter.key))

    def _wait(self, ids: Sequence[str], *, use_tqdm: bool) -> list[RequestOutput]:
        """Wait for these requests. Outputs of other, enqueued requests are kept for `wait_for_completion`."""
        missing = set(ids) - self._finished.keys()
        try:
            with Progress(len(ids), enabled=use_tqdm) as progress:
                progress.advance(len(ids) - len(missing))
                while missing:
                    for output in self._receive().outputs:
                        if output.request_id in missing:
                            missing.discard(output.request_id)
                            progress.advance(1, output)
        except BaseException:
            self._abort(self._front.request_ids)
            self._finished.clear()
            self._enqueued.clear()
            raise
        return [self._finished.pop(request_id) for request_id in ids]

    def _control(self, action: ControlAction) -> Answer:
        """Carry out a control call. Raises the error of the call."""
        self._alive()
        control = self._front.new_control(action)
        effects = self._apply(self._front.start_control(control))
        while not (answers := [a for a in effects.answers if a.id == control.id]):
            effects = self._receive()
        if answers[0].failure is not None:
            raise error_of(answers[0].failure)
        return answers[0]

    def _receive(self) -> Effects:
        """Wait for the core's next message and handle it."""
        message = self._alive().receive()
        assert message is not None
        if isinstance(message, CoreFailed):
            self._front.fail(message.failure.message)
            raise error_of(message.failure)
        return self._apply(self._front.take(message))

    def _apply(self, effects: Effects) -> Effects:
        core = self._alive()
        for message in effects.send:
            core.send(message)
        for output in effects.outputs:
            self._finished[output.request_id] = output
        return effects

    def _abort(self, request_ids: Sequence[str]) -> None:
        with contextlib.suppress(Exception):  # the engine has died: there is nothing to abort
            for message in self._front.abort(request_ids).send:
                self._alive().send(message)

    def _alive(self) -> InlineCore | CoreProcess | ReplicaCores:
        if self._core is None:
            raise EngineDeadError("This LLM is closed.")
        return self._core
