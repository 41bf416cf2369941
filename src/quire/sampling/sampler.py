"""From logits to tokens on a CPU: penalties, temperature, filters, and one random stream per request.

A row's token depends on its logits, its parameters, its own history and `(seed, position)`, and not on
other rows. Most rows need only `Kernels.sample`: their parameters are in one array, by seat, and no
Python runs for them. The few that need more (penalties, a ban on end tokens, logprobs) have a
`SamplingState` and are handled one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.decoding import GrammarSpec
from quire.kernels.base import Kernels
from quire.kernels.sampling import SAMPLE_ROW, sample_row
from quire.messages import AdmittedRequest, TokenLogprobs
from quire.sampling.logprobs import LogprobsMode, processed, top_logprobs
from quire.sampling.rules import RequestRules
from quire.structured.base import Grammar
from quire.structured.masks import Mask, tokens_of

NO_DRAFT = -1
"""In an array of drafts, where a token follows a known token and not a draft."""


class GrammarSource(Protocol):
    """The source of compiled grammars."""

    def grammar(self, spec: GrammarSpec) -> Grammar:
        """A grammar that has been compiled before."""
        ...


def rules_of(
    request: AdmittedRequest, vocab_size: int, grammars: GrammarSource | None
) -> RequestRules | None:
    decoding, grammar = request.decoding, None
    if not decoding.restricts_tokens:
        return None
    if decoding.grammar is not None:
        assert grammars is not None, "the engine prepares grammars only where it has a store"
        grammar = grammars.grammar(decoding.grammar)
    return RequestRules(
        decoding,
        grammar,
        vocab_size=vocab_size,
        output=request.token_ids[request.num_prompt_tokens :],
    )


class SamplingState:
    """A request's parameters and history beyond `SAMPLE_ROW`."""

    __slots__ = ("_always", "banned_until", "bias", "counts", "decoding", "final_ids", "seen")

    def __init__(self, request: AdmittedRequest, vocab_size: int) -> None:
        self.decoding = decoding = request.decoding
        self.banned_until = decoding.banned_until(request.num_prompt_tokens)
        self.final_ids = decoding.final_ids if self.banned_until else []
        self._always = decoding.edits_logits or decoding.logprobs is not None
        self.counts: Tensor | None = None
        """[vocab_size] float32: occurrences of each token in the output, if penalties need it."""
        self.seen: Tensor | None = None
        """[vocab_size] bool: tokens in prompt or output."""
        if decoding.has_penalties:
            ids = torch.tensor(request.token_ids, dtype=torch.int64)
            output = ids[request.num_prompt_tokens :]
            self.counts = torch.bincount(output, minlength=vocab_size).float()
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[ids] = True
        self.bias: tuple[Tensor, Tensor] | None = None
        """Token ids, and the numbers added to their logits."""
        if decoding.logit_bias:
            ids, values = zip(*decoding.logit_bias.items(), strict=True)
            self.bias = torch.tensor(ids), torch.tensor(values, dtype=torch.float32)

    def count(self, token_id: int) -> bool:
        """A token was added to the output. Returns whether it was in prompt or output before, if penalties
        need that."""
        if self.counts is None or self.seen is None:
            return True
        was_seen = bool(self.seen[token_id])
        self.counts[token_id] += 1.0
        self.seen[token_id] = True
        return was_seen

    def uncount(self, token_id: int, was_seen: bool) -> None:
        """Undo the last `count`, which returned `was_seen`."""
        if self.counts is not None and self.seen is not None:
            self.counts[token_id] -= 1.0
            self.seen[token_id] = was_seen

    def is_needed(self, position: int) -> bool:
        """Whether it is needed for the token at this index in the request, or a later one."""
        return self._always or position < self.banned_until

    @property
    def wants_logprobs(self) -> bool:
        return self.decoding.logprobs is not None

    def edit(self, logits: Tensor, position: int, mask: Mask | None) -> None:
        """All edits except temperature and filters, in place. logits: [V]. mask: the tokens that may be
        sampled."""
        decoding = self.decoding
        if mask is not None:
            kept = torch.full_like(logits, -torch.inf)
            index = torch.from_numpy(tokens_of(mask))
            kept[index] = logits[index]
            logits.copy_(kept)
        if position < self.banned_until:
            logits[torch.tensor(self.final_ids)] = -torch.inf
        if self.bias is not None:
            ids, values = self.bias
            logits[ids] += values
        if self.counts is None or self.seen is None:
            return
        if (penalty := decoding.repetition_penalty) != 1.0:
            repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self.seen, repeated, logits))
        if decoding.frequency_penalty != 0.0:
            logits.sub_(self.counts, alpha=decoding.frequency_penalty)
        if decoding.presence_penalty != 0.0:
            logits.sub_((self.counts > 0).float(), alpha=decoding.presence_penalty)


class SamplingSeats:
    """The sampling parameters of the request in each seat. Admission writes everything that is read of a
    seat, so old values are never used."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows = np.zeros(max_num_seqs, dtype=SAMPLE_ROW)
        self._num_random = 0
        self._states: dict[int, SamplingState] = {}

    def admit(self, seat: int, request: AdmittedRequest) -> None:
        self._rows[seat] = sample_row(request.decoding, request.num_prompt_tokens)
        self._num_random += not request.decoding.is_greedy
        state = SamplingState(request, self._vocab_size)
        if state.is_needed(len(request.token_ids)):
            self._states[seat] = state

    def release(self, seat: int) -> None:
        self._num_random -= bool(self._rows[seat]["temperature"] > 0)
        self._rows[seat] = 0
        self._states.pop(seat, None)

    def count(self, seat: int, token_ids: Sequence[int]) -> None:
        """Tokens were added to a request's output that were not sampled."""
        if (state := self._states.get(seat)) is not None:
            for token_id in token_ids:
                state.count(token_id)

    def rows(
        self, seats: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.void] | None:
        """For `Kernels.sample`; None if every seat is greedy."""
        if not self._num_random:
            return None
        rows = self._rows.take(seats)
        rows["position"] = positions
        return rows

    def states(
        self,
        seats: NDArray[np.int64],
        positions: NDArray[np.int64],
        drafts: NDArray[np.int64] | None = None,
    ) -> dict[int, SamplingState]:
        """The states of the seats that need one, by index. A state that is no longer needed is dropped."""
        found: dict[int, SamplingState] = {}
        if not self._states:
            return found
        for index, seat in enumerate(seats.tolist()):
            state = self._states.get(seat)
            if state is None:
                continue
            if state.is_needed(int(positions[index])):
                found[index] = state
            elif drafts is None or drafts[index] == NO_DRAFT:
                del self._states[seat]
        return found


@dataclass(slots=True)
class Sampled:
    """token_ids: [R] int64. valid: [R], False where the logits hold NaN. logprobs: by index, of the valid
    rows that asked."""

    token_ids: NDArray[np.int64]
    valid: NDArray[np.bool_]
    logprobs: Mapping[int, TokenLogprobs]


NO_LOGPROBS: Mapping[int, TokenLogprobs] = {}


class Sampler:
    """Chooses tokens for a batch of rows."""

    def __init__(self, kernels: Kernels, *, logprobs_mode: str = "raw_logprobs") -> None:
        """logprobs_mode: as in `ModelConfig`."""
        self._kernels = kernels
        self._mode = LogprobsMode.of(logprobs_mode)

    def sample(
        self,
        logits: Tensor,
        table: SamplingSeats,
        seats: NDArray[np.int64],
        positions: NDArray[np.int64],
        masks: Mapping[int, Mask] | None = None,
        drafts: NDArray[np.int64] | None = None,
    ) -> Sampled:
        """logits: [R, V] float32, row i for seats[i]; may be overwritten. positions: [R], index in its
        request of the token to be sampled. masks: by index, of rows in which not every token may be.
        drafts: [R], see `StepInput.drafts`; of each seat only the first token is counted here."""
        states = table.states(seats, positions, drafts)
        rows = table.rows(seats, positions)
        if not states:
            result = self._kernels.sample(logits, rows)
            return Sampled(result.token_ids, result.valid, NO_LOGPROBS)
        told = self._prepare(logits, states, positions, rows, masks or {}, drafts)
        result = self._kernels.sample(logits, rows)
        logprobs, wrong = {}, False
        for index, state in states.items():
            if drafts is None or drafts[index] == NO_DRAFT:
                wrong = not result.valid[index]
                if not wrong:
                    state.count(int(result.token_ids[index]))
            else:
                wrong |= drafts[index] != result.token_ids[index - 1] or not result.valid[index]
            if wrong:
                continue
            token = int(result.token_ids[index])
            if index in told:
                decoding = state.decoding
                [logprobs[index]] = top_logprobs(
                    told[index][None], [token], decoding.logprobs or 0, decoding.logprob_token_ids
                )
        return Sampled(result.token_ids, result.valid, logprobs)

    @torch.inference_mode()
    def _prepare(
        self,
        logits: Tensor,
        states: dict[int, SamplingState],
        positions: NDArray[np.int64],
        rows: NDArray[np.void] | None,
        masks: Mapping[int, Mask],
        drafts: NDArray[np.int64] | None,
    ) -> dict[int, Tensor]:
        """Edits logits of the rows that need it, in place, each as if the drafts before it were right.
        Returns the reported logprobs of the rows that ask for them, by index: [V]."""
        told: dict[int, Tensor] = {}
        counted: list[tuple[SamplingState, int, bool]] = []
        for index, state in states.items():
            values = logits[index]
            if drafts is not None and (draft := int(drafts[index])) != NO_DRAFT:
                counted.append((state, draft, state.count(draft)))
            if state.wants_logprobs and not self._mode.processed:
                told[index] = self._mode.reported(values.clone())
            state.edit(values, int(positions[index]), masks.get(index))
            if state.wants_logprobs and self._mode.processed:
                drawn_from = processed(values, None if rows is None else rows[index])
                told[index] = self._mode.reported(drawn_from)
        for state, draft, was_seen in reversed(counted):
            state.uncount(draft, was_seen)
        return told
