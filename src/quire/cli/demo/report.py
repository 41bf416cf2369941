"""The report: from the engine's metrics and from times measured by the client."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from quire.cli.demo.talk import Dialogue
from quire.cli.http import HttpClient
from quire.errors import EngineError

POLL_SECONDS = 0.05


@dataclass(slots=True)
class Peaks:
    """The highest values in all samples of /metrics."""

    blocks_used: int = 0
    blocks_shared: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The values of one /metrics page that the report needs."""

    num_blocks: int
    """Blocks that requests can hold: all except the null block."""
    blocks_used: int
    blocks_shared: int
    running: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int

    @classmethod
    def parse(cls, page: str) -> Snapshot:
        """Raises `EngineError` for a missing metric."""
        label = re.search(r'^vllm:cache_config_info\{[^\n]*?num_gpu_blocks="([0-9]+)"', page, re.M)
        if label is None:
            raise EngineError("/metrics has no vllm:cache_config_info with num_gpu_blocks.")
        num_blocks = int(label[1]) - 1
        return cls(
            num_blocks=num_blocks,
            blocks_used=round(_sample(page, "vllm:kv_cache_usage_perc") * num_blocks),
            blocks_shared=round(_sample(page, "quire:kv_blocks_shared")),
            running=round(_sample(page, "vllm:num_requests_running")),
            prefix_queries=round(_sample(page, "vllm:prefix_cache_queries_total")),
            prefix_hits=round(_sample(page, "vllm:prefix_cache_hits_total")),
            preemptions=round(_sample(page, "vllm:num_preemptions_total")),
        )


async def snapshot(client: HttpClient) -> Snapshot:
    return Snapshot.parse((await client.get("/metrics")).decode("utf-8"))


async def watch(client: HttpClient, peaks: Peaks) -> None:
    """Sample /metrics until cancelled. Peaks shorter than the interval between samples are missed."""
    while True:
        now = await snapshot(client)
        peaks.blocks_used = max(peaks.blocks_used, now.blocks_used)
        peaks.blocks_shared = max(peaks.blocks_shared, now.blocks_shared)
        peaks.running = max(peaks.running, now.running)
        await asyncio.sleep(POLL_SECONDS)


def _sample(page: str, name: str) -> float:
    """The value of a metric, summed over its labels."""
    values = [
        float(line.rpartition(" ")[2])
        for line in page.splitlines()
        if line.startswith((name + "{", name + " "))
    ]
    if not values:
        raise EngineError(f"/metrics has no {name}.")
    return sum(values)


@dataclass(frozen=True, slots=True)
class Report:
    model: str
    ready_seconds: float
    conversations: int
    answers: int
    seconds: float
    prompt_tokens: int
    generated_tokens: int
    tokens_per_second: float
    ttft_median_ms: float
    ttft_max_ms: float
    peak_running: int
    num_blocks: int
    peak_blocks_used: int
    peak_blocks_shared: int
    prefix_queries: int
    prefix_hits: int
    prefix_hit_rate: float
    preemptions: int
    requests: list[dict[str, object]]

    @classmethod
    def make(
        cls,
        dialogues: Sequence[Dialogue],
        *,
        model: str,
        ready_seconds: float,
        peaks: Peaks,
        end: Snapshot,
    ) -> Report:
        turns = [turn for dialogue in dialogues for turn in dialogue.turns]
        seconds = max(turn.done for turn in turns) - min(turn.sent for turn in turns)
        generated = sum(turn.completion_tokens for turn in turns)
        ttfts = [1000 * turn.ttft for turn in turns]
        return cls(
            model=model,
            ready_seconds=round(ready_seconds, 3),
            conversations=len(dialogues),
            answers=len(turns),
            seconds=round(seconds, 3),
            prompt_tokens=sum(turn.prompt_tokens for turn in turns),
            generated_tokens=generated,
            tokens_per_second=round(generated / seconds, 1),
            ttft_median_ms=round(statistics.median(ttfts), 1),
            ttft_max_ms=round(max(ttfts), 1),
            peak_running=peaks.running,
            num_blocks=end.num_blocks,
            peak_blocks_used=peaks.blocks_used,
            peak_blocks_shared=peaks.blocks_shared,
            prefix_queries=end.prefix_queries,
            prefix_hits=end.prefix_hits,
            prefix_hit_rate=round(end.prefix_hits / end.prefix_queries, 4)
            if end.prefix_queries
            else 0.0,
            preemptions=end.preemptions,
            requests=[
                {
                    "conversation": dialogue.number,
                    "turn": position + 1,
                    "question": turn.question,
                    "answer": turn.answer,
                    "finish_reason": turn.finish_reason,
                    "prompt_tokens": turn.prompt_tokens,
                    "cached_tokens": turn.cached_tokens,
                    "generated_tokens": turn.completion_tokens,
                    "ttft_ms": round(1000 * turn.ttft, 1),
                    "tokens_per_second": round(turn.tokens_per_second, 1),
                }
                for dialogue in dialogues
                for position, turn in enumerate(dialogue.turns)
            ],
        )

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        head = (
            f"{'request':<9}{'prompt':>8}{'cached':>8}{'generated':>11}{'TTFT':>10}{'tokens/s':>10}"
        )
        rows = [
            f"{'{conversation}.{turn}'.format(**row):<9}{row['prompt_tokens']:>8}{row['cached_tokens']:>8}"
            f"{row['generated_tokens']:>11}{row['ttft_ms']:>7.0f} ms{row['tokens_per_second']:>10.0f}"
            for row in self.requests
        ]
        facts = {
            "model": f"{self.model}, ready {self.ready_seconds:.1f} s after launch",
            "conversations": f"{self.conversations} at once, {self.answers} answers in {self.seconds:.1f} s",
            "TTFT": f"median {self.ttft_median_ms:.0f} ms, max {self.ttft_max_ms:.0f} ms",
            "throughput": f"{self.tokens_per_second:.0f} tokens/s"
            f" ({self.generated_tokens} generated from {self.prompt_tokens} of prompt)",
            "KV blocks": f"peak {self.peak_blocks_used} of {self.num_blocks} used,"
            f" peak {self.peak_blocks_shared} shared",
            "prefix cache": f"{self.prefix_hits} of {self.prefix_queries} prompt tokens found"
            f" ({100 * self.prefix_hit_rate:.0f} %)",
            "preemptions": str(self.preemptions),
        }
        width = max(len(name) for name in facts) + 2
        return "\n".join([head, *rows, "", *(f"{k:<{width}}{v}" for k, v in facts.items())])
