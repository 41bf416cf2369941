"""The limits of a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Plain numbers, so that tests and the simulator need no model."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    watermark_blocks: int = 0
    """Blocks kept free when a request is admitted beside running ones."""
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True
    itl_target: float = 0.0
    """Seconds of a step in which requests generate; 0 for no target."""
    cost_file: str = ""
    """The content of a file of `quire bench fit`, from which the cost model starts; empty for none."""
    policy: str = "fcfs"
    aging: float = 60.0
    """Under the fair policy: see `SchedulerConfig.priority_aging`."""
    max_samples: int = 1 << 30
    """Tokens that a step may sample. Those after drafts are counted; without drafts there is one for each
    sequence at most."""
    max_drafts: int = 0
    """Most drafts that a request verifies in a step; 0 if there is no drafter."""
    adaptive_drafts: bool = True
    """Whether the number of drafts follows their acceptance and the measured time of steps. Else there are
    as many as possible."""
    max_adapters: int = 1 << 30
    """Distinct adapters that running requests use at once."""
    stages: int = 1
    """Of a pipeline. With several, a request has no row while a token of it is pending, and rows are divided
    among as many plans (`scheduler/micro_batches.py`)."""
    fails_with_loads: bool = False
    """Whether a request ends with an error if KV could not be loaded for it. Else the rest is computed."""
    least_prompt_tokens: int = 64
    """Prompts are not divided into fewer tokens, which would not take less time: all weights are read."""
