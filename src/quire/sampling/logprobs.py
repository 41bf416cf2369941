"""The reported logprobs of a token, and the top ones among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.kernels.reference import filtered_scores
from quire.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class LogprobsMode:
    """The values that are reported as logprobs, on every device."""

    processed: bool
    """Made from the logits that tokens are drawn from, see `processed`; not from the model's."""
    normalized: bool
    """The log-softmax of the logits; not the logits themselves."""

    @classmethod
    def of(cls, name: str) -> LogprobsMode:
        """name: as in `ModelConfig.logprobs_mode`."""
        source, _, kind = name.partition("_")
        return cls(processed=source == "processed", normalized=kind == "logprobs")

    def reported(self, logits: Tensor) -> Tensor:
        """The reported values, [V]. logits: [V], processed if the mode says so."""
        return log_softmax(logits[None])[0] if self.normalized else logits


def processed(logits: Tensor, row: np.void | None) -> Tensor:
    """The logits that are sampled from: [V], divided by the temperature, -inf for tokens that a filter
    removes. logits: edited. row: a `SAMPLE_ROW`; None, or of temperature 0, for greedy."""
    if row is None or row["temperature"] == 0 or bool(logits.isnan().any()):
        return logits.clone()
    kept = filtered_scores(logits, row).isfinite()
    return torch.where(kept, logits / float(row["temperature"]), -torch.inf)


def log_softmax(logits: Tensor) -> Tensor:
    """logits: [R, V]; those of +inf share the whole probability. Row by row on a CPU: PyTorch's sums over
    several rows may depend on their number."""
    if not logits.is_cpu:
        return torch.log_softmax(logits, dim=-1)
    out = torch.empty_like(logits)
    for row, to in zip(logits, out, strict=True):
        endless = row == torch.inf
        if bool(endless.any()):
            row = torch.where(endless, 0.0, -torch.inf)
        to.copy_(torch.log_softmax(row.clone(), dim=-1))
    return out


def top_logprobs(
    logprobs: Tensor, tokens: Sequence[int], asked: int, also: Sequence[int] | None = None
) -> list[TokenLogprobs]:
    """For each row: the value and rank of its token, the top `asked` values (-1 for all), and the values of
    `also`. logprobs: [R, V]; tokens: [R]."""
    count = logprobs.shape[1] if asked == -1 else min(asked, logprobs.shape[1])
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])
    ranks = (logprobs > chosen).sum(1) + 1
    values, ids = _likeliest(logprobs, count)
    others = logprobs[:, list(also)].tolist() if also else [[]] * len(tokens)
    return [
        TokenLogprobs(*entry)
        for entry in zip(
            tokens,
            chosen[:, 0].tolist(),
            ranks.tolist(),
            ids.tolist(),
            values.tolist(),
            others,
            strict=True,
        )
    ]


def _likeliest(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and ids, best first, ties by id: `topk` has no defined order for ties. logprobs: [R, V]. Returns
    [R, count] twice."""
    values, ids = logprobs.topk(count)
    if count == 0:
        return values, ids
    last = values[:, -1:]
    cut_ties = (logprobs >= last).sum(1) > count
    for row in cut_ties.nonzero()[:, 0].tolist():
        kept = values[row] == last[row]
        ids[row, kept] = (logprobs[row] == last[row]).nonzero()[: int(kept.sum()), 0]
    ids, by_id = ids.sort(dim=1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)
