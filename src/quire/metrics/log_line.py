"""The throughput line in the log, with vLLM's text, so that log scrapers keep working."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.messages import SchedulerStats, StepOutputs


logger = logging.getLogger(__name__)


class StatsLogger:
    """Adds up the reports of steps and logs one line per interval; none while the engine is idle."""

    def __init__(self, *, engine: str = "000") -> None:
        self._engine = engine
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._queries = 0
        self._hits = 0
        self._missed = self._external = 0
        self._preemptions = 0
        self._drafts = self._accepted = 0
        self._stats: SchedulerStats | None = None
        self._was_idle = True
        self._since: float | None = None

    def on_step(self, outputs: StepOutputs) -> None:
        decode_rows = 0
        for update in outputs.updates:
            self._generation_tokens += len(update.new_token_ids)
            if update.prefix is not None:
                self._missed += update.prefix.computed
                self._external += update.prefix.external
            elif update.new_token_ids:
                decode_rows += 1
        if outputs.stats is not None:
            self._stats = outputs.stats
            self._prompt_tokens += max(0, outputs.stats.step_tokens - decode_rows)
            self._queries += outputs.stats.prefix_queries
            self._hits += outputs.stats.prefix_hits
            self._preemptions += outputs.stats.num_preemptions
            if (drafts := outputs.stats.drafts) is not None:
                self._drafts += drafts.num_draft_tokens
                self._accepted += drafts.num_accepted_tokens

    def line(self, now: float) -> str | None:
        """The line for the interval that ends `now` (monotonic seconds), or None when idle.

        The first idle interval after work is still reported, so that the last line of a log has zeros.
        """
        since, self._since = self._since, now
        stats = self._stats
        if stats is None:
            return None
        idle = not (self._prompt_tokens or self._generation_tokens or stats.num_running)
        was_idle, self._was_idle = self._was_idle, idle
        seconds = now - since if since is not None else 0.0
        if seconds <= 0.0 or (idle and was_idle):
            return None
        hit_rate = self._hits / self._queries if self._queries else 0.0
        parts = [
            f"Avg prompt throughput: {self._prompt_tokens / seconds:.1f} tokens/s",
            f"Avg generation throughput: {self._generation_tokens / seconds:.1f} tokens/s",
            f"Running: {stats.num_running} reqs",
            f"Waiting: {stats.num_waiting} reqs",
        ]
        if self._preemptions:
            parts.append(f"Preemptions: {self._preemptions}")
        parts.append(f"GPU KV cache usage: {100.0 * stats.kv_usage:.1f}%")
        parts.append(f"Prefix cache hit rate: {100.0 * hit_rate:.1f}%")
        if stats.kv_tiers:
            rate = 100.0 * self._external / max(1, self._external + self._missed)
            parts.append(f"External prefix cache hit rate: {rate:.1f}%")
        if self._drafts:
            rate = 100.0 * self._accepted / self._drafts
            parts.append(f"Draft acceptance rate: {rate:.1f}% of {self._drafts}")
        self._prompt_tokens = self._generation_tokens = self._preemptions = 0
        self._drafts = self._accepted = 0
        return f"Engine {self._engine}: " + ", ".join(parts)

    def log(self, now: float) -> None:
        line = self.line(now)
        if line is not None:
            logger.info("%s", line)
