"""The structs that cross a boundary: front end <-> engine core, and scheduler <-> executor.

All of it is data: no tensors, no callbacks, no shared objects, so each boundary may become a process
boundary. Encoded with msgspec's msgpack (typed on decoding, never pickle).
"""

from __future__ import annotations

from enum import Enum

import msgspec

from quire.sampling_params import PoolingParams, SamplingParams


class FinishReason(str, Enum):
    """Why a request ended. Every accepted request ends in exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"
    """It repeated itself, and its parameters asked to end then."""


class WaitReason(str, Enum):
    """Why a waiting request did not run in a step."""

    CAPACITY = "capacity"
    """No free blocks, no sequence slot, or no token budget left for it."""
    DEFERRED = "deferred"
    """It waits for something on purpose: a request that is computing the prompt both begin with, a token that
    was being sampled when it was preempted, or its grammar, which is being compiled."""


# --- front end -> engine core ---------------------------------------------------------------------


class GrammarSpec(msgspec.Struct, frozen=True):
    """A grammar that the front end has compiled once, so that it is known to be good."""

    kind: str
    """What the text is: "json_schema" or "lark" (everything else is turned into one of them)."""
    text: str


class TokenRules(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What may be generated, as far as it depends on the tokens before: resolved to token ids."""

    bad_words: list[list[int]] = []
    """Sequences that must not occur."""
    grammar: GrammarSpec | None = None
    think_end: list[int] = []
    """Tokens that close a reasoning model's thinking part. The grammar applies after them, if the output
    begins inside one (`thinking`)."""
    think_start: list[int] = []
    thinking: bool = False
    """Whether the prompt ends inside the thinking part."""
    thinking_budget: int | None = None


class AddRequest(msgspec.Struct, tag="add", kw_only=True, frozen=True):
    """One sequence to generate. A request with n > 1 becomes n of these, all but the first naming
    the first as `fork_of`, so that they take over its prompt blocks."""

    request_id: int
    """Internal, unique in the life of the engine. Never what a client sent."""
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    """Key of the request's random stream, always set."""
    max_tokens: int
    """Resolved: never beyond the context. 0: the prompt is computed, for its logprobs or its vector."""
    rules: TokenRules | None = None
    pooling: PoolingParams | None = None
    eos_token_ids: list[int] = []
    arrival_time: float = 0.0
    """Seconds of `time.monotonic()` in the front end (one machine, one clock)."""
    priority: int = 0
    """Lower runs sooner under the priority policy."""
    cache_salt: str | None = None
    """Requests share cached blocks only with the same salt."""
    fork_of: int | None = None


class AbortRequests(msgspec.Struct, tag="abort", frozen=True):
    request_ids: list[int]


class ResetPrefixCache(msgspec.Struct, tag="reset_prefix_cache", frozen=True):
    """Forget all cached content. Running requests keep their blocks, which nobody can find any more."""


class Sleep(msgspec.Struct, tag="sleep", frozen=True):
    """Give memory back: level 1 the KV cache's, 2 the weights' too. Only while there is no work."""

    level: int


class WakeUp(msgspec.Struct, tag="wake_up", frozen=True):
    """Take the memory again; weights that were dropped are loaded again."""


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Answered by the scheduler loop itself between steps: proof that it turns."""

    nonce: int


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Abort what is left and leave."""


CoreInput = AddRequest | AbortRequests | ResetPrefixCache | Sleep | WakeUp | Ping | Shutdown

# --- engine core -> front end ---------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one generated position, before temperature and penalties.

    `top_ids` / `top_logprobs` are the most likely tokens, best first; the sampled token's own
    value and 1-based rank stand apart because it need not be among them.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]
    asked_logprobs: list[float] = []
    """Of `logprob_token_ids`, in their order."""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of consecutive prompt tokens, each given those before it; `token_id` is the prompt's own."""

    start: int
    """Index in the prompt of the first one."""
    entries: list[TokenLogprobs]


class RequestTimes(msgspec.Struct, frozen=True, array_like=True):
    """`time.monotonic()` seconds, taken by the engine core. 0.0 where it has not happened."""

    queued: float
    scheduled: float
    """When its first token was scheduled."""


class RequestUpdate(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step did for one request."""

    request_id: int
    new_token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop token id that ended it, if one of `stop_token_ids` did (None for EOS)."""
    error: str | None = None
    """With finish_reason `error`: what to tell the client."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    embedding: list[float] | None = None
    """With `pooling`, when finished."""
    num_cached_tokens: int | None = None
    """Sent with the first token: prompt tokens whose KV came from the prefix cache."""
    times: RequestTimes | None = None
    """Sent with the first token."""
    num_preemptions: int = 0
    """So far; sent when finished."""


class SchedulerStats(msgspec.Struct, kw_only=True, omit_defaults=True):
    """State after a step, and counts since the previous report."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_by_reason: dict[str, int] = {}
    kv_usage: float = 0.0
    """Share of blocks referenced by requests, 0-1."""
    kv_slots_allocated: int = 0
    kv_slots_used: int = 0
    """Token slots in referenced blocks, and those of them that hold KV. Shared blocks count once."""
    blocks_shared: int = 0
    """Blocks referenced more than once."""
    prefix_queries: int = 0
    prefix_hits: int = 0
    """Tokens looked up in the prefix cache and found there, since the last report."""
    num_preemptions: int = 0
    step_tokens: int = 0
    """Tokens scheduled in this step."""
    blocks_copied: int = 0
    """Copy-on-write block copies, since the last report."""
    rows_held: int = 0
    """Times a request sat out a step because its pending token had to be known first, since the last
    report. Zero without overlap."""
    rows_discarded: int = 0
    """Sampled tokens that nobody wanted, since the last report: their request had been aborted, or had
    ended with the token before (found one step late, with overlap)."""


class StepOutputs(msgspec.Struct, tag="outputs", kw_only=True, omit_defaults=True):
    updates: list[RequestUpdate] = []
    stats: SchedulerStats | None = None
    timestamp: float = 0.0
    """`time.monotonic()` when the step's tokens were known."""


class EngineReady(msgspec.Struct, tag="ready", kw_only=True):
    """The core has loaded the model and serves."""

    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    ledger: list[tuple[str, str]]
    """Memory ledger, as (what, how much) rows for people."""
    weight_bytes: int = 0
    kv_bytes: int = 0
    load_seconds: float = 0.0


def describe_ledger(ready: EngineReady) -> str:
    """The memory ledger in one line, as it is logged at start."""
    return ", ".join(f"{what} {amount}" for what, amount in ready.ledger)


class Pong(msgspec.Struct, tag="pong", frozen=True):
    nonce: int
    timestamp: float


class SleepState(msgspec.Struct, tag="sleep_state", frozen=True):
    """The answer to `Sleep` and `WakeUp`."""

    level: int
    """0: awake."""


class CoreFailed(msgspec.Struct, tag="failed", frozen=True):
    """The core cannot start or go on; it exits after sending this."""

    message: str
    kind: str
    """Name of the `QuireError` subclass to raise in the front end."""


CoreOutput = StepOutputs | EngineReady | Pong | SleepState | CoreFailed

# --- scheduler -> executor -> scheduler -----------------------------------------------------------


class AdmittedRequest(msgspec.Struct, kw_only=True):
    """A request the executor does not know yet (new, or resumed after preemption)."""

    request_id: int
    token_ids: list[int]
    """All known tokens: the prompt, and what was generated before a preemption."""
    num_prompt_tokens: int
    block_ids: list[int]
    params: SamplingParams
    seed: int
    eos_token_ids: list[int] = []
    rules: TokenRules | None = None
    pooling: PoolingParams | None = None
    num_prompt_logprobs: int = 0
    """How many of its prompt's tokens have their logprobs already, from before a preemption."""


class PlannedRow(msgspec.Struct, kw_only=True):
    """One request's share of a step: compute tokens [start, start + num_tokens)."""

    request_id: int
    start: int
    """Its num_computed_tokens before the step."""
    num_tokens: int
    new_block_ids: list[int]
    """Appended to its block table (for an admitted request: already in `AdmittedRequest`)."""
    samples: bool
    """Whether the row reaches the request's last token, so that a token is sampled after it."""
    pending: bool = False
    """Whether that last token is still pending: a plan launched before this one samples it, so only the
    executor knows its id. The row has no other token."""


class StepPlan(msgspec.Struct, kw_only=True):
    """Who computes which tokens into which blocks. Applied in the order: released, admitted,
    copies, rows. Plans may be launched before the results of earlier ones are there, but they are
    carried out one after the other."""

    step_id: int
    released: list[int] = []
    """Requests the executor may forget (finished, aborted or preempted)."""
    admitted: list[AdmittedRequest] = []
    copies: list[tuple[int, int]] = []
    """Copy-on-write: whole blocks to copy (source, destination) before the forward pass."""
    rows: list[PlannedRow] = []

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


class SampledRow(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Result of a row that samples, or has something to tell of its prompt. Token ids in order: one, or
    more where a grammar left no choice for those that follow."""

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    embedding: list[float] | None = None
    error: str | None = None
    """The row alone failed (for example NaN logits); the request ends, the engine does not."""


class StepResult(msgspec.Struct, kw_only=True):
    step_id: int
    sampled: list[SampledRow] = []
