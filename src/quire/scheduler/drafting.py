"""Speculative decoding in the scheduler: which rows verify how many drafts, and how many are asked for.

Drafts are guesses at the tokens that follow a request's last token. A row that computes the last token may
compute drafts after it, like known tokens, and the executor samples after each. With the result, drafts
that were right are known tokens whose KV exists; for the others `num_computed_tokens` is reduced, and their
slots are written again before they are read. No block is shared before its tokens are known.

Drafts use only what is left of a step: they come after all rows in budget and blocks, so they preempt no
request and take no prompt's budget. How many of them pay is decided by `scheduler/draft_policy.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from quire.kvcache import KVCacheManager
from quire.messages import DraftCounts, PlannedRow, SampledRow, StepPlan
from quire.scheduler.cost_model import CostModel
from quire.scheduler.decisions import Reporter
from quire.scheduler.draft_policy import AdaptivePolicy, DraftPolicy
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.request import Request, RequestStatus


class Drafting:
    """The drafts of all requests. Without a drafter (`max_drafts` 0) nothing of it is called."""

    def __init__(
        self, limits: SchedulerLimits, kv: KVCacheManager, report: Reporter, costs: CostModel
    ) -> None:
        self._limits = limits
        self._kv = kv
        self._report = report
        adaptive = limits.adaptive_drafts
        self.policy = AdaptivePolicy(limits.max_drafts, costs) if adaptive else DraftPolicy()
        self._has_drafts = False
        self._counts = DraftCounts()
        self._asking: set[int] = set()
        """Ids of the plans in flight that ask for drafts."""

    # --- planning -------------------------------------------------------------------------------------

    def plan(self, plan: StepPlan, requests: Mapping[int, Request]) -> None:
        """The last pass over a plan: rows verify the drafts that there are, and ask for new ones."""
        if not self._has_drafts and self.policy.rests(len(plan.rows)):
            return
        sampling = [row for row in plan.rows if row.samples]
        if self._has_drafts:
            self._has_drafts = False
            self._verify(plan, sampling, requests)
        if sampling and self._ask(sampling, requests):
            self._asking.add(plan.step_id)

    def _verify(
        self, plan: StepPlan, sampling: Sequence[PlannedRow], requests: Mapping[int, Request]
    ) -> None:
        """Let rows verify drafts, in order, within the rest of the budget and samples and the free
        blocks. Drafts that do not fit are dropped."""
        num_tokens, drafts_of = plan.num_tokens, []
        for row in plan.rows:
            request = requests[row.request_id]
            drafts, request.draft_token_ids = request.draft_token_ids, ()
            if drafts and row.samples:
                drafts_of.append((row, request, drafts[: max(0, request.num_tokens_left - 1)]))
        counts = self.policy.grant(
            [request for _, request, _ in drafts_of],
            [len(drafts) for _, _, drafts in drafts_of],
            len(sampling),
            num_tokens > len(sampling),
        )
        left = min(
            self._limits.max_num_batched_tokens - num_tokens,
            self._limits.max_samples - len(sampling),
        )
        for (row, request, drafts), count in zip(drafts_of, counts, strict=True):
            granted = self._fit(row, drafts[: min(count, left)])
            left -= granted
            request.num_drafts_in_flight += granted
            self._report.drafts(row.request_id, len(drafts), granted)

    def _fit(self, row: PlannedRow, drafts: tuple[int, ...]) -> int:
        """Add as many of the drafts to the row as there are blocks for. Returns their number."""
        kv, reach, count = self._kv, row.start + row.num_tokens, len(drafts)
        missing = kv.num_missing(row.request_id, reach + count)
        if missing > max(0, kv.num_free - self._limits.watermark_blocks):
            slots = kv.num_blocks_of(row.request_id) * kv.block_size
            count = min(count, slots - reach)
        if count <= 0:
            return 0
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
        return count

    def _ask(self, sampling: Sequence[PlannedRow], requests: Mapping[int, Request]) -> bool:
        """Ask for the drafts that the next plan may verify. Returns whether any are wanted."""
        asked = [requests[row.request_id] for row in sampling]
        # At least one token is sampled now, and one after the drafts.
        limits = [
            min(self._limits.max_drafts, max(0, request.num_tokens_left - 2))
            if request.takes_drafts
            else 0
            for request in asked
        ]
        counts = self.policy.ask(asked, limits)
        for row, request, count in zip(sampling, asked, counts, strict=True):
            row.num_drafts = count
            request.awaits_drafts = count > 0
        return any(counts)

    @staticmethod
    def holds(request: Request) -> bool:
        """Whether a request with a pending token cannot be planned: the number of tokens that the plan in
        flight accepts is unknown, or drafts will come with its result."""
        return request.num_drafts_in_flight > 0 or request.awaits_drafts

    # --- results --------------------------------------------------------------------------------------

    def learn(self, request: Request, planned: PlannedRow, token_ids: list[int]) -> tuple[int, int]:
        """Count only the accepted drafts as computed. Before the request has learned `token_ids`. Returns
        the numbers of verified and of accepted drafts."""
        drafts = planned.draft_token_ids
        request.num_drafts_in_flight -= len(drafts)
        accepted = 0
        for draft, token in zip(drafts, token_ids, strict=False):
            if draft != token:
                break
            accepted += 1
        self._counts.add(len(drafts), accepted)
        self.policy.learn(request, len(drafts), accepted)
        if request.status is RequestStatus.RUNNING:
            # If no token follows the accepted drafts, the last of them is computed again for it.
            computed = min(accepted, len(token_ids) - 1)
            request.num_computed_tokens -= len(drafts) - computed
        return len(drafts), accepted

    def keep(self, request: Request, row: SampledRow) -> int:
        """Keep drafts for the next plan, unless that plan is in flight already. An end token is no use as a
        draft: no token follows it. Returns how many are kept."""
        if request.status is not RequestStatus.RUNNING or request.num_pending_tokens:
            return 0
        decoding = request.decoding
        ends = decoding.end_token_ids | decoding.stop_token_ids
        drafts = row.draft_token_ids
        if not ends.isdisjoint(drafts):
            drafts = tuple(takewhile(lambda draft: draft not in ends, drafts))
        if drafts and request.takes_drafts:
            request.draft_token_ids, self._has_drafts = drafts, True
            return len(drafts)
        return 0

    def measure(
        self,
        plan: StepPlan,
        requests: Mapping[int, Request],
        draft_seconds: float,
        seconds: float,
    ) -> None:
        """A plan is done, and took so many seconds."""
        if plan.step_id not in self._asking and self.policy.skips(seconds):
            return
        self._asking.discard(plan.step_id)
        asked = samples = 0
        for row in plan.rows:
            samples += row.samples
            if row.num_drafts:
                asked += row.num_drafts
                if (request := requests.get(row.request_id)) is not None:
                    request.awaits_drafts = False
        self.policy.measure(plan.num_tokens, samples, asked, seconds, draft_seconds)

    def take_counts(self) -> DraftCounts | None:
        """What was verified since the last call; None if nothing was."""
        if not self._counts.num_drafts:
            return None
        counts, self._counts = self._counts, DraftCounts()
        return counts
