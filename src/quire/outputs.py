"""The outputs of a request. Field names are vLLM's, so that scripts work unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.lora.request import LoRARequest
from quire.prefix_report import PrefixReport


@dataclass(slots=True)
class Logprob:
    """One token's log-probability at one position. `rank` is 1-based."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestStateStats:
    """Times and counts of one request. `*_ts` are `time.monotonic()` seconds; arrival is wall time."""

    num_generation_tokens: int = 0
    num_preemptions: int = 0
    arrival_time: float = 0.0
    arrival_ts: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    """Seconds from arrival to the first token (TTFT)."""


@dataclass(slots=True)
class RequestSpecDecodeMetrics:
    """How the drafts of one sequence fared. Each step that verified drafts counts once."""

    num_spec_tokens: int
    """The most drafts of a step."""
    num_draft_tokens: int = 0
    per_step_accepted: list[int] = field(default_factory=list)
    per_step_drafted: list[int] = field(default_factory=list)

    @property
    def num_accepted(self) -> int:
        return sum(self.per_step_accepted)

    @property
    def histogram(self) -> list[int]:
        """The number of steps that accepted j drafts, by j."""
        counts = [0] * (self.num_spec_tokens + 1)
        for accepted in self.per_step_accepted:
            counts[accepted] += 1
        return counts

    def observe(self, num_draft_tokens: int, num_accepted: int) -> None:
        self.num_draft_tokens += num_draft_tokens
        self.per_step_drafted.append(num_draft_tokens)
        self.per_step_accepted.append(num_accepted)

    def to_dict(self, *, detailed: bool = False) -> dict[str, object]:
        """vLLM's `metrics.speculative_decoding`. The mean length counts the token after the drafts too."""
        steps, drafted = len(self.per_step_accepted), self.num_draft_tokens
        found: dict[str, object] = {
            "mean_acceptance_length": 1.0 + self.num_accepted / max(1, steps),
            "draft_acceptance_rate": self.num_accepted / max(1, drafted),
            "acceptance_histogram": self.histogram,
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": self.num_accepted,
            "num_draft_tokens": drafted,
            "num_spec_tokens": self.num_spec_tokens,
        }
        if detailed:
            found["per_step_accepted"] = self.per_step_accepted
            found["per_step_drafted"] = self.per_step_drafted
        return found


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` sequences of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """stop | length | repetition | abort | error | timeout | expired; None while the sequence
    continues."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; None for end of sequence."""
    spec_decode_metrics: RequestSpecDecodeMetrics | None = None
    """With speculative decoding, when finished."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request: all of it or only what is new, depending on its `output_kind`.

    With output_kind DELTA, `outputs` holds only the sequences that have something new.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestStateStats = field(default_factory=RequestStateStats)
    num_cached_tokens: int | None = None
    """Prompt tokens whose KV was found in the prefix cache, or a store outside it."""
    prefix: PrefixReport | None = None
    """Where they were found, and why no more were."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """One entry per prompt token (None for the first, and for those before `prompt_logprob_start`), once all
    are computed."""
    embedding: list[float] | None = None
    """Of a request with `PoolingParams`, when finished."""
    error: str | None = None
    """With finish_reason `error`: a message that may be shown to a client."""
    lora_request: LoRARequest | None = None
    """The adapter with which it was computed."""
    kv_transfer_params: dict[str, object] | None = None
    """Where another instance finds the prompt's KV, when finished, if it was asked to hold it."""


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """What `LLM.embed` returns for a prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int | None = None


@dataclass(slots=True)
class PoolingOutput:
    data: list[float]


@dataclass(slots=True)
class PoolingRequestOutput:
    """What `LLM.encode` returns for a prompt."""

    request_id: str
    outputs: PoolingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int | None = None


@dataclass(slots=True)
class ScoringOutput:
    score: float


@dataclass(slots=True)
class ScoringRequestOutput:
    """What `LLM.score` returns for a pair of texts."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    """Of both texts, one after the other."""
    finished: bool = True
    num_cached_tokens: int | None = None
