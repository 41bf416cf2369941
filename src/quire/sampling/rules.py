"""Rules for the next token that depend on the tokens before it: bad words, thinking budgets, grammars.

A mask is a row of bits, one per token. It is made on the host, from tokens that the host knows, so a
request with such rules cannot be overlapped (`needs_token_before_next`). On a GPU its mask is filled
while the model computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np

from quire.decoding import Decoding, TokenRules
from quire.errors import InvalidParameterError
from quire.structured.base import Grammar, GrammarError, NoTokenLeftError
from quire.structured.masks import Mask, is_allowed, mask_of, num_mask_words, tokens_of

NOTHING_ALLOWED = "no token satisfies its constraints, or it is too complex to follow; simplify it."
MAX_FORCED = 64
"""Most tokens that one step adds because the grammar allows only them."""


class RequestRules:
    """Per-request constraint state, rebuildable from its tokens (after preemption)."""

    def __init__(
        self,
        decoding: Decoding,
        grammar: Grammar | None,
        *,
        vocab_size: int,
        output: Sequence[int],
    ) -> None:
        """grammar: `decoding.grammar`, compiled. output: tokens generated so far."""
        rules = decoding.rules or TokenRules()
        self._vocab_size = vocab_size
        self._ends = sorted(decoding.end_token_ids)
        self._bad = [tuple(word) for word in rules.bad_words]
        self._has_allowed = decoding.allowed_token_ids is not None
        self._allowed: Mask | None = None
        if decoding.allowed_token_ids is not None:
            self._allowed = mask_of(decoding.allowed_token_ids, vocab_size)
        elif self._bad:
            self._allowed = mask_of(range(vocab_size), vocab_size)
        self._too_early = mask_of(decoding.final_ids, vocab_size) if decoding.min_tokens else None
        """Tokens that may not come before `min_tokens`. (The sampler bans them too, without a mask.)"""
        self._num_to_go = decoding.min_tokens
        self._longest_bad = max(map(len, self._bad), default=0)
        self._matcher = None if grammar is None else grammar.matcher()
        self._may_force = grammar is not None and decoding.logprobs is None
        """Else each token needs the model's logits, so forced tokens are only drafts."""
        self._start, self._end = tuple(rules.think_start), tuple(rules.think_end)
        self._budget = rules.thinking_budget
        self._thinking = rules.thinking
        self._num_thought = 0
        self._tail: list[int] = []
        self._tail_size = max(self._longest_bad, len(self._start), len(self._end), 1)
        for token in output:
            self.learn(token)

    def learn(self, token: int) -> bool:
        """Apply a generated token. Returns False if the grammar does not allow it: then no token may
        follow."""
        self._tail = [*self._tail, token][-self._tail_size :]
        self._num_to_go -= 1
        if self._thinking:
            self._num_thought += 1
            self._thinking = not self._ends_with(self._end)
            return True
        if self._ends_with(self._start):
            self._thinking, self._num_thought = True, 0
        if self._matcher is None or token in self._ends:
            return True
        return self._matcher.accept(token)

    def copy(self) -> RequestRules:
        """An independent state, to look ahead with."""
        twin = copy(self)
        if self._matcher is not None:
            twin._matcher = self._matcher.copy()
        return twin

    def masks_along(self, drafts: Sequence[int]) -> Iterator[Mask | None]:
        """What `mask` would be now and after each draft. Ends early at a draft that is not allowed: what is
        sampled after it is meaningless. Raises `GrammarError` or `NoTokenLeftError` where a mask would allow
        no token."""
        ahead = self.copy() if drafts else self
        for draft in (*drafts, None):
            mask = ahead.mask()
            if mask is not None and not mask.any():
                raise ahead._nothing_left()
            yield mask
            if draft is None or draft in self._ends or not ahead.learn(draft):
                return

    def num_allowed(self, drafts: Sequence[int]) -> int:
        """The number of leading drafts that the rules allow. An end token is not counted: no token follows
        it, so it is no use as a draft."""
        ahead = self.copy()
        for count, draft in enumerate(drafts):
            if draft in self._ends or not ahead._allows(draft) or not ahead.learn(draft):
                return count
        return len(drafts)

    def _allows(self, token: int) -> bool:
        """Whether the token may come next, if the grammar has nothing against it."""
        if self._thinking and self._is_over_budget:
            return token == self._next_of_end()
        banned = any(word[-1] == token and self._begun(word) for word in self._bad)
        return not banned and (self._allowed is None or is_allowed(self._allowed, token))

    @property
    def _is_over_budget(self) -> bool:
        return self._budget is not None and self._num_thought >= self._budget and bool(self._end)

    def _ends_with(self, marker: tuple[int, ...]) -> bool:
        return bool(marker) and tuple(self._tail[-len(marker) :]) == marker

    def mask(self) -> Mask | None:
        """The tokens that may come next; None for all; all zero for none. Raises `GrammarError` if the
        grammar cannot be followed any further."""
        mask = self._mask()
        if mask is not None and self._too_early is not None and self._num_to_go > 0:
            mask = mask & ~self._too_early
        return mask

    def _nothing_left(self) -> InvalidParameterError:
        """The error for a mask that allows no token."""
        if self._matcher is not None and not self._thinking:
            return GrammarError(NOTHING_ALLOWED)
        asked = {
            "thinking_token_budget": self._thinking and self._is_over_budget,
            "allowed_token_ids": self._has_allowed,
            "bad_words": bool(self._bad),
            "min_tokens": self._too_early is not None and self._num_to_go > 0,
        }
        return NoTokenLeftError([name for name, is_asked in asked.items() if is_asked])

    def _mask(self) -> Mask | None:
        if self._thinking and self._is_over_budget:
            return mask_of([self._next_of_end()], self._vocab_size)
        if self._thinking or self._matcher is None:
            return self._plain()
        mask = np.zeros(num_mask_words(self._vocab_size), dtype=np.int32)
        self._matcher.fill_mask(mask)
        plain = self._plain()
        return mask if plain is None else mask & (plain | mask_of(self._ends, self._vocab_size))

    def _next_of_end(self) -> int:
        """The next token of the marker that ends the reasoning, after its tokens so far."""
        begun = range(len(self._end) - 1, 0, -1)
        return self._end[next((k for k in begun if self._ends_with(self._end[:k])), 0)]

    def _plain(self) -> Mask | None:
        """The mask without the grammar."""
        banned = [word[-1] for word in self._bad if self._begun(word)]
        mask = self._allowed
        if mask is not None and banned:
            mask = mask & ~mask_of(banned, self._vocab_size)
        return mask

    def _begun(self, word: tuple[int, ...]) -> bool:
        before = word[:-1]
        return not before or tuple(self._tail[-len(before) :]) == before

    def forced(self, most: int) -> list[int]:
        """The next tokens as long as only one is allowed, at most `most`; they are applied already. The
        model's logits would not change them."""
        found: list[int] = []
        while self._may_force and not self._thinking and len(found) < min(most, MAX_FORCED):
            mask = self.mask()
            if mask is None:
                break
            tokens = tokens_of(mask).tolist()
            if len(tokens) != 1 or tokens[0] in self._ends or not self.learn(tokens[0]):
                break
            found.append(tokens[0])
        return found

    def certain(self, most: int) -> list[int]:
        """The next tokens as long as the grammar allows only one, at most `most`, where `forced` may not
        apply them."""
        if self._matcher is None or self._may_force:
            return []
        ahead = self.copy()
        ahead._may_force = True
        return ahead.forced(most)
