"""The front end of an engine core, without I/O: requests and control calls become messages for the core, its
messages become outputs and answers.

`LLM` and `AsyncLLM` are shells around one `FrontEnd`. They send its messages, wait, and pass on what it
returns. All decisions about requests are made here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from quire.config import LoRAConfig, SchedulerConfig
from quire.engine.adapters import AdapterRegistry
from quire.engine.admission import Admission
from quire.engine.beam_search import SearchRequest
from quire.engine.controls import Controls
from quire.engine.input_processor import EngineRequest, InputProcessor, PromptInput
from quire.engine.output_processor import OutputProcessor
from quire.engine.replicas import merged_stats
from quire.engine.setup import ServedModel
from quire.errors import (
    EngineDeadError,
    EngineSleepingError,
    InvalidParameterError,
)
from quire.messages import (
    AbortRequests,
    Answer,
    Control,
    ControlAction,
    CoreInput,
    CoreOutput,
    SchedulerStats,
    StepOutputs,
    WakeUp,
)
from quire.metrics import MetricsSink
from quire.outputs import RequestOutput
from quire.placement import Placement
from quire.sampling_params import BeamSearchParams, PoolingParams, SamplingParams
from quire.structured.checker import GrammarChecker
from quire.text.parsing.base import ThinkingTokens

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Effects:
    """The effects of a call or of a message from the core. The messages must be sent in this order."""

    send: list[CoreInput] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)
    """For the callers of their requests, in this order."""
    answers: list[Answer] = field(default_factory=list)
    """To control calls."""


class FrontEnd:
    """The live requests and calls between callers and one engine core. Only `check_grammar` is
    thread-safe."""

    def __init__(
        self,
        model: ServedModel,
        limits: SchedulerConfig,
        *,
        final_only: bool = False,
        lora: LoRAConfig = LoRAConfig(),
    ) -> None:
        """final_only: one output per request, whatever its `output_kind`."""
        self.model = model
        self.stats = SchedulerStats()
        """The scheduler's state after the last step; of several, their sum."""
        self._stats_of: dict[int, SchedulerStats] = {}
        self.dead: EngineDeadError | None = None
        """The error with which the engine died, if it did."""
        self.adapters = AdapterRegistry(lora, model)
        self._checker = GrammarChecker(
            model.tokenizer, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids
        )
        self._input = InputProcessor(model, has_head=model.spec.has_head)
        self._output = OutputProcessor(
            model.tokenizer,
            stream_interval=limits.stream_interval,
            final_only=final_only,
            max_drafts=model.max_drafts,
        )
        self._controls = Controls()
        self._searches: dict[str, SearchRequest] = {}
        self._search_of_beam: dict[str, SearchRequest] = {}
        self._admission = Admission(limits, self._output)

    # --- requests ---------------------------------------------------------------------------------

    @property
    def request_ids(self) -> list[str]:
        """The ids of the live requests, without the beams of searches."""
        plain = [i for i in self._output.requests if i not in self._search_of_beam]
        return [*plain, *self._searches]

    @property
    def is_busy(self) -> bool:
        return bool(self._output.requests or self._searches or self._controls.is_loading)

    def read(
        self,
        prompt: PromptInput,
        params: SamplingParams | PoolingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        placement: Placement = Placement(),
        add_special_tokens: bool = True,
        thinking: ThinkingTokens | None = None,
        fit_max_tokens: bool = False,
        deadline: float | None = None,
    ) -> EngineRequest:
        """Validate and tokenize a request, to be passed to `start`. `placement.adapter` is a name here, of
        which the request gets the current version. deadline: seconds of `time.monotonic()` after which it
        ends with "expired" if it has only waited, else "timeout".

        Raises `RequestError`, `EngineSleepingError`, or `EngineDeadError` if the engine has died.
        """
        self._check_alive()
        if self.is_sleeping:
            raise EngineSleepingError(
                "The engine sleeps; wake it up first (wake_up(), or POST /wake_up)."
            )
        if request_id in self._searches or request_id in self._output.requests:
            raise InvalidParameterError(
                f"request_id {request_id!r} is in use.", param="request_id", value=request_id
            )
        placement, lora_request = self.adapters.place(placement)
        return self._input.process(
            prompt,
            params,
            request_id=request_id,
            placement=placement,
            add_special_tokens=add_special_tokens,
            thinking=thinking,
            fit_max_tokens=fit_max_tokens,
            lora_request=lora_request,
            deadline=deadline,
        )

    def check_grammar(self, params: SamplingParams) -> Sequence[str]:
        """Compile the grammar once, in a process that can be killed: the engine core, which compiles it
        again, must not get one that never finishes. Blocks; may be called from any thread. Returns
        warnings for the client.

        Raises `InvalidParameterError` with the reason.
        """
        wanted = self._input.grammar(params)
        if wanted is None:
            return ()
        self._checker.check(wanted.spec)
        return wanted.warnings

    def check_queue(self, request: EngineRequest) -> None:
        """Raises `QueueFullError` if too much would wait with `request`, or it too long."""
        self._admission.check(request)

    def start(self, request: EngineRequest) -> Effects:
        """Queue a request. It then ends with exactly one finished output, unless the engine dies."""
        self._check_alive()
        effects = Effects()
        if isinstance(request.params, BeamSearchParams):
            search = SearchRequest(request, request.params, self.model)
            self._searches[request.request_id] = search
            self._extend(search, effects)
        else:
            self._output.add(request)
            self._admission.sent(request)
            effects.send += request.sequences
        return effects

    def _extend(self, search: SearchRequest, effects: Effects) -> None:
        """Request one more token for each beam. Beams are not refused because of a full queue or a
        pending sleep."""
        beams = []
        for token_ids in search.beams():
            beam = self._input.process(
                token_ids,
                search.step_params,
                placement=search.request.placement,
                max_logprobs=-1,
                deadline=search.request.deadline,
            )
            self._output.add(beam)
            self._search_of_beam[beam.request_id] = search
            effects.send += map(search.placed, beam.sequences)
            beams.append(beam.request_id)
        search.start_round(beams)

    def abort(self, request_ids: Iterable[str]) -> Effects:
        """End requests now. Unknown or finished ids are ignored."""
        effects = Effects()
        ended: list[int] = []
        for request_id in request_ids:
            if request_id in self._search_of_beam:
                continue  # a beam ends with its search
            search = self._searches.pop(request_id, None)
            for plain_id in search.waiting if search is not None else [request_id]:
                sequence_ids, output = self._output.abort(plain_id)
                ended += sequence_ids
                if self._search_of_beam.pop(plain_id, None) is None and output is not None:
                    effects.outputs.append(output)
            if search is not None:
                effects.outputs.append(search.output("abort"))
        if ended and self.dead is None:
            effects.send.append(AbortRequests(ended))
        return self.settle(effects)

    # --- control calls ----------------------------------------------------------------------------

    @property
    def is_sleeping(self) -> bool:
        """Whether the engine sleeps or is about to: it refuses requests."""
        return self._controls.is_sleeping

    def new_control(self, action: ControlAction) -> Control:
        """A control call with a new id, to be passed to `start_control`."""
        self._check_alive()
        return self._controls.new(action)

    def start_control(self, control: Control) -> Effects:
        """A sleep is held until no request is left; a wake-up ends the held sleeps."""
        effects = Effects()
        if isinstance(control.action, WakeUp):
            effects.answers += self._controls.call_off()
        effects.send += self._controls.start(control, busy=self.is_busy)
        return effects

    def cancel_control(self, control: Control) -> None:
        """The caller no longer waits. If the call was sent, it is carried out."""
        self._controls.cancel(control.id)

    # --- the core's messages ----------------------------------------------------------------------

    def take(self, message: CoreOutput) -> Effects:
        """Handle one message, except `CoreFailed`, which is for `fail`."""
        effects = Effects()
        if isinstance(message, StepOutputs):
            self.stats = merged_stats(self._stats_of, message)
            self._admission.reported(self.stats)
            processed = self._output.process(message)
            if processed.aborts:
                effects.send.append(AbortRequests(processed.aborts))
            for output in processed.outputs:
                search = self._search_of_beam.pop(output.request_id, None)
                if search is None:
                    effects.outputs.append(output)
                elif search.take(output):
                    self._go_on(search, effects)
            for answer in message.answers:
                self._take_answer(answer, effects)
        elif isinstance(message, Answer):
            self._take_answer(message, effects)
        return self.settle(effects)

    def _take_answer(self, answer: Answer, effects: Effects) -> None:
        self._controls.take(answer)
        self.metrics.on_sleep_state(answer.sleep_level)
        effects.answers.append(answer)

    def _go_on(self, search: SearchRequest, effects: Effects) -> None:
        """Continue a search after a round."""
        if search.is_done:
            del self._searches[search.request.request_id]
            effects.outputs.append(search.output())
        else:
            self._extend(search, effects)

    def settle(self, effects: Effects) -> Effects:
        """Add the effects of requests having ended, and of changes of `adapters`."""
        if not self.is_busy:
            effects.send += self._controls.release()
        used = (search.request.placement.adapter for search in self._searches.values())
        effects.send += self.adapters.take_dropped(used)
        return effects

    def fail(self, message: str) -> None:
        """The engine has died: all live requests end without an output, and later ones are refused."""
        if self.dead is None:
            self.dead = EngineDeadError(message)
            self._output.fail_all(message)
            self._searches.clear()
            self._search_of_beam.clear()

    def _check_alive(self) -> None:
        if self.dead is not None:
            raise EngineDeadError(str(self.dead))

    def close(self) -> None:
        """End the processes that check grammars. Idempotent."""
        self._checker.close()

    @property
    def metrics(self) -> MetricsSink:
        return self._output.metrics

    def report_to(self, metrics: MetricsSink, *, log_prefixes: bool = False) -> None:
        self._output.metrics, self._output.log_prefixes = metrics, log_prefixes
