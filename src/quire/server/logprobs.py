"""The engine's log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence

from quire.outputs import Logprob
from quire.server.engine_protocol import ServedTokenizer
from quire.server.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

SMALLEST = -9999.0
"""Stands for minus infinity, which JSON cannot carry (vLLM's value)."""

Position = dict[int, Logprob]
"""Token id -> Logprob at one position: the sampled token's, and the most likely ones'."""


class LogprobFormatter:
    """Shapes one request's logprobs. `top` is how many alternatives the client asked for; -1 all."""

    def __init__(self, tokenizer: ServedTokenizer, *, top: int, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._as_ids = as_ids

    def completion(
        self, token_ids: Sequence[int], positions: Sequence[Position], offset: int
    ) -> CompletionLogprobs:
        """`offset`: characters of the text before the first of these tokens.

        As in vLLM, `top_logprobs` has the sampled token's entry as well as the most likely ones'.
        """
        tokens: list[str] = []
        offsets: list[int] = []
        own: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token_id, position in zip(token_ids, positions, strict=False):
            shown = self._token(token_id)
            tokens.append(shown)
            offsets.append(offset)
            offset += len(shown)
            own.append(_finite(position[token_id].logprob) if token_id in position else None)
            best = self._best(position)
            if token_id in position and token_id not in best:
                best = [token_id, *best]
            tops.append({self._token(i): _finite(position[i].logprob) for i in best})
        return CompletionLogprobs(offsets, own, tokens, tops)

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
        """The most likely ids, best first; ties in the engine's order."""
        ranked = sorted(position, key=lambda i: -position[i].logprob)
        return ranked if self._top < 0 else ranked[: self._top]

    def _token(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.decode_token(token_id)

    def _bytes(self, token_id: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token_id))


def _finite(logprob: float) -> float:
    return logprob if logprob > SMALLEST else SMALLEST  # also for NaN
