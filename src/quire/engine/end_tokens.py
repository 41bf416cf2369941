"""The tokens that end a text, from all files that name them. They are derived only here.

Fine-tunes often change one file and keep the others of their base model: the tokenizer names `<|im_end|>`,
while config.json and generation_config.json still name `<|endoftext|>`. So a text ends at any of them: at the
tokenizer's EOS, as in vLLM, and at what the two configs name. `min_tokens`, `ignore_eos`, grammars and beam
search all read this one list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class TokenIds(Protocol):
    """The methods of a tokenizer that are used here."""

    @property
    def eos_token_id(self) -> int | None: ...
    def token_id(self, token: str) -> int | None: ...


@dataclass(frozen=True, slots=True)
class EosSource:
    """One file's value: a token id, a token's text, a list of them, or None, as in the JSON."""

    file: str
    value: object


@dataclass(frozen=True, slots=True)
class EndTokens:
    """ids: distinct, and all within the model's vocabulary. warnings: a sentence for each dropped value."""

    ids: tuple[int, ...]
    warnings: tuple[str, ...]


def end_tokens(
    sources: Sequence[EosSource],
    tokenizer: TokenIds,
    *,
    vocab_size: int,
    take_eos: bool = True,
    default: Sequence[int] = (),
) -> EndTokens:
    """The union of all sources and, with `take_eos`, the tokenizer's EOS.

    default: used if no source names any. A value that is not an id of the model (out of range, a bool, an
    unknown text) is dropped with a warning.
    """
    named = [source for source in sources if source.value not in (None, [])]
    if take_eos and tokenizer.eos_token_id is not None:
        named.insert(0, EosSource("the tokenizer", tokenizer.eos_token_id))
    ids: dict[int, None] = {}
    warnings = []
    for source in named or [EosSource("the model family", list(default))]:
        values = source.value if isinstance(source.value, list) else [source.value]
        for value in values:
            token = _id_of(value, tokenizer)
            if token is not None and 0 <= token < vocab_size:
                ids[token] = None
            else:
                warnings.append(
                    f"{source.file}: eos_token_id {value!r:.80} is no token of this model, whose "
                    f"vocabulary has {vocab_size} ids; it is ignored."
                )
    return EndTokens(tuple(ids), tuple(warnings))


def _id_of(value: object, tokenizer: TokenIds) -> int | None:
    if type(value) is int:
        return value
    if isinstance(value, dict):  # an added token, as tokenizer_config.json writes it
        value = value.get("content")
    if not isinstance(value, str):
        return None
    if value.isascii() and value.isdecimal() and len(value) < 11:
        return int(value)
    return tokenizer.token_id(value)
