"""From logits to tokens: penalties, temperature, filters, and one random stream per request.

Everything here is per row. What a row yields depends on its logits, its parameters, its own history and
`(seed, position)`, never on the rows beside it: the batch only shares the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels.base import Kernels
from quire.messages import SampledRow, TokenLogprobs
from quire.sampling_params import SamplingParams


class SamplingState:
    """One request's sampling parameters and history. A value of the request: nothing is kept by
    slot or batch position, so nothing stale can be read."""

    __slots__ = ("counts", "final_ids", "params", "seed", "seen")

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        eos_token_ids: Sequence[int],
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        vocab_size: int,
    ) -> None:
        self.params = params
        self.seed = seed if seed < 2**63 else seed - 2**64
        self.final_ids = sorted({*eos_token_ids, *(params.stop_token_ids or ())})
        self.counts: Tensor | None = None
        """[vocab_size] float32: occurrences of each token in the output, where penalties need it."""
        self.seen: Tensor | None = None
        """[vocab_size] bool: tokens in prompt or output."""
        if params.has_penalties:
            ids = torch.tensor(token_ids, dtype=torch.int64)
            self.counts = torch.bincount(ids[num_prompt_tokens:], minlength=vocab_size).float()
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[ids] = True

    def learn(self, token_id: int) -> None:
        """A token was sampled."""
        if self.counts is not None and self.seen is not None:
            self.counts[token_id] += 1.0
            self.seen[token_id] = True

    def edits_logits(self, num_output_tokens: int) -> bool:
        return self.counts is not None or (
            num_output_tokens < self.params.min_tokens and bool(self.final_ids)
        )


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits to sample from."""

    request_id: int
    state: SamplingState
    position: int
    """Index in the request of the token to be sampled: the counter of its random stream."""
    num_output_tokens: int


class Sampler:
    """Chooses tokens for a batch of rows."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledRow]:
        """logits: [R, V] float32, row i for rows[i]; may be overwritten. Returns one result a row, in
        order; a row whose logits hold NaN gets an error of its own."""
        assert logits.shape[0] == len(rows)
        logprobs = self._raw_logprobs(logits, rows)
        for index, row in enumerate(rows):
            if row.state.edits_logits(row.num_output_tokens):
                _edit(logits[index], row)
        tokens = logits.argmax(dim=-1)
        best = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
        random = [i for i, row in enumerate(rows) if not row.state.params.is_greedy]
        if random:
            picked = torch.tensor(random)
            drawn = self._draw(logits[picked], best[picked], [rows[i] for i in random])
            tokens[picked] = drawn
        # The maximum is NaN if anything in the row is.
        broken = torch.isnan(best).tolist()
        results = []
        for index, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if broken[index]:
                error = "The model produced invalid numbers (NaN) for this request."
                results.append(SampledRow(request_id=row.request_id, token_ids=[], error=error))
                continue
            row.state.learn(token)
            entry = logprobs.get(index)
            results.append(
                SampledRow(
                    request_id=row.request_id,
                    token_ids=[token],
                    logprobs=None if entry is None else [_top(entry, token, row.state.params)],
                )
            )
        return results

    def _draw(self, logits: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """One token a row from the filtered distribution, by the Gumbel-max trick. [R] int64"""
        params = [row.state.params for row in rows]
        temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float32)
        scores = (logits - best.unsqueeze(1)) / temperatures.unsqueeze(1)
        for index, p in enumerate(params):
            filter_scores(scores[index], top_k=p.top_k, top_p=p.top_p, min_p=p.min_p)
        seeds = torch.tensor([row.state.seed for row in rows], dtype=torch.int64)
        positions = torch.tensor([row.position for row in rows], dtype=torch.int64)
        return self._kernels.sample_gumbel(scores, seeds, positions)

    @staticmethod
    def _raw_logprobs(logits: Tensor, rows: Sequence[SamplingRow]) -> dict[int, Tensor]:
        """Log-softmax of the untouched logits, for the rows that ask: index -> [V]."""
        asked = [i for i, row in enumerate(rows) if row.state.params.logprobs is not None]
        if not asked:
            return {}
        picked = torch.log_softmax(logits[torch.tensor(asked)], dim=-1)
        return dict(zip(asked, picked, strict=True))


def filter_scores(scores: Tensor, *, top_k: int, top_p: float, min_p: float) -> None:
    """Set excluded tokens of one row to -inf, in place. scores: [V] float32, the best is 0.

    In vLLM's order: min_p, then top_k, then top_p of what is left. Tokens that tie with the k-th
    stay. A full sort is taken only where the most likely few hundred tokens do not hold `top_p`.
    """
    if min_p > 0.0:
        scores.masked_fill_(scores.exp() < min_p, -torch.inf)
    vocab_size = scores.shape[0]
    if 0 < top_k < vocab_size:
        threshold = scores.topk(top_k, sorted=False).values.min()
        scores.masked_fill_(scores < threshold, -torch.inf)
    if top_p < 1.0:
        _keep_top_p(scores, top_p)


_NUCLEUS_GUESS = 256


def _keep_top_p(scores: Tensor, top_p: float) -> None:
    weights = scores.exp()
    target = top_p * weights.sum()
    size = min(_NUCLEUS_GUESS, scores.shape[0])
    values, ids = weights.topk(size)
    before = values.cumsum(0) - values
    if size < scores.shape[0] and bool(before[-1] + values[-1] < target):
        values, ids = weights.sort(descending=True, stable=True)
        before = values.cumsum(0) - values
    # The most likely token always stays: nothing precedes it.
    kept = ids[before < target]
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[kept] = False
    mask[ids[0]] = False
    scores.masked_fill_(mask, -torch.inf)


def _edit(logits: Tensor, row: SamplingRow) -> None:
    """Penalties and the min_tokens ban, in place. logits: [V]"""
    state, params = row.state, row.state.params
    if row.num_output_tokens < params.min_tokens and state.final_ids:
        logits[torch.tensor(state.final_ids)] = -torch.inf
    if state.counts is None or state.seen is None:
        return
    if params.repetition_penalty != 1.0:
        repeated = torch.where(
            logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty
        )
        logits.copy_(torch.where(state.seen, repeated, logits))
    if params.frequency_penalty != 0.0:
        logits.sub_(state.counts, alpha=params.frequency_penalty)
    if params.presence_penalty != 0.0:
        logits.sub_((state.counts > 0).float(), alpha=params.presence_penalty)


def _top(logprobs: Tensor, token: int, params: SamplingParams) -> TokenLogprobs:
    """logprobs: [V]. The chosen token's value and rank, and the top ones asked for."""
    asked = params.logprobs or 0
    count = logprobs.shape[0] if asked == -1 else min(asked, logprobs.shape[0])
    chosen = logprobs[token]
    rank = int((logprobs > chosen).sum()) + 1
    values, ids = logprobs.topk(count)
    return TokenLogprobs(
        token_id=token,
        logprob=float(chosen),
        rank=rank,
        top_ids=ids.tolist(),
        top_logprobs=values.tolist(),
    )
