"""Offline inference: `LLM(...).generate(prompts, params)`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal

from quire.config import EngineConfig, from_flat
from quire.engine.core_client import CoreProcess, InlineCore, failure_of
from quire.engine.input_processor import EngineRequest, InputProcessor, PromptInput
from quire.engine.output_processor import OutputProcessor
from quire.engine.setup import ServedModel, locate, resolve, serve_model
from quire.errors import EngineDeadError, InvalidParameterError
from quire.messages import (
    AbortRequests,
    CoreFailed,
    CoreOutput,
    EngineReady,
    ResetPrefixCache,
    SchedulerStats,
    StepOutputs,
    describe_ledger,
)
from quire.outputs import RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)

Message = Mapping[str, object]


class LLM:
    """A model for offline use, with vLLM's interface.

    `LLM("path/or/hub-id", max_model_len=4096, ...)`; without a model, the built-in one. Keywords are the
    flags of `quire serve` with underscores; an unknown one raises `ConfigError`.

    engine: "inline" runs the model in this process; "process" gives it one of its own.

    Not thread-safe. Close it, or use it as a context manager, to give its memory back.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        engine: Literal["inline", "process"] = "inline",
        **options: object,
    ) -> None:
        config = locate(from_flat({"model": model, **options}))
        self.config: EngineConfig = config
        resolved = resolve(config)
        self._core: InlineCore | CoreProcess | None = None
        if engine == "process":
            process = CoreProcess(kernels=config.runtime.kernels)
            self._core = process
            try:
                process.configure(config)
                self.model: ServedModel = serve_model(config, resolved)
                self.ready: EngineReady = process.wait_ready()
            except BaseException:
                process.close()
                raise
        elif engine == "inline":
            from quire.engine.build import build_core

            self.model = serve_model(config, resolved)
            core, self.ready = build_core(config, resolved)
            self._core = InlineCore(core)
        else:
            raise InvalidParameterError(
                f"engine must be inline or process, got {engine!r}.", param="engine", value=engine
            )
        logger.info("memory: %s", describe_ledger(self.ready))
        self._input = InputProcessor(self.model)
        self._output = OutputProcessor(self.model.tokenizer)
        self._num_submitted = 0
        self.stats = SchedulerStats()
        """The scheduler's state after the last step."""

    # --- generation -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt. Outputs come in the order of the prompts.

        prompts: one, or a sequence: text, token ids, or a mapping (see `PromptInput`).
        sampling_params: one for all, or one per prompt; None is the model's defaults.
        Raises `RequestError` before anything runs if any prompt or parameter is wrong.
        """
        batch = _as_batch(prompts)
        params = self._params_for(batch, sampling_params)
        priorities = list(priority) if priority is not None else [0] * len(batch)
        if len(priorities) != len(batch):
            raise InvalidParameterError(
                f"priority has {len(priorities)} entries for {len(batch)} prompts.",
                param="priority",
            )
        return self._run(batch, params, priorities, add_special_tokens=True, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template."""
        template = self.model.chat_template
        if template is None:
            raise InvalidParameterError(
                "The model has no chat template; pass chat_template=... to LLM.", param="messages"
            )
        conversations: list[Sequence[Message]] = (
            [messages]  # type: ignore[list-item]
            if messages and isinstance(messages[0], Mapping)
            else list(messages)  # type: ignore[arg-type]
        )
        batch: list[PromptInput] = [
            template.render(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **dict(chat_template_kwargs or {}),  # type: ignore[arg-type]
            )
            for conversation in conversations
        ]
        params = self._params_for(batch, sampling_params)
        return self._run(
            batch, params, [0] * len(batch), add_special_tokens=False, use_tqdm=use_tqdm
        )

    def get_default_sampling_params(self) -> SamplingParams:
        """What requests get that bring no parameters: the model's own, else neutral."""
        return SamplingParams(**self.model.default_sampling)  # type: ignore[arg-type]

    def get_tokenizer(self) -> object:
        return self.model.tokenizer

    def reset_prefix_cache(self) -> None:
        self._alive().send(ResetPrefixCache())

    def close(self) -> None:
        """Free the model and the KV cache. Idempotent."""
        core, self._core = self._core, None
        if core is not None:
            core.close()

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

    def _run(
        self,
        prompts: Sequence[PromptInput],
        params: Sequence[SamplingParams],
        priorities: Sequence[int],
        *,
        add_special_tokens: bool,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        core = self._alive()
        requests: list[EngineRequest] = []
        for prompt, param, priority in zip(prompts, params, priorities, strict=True):
            requests.append(
                self._input.process(
                    prompt,
                    param.replace(output_kind=RequestOutputKind.FINAL_ONLY),
                    request_id=str(self._num_submitted + len(requests)),
                    priority=priority,
                    add_special_tokens=add_special_tokens,
                )
            )
        self._num_submitted += len(requests)
        for request in requests:
            self._output.add(request)
            for sequence in request.sequences:
                core.send(sequence)
        try:
            finished = self._collect(core, len(requests), use_tqdm)
        except BaseException:
            self._abort_all(core)
            raise
        return [finished[request.request_id] for request in requests]

    def _collect(
        self, core: InlineCore | CoreProcess, count: int, use_tqdm: bool
    ) -> dict[str, RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        with _Progress(count, enabled=use_tqdm) as progress:
            while len(finished) < count:
                message = core.receive()
                outputs = self._process(core, message)
                for output in outputs:
                    finished[output.request_id] = output
                    progress.advance(output)
        return finished

    def _process(
        self, core: InlineCore | CoreProcess, message: CoreOutput | None
    ) -> list[RequestOutput]:
        if isinstance(message, CoreFailed):
            self._output.fail_all(message.message)
            raise failure_of(message)
        if not isinstance(message, StepOutputs):
            return []
        self.stats = message.stats or self.stats
        processed = self._output.process(message)
        if processed.aborts:
            core.send(AbortRequests(processed.aborts))
        return processed.outputs

    def _abort_all(self, core: InlineCore | CoreProcess) -> None:
        for request_id in list(self._output.requests):
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
        if len(params) != len(batch):
            raise InvalidParameterError(
                f"sampling_params has {len(params)} entries for {len(batch)} prompts; "
                "pass one for all, or one per prompt.",
                param="sampling_params",
            )
        return params


def _as_batch(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    """A lone prompt becomes a batch of one. A sequence of ints is a prompt, of anything else a batch."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


class _Progress:
    """tqdm with tokens per second, or nothing."""

    def __init__(self, count: int, *, enabled: bool) -> None:
        self._bar = None
        self._tokens = 0
        if enabled:
            from tqdm import tqdm

            self._bar = tqdm(total=count, desc="Processed prompts", dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, output: RequestOutput) -> None:
        if self._bar is None:
            return
        self._tokens += sum(len(sequence.token_ids) for sequence in output.outputs)
        elapsed = self._bar.format_dict["elapsed"]
        if elapsed > 0:
            self._bar.set_postfix_str(f"{self._tokens / elapsed:.1f} output tok/s", refresh=False)
        self._bar.update(1)
