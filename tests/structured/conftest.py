from __future__ import annotations

import numpy as np
import pytest

from quire.builtin import MODEL_DIR
from quire.decoding import GrammarSpec
from quire.sampling_params import StructuredOutputsParams
from quire.structured.base import Grammar, TokenMatcher
from quire.structured.guidance import GuidanceCompiler
from quire.structured.masks import num_mask_words, tokens_of
from quire.structured.spec import to_spec
from quire.text.tokenizer import Tokenizer
from tests.text import builders


class Kit:
    """A tokenizer, and what to do with grammars for it."""

    def __init__(self, tokenizer: Tokenizer, eos: list[int], *, more_logits: int) -> None:
        self.tokenizer = tokenizer
        self.eos = eos
        self.vocab_size = tokenizer.max_token_id + 1 + more_logits
        self.compiler = GuidanceCompiler(tokenizer, vocab_size=self.vocab_size, eos_token_ids=eos)

    def compile(self, **params: object) -> Grammar:
        return self.compile_params(StructuredOutputsParams(**params))

    def compile_params(self, params: StructuredOutputsParams) -> Grammar:
        return self.compiler.compile(to_spec(params))

    def matcher(self, **params: object) -> TokenMatcher:
        return self.compile(**params).matcher()

    def allowed(self, matcher: TokenMatcher) -> list[int]:
        row = np.full(num_mask_words(self.vocab_size), -1, np.int32)
        matcher.fill_mask(row)
        return [int(token) for token in tokens_of(row)]

    def may_end(self, matcher: TokenMatcher) -> bool:
        allowed = set(self.allowed(matcher))
        assert allowed.isdisjoint(self.eos) or allowed.issuperset(self.eos)
        return not allowed.isdisjoint(self.eos)

    def accepts(self, matcher: TokenMatcher, text: str) -> bool:
        """Whether `text` is a whole text of the grammar; moves the matcher."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return all(matcher.accept(token) for token in ids) and self.may_end(matcher)

    def text(self, ids: list[int]) -> str:
        return b"".join(self.tokenizer.token_bytes(i) for i in ids if i not in self.eos).decode()


def builtin_kit() -> Kit:
    return Kit(Tokenizer.from_directory(MODEL_DIR), [2, 0], more_logits=0)


def byte_level_kit() -> Kit:
    return Kit(Tokenizer(builders.byte_level()), [2], more_logits=100)


@pytest.fixture(scope="session", params=[builtin_kit, byte_level_kit], ids=["builtin", "byte"])
def kit(request: pytest.FixtureRequest) -> Kit:
    return request.param()


def lark(text: str) -> GrammarSpec:
    return GrammarSpec("lark", text)
