"""Scheduler -> executor -> scheduler: the plan, and its result."""

from __future__ import annotations

import msgspec

from quire.decoding import Decoding
from quire.messages.core import PromptLogprobs, TokenLogprobs
from quire.messages.transfer import Save, Transfer, TransferResult
from quire.placement import Placement

BlockIds = tuple[list[int], ...]
"""By group of layers, see `quire.kv_layout`."""


class AdmittedRequest(msgspec.Struct, kw_only=True):
    """A request that the executor does not have yet (new, or resumed after preemption)."""

    request_id: int
    token_ids: list[int]
    """All known tokens: the prompt, and those generated before a preemption."""
    num_prompt_tokens: int
    block_ids: BlockIds
    """Its block tables. 0, the null block, where all tokens are behind the group's window."""
    decoding: Decoding
    placement: Placement = Placement()
    num_prompt_logprobs: int = 0
    """The number of prompt tokens whose logprobs are known already, from before a preemption."""


class PlannedRow(msgspec.Struct, kw_only=True):
    """One request's share of a step: compute tokens [start, start + num_tokens), of which the last may be
    drafts."""

    request_id: int
    start: int
    """Its num_computed_tokens before the step."""
    num_tokens: int
    new_block_ids: BlockIds = ()
    """Appended to its block tables, to each as many; empty if there are none, and for an admitted request, as
    `AdmittedRequest` has them already. What is behind a group's window may be another request's by now."""
    samples: int
    """How many tokens may be sampled. 0 if the row does not reach the request's last token; else 1, and one
    more for each draft."""
    pending: bool = False
    """Whether the request's last token is still pending: an earlier plan samples it, so only the executor
    knows its id. The row has no other token."""
    draft_token_ids: tuple[int, ...] = ()
    """Guesses at what follows the last token. One is accepted if it equals the token sampled before it and
    all drafts before it were. What is sampled after the first that was not is meaningless."""
    num_drafts: int = 0
    """The most drafts to propose for the next plan, if the row samples."""


class StepPlan(msgspec.Struct, kw_only=True):
    """The rows that compute tokens, and the blocks they write. Applied in the order: released, admitted,
    clears_stores, saves, copies, loads, rows. Plans may be launched before the results of earlier ones
    arrive, but they are executed one after the other."""

    step_id: int
    released: list[int] = []
    """Requests whose state the executor may drop (finished, aborted or preempted)."""
    admitted: list[AdmittedRequest] = []
    clears_stores: bool = False
    """The stores outside the cache drop all KV that this instance may load, copies under way included."""
    saves: list[Save] = []
    loads: list[Transfer] = []
    """No row of this plan reads these blocks, and no later one before the load's result is known."""
    copies: list[tuple[int, int]] = []
    """Copy-on-write: whole blocks to copy (source, destination) before the forward pass."""
    rows: list[PlannedRow] = []

    @property
    def num_tokens(self) -> int:
        return sum([row.num_tokens for row in self.rows])


class SampledRow(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Result of a row that samples, or has something to tell of its prompt. Token ids in order: the accepted
    drafts, the token sampled after them, and those that follow because a grammar left no choice."""

    request_id: int
    token_ids: list[int]
    draft_token_ids: tuple[int, ...] = ()
    """Guesses at what follows these tokens, to verify in the next step."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    embedding: list[float] | None = None
    error: str | None = None
    """Only this row failed (for example NaN logits): the request ends, the engine does not."""


class StepResult(msgspec.Struct, kw_only=True):
    step_id: int
    sampled: list[SampledRow] = []
    draft_seconds: float = 0.0
    """Time that proposing drafts took, which is part of the step's time."""
    transferred: list[TransferResult] = []
    """Loads of this plan or earlier ones that are over. A plan without rows waits a moment for one, if any
    are under way."""
