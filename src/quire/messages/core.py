"""Front end <-> engine core: requests in, outputs out."""

from __future__ import annotations

from enum import Enum

import msgspec

from quire.decoding import Decoding
from quire.messages.state import CoreState
from quire.placement import Placement
from quire.prefix_report import PrefixReport


class FinishReason(str, Enum):
    """Why a request ended. Every accepted request ends in exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"
    """It repeated itself, and its parameters end it then."""
    TIMEOUT = "timeout"
    """Its deadline passed after it was admitted."""
    EXPIRED = "expired"
    """Its deadline passed while it was queued: nothing was computed."""


# --- front end -> engine core ---------------------------------------------------------------------


class KVSource(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that has computed a request's prompt and holds its KV for another (prefill/decode
    disaggregation), as long as the lease of the ticket lasts."""

    engine_id: str
    host: str
    """A host name or address, or unix:PATH on the same machine."""
    ports: tuple[int, ...]
    """Of each of its ranks, in their order."""
    ticket: str
    """Unforgeable, and valid once."""
    num_tokens: int
    """Of the prompt, that have KV there."""


class AddRequest(msgspec.Struct, tag="add", kw_only=True, frozen=True, omit_defaults=True):
    """One sequence to generate. A request with n > 1 becomes n of these. All but the first name the first as
    `fork_of`, so that they share its prompt blocks."""

    request_id: int
    """Internal, unique in the life of the engine. Never a text from a client."""
    prompt_token_ids: list[int]
    decoding: Decoding
    placement: Placement = Placement()
    arrival_time: float = 0.0
    """Seconds of `time.monotonic()` in the front end (one machine, one clock)."""
    fork_of: int | None = None
    group: int | None = None
    """Requests of one group are computed by one replica: the beams of a search."""
    deadline: float | None = None
    """Seconds of `time.monotonic()`. When it has passed, the request ends before the next step."""
    source: KVSource | None = None
    """Where its prompt's KV is."""
    output_token_ids: list[int] = []
    """Tokens that another engine core has generated for it, before it died. They count as its output."""
    num_prompt_logprobs: int = 0
    """The number of prompt tokens whose logprobs that core has sent."""
    hold_kv: bool = False
    """Hold the prompt's KV at its end, so that another instance can fetch it (`RequestUpdate.kv_source`)."""


class AbortRequests(msgspec.Struct, tag="abort", frozen=True):
    request_ids: list[int]


class ResetPrefixCache(msgspec.Struct, tag="reset_prefix_cache", frozen=True):
    """Drop all cached content. Running requests keep their blocks, but no other request finds them."""


class Sleep(msgspec.Struct, tag="sleep", frozen=True):
    """Free memory: at level 1 the KV cache's, at 2 also the weights'. An error while requests run."""

    level: int


class WakeUp(msgspec.Struct, tag="wake_up", frozen=True):
    """Allocate the memory again; weights that were dropped are loaded again."""


class LoadAdapter(msgspec.Struct, tag="load_adapter", frozen=True):
    """Load an adapter now, ahead of its first request. Answered when it is in memory."""

    key: str


class ReadRecord(msgspec.Struct, tag="read_record", frozen=True):
    """Answered with the record of decisions (`Answer.records`)."""


class Inspect(msgspec.Struct, tag="inspect", frozen=True):
    """Answered with the core's state (`Answer.states`)."""


ControlAction = ResetPrefixCache | Sleep | WakeUp | LoadAdapter | ReadRecord | Inspect


class Control(msgspec.Struct, tag="control", frozen=True):
    """A call for the whole engine, carried out between two steps. Answered by an `Answer` with its id, in the
    order in which they were sent; except a `LoadAdapter`, which takes its time beside the steps."""

    id: int
    action: ControlAction


class AddAdapter(msgspec.Struct, tag="add_adapter", frozen=True):
    """A version of a LoRA adapter that requests may name. It is read when the first of them comes."""

    key: str
    """`Placement.adapter` of its requests: NAME@HASH, with a hash of its content."""
    path: str


class DropAdapter(msgspec.Struct, tag="drop_adapter", frozen=True):
    """No later request names this version. It is dropped when those that name it have ended."""

    key: str


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Answered by the scheduler loop itself between steps: proof that it makes progress."""

    nonce: int


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Abort all requests and exit."""


CoreInput = AddRequest | AbortRequests | Control | AddAdapter | DropAdapter | Ping | Shutdown

# --- engine core -> front end ---------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one generated position, before temperature and penalties.

    `top_ids` / `top_logprobs` are the most likely tokens, best first; the sampled token's own
    value and 1-based rank are separate fields because it need not be among them.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]
    asked_logprobs: list[float] = []
    """Of `logprob_token_ids`, in their order."""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of consecutive prompt tokens, each given those before it; `token_id` is the prompt's token."""

    start: int
    """Index in the prompt of the first of these tokens."""
    entries: list[TokenLogprobs]


class RequestTimes(msgspec.Struct, frozen=True, array_like=True):
    """`time.monotonic()` seconds, taken by the engine core. 0.0 for an event that has not happened."""

    queued: float
    scheduled: float
    """When its first token was scheduled."""


class RequestUpdate(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The result of one step for one request."""

    request_id: int
    new_token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop token id that ended it, if one of `stop_token_ids` did (None for EOS)."""
    error: str | None = None
    """With finish_reason `error`: a message that may be shown to the client."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    embedding: list[float] | None = None
    """With `pooling`, when finished."""
    prefix: PrefixReport | None = None
    """Sent with the first token: prompt tokens whose KV was found, where, and why no more were."""
    times: RequestTimes | None = None
    """Sent with the first token, and when its deadline has ended it."""
    num_preemptions: int = 0
    """The number so far; sent when finished."""
    drafts: tuple[int, int] | None = None
    """If the row verified drafts: how many, and how many of them were right."""
    kv_source: KVSource | None = None
    """With `AddRequest.hold_kv`, when finished. None also then if its KV could not be held."""


class DraftCounts(msgspec.Struct, array_like=True):
    """Drafts that were verified, as vLLM counts them."""

    num_drafts: int = 0
    """Rows that verified at least one draft."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = []
    """Accepted drafts by their place in the row, from 0."""

    def add(self, num_drafts: int, num_accepted: int) -> None:
        """A row was verified."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        missing = num_accepted - len(self.accepted_per_position)
        self.accepted_per_position += [0] * missing
        for position in range(num_accepted):
            self.accepted_per_position[position] += 1


class TierStats(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A store of KV outside the cache: its state, and counts since the previous report. Of the sampling
    rank's store, which decides; the other ranks' have the same load."""

    blocks: int = 0
    bytes: int = 0
    """Taken, after compression."""
    capacity_bytes: int = 0
    is_off: bool = False
    """An error has ended its use."""
    saved_blocks: int = 0
    loaded_blocks: int = 0
    evicted_blocks: int = 0
    dropped_blocks: int = 0
    """Offered and not kept: no room, or too many at a time."""
    damaged_blocks: int = 0
    """Not loaded, because their checksum was wrong or they could not be read."""
    written_bytes: int = 0
    read_bytes: int = 0


class TenantStats(msgspec.Struct, omit_defaults=True):
    """A tenant's requests, under the fair policy."""

    waiting: int = 0
    running: int = 0
    charged: float = 0.0
    """Since the last report: 1 for each prompt token that was not found in the cache, 2 for each generated
    token. Negative if more was refunded."""


class LoadStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """What waits, and how fast it is worked off: `scheduler/load.py`. About ten times per second."""

    queue_tokens: int = 0
    """Prompt tokens of waiting requests, without those that the cache is expected to hold."""
    first_tokens: int = 0
    """What the first running request with a prompt to compute has left of it. It gets most of each step."""
    uncached: float = 1.0
    """The part of the last admitted prompts that the cache did not hold."""
    free_seats: int = 0
    """Requests that could be admitted at once, as far as seats and blocks are concerned."""
    prompt_rate: float = 0.0
    """Prompt tokens per second beside what generates now; 0 if not known yet."""
    end_rate: float = 0.0
    """Requests that end per second, lately; 0 if none has ended."""
    wait_seconds: float = 0.0
    """The wait of a request that comes now."""
    step_predicted: float = 0.0
    """Seconds that were expected of the last step that was measured."""
    step_target: float = 0.0
    """Seconds; 0 without --itl-target."""


class SchedulerStats(msgspec.Struct, kw_only=True, omit_defaults=True):
    """State after a step, and counts since the previous report."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_by_reason: dict[str, int] = {}
    """`capacity`: no free blocks, no sequence slot or no token budget, for it or for one before it.
    `deferred`: a prompt that another request computes, a pending token, its grammar, its adapter or a place
    for that is awaited."""
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
    kv_tiers: dict[str, TierStats] = {}
    """Stores outside the cache: "ram", "disk", "peer", "staging" (copies of blocks on their way to a tier),
    "export" (held for other instances). Empty if there are none."""
    num_preemptions: int = 0
    running_adapters: list[str] = []
    waiting_adapters: list[str] = []
    """Names of the adapters of running and of waiting requests, sorted."""
    step_tokens: int = 0
    """Tokens scheduled in this step."""
    blocks_copied: int = 0
    """Copy-on-write block copies, since the last report."""
    rows_held: int = 0
    """Number of times that a request was left out of a step because its pending token had to be known
    first, since the last report. Zero without overlap."""
    drafts: DraftCounts | None = None
    """Since the last report; None if no drafts were verified."""
    load: LoadStats = LoadStats()
    tenants: dict[str, TenantStats] = {}
    """Those that have changed, about once per second; under the fair policy."""
    rows_discarded: int = 0
    """Sampled tokens that were discarded, since the last report: their request had been aborted, or had
    ended with the token before (which is found one step late, with overlap)."""


class RecoveryCounts(msgspec.Struct, omit_defaults=True):
    """What the death of an engine core has led to."""

    restarts: int = 0
    resumed: int = 0
    """Requests that were in a core that died, and go on in another."""
    poison: int = 0
    """Requests that ended because cores died of them."""


class StepOutputs(msgspec.Struct, tag="outputs", kw_only=True, omit_defaults=True):
    updates: list[RequestUpdate] = []
    stats: SchedulerStats | None = None
    timestamp: float = 0.0
    """`time.monotonic()` when the step's tokens were known."""
    answers: list[Answer] = []
    """To calls that were carried out beside the steps."""
    replica: int = 0
    """Which of several cores sent it; set by the receiver."""
    recovery: RecoveryCounts | None = None
    """Set by the receiver, in messages about a core that has died or is back."""


class EngineReady(msgspec.Struct, tag="ready", kw_only=True):
    """The core has loaded the model and accepts requests."""

    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    ledger: list[tuple[str, str]]
    """The memory ledger as rows of text: (what, how much)."""
    weight_bytes: int = 0
    kv_bytes: int = 0
    load_seconds: float = 0.0
    replicas: list[EngineReady] = []
    """If this is the sum of several cores: what each of them has."""


def describe_ledger(ready: EngineReady) -> str:
    """The memory ledger in one line, as it is logged at start."""
    return ", ".join(f"{what} {amount}" for what, amount in ready.ledger)


class Pong(msgspec.Struct, tag="pong", frozen=True):
    nonce: int
    timestamp: float


class Failure(msgspec.Struct, frozen=True):
    """An exception, as data."""

    message: str
    kind: str
    """Name of the `QuireError` subclass to raise in the front end."""


class Answer(msgspec.Struct, tag="answer", frozen=True):
    """The `Control` with this id was carried out, or failed without ending the engine."""

    id: int
    sleep_level: int
    """The engine's current level, also after a failure. 0: awake."""
    failure: Failure | None = None
    records: list[bytes] = []
    """To `ReadRecord`: of each core, for `scheduler/record_reader.py`. None of one that keeps no record."""
    states: list[CoreState] = []
    """With `Inspect`: of each core."""


class CoreFailed(msgspec.Struct, tag="failed", frozen=True):
    """The core cannot start or continue; it exits after sending this."""

    failure: Failure


CoreOutput = StepOutputs | EngineReady | Pong | Answer | CoreFailed
