"""What speculative decoding did in a run, under vLLM's keys: from a server's counters, or an engine's."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.bench.client import HttpPool
from quire.metrics import NullMetrics

if TYPE_CHECKING:
    from quire.engine.llm import LLM
    from quire.messages import StepOutputs

_LINE = re.compile(r"^vllm:spec_decode_num_(\w+?)_total(?:\{([^}]*)\})? (\S+)", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')


@dataclass(slots=True)
class DraftCounts:
    """Of all engines together."""

    num_drafts: int = 0
    """Rows that verified drafts."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: dict[int, int] = field(default_factory=dict)
    """By place in the row."""


async def read_counts(pool: HttpPool) -> DraftCounts | None:
    """None if the server has no such counters."""
    answer = await pool.ask(pool.prepare("/metrics"))
    return None if answer.error else parse_counts(bytes(answer.body).decode(errors="replace"))


def parse_counts(text: str) -> DraftCounts | None:
    """text: of /metrics."""
    counts, lines = DraftCounts(), _LINE.findall(text)
    for name, labels, value in lines:
        number = int(float(value))
        if name == "accepted_tokens_per_pos":
            if (found := _POSITION.search(labels)) is not None:
                position = int(found[1])
                counts.accepted_at[position] = counts.accepted_at.get(position, 0) + number
        elif name in ("drafts", "draft_tokens", "accepted_tokens"):
            field_name = "num_drafts" if name == "drafts" else name
            setattr(counts, field_name, getattr(counts, field_name) + number)
    return counts if lines else None


class DraftWatch(NullMetrics):
    """Counts the drafts of an `LLM` from now on."""

    def __init__(self, llm: LLM) -> None:
        self.counts = DraftCounts()
        llm._front.report_to(self)

    def on_step(self, outputs: StepOutputs) -> None:
        counts = self.counts
        if outputs.stats is not None and (found := outputs.stats.drafts) is not None:
            counts.num_drafts += found.num_drafts
            counts.draft_tokens += found.num_draft_tokens
            counts.accepted_tokens += found.num_accepted_tokens
            for at, accepted in enumerate(found.accepted_per_position):
                counts.accepted_at[at] = counts.accepted_at.get(at, 0) + accepted


def draft_figures(before: DraftCounts | None, after: DraftCounts | None) -> dict[str, object]:
    """Empty if nothing was drafted in between."""
    if before is None or after is None or after.draft_tokens <= before.draft_tokens:
        return {}
    drafts = after.num_drafts - before.num_drafts
    tokens = after.draft_tokens - before.draft_tokens
    accepted = after.accepted_tokens - before.accepted_tokens
    per_position = [
        (after.accepted_at[at] - before.accepted_at.get(at, 0)) / drafts
        for at in sorted(after.accepted_at)
    ]
    return {
        "spec_decode_acceptance_rate": 100 * accepted / tokens,
        "spec_decode_acceptance_length": 1 + accepted / drafts,
        "spec_decode_num_drafts": drafts,
        "spec_decode_draft_tokens": tokens,
        "spec_decode_accepted_tokens": accepted,
        "spec_decode_per_position_acceptance_rates": per_position,
    }
