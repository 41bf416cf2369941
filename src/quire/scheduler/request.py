"""The scheduler's state of a request."""

from __future__ import annotations

from enum import Enum

from quire.kvcache import CacheKey
from quire.messages import AddRequest, FinishReason, PromptLogprobs, RequestTimes
from quire.prefix_report import PrefixReport
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
        "_common", "arrival_time", "awaits_drafts", "cache_key", "decoding",
        "draft_token_ids", "drafts_right", "drafts_tried", "last_probe", "probes", "finish_reason",
        "fork_of", "generates", "hold_kv", "needs_token_before_next", "num_computed_tokens",
        "num_drafts_in_flight", "num_pending_tokens", "num_preemptions", "num_prompt_logprobs",
        "num_prompt_tokens", "placement", "prefix", "queued_time", "request_id", "scheduled_time",
        "sort_key", "source", "status", "stop_token", "takes_drafts", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        message: AddRequest,
        *,
        queued_time: float,
        needs_token_before_next: bool = False,
        takes_drafts: bool = True,
    ) -> None:
        self.request_id = message.request_id
        self.token_ids = message.prompt_token_ids + message.output_token_ids
        self.num_prompt_tokens = len(message.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.takes_drafts = takes_drafts and message.decoding.generates
        self.draft_token_ids: tuple[int, ...] = ()
        """Guesses at the tokens that follow, to be verified by the next plan if there is room."""
        self.drafts_right = self.drafts_tried = 0.0
        """Of the last few drafts, for `AdaptivePolicy`."""
        self.last_probe = 0
        self.probes = False
        """Whether its drafts are verified although they may not pay."""
        self.num_drafts_in_flight = 0
        """The number of drafts that a plan in flight verifies. Until its result has come, they count as
        computed, and the most tokens that it may sample count as pending."""
        self.awaits_drafts = False
        """Whether the last plan that samples a token of this request asked for drafts."""
        self.needs_token_before_next = needs_token_before_next
        """Whether a pending token must become known before the next one is computed."""
        self.prefix: PrefixReport | None = None
        """Set at the first admission."""
        self.decoding = message.decoding
        self.generates = message.decoding.generates
        self.placement = message.placement
        self.num_prompt_logprobs = max(
            message.decoding.first_prompt_logprob, message.num_prompt_logprobs
        )
        """The first prompt token whose logprobs are wanted and not known yet, if any are wanted."""
        self.arrival_time = message.arrival_time
        self.cache_key = CacheKey(message.placement.cache_salt, message.placement.adapter)
        self.fork_of = message.fork_of
        self.source = message.source
        self.hold_kv = message.hold_kv
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_token: int | None = None
        self.num_preemptions = 0
        self.queued_time = queued_time
        self.scheduled_time = 0.0
        self.sort_key: tuple[float, ...] = ()
        """Its place in the policy's order; smaller is served first. Fixed at the first admission."""
        self._common: dict[int, int] = {}

    @property
    def was_admitted(self) -> bool:
        """Whether it is running, or was before a preemption."""
        return self.prefix is not None

    @property
    def has_run(self) -> bool:
        """Whether it was admitted, here or in a core that has died."""
        return self.was_admitted or len(self.token_ids) > self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Known output tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens_left(self) -> int:
        """The most tokens that it may generate after its known and pending ones."""
        return self.decoding.max_tokens - self.num_output_tokens - self.num_pending_tokens

    @property
    def most_cached(self) -> int | None:
        """How many of its tokens may come from the prefix cache; None for all. The cache has no hidden
        states, which logprobs and a mean need."""
        if not self.decoding.reads_prefix_cache:
            return 0
        if (
            self.decoding.prompt_logprobs is None
            or self.num_prompt_logprobs >= self.num_prompt_tokens
        ):
            return None
        return self.num_prompt_logprobs - 1

    @property
    def ends_with_pending(self) -> bool:
        """Whether the request ends with the last pending token, whatever its id."""
        produced = len(self.token_ids) - self.num_prompt_tokens
        return produced + self.num_pending_tokens >= self.decoding.max_tokens

    def common_prefix(self, other: Request, block_size: int) -> int:
        """The number of equal tokens at the beginning of this request and another one, in whole blocks.
        Cached, since the scheduler needs it in every step."""
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

    def append_tokens(self, tokens: list[int]) -> list[int]:
        """Add sampled tokens until one of them is the last. Returns those."""
        if len(tokens) == 1:
            self.append_token(tokens[0])
            return tokens
        for number, token in enumerate(tokens, 1):
            self.append_token(token)
            if self.finish_reason is not None:
                return tokens[:number]
        return tokens

    def append_token(self, token: int) -> None:
        """Add a sampled token and decide whether it is the last one."""
        self.token_ids.append(token)
        produced, decoding = len(self.token_ids) - self.num_prompt_tokens, self.decoding
        if produced >= decoding.min_tokens:
            if token in decoding.end_token_ids:
                self.finish_reason = FinishReason.STOP
                return
            if token in decoding.stop_token_ids:
                self.finish_reason = FinishReason.STOP
                self.stop_token = token
                return
        if produced >= decoding.max_tokens:
            self.finish_reason = FinishReason.LENGTH
        elif decoding.repetition_detection is not None and repeats(
            self.token_ids, produced, decoding.repetition_detection
        ):
            self.finish_reason = FinishReason.REPETITION

    def news_of_prompt(self, found: PromptLogprobs) -> PromptLogprobs | None:
        """New prompt logprobs only; a resumed request recomputes some."""
        known = self.num_prompt_logprobs - found.start
        assert known >= 0, "some are missing"
        entries = found.entries[known:]
        if not entries:
            return None
        self.num_prompt_logprobs += len(entries)
        return PromptLogprobs(found.start + known, entries)

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}, {self.status.value}, "
            f"{self.num_computed_tokens}/{self.num_tokens} tokens)"
        )


def repeats(tokens: list[int], produced: int, rule: RepetitionDetectionParams) -> bool:
    """Whether the last `produced` tokens end in the same pattern `min_count` times in a row.

    It compares from the end, so usually one token for each pattern size.
    """
    for size in range(max(1, rule.min_pattern_size), rule.max_pattern_size + 1):
        length = size * rule.min_count
        if length > produced:
            return False
        if all(tokens[-i] == tokens[-i - size] for i in range(1, length - size + 1)):
            return True
    return False


def check_message(message: AddRequest, max_model_len: int) -> None:
    """Raises `ValueError` for a request that could never be served."""
    if not message.prompt_token_ids or message.decoding.max_tokens < 0:
        raise ValueError("a request needs at least one prompt token, and max_tokens of 0 or more")
    if message.output_token_ids and len(message.output_token_ids) >= message.decoding.max_tokens:
        raise ValueError("a request that goes on needs a token left to generate")
    if not 0.0 < message.placement.weight < float("inf"):
        raise ValueError("a tenant's weight must be positive")
    if len(message.prompt_token_ids) + message.decoding.max_tokens > max_model_len:
        raise ValueError("prompt and max_tokens exceed max_model_len")
