"""Suffix decoding (arXiv 2411.04975): drafts from the request's own tokens and from past outputs.

Past outputs are kept in a ring of bounded size. They become drafts only for requests of the same tenant,
salt and adapter: else how fast an answer comes would say what others were answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quire.kernels.program import StepRows
from quire.messages import StepPlan
from quire.speculative.base import DraftContext, DraftTask
from quire.speculative.lookup import Lookup, LookupRules, owner_of

ANCHOR = 2
MOST_TOKENS = 1 << 20
"""Of past outputs: 28 MB when the ring is full."""
TOKENS_PER_TEXT = 512
LEAD = 32
"""Prompt tokens that are kept before an output, so that its beginning is found too."""


class SuffixDrafter:
    def __init__(self, rules: LookupRules, most_texts: int) -> None:
        """most_texts: past outputs that are kept."""
        self._rules, self._most_texts = rules, most_texts

    def open_cache(self, rows: StepRows, num_blocks: int, block_size: int) -> None:
        room = min(MOST_TOKENS, self._most_texts * TOKENS_PER_TEXT)
        capacity = 1 << (room - 1).bit_length() if room else 0
        self._rows = rows
        self._lookup = Lookup(rows, self._rules, capacity=capacity, most_texts=self._most_texts)
        self._seats: dict[int, tuple[int, int]] = {}
        """By seat: the owner of its text, and where it begins to be kept."""
        self._known: dict[int, int] = {}
        """By seat: the number of known tokens when it was seen last."""

    def begin(self, plan: StepPlan, seat_of: Mapping[int, int]) -> None:
        for request in plan.admitted:
            seat, owner = seat_of[request.request_id], owner_of(request.placement)
            self._seats[seat] = (owner, max(0, len(request.token_ids) - LEAD))
            self._lookup.admit(seat, owner)
        for row in plan.rows:  # also of requests that nobody asks about
            known = row.start + row.num_tokens - len(row.draft_token_ids)
            self._known[seat_of[row.request_id]] = known

    def release(self, seat: int) -> None:
        owner, start = self._seats.pop(seat)
        known = self._known.pop(seat)
        if known > start + LEAD:
            self._lookup.add(self._rows.token_ids[seat, start:known], owner)

    def propose(self, tasks: Sequence[DraftTask]) -> Sequence[Sequence[int]]:
        for task in tasks:
            self._known[task.seat] = task.num_tokens
        return self._lookup.propose(tasks)


def create(context: DraftContext) -> SuffixDrafter:
    options = context.options
    depth = options.suffix_decoding_max_tree_depth
    rules = LookupRules(
        anchor=min(ANCHOR, depth),
        depth=depth,
        most=options.num_speculative_tokens,
        votes=True,
        factor=options.suffix_decoding_max_spec_factor,
        least=options.suffix_decoding_min_token_prob,
    )
    return SuffixDrafter(rules, options.suffix_decoding_max_cached_requests)
