"""A request as the scheduler sees it."""

from __future__ import annotations

from enum import Enum

from quire.kvcache import CacheKey
from quire.messages import AddRequest, FinishReason, RequestTimes
from quire.sampling_params import RepetitionDetectionParams


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    """Waiting again, after having run."""
    FINISHED = "finished"


class Request:
    """A list of tokens, of which the first `num_computed_tokens` have their KV in blocks once the plans in
    flight are done. Those plans sample the last `num_pending_tokens`, whose ids are not known yet."""

    __slots__ = (
        "_common", "arrival_time", "cache_key", "draft_token_ids", "eos_token_ids", "finish_reason",
        "fork_of", "max_tokens", "needs_token_before_next", "num_cached_tokens", "num_computed_tokens",
        "num_drafts_in_flight", "num_pending_tokens", "num_preemptions", "num_prompt_logprobs",
        "num_prompt_tokens", "params", "pooling", "priority", "queued_time", "request_id", "rules",
        "scheduled_time", "seed", "sort_key", "status", "stop_token", "stop_token_ids", "token_ids",
    )  # fmt: skip

    def __init__(
        self, message: AddRequest, *, queued_time: float, needs_token_before_next: bool = False
    ) -> None:
        self.request_id = message.request_id
        self.token_ids = list(message.prompt_token_ids)
        self.num_prompt_tokens = len(message.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.draft_token_ids: tuple[int, ...] = ()
        """Guesses at what follows its tokens, for the next plan to verify if it can."""
        self.num_drafts_in_flight = 0
        """How many a plan in flight verifies. Until its result is there, they count as computed, and the most
        tokens that it may sample as pending."""
        self.needs_token_before_next = needs_token_before_next
        """Whether a pending token must become known before the next one is computed."""
        self.num_cached_tokens: int | None = None
        """Set when first admitted: prompt tokens found computed by others."""
        self.params = message.params
        self.seed = message.seed
        self.max_tokens = message.max_tokens
        self.rules = message.rules
        self.pooling = message.pooling
        ignores_eos = message.params.ignore_eos and not self.has_grammar
        self.eos_token_ids = frozenset(() if ignores_eos else message.eos_token_ids)
        self.stop_token_ids = frozenset(message.params.stop_token_ids or ())
        self.num_prompt_logprobs = max(1, message.params.prompt_logprob_start or 0)
        """The first prompt token whose logprobs are wanted and not known yet, where any are wanted."""
        self.arrival_time = message.arrival_time
        self.priority = message.priority
        self.cache_key = CacheKey(message.cache_salt)
        self.fork_of = message.fork_of
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_token: int | None = None
        self.num_preemptions = 0
        self.queued_time = queued_time
        self.scheduled_time = 0.0
        self.sort_key: tuple[float, ...] = ()
        """Its place in the policy's order; smaller is served first. Fixed once it was admitted."""
        self._common: dict[int, int] = {}

    @property
    def was_admitted(self) -> bool:
        """Now or before a preemption."""
        return self.num_cached_tokens is not None

    @property
    def num_tokens(self) -> int:
        """Known and pending."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Known ones."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def has_grammar(self) -> bool:
        """Then it ends where the grammar does, whatever min_tokens or ignore_eos say."""
        return self.rules is not None and self.rules.grammar is not None

    @property
    def most_cached(self) -> int | None:
        """How many of its tokens may come from the prefix cache; None for all. What is cached has no hidden
        states, which logprobs and a mean are made of."""
        if self.pooling is not None:
            whole = self.pooling.pooling == "mean" or self.pooling.skip_reading_prefix_cache
            return 0 if whole else None
        if self.params.skip_reading_prefix_cache:
            return 0
        if (
            self.params.prompt_logprobs is None
            or self.num_prompt_logprobs >= self.num_prompt_tokens
        ):
            return None
        return self.num_prompt_logprobs - 1

    @property
    def ends_with_pending(self) -> bool:
        """Whether the last pending token is its last one, whatever it is."""
        return self.num_output_tokens + self.num_pending_tokens >= self.max_tokens

    def common_prefix(self, other: Request, block_size: int) -> int:
        """With how many tokens, in whole blocks, this request and another one begin. Kept, as the scheduler
        asks in every step."""
        common = self._common.get(other.request_id)
        if common is None:
            mine, theirs = self.token_ids, other.token_ids
            length = min(len(mine), len(theirs))
            common = length - length % block_size
            for start in range(0, common, block_size):
                end = start + block_size
                if mine[start:end] != theirs[start:end]:
                    common = start
                    break
            self._common[other.request_id] = common
        return common

    @property
    def times(self) -> RequestTimes:
        return RequestTimes(self.queued_time, self.scheduled_time)

    def append_token(self, token: int) -> None:
        """Add a sampled token and decide whether it is the last one."""
        self.token_ids.append(token)
        produced = self.num_output_tokens
        if produced >= self.params.min_tokens or self.has_grammar:
            if token in self.eos_token_ids:
                self.finish_reason = FinishReason.STOP
                return
            if token in self.stop_token_ids:
                self.finish_reason = FinishReason.STOP
                self.stop_token = token
                return
        if produced >= self.max_tokens:
            self.finish_reason = FinishReason.LENGTH
        elif self.params.repetition_detection is not None and repeats(
            self.token_ids, produced, self.params.repetition_detection
        ):
            self.finish_reason = FinishReason.REPETITION

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}, {self.status.value}, "
            f"{self.num_computed_tokens}/{self.num_tokens} tokens)"
        )


def repeats(tokens: list[int], produced: int, rule: RepetitionDetectionParams) -> bool:
    """Whether the last `produced` tokens end in the same pattern `min_count` times in a row.

    Compares from the end, and so usually one token for each size.
    """
    for size in range(max(1, rule.min_pattern_size), rule.max_pattern_size + 1):
        length = size * rule.min_count
        if length > produced:
            return False
        if all(tokens[-i] == tokens[-i - size] for i in range(1, length - size + 1)):
            return True
    return False
