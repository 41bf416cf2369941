"""The engine's log-probabilities in OpenAI's two formats, and those of prompts in vLLM's."""

from __future__ import annotations

from collections.abc import Sequence

from quire.outputs import Logprob
from quire.server.engine_protocol import ServedTokenizer
from quire.server.wire import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
    VocabLogprob,
)

SMALLEST = -9999.0
"""Replaces minus infinity, which JSON cannot express (vLLM's value)."""

Position = dict[int, Logprob]
"""Token id -> Logprob at one position: for the token at this position, the most likely tokens, and
`logprob_token_ids`."""


class LogprobFormatter:
    """Writes one request's logprobs. `top`: the number of alternatives that the client asked for, -1 for all.
    `always`: tokens that are included whatever their rank."""

    def __init__(
        self, tokenizer: ServedTokenizer, *, top: int, as_ids: bool, always: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._as_ids = as_ids
        self._always = always

    def completion(
        self, token_ids: Sequence[int], positions: Sequence[Position | None], offset: int
    ) -> tuple[CompletionLogprobs, int]:
        """The logprobs, and the offset after them. `offset`: the number of characters before the first of
        these tokens. Offsets are sums of the lengths of token texts. They differ from the text sent so
        far while text is held for a stop string.
        """
        shaped = CompletionLogprobs([], [], [], [])
        for token_id, position in zip(token_ids, positions, strict=False):
            shaped.text_offset.append(offset)
            offset += len(self._tokenizer.decode_token(token_id))
            self._add(shaped, token_id, position)
        return shaped, offset

    def echo(
        self, token_ids: Sequence[int], positions: Sequence[Position | None], text: str
    ) -> CompletionLogprobs:
        """Logprobs of the prompt, before those of the answer. A special token that is not in `text` (a
        BOS that the tokenizer added) has length 0, so that offsets point into the text."""
        shaped, offset = CompletionLogprobs([], [], [], []), 0
        for token_id, position in zip(token_ids, positions, strict=True):
            shaped.text_offset.append(min(offset, len(text)))
            piece = self._tokenizer.decode_token(token_id)
            if text.startswith(piece, offset) or self._tokenizer.decode([token_id]):
                offset += len(piece)
            self._add(shaped, token_id, position)
        return shaped

    def _add(self, shaped: CompletionLogprobs, token_id: int, position: Position | None) -> None:
        """As in vLLM, `top_logprobs` has the most likely tokens and the token itself. If two ids have the
        same text, the entry is the token's own, or else the likelier one's."""
        shaped.tokens.append(self._token(token_id))
        if position is None:  # the prompt's first token, or one without logprobs
            shaped.token_logprobs.append(None)
            shaped.top_logprobs.append(None)
            return
        own = position.get(token_id)
        top = {} if own is None else {self._token(token_id): _finite(own.logprob)}
        for other in self._best(position):
            top.setdefault(self._token(other), _finite(position[other].logprob))
        shaped.token_logprobs.append(None if own is None else _finite(own.logprob))
        shaped.top_logprobs.append(top)

    def chat(self, token_ids: Sequence[int], positions: Sequence[Position]) -> ChatLogprobs:
        content = []
        for token_id, position in zip(token_ids, positions, strict=False):
            sampled = position.get(token_id)
            content.append(
                TokenLogprob(
                    self._token(token_id),
                    _finite(sampled.logprob) if sampled is not None else SMALLEST,
                    self._bytes(token_id),
                    [
                        TopLogprob(self._token(i), _finite(position[i].logprob), self._bytes(i))
                        for i in self._best(position)
                    ],
                )
            )
        return ChatLogprobs(content)

    def _best(self, position: Position) -> list[int]:
        """The most likely ids, best first, ties in the engine's order; then `always`."""
        ranked = sorted(position, key=lambda i: -position[i].logprob)
        best = ranked if self._top < 0 else ranked[: self._top]
        return best + [i for i in self._always if i in position and i not in best]

    def _token(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.decode_token(token_id)

    def _bytes(self, token_id: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token_id))


def joined(first: CompletionLogprobs, then: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        first.text_offset + then.text_offset,
        first.token_logprobs + then.token_logprobs,
        first.tokens + then.tokens,
        first.top_logprobs + then.top_logprobs,
    )


def prompt_logprobs(
    positions: Sequence[Position | None], tokenizer: ServedTokenizer
) -> PromptLogprobs:
    """In vLLM's format: by token id, with ranks."""
    return [
        None
        if position is None
        else {
            token_id: VocabLogprob(
                _finite(entry.logprob), entry.rank, tokenizer.decode_token(token_id)
            )
            for token_id, entry in position.items()
        }
        for position in positions
    ]


def _finite(logprob: float) -> float:
    return logprob if logprob > SMALLEST else SMALLEST  # also for NaN
