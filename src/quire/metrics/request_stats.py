"""The record of a finished request, and the interface through which the engine reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from quire.messages import StepOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """One request, all its `n` sequences together, when the last of them has ended.

    Every `*_ts` is `time.monotonic()` seconds, or 0.0 if the event never happened (a request aborted in
    the queue was never scheduled). A derived interval is None if one of its ends is missing.
    """

    prompt_tokens: int
    generation_tokens: int
    """Sum over all sequences."""
    cached_tokens: int
    finish_reason: str
    """stop | length | repetition | abort | error | timeout | expired; that of the first sequence."""
    arrival_ts: float
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    finished_ts: float = 0.0
    """When the front end got the end; if not set, the last token's time is used."""
    num_preemptions: int = 0
    n: int = 1
    max_tokens: int | None = None
    """As the client sent it; None: the rest of the context."""
    max_generation_tokens: int = 0
    """The longest sequence's; 0 means the same as `generation_tokens` (n = 1)."""
    replica: int = 0
    """The engine core that computed it; 0 if it was aborted before it had an output."""

    @property
    def e2e_seconds(self) -> float | None:
        return _span(self.arrival_ts, self.finished_ts or self.last_token_ts)

    @property
    def queue_seconds(self) -> float | None:
        """Of a request that waited until its deadline: all of its time."""
        waited = self.finish_reason == "expired"
        return _span(self.queued_ts, self.finished_ts if waited else self.scheduled_ts)

    @property
    def prefill_seconds(self) -> float | None:
        return _span(self.scheduled_ts, self.first_token_ts)

    @property
    def decode_seconds(self) -> float | None:
        return _span(self.first_token_ts, self.last_token_ts)

    @property
    def inference_seconds(self) -> float | None:
        return _span(self.scheduled_ts, self.last_token_ts)

    @property
    def longest_sequence(self) -> int:
        return self.max_generation_tokens or self.generation_tokens

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds per token after the first (TPOT); 0 for a single token, as vLLM reports."""
        decode = self.decode_seconds
        if decode is None:
            return None
        return decode / (self.longest_sequence - 1) if self.longest_sequence > 1 else 0.0


def _span(start: float, end: float) -> float | None:
    if start <= 0.0 or end <= 0.0:
        return None
    return max(0.0, end - start)


class MetricsSink(Protocol):
    """What an engine's front end reports to. No call returns anything.

    Order per request: `on_first_token` once per request (without a time if the prompt was all),
    `on_token_gap` once per later token of each sequence, `on_finished` once. `on_step` once per message
    of the engine core. external_tokens: of the cached ones, those loaded from outside the prefix cache.
    """

    def on_step(self, outputs: StepOutputs) -> None: ...

    def on_first_token(
        self,
        ttft_seconds: float | None,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        external_tokens: int = 0,
    ) -> None: ...

    def on_token_gap(self, seconds: float) -> None: ...

    def on_finished(self, request: FinishedRequest) -> None: ...

    def on_rejected(self, reason: str) -> None: ...

    def on_sleep_state(self, level: int) -> None: ...


class NullMetrics:
    """Counts nothing; used by `LLM`."""

    def on_step(self, outputs: StepOutputs) -> None:
        pass

    def on_first_token(
        self,
        ttft_seconds: float | None,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        external_tokens: int = 0,
    ) -> None:
        pass

    def on_token_gap(self, seconds: float) -> None:
        pass

    def on_finished(self, request: FinishedRequest) -> None:
        pass

    def on_rejected(self, reason: str) -> None:
        pass

    def on_sleep_state(self, level: int) -> None:
        pass
