"""Which tokens may come next, where that depends on those before: bad words, thinking budgets, grammars.

A mask is a row of bits, one per token. It is made on the host, from tokens that the host knows, so a request
with such rules cannot be overlapped (`needs_token_before_next`); on a GPU its mask is filled while the model
computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quire.messages import TokenRules
from quire.sampling_params import SamplingParams
from quire.structured.base import Grammar

MOST_FORCED = 64
"""Tokens that one step may add because a grammar leaves no choice."""

Mask = NDArray[np.uint32]
"""[ceil(vocab_size / 32)]: bit t % 32 of word t // 32 says whether token t may be next."""


def has_rules(params: SamplingParams, rules: TokenRules | None) -> bool:
    return rules is not None or params.allowed_token_ids is not None


def needs_every_token(rules: TokenRules | None) -> bool:
    """Whether the next token's mask depends on the last token."""
    return rules is not None


class RequestRules:
    """One request's: state that is a function of its tokens, so that it can be made anew from them."""

    def __init__(
        self,
        params: SamplingParams,
        rules: TokenRules | None,
        grammar: Grammar | None,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        output: Sequence[int],
    ) -> None:
        """output: tokens generated so far."""
        rules = rules or TokenRules()
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._allowed: Mask | None = None
        if params.allowed_token_ids is not None:
            self._allowed = bits(params.allowed_token_ids, vocab_size)
        self._bad = [tuple(word) for word in rules.bad_words]
        self._longest_bad = max(map(len, self._bad), default=0)
        self._matcher = None if grammar is None else grammar.matcher()
        self._may_force = grammar is not None and params.logprobs is None
        self._start, self._end = tuple(rules.think_start), tuple(rules.think_end)
        self._budget = rules.thinking_budget
        self._thinking = rules.thinking
        self._num_thought = 0
        self._tail: list[int] = []
        self._tail_size = max(self._longest_bad, len(self._start), len(self._end), 1)
        for token in output:
            self.learn(token)

    def learn(self, token: int) -> bool:
        """A token was generated. False if the grammar does not know it: then no other may follow."""
        self._tail = [*self._tail, token][-self._tail_size :]
        if self._thinking:
            self._num_thought += 1
            self._thinking = not self._ends_with(self._end)
            return True
        if self._ends_with(self._start):
            self._thinking, self._num_thought = True, 0
        if self._matcher is None or token in self._eos:
            return True
        return self._matcher.accept(token)

    def _ends_with(self, marker: tuple[int, ...]) -> bool:
        return bool(marker) and tuple(self._tail[-len(marker) :]) == marker

    def mask(self) -> Mask | None:
        """What may come next; None for everything. All zero if nothing may."""
        if self._thinking:
            if self._budget is not None and self._num_thought >= self._budget and self._end:
                return bits([self._next_of_end()], self._vocab_size)
            return self._plain()
        if self._matcher is None:
            return self._plain()
        words = np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
        self._matcher.fill_mask(words)
        mask = words.view(np.uint32)
        plain = self._plain()
        return mask if plain is None else mask & (plain | bits(self._eos, self._vocab_size))

    def _next_of_end(self) -> int:
        """Of the marker that closes the thinking part, the token after those that are there."""
        begun = range(len(self._end) - 1, 0, -1)
        return self._end[next((k for k in begun if self._ends_with(self._end[:k])), 0)]

    def _plain(self) -> Mask | None:
        """Without the grammar."""
        banned = [word[-1] for word in self._bad if self._begun(word)]
        if not banned:
            return self._allowed
        mask = ~bits(banned, self._vocab_size)
        return mask if self._allowed is None else mask & self._allowed

    def _begun(self, word: tuple[int, ...]) -> bool:
        before = word[:-1]
        return not before or tuple(self._tail[-len(before) :]) == before

    def forced(self, most: int) -> list[int]:
        """Tokens that can be the only ones to follow now, learned already: computing what the model thinks of
        them would change nothing. At most `most`."""
        found: list[int] = []
        while self._may_force and not self._thinking and len(found) < min(most, MOST_FORCED):
            mask = self.mask()
            if mask is None:
                break
            words = np.flatnonzero(mask)
            if len(words) != 1 or int(mask[words[0]]).bit_count() != 1:
                break
            token = int(words[0]) * 32 + int(mask[words[0]]).bit_length() - 1
            if token in self._eos or not self.learn(token):
                break
            found.append(token)
        return found


def bits(tokens: Sequence[int], vocab_size: int) -> Mask:
    """A mask with these tokens."""
    mask = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    ids = np.asarray(tokens, dtype=np.int64)
    np.bitwise_or.at(mask, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
    return mask


def as_bools(mask: Mask, vocab_size: int) -> NDArray[np.bool_]:
    """[vocab_size]"""
    unpacked = np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocab_size)
    return unpacked.astype(np.bool_)
