"""The tokenizer: text to ids and back, for whole texts and for single tokens.

A thin layer over the Rust `tokenizers` library, and not over transformers' `AutoTokenizer`: the same ids
from the same tokenizer.json, without importing torch (26 ms instead of 2.4 s). It adds typed errors for
bad text, truncation that keeps the special tokens, the exact bytes of a token, and the set of special
ids.

One deliberate difference: transformers 5 rebuilds some tokenizers from their class name. For a checkpoint
that says `LlamaTokenizer` it replaces the file's normalizer by a Metaspace pre-tokenizer, which differs
for text that starts with a space or follows a special token. We always follow tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quire.errors import CheckpointError, InvalidParameterError
from quire.text import hf_tokenizer
from quire.text.pieces import PieceScheme, PieceTable, piece_scheme
from quire.text.tokenizer_config import TokenizerConfig, TokenSpec, read_tokenizer_config

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding
    from tokenizers import Tokenizer as Backend


class Tokenizer:
    """Encodes and decodes with one checkpoint's tokenizer. Safe to share between threads."""

    def __init__(self, backend: Backend, config: TokenizerConfig | None = None) -> None:
        """Wrap `backend` and add the tokens that `config` requires. The caller must not use the backend
        again.

        Truncation and padding stored in tokenizer.json are switched off: they are for training batches and
        would silently cut prompts.
        """
        self.config = config or TokenizerConfig()
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.config.split_special_tokens
        _add_missing_tokens(backend, self.config)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.added_ids = frozenset(added)
        self.scheme: PieceScheme = piece_scheme(backend)
        self._pieces = PieceTable(backend, self.scheme)
        self._visible_pieces = PieceTable(backend, self.scheme, hidden=self.special_ids)

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Load from a checkpoint directory.

        Raises `CheckpointError` where there is no usable tokenizer file, or it is damaged.
        """
        directory = Path(path)
        return cls(_load_backend(directory), read_tokenizer_config(directory))

    # --- whole texts ---

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        truncate_to: int | None = None,
        truncation_side: Literal["left", "right"] = "left",
    ) -> list[int]:
        """Token ids of `text`; with `add_special_tokens`, what the post-processor adds (bos, ...).

        `truncate_to` bounds the number of ids, special tokens included and kept; "left" drops
        the beginning of the text (what a chat prompt wants), "right" its end.

        Raises `InvalidParameterError` for text that is not valid Unicode, and for a `truncate_to`
        that leaves no room for the text.
        """
        if truncate_to is None:
            return self._encoding(text, add_special_tokens).ids
        num_special = self.num_special_tokens_added if add_special_tokens else 0
        room = truncate_to - num_special
        if room < 1:
            raise InvalidParameterError(
                f"truncate_prompt_tokens is {truncate_to}; it must be at least {num_special + 1} to "
                f"leave room for one token beside the {num_special} this tokenizer adds.",
                param="truncate_prompt_tokens",
                value=truncate_to,
            )
        encoding = self._encoding(text, add_special_tokens=False)
        encoding.truncate(room, 0, truncation_side)
        if add_special_tokens:
            encoding = self.backend.post_process(encoding, None, True)
        return encoding.ids

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` for many texts at once, in parallel threads."""
        for text in texts:
            _check_text(text)
        encodings = self.backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids outside the vocabulary contribute nothing.

        Raises `InvalidParameterError` for an id that is negative or not an integer.
        """
        try:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise InvalidParameterError(
                "Token ids must be integers from 0 up to 2**32 - 1.", param="tokens"
            ) from error

    def _encoding(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:  # the library raises this for anything but valid Unicode text
            _check_text(text)
            raise

    # --- single tokens ---

    def token_str(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it ("Ġthe", "▁the"), or None outside the vocabulary."""
        return self.backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None

    def token_id(self, token: str) -> int | None:
        """The id of a token given in the vocabulary's spelling, or None."""
        return self.backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes this token adds to a text: OpenAI's `bytes` in `logprobs`.

        Concatenated over a text's tokens they are the text's UTF-8, up to the one leading space that
        sentencepiece decoders drop. For decoders that are not a concatenation (WordPiece, ...), the
        bytes of the token decoded alone.
        """
        if self.scheme.kind == "opaque":
            return self.decode([token_id], skip_special_tokens=False).encode("utf-8")
        piece = self._pieces[token_id]
        return piece.encode("utf-8") if isinstance(piece, str) else piece

    def decode_token(self, token_id: int) -> str:
        """The text of one token for display; bytes that are not a whole character become U+FFFD.

        Unlike `decode([id])` it keeps a leading space, so the tokens of a text join to that text.
        """
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def pieces(self, *, skip_special_tokens: bool) -> PieceTable:
        """Token id -> text or bytes; special tokens are empty where they are skipped."""
        return self._visible_pieces if skip_special_tokens else self._pieces

    # --- vocabulary ---

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """The texts of the special tokens, where they are shown."""
        return frozenset(self.decode_token(token_id) for token_id in self.special_ids) - {""}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model may have more logits than this."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def max_token_id(self) -> int:
        """The largest id in use; above `vocab_size - 1` where the vocabulary has holes."""
        return max(self.vocab().values(), default=-1)

    def vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included; a fresh dict, in no particular order."""
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def num_special_tokens_added(self) -> int:
        """How many tokens `encode` adds around a single text."""
        return self.backend.num_special_tokens_to_add(False)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @cached_property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.token_id(self.bos_token)

    @cached_property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.token_id(self.eos_token)

    @cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """bos_token, eos_token, unk_token, ... -> text, for those that are set."""
        return {name: spec.content for name, spec in self.config.named_tokens.items()}

    # --- chat ---

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template, or None."""
        return self.config.chat_templates.get("default")

    @property
    def tool_chat_template(self) -> str | None:
        """The source of the template named "tool_use", for requests with tools, or None."""
        return self.config.chat_templates.get("tool_use")


def _load_backend(directory: Path) -> Backend:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; pass a checkpoint's directory.")
    path = directory / "tokenizer.json"
    if not path.is_file():
        found = hf_tokenizer.convertible_file(directory)
        if found is None:
            raise CheckpointError(
                f"{directory} has no tokenizer.json. Download the checkpoint's tokenizer files, or "
                "point --tokenizer at a directory that has them."
            )
        return hf_tokenizer.convert_with_transformers(directory, found=found)
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{path} could not be read as a tokenizer; it may be truncated. Download it again."
        ) from error


def _add_missing_tokens(backend: Backend, config: TokenizerConfig) -> None:
    """Register the configured tokens that tokenizer.json does not, in transformers' order.

    Order matters: a token that is in no vocabulary gets the next free id.
    """
    named = [*config.named_tokens.values(), *config.extra_tokens]
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for spec in config.added_tokens.values():
        if spec.content not in present or not _same(spec, present[spec.content]):
            backend.add_tokens([_added_token(spec)])
    for spec in named:
        backend.add_special_tokens([_added_token(spec)])


def _same(spec: TokenSpec, token: AddedToken) -> bool:
    return (spec.special, spec.lstrip, spec.rstrip, spec.single_word, spec.normalized) == (
        token.special,
        token.lstrip,
        token.rstrip,
        token.single_word,
        token.normalized,
    )


def _added_token(spec: TokenSpec) -> AddedToken:
    from tokenizers import AddedToken

    return AddedToken(
        spec.content,
        special=spec.special,
        lstrip=spec.lstrip,
        rstrip=spec.rstrip,
        single_word=spec.single_word,
        normalized=spec.normalized,
    )


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise InvalidParameterError(
            f"Text to tokenize must be a string, not {type(text).__name__}.", param="prompt"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidParameterError(
            f"The text is not valid Unicode: a lone surrogate at character {error.start}. "
            "Encode the character properly (a JSON \\ud83d needs its \\udXXX partner).",
            param="prompt",
        ) from error
