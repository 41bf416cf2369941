"""Makes text with an exact number of tokens.

Decoding random ids and encoding the text again gives other ids, and another number of them. So prompts
are made of words that are one token at every place: " word", for byte-level BPE and SentencePiece. They
are found by encoding with the tokenizer. If it has too few (a test's tokenizer), any ids are decoded, the
length is that of the encoded text, and `--prompt-token-ids` sends the ids themselves.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.text import Tokenizer

MIN_WORDS = 64
MAX_SCANNED = 50_000
_WORD = re.compile(r" [a-z]{2,}")


class PromptMaker:
    """Draws prompts from one seeded random stream."""

    def __init__(self, tokenizer: Tokenizer, seed: int, *, send_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._send_ids = send_ids
        self.random = random.Random(seed)
        self.num_special = tokenizer.num_special_tokens_added
        words = _word_tokens(tokenizer)
        self.exact = len(words) >= MIN_WORDS
        self._ids = list(words) if self.exact else _plain_ids(tokenizer)
        self._words = words

    def draw(self, count: int, *, rng: random.Random | None = None) -> list[int]:
        """[count] ids, from the maker's stream or another."""
        return (rng or self.random).choices(self._ids, k=count) if count > 0 else []

    def body_len(self, prompt_len: int) -> int:
        """The number of ids to draw, so that the length with special tokens is `prompt_len`; at least 1."""
        return max(prompt_len - self.num_special, 1)

    def prompt(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text of these ids, and the number of tokens that the server will count (special tokens
        included)."""
        text = self.text(ids)
        return text, list(ids) if self._send_ids else self._tokenizer.encode(text)

    def text(self, ids: Sequence[int]) -> str:
        if self.exact:
            return "".join(self._words[token] for token in ids)
        return self._tokenizer.decode(list(ids))


def _word_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """id -> " word", for ids that do not change when texts are joined and encoded."""
    words: dict[int, str] = {}
    special = {tokenizer.token_id(token) for token in tokenizer.special_tokens.values()}
    for token, token_id in sorted(tokenizer.vocab().items(), key=lambda item: item[1])[
        :MAX_SCANNED
    ]:
        word = " " + token[1:] if token[:1] in ("Ġ", "▁") else ""
        if _WORD.fullmatch(word) and token_id not in special:
            words[token_id] = word
    texts = list(words.values())
    encoded = tokenizer.encode_batch([text * 2 for text in texts], add_special_tokens=False)
    return {
        token_id: word
        for (token_id, word), ids in zip(words.items(), encoded, strict=True)
        if ids == [token_id, token_id]
    }


def _plain_ids(tokenizer: Tokenizer) -> list[int]:
    special = {tokenizer.token_id(token) for token in tokenizer.special_tokens.values()}
    return sorted(set(tokenizer.vocab().values()) - special)
