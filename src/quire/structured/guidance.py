"""Grammars by llguidance: an Earley parser over a lexer of derivatives, which computes each mask on demand.
Compiling takes milliseconds, since nothing is precomputed for the vocabulary.

It gets the vocabulary from our table of token bytes and not from tokenizer.json, for two reasons: every
tokenizer that can be served works, and a token has exactly the bytes that the detokenizer writes for it.
(llguidance itself treats `<tool_call>` as a special token even where the checkpoint says that it is
text.)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quire.decoding import GrammarSpec
from quire.structured.base import Grammar, GrammarError, TokenMatcher, Vocabulary
from quire.structured.masks import Mask, mask_of, num_mask_words

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

BASE_BYTES = 128 << 10
BYTES_PER_BYTE = 128
"""Memory of a compiled grammar, measured: a constant, and this much for each byte of its text."""

MAX_ROW_ITEMS = 16_000
"""Maximum number of parser items at one place in the text. llguidance's default of 2,000 allows 500
optional properties, each of which has four items. `step_max_items` still limits the work of a step: 1,000
integers take 29 ms at worst, 3 on average."""
MAX_REASON = 300


class GuidanceCompiler:
    """See `GrammarCompiler`. Reads the vocabulary in its constructor: some 0.5 s for 128,000 tokens, during
    which no other Python thread runs."""

    def __init__(
        self, vocabulary: Vocabulary, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        """vocab_size: the model's. Ids that the tokenizer does not have are never allowed."""
        from llguidance import LLTokenizer, TokenizerWrapper

        table = _TokenTable(vocabulary, vocab_size, eos_token_ids)
        self._vocab_size = vocab_size
        self._eos = tuple(table.eos_token_ids)
        self._tokenizer = LLTokenizer(TokenizerWrapper(table), eos_token=list(self._eos))

    def compile(self, spec: GrammarSpec) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        text = spec.text
        if spec.kind == "json_schema":
            text = LLMatcher.grammar_from_json_schema(text)
        limits = LLParserLimits(verbose_errors=False, max_items_in_row=MAX_ROW_ITEMS)
        root = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        if root.is_error():
            raise GrammarError(_first_line(root.get_error()))
        num_bytes = BASE_BYTES + BYTES_PER_BYTE * len(spec.text)
        return GuidanceGrammar(root, self._tokenizer, self._eos, self._vocab_size, num_bytes)


class GuidanceGrammar:
    """See `Grammar`. Holds a matcher in its first state; each request gets a copy of it."""

    def __init__(
        self,
        root: LLMatcher,
        tokenizer: LLTokenizer,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        num_bytes: int,
    ) -> None:
        self._root = root
        self._lock = threading.Lock()
        self.num_bytes = num_bytes
        self.eos_token_ids = eos_token_ids
        self.eos_mask = mask_of(eos_token_ids, vocab_size)
        self.num_tokens = tokenizer.vocab_size
        self.num_words = num_mask_words(self.num_tokens)

    def matcher(self) -> TokenMatcher:
        with self._lock:
            return GuidanceMatcher(self, self._root.deep_copy())


class GuidanceMatcher:
    """See `TokenMatcher`."""

    __slots__ = ("_ended", "_grammar", "_matcher")

    def __init__(self, grammar: GuidanceGrammar, matcher: LLMatcher) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self._ended = False

    def fill_mask(self, row: Mask) -> None:
        # row: [ceil(vocab_size / 32)]; the tokenizer's tokens are in the first words
        num_words = self._grammar.num_words
        if not row.flags.c_contiguous or row.itemsize != 4 or len(row) < num_words:
            raise ValueError(
                f"a mask needs {num_words} words in a row"
            )  # what follows writes by address
        row[num_words:] = 0
        if self._ended:
            row[:] = self._grammar.eos_mask
            return
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, num_words * 4)
        if self._matcher.is_error():
            row[:] = 0  # llguidance would end the text as if it were complete

    def accept(self, token_id: int) -> bool:
        if self._ended or token_id >= self._grammar.num_tokens:
            return False
        if token_id in self._grammar.eos_token_ids and self._matcher.is_accepting():
            self._ended = True
            return True
        return self._matcher.try_consume_tokens([token_id]) == 1

    def copy(self) -> GuidanceMatcher:
        # Not a rollback, which a matcher that has met an error does not survive.
        twin = GuidanceMatcher(self._grammar, self._matcher.deep_copy())
        twin._ended = self._ended
        return twin

    @property
    def is_finished(self) -> bool:
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())


class _TokenTable:
    """What llguidance needs of a tokenizer: each token's bytes, and the usual tokens of a text.

    Where the grammar allows only one text, the mask allows only the tokens that the tokenizer would use
    for it, because the model was trained on those.
    """

    bos_token_id = None

    def __init__(
        self, vocabulary: Vocabulary, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        size = min(vocabulary.max_token_id + 1, vocab_size)
        self._vocabulary = vocabulary
        self.eos_token_ids = [token for token in eos_token_ids if token < size]
        if not self.eos_token_ids:
            raise GrammarError("the model has no end-of-sequence token, so no text could end.")
        self.tokens = [vocabulary.token_bytes(token) for token in range(size)]
        self.eos_token_id = self.eos_token_ids[0]
        self.special_token_ids = sorted(
            {*(t for t in vocabulary.special_ids if t < size), *self.eos_token_ids}
        )

    def __call__(self, text: bytes) -> list[int]:
        return self._vocabulary.encode(text.decode(), add_special_tokens=False)


def _first_line(error: str) -> str:
    """The reason, without the excerpt and the parser's state that follow it."""
    lines = error.strip().split("\n")
    line = lines[0]
    if line == "regex parse error:":
        line = f"{line} {lines[-1].removeprefix('error: ')}, in {lines[1].strip()}"
    return (line if len(line) <= MAX_REASON else line[:MAX_REASON] + "...").rstrip(".") + "."
