"""From the core's token ids to `RequestOutput`s: text, stop strings, logprobs, times. Sans I/O."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.decoding import Task
from quire.engine.handoff import to_params
from quire.engine.input_processor import EngineRequest
from quire.engine.queue_share import Held
from quire.messages import FinishReason, RequestUpdate, StepOutputs, TokenLogprobs
from quire.metrics import FinishedRequest, MetricsSink, NullMetrics
from quire.outputs import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    RequestSpecDecodeMetrics,
    RequestStateStats,
)
from quire.prefix_report import PrefixReport
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.text.detokenizer import IncrementalDetokenizer
from quire.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sequence:
    """One of a request's n sequences."""

    request_id: int
    index: int
    detokenizer: IncrementalDetokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    last_token_ts: float = 0.0
    drafts: RequestSpecDecodeMetrics | None = None
    sent: int = 0
    """Tokens already in a DELTA output."""


@dataclass(slots=True)
class RequestState:
    """One request of a caller, while it lives."""

    request: EngineRequest
    params: SamplingParams | None
    """None for a request for a vector."""
    kind: RequestOutputKind
    sequences: list[_Sequence]
    metrics: RequestStateStats
    prefix: PrefixReport | None = None
    error: str | None = None
    replica: int = 0
    is_queued: bool = True
    """No token of output so far."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """As far as they are known; None if they were not requested."""
    embedding: list[float] | None = None
    kv_transfer_params: dict[str, object] | None = None
    held: dict[int, str] = field(default_factory=dict)
    """Sequence index -> text that is buffered because of the stream interval."""

    @property
    def num_cached_tokens(self) -> int:
        return 0 if self.prefix is None else self.prefix.cached

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)


@dataclass(slots=True)
class Processed:
    """The result of one message of the core."""

    outputs: list[RequestOutput]
    aborts: list[int]
    """Sequences that ended here (by a stop string) and must end in the core too."""


class OutputProcessor:
    """Keeps every live request's text and history."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        metrics: MetricsSink | None = None,
        stream_interval: int = 1,
        final_only: bool = False,
        max_drafts: int = 0,
    ) -> None:
        """stream_interval: tokens per output, for requests that do not set it.
        final_only: one output per request, whatever its `output_kind`."""
        self._tokenizer = tokenizer
        self._stream_interval = stream_interval
        self._final_only = final_only
        self._max_drafts = max_drafts
        self.metrics: MetricsSink = metrics or NullMetrics()
        self.log_prefixes = False
        """Whether each request's `PrefixReport` is logged with its first token."""
        self._states: dict[int, tuple[RequestState, _Sequence]] = {}
        self.requests: dict[str, RequestState] = {}
        self.live_sequences = Held()
        """That run or wait."""
        self.queued_requests, self.queued_tokens = Held(), Held()
        """Those without output so far, and their prompts' tokens."""

    def add(self, request: EngineRequest) -> RequestState:
        """Add a request. Its id must be unique among live ones."""
        params = request.params if isinstance(request.params, SamplingParams) else None
        kind = RequestOutputKind.FINAL_ONLY
        if params is not None and not self._final_only:
            kind = params.output_kind
        sequences = []
        for index, message in enumerate(request.sequences):
            detokenizer = None
            if params is not None and params.detokenize:
                detokenizer = IncrementalDetokenizer(
                    self._tokenizer,
                    prompt_token_ids=request.prompt_token_ids[-32:],
                    skip_special_tokens=params.skip_special_tokens,
                    spaces_between_special_tokens=params.spaces_between_special_tokens,
                    stop=params.stop_strings,
                    include_stop_str_in_output=params.include_stop_str_in_output,
                    min_tokens=params.min_tokens,
                )
            sequence = _Sequence(message.request_id, index, detokenizer)
            if message.decoding.logprobs is not None:
                sequence.logprobs, sequence.cumulative_logprob = [], 0.0
            if self._max_drafts and params is not None:
                sequence.drafts = RequestSpecDecodeMetrics(self._max_drafts)
            sequences.append(sequence)
        stats = RequestStateStats(arrival_time=time.time(), arrival_ts=request.arrival_ts)
        state = RequestState(request, params, kind, sequences, stats)
        asked = request.sequences[0].decoding
        if asked.prompt_logprobs is not None:
            first = asked.first_prompt_logprob
            state.prompt_logprobs = [None] * min(first, len(request.prompt_token_ids))
        self.requests[request.request_id] = state
        for sequence in sequences:
            self._states[sequence.request_id] = (state, sequence)
        tenant, weight = request.placement.tenant, request.placement.weight
        self.live_sequences.add(tenant, weight, len(sequences))
        self.queued_requests.add(tenant, weight, 1)
        self.queued_tokens.add(tenant, weight, len(request.prompt_token_ids))
        return state

    def process(self, outputs: StepOutputs) -> Processed:
        """Apply a step. Returns an output for each request that has a new one."""
        self.metrics.on_step(outputs)
        processed = Processed([], [])
        touched: dict[str, tuple[RequestState, dict[int, str]]] = {}
        for update in outputs.updates:
            known = self._states.get(update.request_id)
            if known is None:
                continue  # it has ended here already: by a stop string, or aborted
            state, sequence = known
            state.replica = outputs.replica
            self._note_prompt(state, update)
            if not update.new_token_ids and update.finish_reason is None:
                continue  # only prompt logprobs, which are not complete yet
            try:
                delta = self._apply(state, sequence, update, outputs.timestamp, processed)
            except Exception:
                # An error in one request's text ends only that request.
                logger.exception("request %s failed in output processing", update.request_id)
                state.error = "The server failed to process this request's output."
                processed.aborts.extend(self._end(state, FinishReason.ERROR))
                delta = ""
            _, deltas = touched.setdefault(state.request.request_id, (state, {}))
            deltas[sequence.index] = deltas.get(sequence.index, "") + delta
        for state, deltas in touched.values():
            if state.finished:
                self._close(state)
            if self._waits_for_more(state, deltas):
                continue
            output = _show(state, deltas)
            if output is not None:
                processed.outputs.append(output)
        return processed

    def _waits_for_more(self, state: RequestState, deltas: dict[int, str]) -> bool:
        """True if the output is buffered, because there are fewer than stream_interval new tokens. If
        False, `deltas` includes the buffered text. The first and the last output are never buffered."""
        if state.params is None or state.kind is not RequestOutputKind.DELTA:
            return False
        interval = state.params.stream_interval or self._stream_interval
        if interval == 1:
            return False
        for index, text in deltas.items():
            state.held[index] = state.held.get(index, "") + text
        new = sum(len(s.token_ids) - s.sent for s in state.sequences)
        if new < interval and any(s.sent for s in state.sequences) and not state.finished:
            return True
        deltas.update(state.held)
        state.held.clear()
        return False

    def abort(self, request_id: str) -> tuple[list[int], RequestOutput | None]:
        """End a request here. Returns the core's ids to abort, and the last output."""
        state = self.requests.get(request_id)
        if state is None:
            return [], None
        return self._end(state, FinishReason.ABORT), _show(state, _all_indices(state))

    def fail_all(self, message: str) -> None:
        """The engine has died: all live requests end with this error."""
        for state in list(self.requests.values()):
            state.error = message
            self._end(state, FinishReason.ERROR)

    def _end(self, state: RequestState, reason: FinishReason) -> list[int]:
        ids = []
        for sequence in state.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = reason
                ids.append(sequence.request_id)
                self._forget(state, sequence)
        self._close(state)
        return ids

    def _apply(
        self,
        state: RequestState,
        sequence: _Sequence,
        update: RequestUpdate,
        timestamp: float,
        processed: Processed,
    ) -> str:
        """Apply one sequence's update; returns the released text."""
        self._note_times(state, sequence, update, timestamp)
        token_ids = update.new_token_ids
        finish, stop_reason = update.finish_reason, update.stop_token
        if update.error is not None:
            state.error = update.error
        delta = ""
        if sequence.detokenizer is not None and state.params is not None:
            by_token = finish is FinishReason.STOP
            hidden = by_token and not state.params.include_stop_str_in_output
            visible = token_ids[:-1] if hidden else token_ids
            result = sequence.detokenizer.push(visible, final=finish is not None)
            delta = result.delta
            if result.stop is not None:
                token_ids = token_ids[: result.stop.num_tokens]
                if finish is None:
                    processed.aborts.append(sequence.request_id)
                finish, stop_reason = FinishReason.STOP, None
                sequence.stop_reason = result.stop.stop_string
        sequence.token_ids.extend(token_ids)
        if update.drafts is not None and sequence.drafts is not None:
            sequence.drafts.observe(*update.drafts)
        state.metrics.num_generation_tokens += len(token_ids)
        self._note_logprobs(state, sequence, (update.logprobs or [])[: len(token_ids)])
        if finish is not None:
            sequence.finish_reason = finish
            if stop_reason is not None:
                sequence.stop_reason = stop_reason
            state.metrics.num_preemptions += update.num_preemptions
            self._forget(state, sequence)
        return delta

    def _forget(self, state: RequestState, sequence: _Sequence) -> None:
        """A sequence has ended."""
        if self._states.pop(sequence.request_id, None) is not None:
            self.live_sequences.remove(state.request.placement.tenant, 1)

    def _leaves_queue(self, state: RequestState) -> None:
        if state.is_queued:
            state.is_queued = False
            tenant = state.request.placement.tenant
            self.queued_requests.remove(tenant, 1)
            self.queued_tokens.remove(tenant, len(state.request.prompt_token_ids))

    def _note_times(
        self, state: RequestState, sequence: _Sequence, update: RequestUpdate, timestamp: float
    ) -> None:
        stats = state.metrics
        if update.times is not None and stats.scheduled_ts == 0.0:
            stats.queued_ts, stats.scheduled_ts = update.times.queued, update.times.scheduled
        if update.prefix is not None and state.prefix is None:
            state.prefix = update.prefix
        if not update.new_token_ids:
            if state.request.task is not Task.GENERATE and update.prefix is not None:
                self._count_prompt(state, None)
            return
        if stats.first_token_ts == 0.0:
            stats.first_token_ts = timestamp
            self._leaves_queue(state)
            stats.first_token_latency = timestamp - stats.arrival_ts
            self._count_prompt(state, stats.first_token_latency)
        if sequence.last_token_ts:
            gap = (timestamp - sequence.last_token_ts) / len(update.new_token_ids)
            for _ in update.new_token_ids:
                self.metrics.on_token_gap(gap)
        sequence.last_token_ts = stats.last_token_ts = timestamp

    def _count_prompt(self, state: RequestState, ttft_seconds: float | None) -> None:
        if self.log_prefixes:
            logger.info("request %s: prompt: %s", state.request.request_id, state.prefix)
        self.metrics.on_first_token(
            ttft_seconds,
            prompt_tokens=len(state.request.prompt_token_ids),
            cached_tokens=state.num_cached_tokens,
            external_tokens=0 if state.prefix is None else state.prefix.external,
        )

    def _note_prompt(self, state: RequestState, update: RequestUpdate) -> None:
        if update.embedding is not None:
            state.embedding = update.embedding
        if update.kv_source is not None:
            state.kv_transfer_params = to_params(update.kv_source, state.request.request_id)
        if update.prompt_logprobs is not None and state.prompt_logprobs is not None:
            also = state.request.sequences[0].decoding.logprob_token_ids
            state.prompt_logprobs += [
                self._position(entry, also) for entry in update.prompt_logprobs.entries
            ]

    def _note_logprobs(
        self, state: RequestState, sequence: _Sequence, entries: Sequence[TokenLogprobs]
    ) -> None:
        if sequence.logprobs is None or sequence.cumulative_logprob is None:
            return
        also = state.request.sequences[0].decoding.logprob_token_ids
        for entry in entries:
            sequence.cumulative_logprob += entry.logprob
            sequence.logprobs.append(self._position(entry, also))

    def _position(self, entry: TokenLogprobs, also: list[int]) -> dict[int, Logprob]:
        """also: the tokens of `asked_logprobs`."""
        name = self._tokenizer.decode_token
        position = {
            token: Logprob(value, rank, name(token))
            for rank, (token, value) in enumerate(
                zip(entry.top_ids, entry.top_logprobs, strict=True), start=1
            )
        }
        if entry.token_id not in position:
            position[entry.token_id] = Logprob(entry.logprob, entry.rank, name(entry.token_id))
        for token, value in zip(also, entry.asked_logprobs, strict=False):
            position.setdefault(token, Logprob(value, None, name(token)))
        return position

    def _close(self, state: RequestState) -> None:
        if self.requests.pop(state.request.request_id, None) is None:
            return
        self._leaves_queue(state)
        stats, request = state.metrics, state.request
        first_reason = state.sequences[0].finish_reason
        assert first_reason is not None
        self.metrics.on_finished(
            FinishedRequest(
                prompt_tokens=len(request.prompt_token_ids),
                generation_tokens=stats.num_generation_tokens,
                cached_tokens=state.num_cached_tokens,
                finish_reason=first_reason.value,
                arrival_ts=stats.arrival_ts,
                queued_ts=stats.queued_ts,
                scheduled_ts=stats.scheduled_ts,
                first_token_ts=stats.first_token_ts,
                last_token_ts=stats.last_token_ts,
                finished_ts=time.monotonic(),
                num_preemptions=stats.num_preemptions,
                n=len(state.sequences),
                max_tokens=None if state.params is None else state.params.max_tokens,
                max_generation_tokens=max(len(s.token_ids) for s in state.sequences),
                replica=state.replica,
            )
        )


def _all_indices(state: RequestState) -> dict[int, str]:
    return {index: state.held.get(index, "") for index in range(len(state.sequences))}


def _show(state: RequestState, deltas: dict[int, str]) -> RequestOutput | None:
    """The output for the caller, or None. deltas: the released text of each sequence that changed."""
    finished = state.finished
    if state.kind is RequestOutputKind.FINAL_ONLY and not finished:
        return None
    if state.kind is RequestOutputKind.DELTA:
        outputs = [_delta(state.sequences[index], text) for index, text in sorted(deltas.items())]
    else:
        outputs = [_cumulative(sequence) for sequence in state.sequences]
    return RequestOutput(
        request_id=state.request.request_id,
        prompt=state.request.prompt,
        prompt_token_ids=state.request.prompt_token_ids,
        outputs=outputs,
        finished=finished,
        metrics=state.metrics,
        num_cached_tokens=None if state.prefix is None else state.prefix.cached,
        prefix=state.prefix,
        prompt_logprobs=state.prompt_logprobs,
        embedding=state.embedding,
        error=state.error,
        lora_request=state.request.lora_request,
        kv_transfer_params=state.kv_transfer_params,
    )


def _cumulative(sequence: _Sequence) -> CompletionOutput:
    text = sequence.detokenizer.text if sequence.detokenizer is not None else ""
    logprobs = sequence.logprobs
    return _completion(sequence, text, list(sequence.token_ids), logprobs and list(logprobs))


def _delta(sequence: _Sequence, text: str) -> CompletionOutput:
    start, sequence.sent = sequence.sent, len(sequence.token_ids)
    logprobs = sequence.logprobs[start:] if sequence.logprobs is not None else None
    return _completion(sequence, text, sequence.token_ids[start:], logprobs)


def _completion(
    sequence: _Sequence,
    text: str,
    token_ids: list[int],
    logprobs: list[dict[int, Logprob]] | None,
) -> CompletionOutput:
    return CompletionOutput(
        index=sequence.index,
        text=text,
        token_ids=token_ids,
        cumulative_logprob=sequence.cumulative_logprob,
        logprobs=logprobs,
        finish_reason=None if sequence.finish_reason is None else sequence.finish_reason.value,
        stop_reason=sequence.stop_reason,
        spec_decode_metrics=None if sequence.finish_reason is None else sequence.drafts,
    )
