"""Scheduler -> executor -> scheduler: a plan out, what it gave back in."""

from __future__ import annotations

import msgspec

from quire.decoding import Decoding
from quire.messages.core import PromptLogprobs, TokenLogprobs

BlockIds = tuple[list[int], ...]
"""By group of layers, see `quire.kv_layout`."""


class AdmittedRequest(msgspec.Struct, kw_only=True):
    """A request the executor does not know yet (new, or resumed after preemption)."""

    request_id: int
    token_ids: list[int]
    """All known tokens: the prompt, and what was generated before a preemption."""
    num_prompt_tokens: int
    block_ids: BlockIds
    """Its block tables. 0, the null block, where all tokens are behind the group's window."""
    decoding: Decoding
    num_prompt_logprobs: int = 0
    """How many of its prompt's tokens have their logprobs already, from before a preemption."""


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
    """Whether that last token is still pending: a plan launched before this one samples it, so only the
    executor knows its id. The row has no other token."""
    draft_token_ids: tuple[int, ...] = ()
    """Guesses at what follows the last token. One is accepted if it equals the token sampled before it and
    all drafts before it were. What is sampled after the first that was not is meaningless."""


BlockName = tuple[bytes, int]
"""Which KV, wherever it is: hash of a block's tokens and all before them, and the group of layers."""


class Transfer(msgspec.Struct, kw_only=True, frozen=True):
    """Blocks to move between the cache and a store outside it. They belong to the transfer until its result
    is there, which may be with a later plan's."""

    transfer_id: int
    names: list[BlockName]
    block_ids: list[int]
    """Where they are in the cache, or come to be."""


class TransferResult(msgspec.Struct, kw_only=True, frozen=True):
    transfer_id: int
    num_good: int
    """So many of its blocks, the first ones, were moved."""


class StepPlan(msgspec.Struct, kw_only=True):
    """Who computes which tokens into which blocks. Applied in the order: released, admitted, loads,
    copies, rows, saves. Plans may be launched before the results of earlier ones are there, but they are
    carried out one after the other."""

    step_id: int
    released: list[int] = []
    """Requests the executor may forget (finished, aborted or preempted)."""
    admitted: list[AdmittedRequest] = []
    loads: list[Transfer] = []
    """From a store into the cache. No row of this plan reads what is loaded."""
    copies: list[tuple[int, int]] = []
    """Copy-on-write: whole blocks to copy (source, destination) before the forward pass."""
    rows: list[PlannedRow] = []
    saves: list[Transfer] = []
    """From the cache into a store."""

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


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
    """The row alone failed (for example NaN logits); the request ends, the engine does not."""


class StepResult(msgspec.Struct, kw_only=True):
    step_id: int
    sampled: list[SampledRow] = []
    transferred: list[TransferResult] = []
    """Transfers, of this plan or earlier ones, that are over. With a plan that has no rows, at least one if
    any are under way."""
