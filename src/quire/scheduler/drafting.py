"""Speculative decoding in the scheduler: which rows verify how many drafts, and how many are asked for.

Drafts are guesses at the tokens that follow a request's last token. A row that computes the last token may
compute drafts after it, like known tokens, and the executor samples after each. With the result, drafts
that were right are known tokens whose KV exists; for the others `num_computed_tokens` is reduced, and their
slots are written again before they are read. No block is shared before its tokens are known.

Drafts use only what is left of a step: they come after all rows in budget and blocks, so they preempt no
request and delay no prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile

from quire.kvcache import KVCacheManager
from quire.messages import PlannedRow, SampledRow, StepPlan
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.request import Request, RequestStatus


class Drafting:
    """The drafts of all requests."""

    def __init__(self, limits: SchedulerLimits, kv: KVCacheManager) -> None:
        self._limits = limits
        self._kv = kv
        self._has_drafts = False

    def plan(self, plan: StepPlan, requests: Mapping[int, Request]) -> None:
        """The last pass over a plan: rows verify the drafts that there are, and ask for new ones."""
        if self._has_drafts:
            self._verify(plan, requests)
        if self._limits.max_drafts:
            self._ask(plan, requests)

    def _verify(self, plan: StepPlan, requests: Mapping[int, Request]) -> None:
        """Let rows verify drafts, in order, within the rest of the budget and samples and the free
        blocks. Drafts that do not fit are dropped."""
        self._has_drafts = False
        limits, kv = self._limits, self._kv
        left = min(
            limits.max_num_batched_tokens - plan.num_tokens,
            limits.max_samples - sum(row.samples for row in plan.rows),
        )
        for row in plan.rows:
            request = requests[row.request_id]
            drafts, request.draft_token_ids = request.draft_token_ids, ()
            if not drafts or not row.samples:
                continue
            reach = row.start + row.num_tokens
            count = min(len(drafts), left, request.num_tokens_left - 1)
            missing = kv.num_missing(row.request_id, reach + count)
            if missing > max(0, kv.num_free - limits.watermark_blocks):
                slots = kv.num_blocks_of(row.request_id) * kv.block_size
                count = min(count, slots - reach)
            if count <= 0:
                continue
            growth = kv.grow(row.request_id, reach + count)
            assert growth is not None
            if row.new_block_ids and growth.block_ids:
                pairs = zip(row.new_block_ids, growth.block_ids, strict=True)
                row.new_block_ids = tuple(old + new for old, new in pairs)
            else:
                row.new_block_ids = row.new_block_ids or growth.block_ids
            row.draft_token_ids = drafts[:count]
            row.num_tokens += count
            row.samples += count
            request.num_drafts_in_flight += count
            left -= count

    def _ask(self, plan: StepPlan, requests: Mapping[int, Request]) -> None:
        """Ask for the drafts that the next plan may verify."""
        for row in plan.rows:
            request = requests[row.request_id]
            if row.samples and request.takes_drafts:
                # At least one token is sampled here, and one after the drafts.
                row.num_drafts = max(0, min(self._limits.max_drafts, request.num_tokens_left - 2))
            request.awaits_drafts = row.num_drafts > 0

    @staticmethod
    def holds(request: Request) -> bool:
        """Whether a request with a pending token cannot be planned: the number of tokens that the plan in
        flight accepts is unknown, or drafts will come with its result."""
        return request.num_drafts_in_flight > 0 or request.awaits_drafts

    def learn(self, request: Request, planned: PlannedRow, token_ids: list[int]) -> None:
        """Count only the accepted drafts as computed. Before the request has learned `token_ids`."""
        drafts = planned.draft_token_ids
        request.num_drafts_in_flight -= len(drafts)
        if request.status is RequestStatus.RUNNING:
            pairs = zip(drafts, token_ids, strict=False)
            accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            # If no token follows the accepted drafts, the last of them is computed again for it.
            computed = min(accepted, len(token_ids) - 1)
            request.num_computed_tokens -= len(drafts) - computed

    def keep(self, request: Request, row: SampledRow) -> None:
        """Keep drafts for the next plan, unless that plan is in flight already."""
        is_waited_for = request.status is RequestStatus.RUNNING and not request.num_pending_tokens
        if is_waited_for and request.takes_drafts:
            request.draft_token_ids, self._has_drafts = row.draft_token_ids, True
