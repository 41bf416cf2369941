"""Beam search: finds the likeliest continuations of a prompt by extending the best few at each step.

`BeamSearch` is the algorithm: it returns the token lists to extend by one token, and takes the candidates
for the next token. `SearchRequest` is a caller's request for a search: the front end extends its beams
with ordinary requests of one token. A beam shares blocks with the beams it came from through the prefix
cache, so a step computes only its new token.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from heapq import nlargest

import msgspec

from quire.engine.input_processor import EngineRequest
from quire.engine.setup import ServedModel
from quire.errors import EngineError
from quire.messages import AddRequest
from quire.outputs import CompletionOutput, Logprob, RequestOutput
from quire.prefix_report import PrefixReport
from quire.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from quire.text.detokenizer import IncrementalDetokenizer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class BeamSearchSequence:
    """One continuation. `tokens` begins with the prompt's, and so does `text`, as in vLLM."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    """Per generated token: the candidates there."""
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """What `LLM.beam_search` returns for a prompt."""

    sequences: list[BeamSearchSequence]
    """Best first."""


@dataclass(slots=True)
class BeamSearch:
    """The search from one prompt.

    Each live beam proposes its `2 * beam_width` likeliest tokens. A proposal that ends its sequence is
    completed; the best `beam_width` of the others stay live. At the end the completed and the live ones are
    ranked together. This is vLLM's algorithm, except that the search ends as soon as no live beam can still
    become one of the best; vLLM computes all of them to the end.
    """

    prompt_token_ids: Sequence[int]
    params: BeamSearchParams
    eos_token_ids: Collection[int]
    max_tokens: int
    live: list[BeamSearchSequence] = field(init=False)
    """The beams to extend next."""
    _completed: list[BeamSearchSequence] = field(init=False, default_factory=list)
    _num_steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.live = [BeamSearchSequence(list(self.prompt_token_ids))]

    @property
    def done(self) -> bool:
        return self._num_steps >= self.max_tokens or self._is_settled()

    def advance(self, positions: Sequence[dict[int, Logprob]]) -> None:
        """candidates: for the next token of each live beam, in their order."""
        proposals = []
        for beam, position in zip(self.live, positions, strict=True):
            for token in sorted(position):  # ties go to the better beam, then to the lowest id
                total = beam.cum_logprob + position[token].logprob
                if token in self.eos_token_ids and not self.params.ignore_eos:
                    self._completed.append(_extended(beam, token, position, total, "stop"))
                else:
                    proposals.append((total, beam, token, position))
        # All of these have the same length, so the order by score is the order by probability.
        best = nlargest(self.params.beam_width, proposals, key=lambda proposal: proposal[0])
        self.live = [
            _extended(beam, token, position, total, None) for total, beam, token, position in best
        ]
        self._completed = self._best_of(self._completed)
        self._num_steps += 1

    def best(self) -> list[BeamSearchSequence]:
        """The result, best first."""
        return self._best_of([*self._completed, *self.live])[: self.params.n]

    def _best_of(self, beams: list[BeamSearchSequence]) -> list[BeamSearchSequence]:
        return nlargest(self.params.beam_width, beams, key=self.score)

    def score(self, beam: BeamSearchSequence) -> float:
        """As in vLLM: the prompt counts for the length, the token that ends the sequence does not."""
        return self._judge(beam.cum_logprob, len(beam.tokens) - (beam.finish_reason == "stop"))

    def _judge(self, cum_logprob: float, length: int) -> float:
        return float(cum_logprob / max(1, length) ** self.params.length_penalty)

    def _is_settled(self) -> bool:
        """Whether enough completed sequences are better than any live beam can become. A beam only gets
        less likely. A greater length can raise its score, at most up to the longest length; with a
        negative penalty it cannot."""
        if not self.live or len(self._completed) < self.params.beam_width:
            return not self.live
        length = len(self.live[0].tokens)
        if self.params.length_penalty > 0:
            length = len(self.prompt_token_ids) + self.max_tokens
        return self._judge(self.live[0].cum_logprob, length) <= self.score(self._completed[-1])


def _extended(
    beam: BeamSearchSequence,
    token: int,
    position: dict[int, Logprob],
    cum_logprob: float,
    finish_reason: str | None,
) -> BeamSearchSequence:
    return BeamSearchSequence(
        [*beam.tokens, token],
        [*beam.logprobs, position],
        cum_logprob,
        finish_reason=finish_reason,
    )


def step_params(params: BeamSearchParams, vocab_size: int) -> SamplingParams:
    """Parameters to extend a beam: one token, and so many candidates that `beam_width` of them do not end
    it."""
    return SamplingParams(
        max_tokens=1,
        temperature=params.temperature,
        logprobs=min(2 * params.beam_width, vocab_size),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class SearchRequest:
    """A caller's request for a search: rounds of one-token requests, then one output, the best sequences."""

    def __init__(
        self, request: EngineRequest, params: BeamSearchParams, model: ServedModel
    ) -> None:
        self.request = request
        self.step_params = step_params(params, model.vocab_size)
        """The parameters of requests that extend a beam."""
        self._group: int | None = None
        self._search = BeamSearch(
            request.prompt_token_ids, params, model.eos_token_ids, request.max_tokens
        )
        self._tokenizer = model.tokenizer
        self._round: dict[str, RequestOutput | None] = {}
        """The beams' requests, in the order of the beams, and their outputs."""
        self._prefix: PrefixReport | None = None
        self._error: str | None = None
        self._late: str | None = None
        """The finish reason, if its deadline has passed."""

    @property
    def is_done(self) -> bool:
        return self._error is not None or self._late is not None or self._search.done

    @property
    def waiting(self) -> list[str]:
        """The beams' requests that have no output yet."""
        return [request_id for request_id, output in self._round.items() if output is None]

    def beams(self) -> list[list[int]]:
        """The token lists to extend next."""
        return [beam.tokens for beam in self._search.live]

    def placed(self, sequence: AddRequest) -> AddRequest:
        """A beam's message, with the search's place in the queue, and all beams in one group."""
        self._group = self._group or sequence.request_id
        arrival_time = self.request.arrival_ts
        return msgspec.structs.replace(sequence, arrival_time=arrival_time, group=self._group)

    def start_round(self, request_ids: Sequence[str]) -> None:
        """request_ids: of the requests that extend `beams()`, in that order."""
        self._round = dict.fromkeys(request_ids)

    def take(self, output: RequestOutput) -> bool:
        """Store the output of a beam's request. Returns whether it was the last one of the round."""
        self._round[output.request_id] = output
        outputs = [output for output in self._round.values() if output is not None]
        if len(outputs) < len(self._round):
            return False
        if self._prefix is None:
            self._prefix = outputs[0].prefix
        self._error = next((o.error for o in outputs if o.error is not None), None)
        reasons = {output.outputs[0].finish_reason for output in outputs}
        if reasons & {"timeout", "expired"}:
            self._late = "expired" if reasons == {"expired"} and self._prefix is None else "timeout"
        elif self._error is None:
            try:
                self._search.advance([candidates(output) for output in outputs])
            except Exception:  # an error in one search ends only that search
                logger.exception("beam search %s failed", self.request.request_id)
                self._error = "The server failed to process this request's output."
        return True

    def output(self, reason: str | None = None) -> RequestOutput:
        """The best sequences. reason: the finish reason, if the search was ended early."""
        reason = "error" if self._error else self._late or reason
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=[
                self._completion(index, beam, reason)
                for index, beam in enumerate(self._search.best())
            ],
            finished=True,
            num_cached_tokens=None if self._prefix is None else self._prefix.cached,
            prefix=self._prefix,
            error=self._error,
            lora_request=self.request.lora_request,
        )

    def _completion(
        self, index: int, beam: BeamSearchSequence, reason: str | None
    ) -> CompletionOutput:
        token_ids = beam.tokens[len(self.request.prompt_token_ids) :]
        hidden = beam.finish_reason == "stop"
        show_end = self._search.params.include_stop_str_in_output
        detokenizer = IncrementalDetokenizer(
            self._tokenizer,
            prompt_token_ids=self.request.prompt_token_ids[-32:],
            skip_special_tokens=not show_end,
        )
        visible = token_ids[:-1] if hidden and not show_end else token_ids
        return CompletionOutput(
            index=index,
            text=detokenizer.push(visible, final=True).delta,
            token_ids=token_ids,
            cumulative_logprob=beam.cum_logprob,
            logprobs=beam.logprobs,
            finish_reason=beam.finish_reason or reason or "length",
            stop_reason=beam.stop_reason,
        )


def candidates(output: RequestOutput) -> dict[int, Logprob]:
    """The candidates for the next token, from a beam's output. Raises `EngineError` if its request failed."""
    logprobs = output.outputs[0].logprobs
    if not logprobs:
        raise EngineError(output.error or "A beam's request ended without a token.")
    return logprobs[0]
