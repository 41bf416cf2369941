"""From logits to tokens: penalties, temperature, filters, and one random stream per request.

What a row yields depends on its logits, its parameters, its own history and `(seed, position)`, never on
the rows beside it. Most rows want only what `Kernels.sample` does: their parameters lie in one array, by
seat, and no Python runs for them. The few that want more (penalties, a ban on end tokens, logprobs) have
a `SamplingState` and are handled one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.base import Kernels
from quire.kernels.sampling import SAMPLE_ROW
from quire.messages import AdmittedRequest, TokenLogprobs

_MOST_TOP_K = 2**31 - 1


class SamplingState:
    """What a request needs beyond `SAMPLE_ROW`: its parameters and history."""

    __slots__ = ("counts", "final_ids", "num_prompt_tokens", "params", "seen")

    def __init__(self, request: AdmittedRequest, vocab_size: int) -> None:
        self.params = params = request.params
        self.num_prompt_tokens = request.num_prompt_tokens
        self.final_ids = sorted({*request.eos_token_ids, *(params.stop_token_ids or ())})
        self.counts: Tensor | None = None
        """[vocab_size] float32: occurrences of each token in the output, where penalties need it."""
        self.seen: Tensor | None = None
        """[vocab_size] bool: tokens in prompt or output."""
        if params.has_penalties:
            ids = torch.tensor(request.token_ids, dtype=torch.int64)
            output = ids[request.num_prompt_tokens :]
            self.counts = torch.bincount(output, minlength=vocab_size).float()
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[ids] = True

    def learn(self, token_id: int) -> None:
        """A token was sampled."""
        if self.counts is not None and self.seen is not None:
            self.counts[token_id] += 1.0
            self.seen[token_id] = True

    def bans_final_ids(self, position: int) -> bool:
        """For the token to be sampled at this index in the request."""
        few = position - self.num_prompt_tokens < self.params.min_tokens
        return few and bool(self.final_ids)

    def is_needed(self, position: int) -> bool:
        """For that token, or any later one."""
        return (
            self.counts is not None
            or self.params.logprobs is not None
            or self.bans_final_ids(position)
        )


class SamplingSeats:
    """How the request in each seat is sampled. Admission writes all that is read of a seat, so nothing
    stale can be."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows = np.zeros(max_num_seqs, dtype=SAMPLE_ROW)
        self._num_random = 0
        self._states: dict[int, SamplingState] = {}

    def admit(self, seat: int, request: AdmittedRequest) -> None:
        params, seed = request.params, request.seed
        row = self._rows[seat]
        row["temperature"] = params.temperature
        row["top_p"] = params.top_p
        row["min_p"] = params.min_p
        row["top_k"] = min(params.top_k, _MOST_TOP_K)
        row["seed"] = seed if seed < 2**63 else seed - 2**64
        self._num_random += not params.is_greedy
        if params.has_penalties or params.min_tokens > 0 or params.logprobs is not None:
            self._states[seat] = SamplingState(request, self._vocab_size)

    def release(self, seat: int) -> None:
        self._num_random -= bool(self._rows[seat]["temperature"] > 0)
        self._rows[seat] = 0
        self._states.pop(seat, None)

    def rows(
        self, seats: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.void] | None:
        """For `Kernels.sample`; None if every seat is greedy."""
        if not self._num_random:
            return None
        rows = self._rows[seats]
        rows["position"] = positions
        return rows

    def states(
        self, seats: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> dict[int, SamplingState]:
        """Of those seats that need one, by index. One that no longer does is dropped."""
        found: dict[int, SamplingState] = {}
        if not self._states:
            return found
        for index, seat in enumerate(seats.tolist()):
            state = self._states.get(seat)
            if state is None:
                continue
            if state.is_needed(int(positions[index])):
                found[index] = state
            else:
                del self._states[seat]
        return found


@dataclass(frozen=True, slots=True)
class Sampled:
    """token_ids: [R] int64. valid: [R] bool, False where the logits held NaN; there is then no token.
    logprobs: by index, of the rows that asked."""

    token_ids: NDArray[np.int64]
    valid: NDArray[np.bool_]
    logprobs: dict[int, TokenLogprobs]


class Sampler:
    """Chooses tokens for a batch of rows."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def sample(
        self,
        logits: Tensor,
        table: SamplingSeats,
        seats: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> Sampled:
        """logits: [R, V] float32, row i for seats[i], no seat twice; may be overwritten. positions: [R],
        index in its request of the token to be sampled."""
        states = table.states(seats, positions)
        raw = _prepare(logits, states, positions) if states else {}
        result = self._kernels.sample(logits, table.rows(seats, positions))
        logprobs: dict[int, TokenLogprobs] = {}
        for index, state in states.items():
            if not result.valid[index]:
                continue
            token = int(result.token_ids[index])
            state.learn(token)
            if index in raw:
                logprobs[index] = top_logprobs(raw[index], token, state.params.logprobs or 0)
        return Sampled(result.token_ids, result.valid, logprobs)


@torch.inference_mode()
def _prepare(
    logits: Tensor, states: dict[int, SamplingState], positions: NDArray[np.int64]
) -> dict[int, Tensor]:
    """Edits the rows that want it, in place. Returns log-softmax of the rows as they were, for those that
    ask: index -> [V]."""
    raw: dict[int, Tensor] = {}
    for index, state in states.items():
        if state.params.logprobs is not None:
            raw[index] = torch.log_softmax(logits[index], dim=-1)
        _edit(logits[index], state, int(positions[index]))
    return raw


def _edit(logits: Tensor, state: SamplingState, position: int) -> None:
    """Penalties and the min_tokens ban, in place. logits: [V]"""
    params = state.params
    if state.bans_final_ids(position):
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


def top_logprobs(logprobs: Tensor, token: int, asked: int) -> TokenLogprobs:
    """logprobs: [V]. The chosen token's value and rank, and the top ones asked for, -1 for all."""
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
