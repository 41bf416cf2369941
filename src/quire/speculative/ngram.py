"""Prompt lookup: drafts are what followed the longest suffix of the request's tokens where it was before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quire.kernels.program import StepRows
from quire.messages import StepPlan
from quire.speculative.base import DraftContext, DraftTask
from quire.speculative.lookup import Lookup, LookupRules

FACTOR = 1.5
"""Drafts for each token of the suffix that was found: a long one is more often right. Measured on
bench/copying.py."""


class NgramDrafter:
    def __init__(self, rules: LookupRules) -> None:
        self._rules = rules

    def open_cache(self, rows: StepRows, num_blocks: int, block_size: int) -> None:
        self._lookup = Lookup(rows, self._rules)

    def begin(self, plan: StepPlan, seat_of: Mapping[int, int]) -> None:
        for request in plan.admitted:
            self._lookup.admit(seat_of[request.request_id], 0)

    def release(self, seat: int) -> None:
        pass

    def propose(self, tasks: Sequence[DraftTask]) -> Sequence[Sequence[int]]:
        return self._lookup.propose(tasks)


def create(context: DraftContext) -> NgramDrafter:
    options = context.options
    return NgramDrafter(
        LookupRules(
            anchor=options.prompt_lookup_min,
            depth=options.prompt_lookup_max,
            most=options.num_speculative_tokens,
            factor=FACTOR,
        )
    )
