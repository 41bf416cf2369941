"""Results that a request wants for its prompt: the logprobs of its tokens, or one vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.lora import AdapterSet
from quire.messages import AdmittedRequest, PromptLogprobs, TokenLogprobs
from quire.models.decoder import DecoderModel
from quire.sampling.logprobs import log_softmax, top_logprobs
from quire.sampling_params import PoolingParams

LOGITS_BYTES = 32 << 20
"""Limit on the prompt logits in memory at a time: those of a long prompt would be gigabytes."""


Parts = Iterable[tuple[Tensor, Sequence[int]]]
Score = Callable[[Parts, int, Sequence[int]], list[TokenLogprobs]]


def score(parts: Parts, count: int, also: Sequence[int]) -> list[TokenLogprobs]:
    """The logprobs of tokens. parts: logits [R, V] and R tokens each, which are computed as they are read.
    count, also: as in `top_logprobs`."""
    every = (top_logprobs(log_softmax(x.float()), tokens, count, also) for x, tokens in parts)
    return [entry for entries in every for entry in entries]


@dataclass(frozen=True, slots=True)
class PromptResult:
    logprobs: PromptLogprobs | None = None
    embedding: list[float] | None = None


@dataclass(slots=True)
class PromptWork:
    """Prompt logprobs / pooling state of one request; reset on readmission."""

    prompt: list[int]
    pooling: PoolingParams | None
    first: int
    """The first prompt token whose logprobs are wanted; the prompt's length if none are."""
    num_logprobs: int
    also: list[int]
    adapter: tuple[AdapterSet, int] | None = None
    """With which logits are computed."""
    sum: NDArray[np.float64] | None = None
    """[hidden_size]: the sum of the hidden states so far, for a mean."""

    @classmethod
    def of(cls, request: AdmittedRequest) -> PromptWork | None:
        prompt, decoding = request.token_ids[: request.num_prompt_tokens], request.decoding
        scores = decoding.prompt_logprobs is not None and request.num_prompt_logprobs < len(prompt)
        if decoding.pooling is None and not scores:
            return None
        return cls(
            prompt=prompt,
            pooling=decoding.pooling,
            first=request.num_prompt_logprobs if scores else len(prompt),
            num_logprobs=decoding.prompt_logprobs or 0,
            also=decoding.logprob_token_ids,
        )

    def wanted(self, start: int, count: int) -> int:
        """The number of the row's last tokens whose hidden states are wanted."""
        if self.pooling is not None:
            if self.pooling.pooling == "mean":
                return count
            return int(start + count == len(self.prompt))
        # The hidden state at p - 1 gives the logprobs of token p.
        begin = max(start, self.first - 1)
        return start + count - begin if begin < min(start + count, len(self.prompt) - 1) else 0

    def is_done(self, num_computed: int) -> bool:
        return num_computed >= len(self.prompt)

    def read(
        self, start: int, count: int, hidden: Tensor, model: DecoderModel, scored: Score = score
    ) -> PromptResult | None:
        """hidden: [at least `wanted`, hidden_size], of the row's last tokens. scored: the device's."""
        wanted = self.wanted(start, count)
        if not wanted:
            return None
        hidden = hidden[len(hidden) - wanted :]
        if self.pooling is not None:
            return self._pool(hidden, start + count)
        begin = start + count - wanted
        targets = self.prompt[begin + 1 : start + count + 1]
        with torch.inference_mode():
            parts = self._parts(hidden[: len(targets)], targets, model)
            entries = scored(parts, self.num_logprobs, self.also)
        return PromptResult(logprobs=PromptLogprobs(begin + 1, entries))

    def _parts(
        self, hidden: Tensor, targets: list[int], model: DecoderModel
    ) -> Iterator[tuple[Tensor, list[int]]]:
        size = max(1, LOGITS_BYTES // (4 * model.spec.vocab_size))
        for at in range(0, len(targets), size):
            part, adapters = hidden[at : at + size], None
            if self.adapter is not None:
                packed, index = self.adapter
                adapters = packed.rows(torch.full((len(part),), index, dtype=torch.int32))
            yield model.logits(part, adapters), targets[at : at + size]

    def _pool(self, hidden: Tensor, num_computed: int) -> PromptResult | None:
        assert self.pooling is not None
        if self.pooling.pooling == "mean":
            # NumPy adds one row after the other, so the sum does not depend on how the prompt was cut.
            rows = (
                hidden.cpu().double().numpy()
            )  # widened here: in float64 a prompt takes gigabytes
            if self.sum is not None:
                rows = np.vstack([self.sum, rows])
            self.sum = np.add.reduce(rows, axis=0)
            vector = torch.from_numpy(self.sum / len(self.prompt)).float()
        else:
            vector = hidden[-1].float().cpu()
        if not self.is_done(num_computed):
            return None
        vector = vector[: self.pooling.dimensions]
        if self.pooling.normalize:
            vector = F.normalize(vector, dim=0)
        return PromptResult(embedding=vector.tolist())
