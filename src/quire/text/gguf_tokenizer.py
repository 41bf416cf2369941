"""The tokenizer in the metadata of a GGUF file, and the defaults of generation that belong to it.

Two kinds are read. "gpt2" is byte-level BPE with its merges; how texts are split before it is only named
(`tokenizer.ggml.pre`), and `PRE_TOKENIZERS` has the patterns of the tokenizer.json files that a name stands
for. "llama" is the BPE of SentencePiece: merges follow from the tokens' scores. Both become a `tokenizers`
backend as in the tokenizer.json of such a model, with the same ids for the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.errors import CheckpointError
from quire.text.tokenizer import Tokenizer
from quire.text.tokenizer_config import MAX_TEMPLATE_CHARS, TokenizerConfig, TokenSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

Metadata = Mapping[str, object]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Of tokenizer.ggml.token_type. 6 is a byte."""

REMEDY = "give the original model's tokenizer with --tokenizer (a directory or hub id)"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CASED = f"{_LEAD}{_UPPER}*{_LOWER}+(?:ENDING)?|{_LEAD}{_UPPER}+{_LOWER}*(?:ENDING)?"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How texts are split into what BPE merges within."""

    patterns: tuple[str, ...] = ()
    """In turn; none: GPT-2's own."""
    single_digits: bool = False
    """Before the patterns."""
    ignore_merges: bool = False
    """A piece that is a token is that token, whatever the merges."""
    adds_bos: bool = False
    """If the file does not say it."""
    nfc: bool = False
    """Whether texts are normalized first."""


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(single_digits=True)
_CL100K = (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_LLAMA3 = PreTokenizer(_CL100K, ignore_merges=True, adds_bos=True)
_QWEN = (rf"{_WORDS}|\p{{N}}|{_REST}",)
_TEKKEN = _CASED.replace("(?:ENDING)?", "")
_GPT4O = _CASED.replace("(?:ENDING)", "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,  # Granite 3
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": PreTokenizer(_CL100K),
    "dbrx": PreTokenizer(_CL100K),  # OLMo 2, Phi-4
    "qwen2": PreTokenizer(_QWEN, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_QWEN),
    "tekken": PreTokenizer(
        (rf"{_TEKKEN}|\p{{N}}|{_REST_SLASH}",), ignore_merges=True, adds_bos=True
    ),
    "gpt-4o": PreTokenizer((rf"{_GPT4O}|\p{{N}}{{1,3}}|{_REST_SLASH}",)),  # Phi-4-mini
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
    ),
}
"""tokenizer.ggml.pre -> how texts are split. "default" is missing: converters wrote it for tokenizers that
they did not know."""

NAMED_IDS: Mapping[str, str] = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|>".split()
)
"""Control tokens that end a turn or a text in every model that has them. Files name only some of them."""
SAMPLING: Mapping[str, str] = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def read_generation_config(metadata: Metadata) -> dict[str, object]:
    """As in generation_config.json: the ends of a text, and the recommended sampling."""
    ends = [metadata.get(f"tokenizer.ggml.{key}") for key in END_IDS]
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, Sequence) and isinstance(types, Sequence):
        controls = (i for i, kind in enumerate(types[: len(tokens)]) if kind == CONTROL)
        ends += [index for index in controls if tokens[index] in END_TEXTS]
    config: dict[str, object] = {
        name: round(value, 6) if isinstance(value, float) else value
        for key, name in SAMPLING.items()
        if type(value := metadata.get(key)) in (int, float)
    }
    return config | {"eos_token_id": list(dict.fromkeys(end for end in ends if type(end) is int))}


def read_tokenizer(metadata: Metadata, *, where: str) -> Tokenizer:
    """where: the file's name, for messages.

    Raises `CheckpointError` for a kind or pre-tokenizer that is not known, and for damaged values.
    """
    try:
        parts = _Parts(metadata, where)
        kind = metadata.get("tokenizer.ggml.model")
        if kind == "gpt2":
            backend = _byte_level(parts)
        elif kind == "llama":
            backend = _sentencepiece(parts)
        else:
            raise CheckpointError(
                f"{where}: tokenizer.ggml.model is {kind!r:.80}, and gpt2 and llama are read; {REMEDY}"
            )
        _add_tokens(backend, parts)
        return Tokenizer(backend, parts.config())
    except CheckpointError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception
        raise CheckpointError(
            f"{where}: no tokenizer can be made of tokenizer.ggml.* ({error!s:.200}); {REMEDY}"
        ) from error


class _Parts:
    """The values under tokenizer.*, with their types checked."""

    def __init__(self, metadata: Metadata, where: str) -> None:
        self.metadata = metadata
        self.where = where
        self.tokens: list[str] = list(self._sequence("tokens"))  # type: ignore[arg-type]
        types = self._sequence("token_type", missing=[NORMAL] * len(self.tokens))
        self.types: list[object] = list(types)
        if len(self.types) != len(self.tokens):
            raise self.bad("token_type", f"{len(self.types)} values for {len(self.tokens)} tokens")
        self.vocab = {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != UNUSED
        }
        num_used = len(self.types) - self.types.count(UNUSED)
        if len(self.vocab) != num_used:
            raise self.bad("tokens", f"{num_used - len(self.vocab)} of them twice")

    def get(self, name: str) -> object:
        return self.metadata.get(f"tokenizer.ggml.{name}")

    def bad(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: tokenizer.ggml.{name} has {what}; {REMEDY}")

    def _sequence(self, name: str, missing: Sequence[object] | None = None) -> Sequence[object]:
        value = self.get(name)
        value = missing if value is None else value
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self.bad(name, "no list" if value is not None else "no value")
        return value

    def pairs(self) -> list[tuple[str, str]]:
        """The merges, which are written with a space between the two."""
        merges = []
        for text in self._sequence("merges"):
            first, _, second = str(text)[1:].partition(" ")
            merges.append((str(text)[0] + first, second))
        return merges

    def scores(self) -> Sequence[float]:
        scores = self._sequence("scores")
        if len(scores) != len(self.tokens):
            raise self.bad("scores", f"{len(scores)} values for {len(self.tokens)} tokens")
        return scores  # type: ignore[return-value]

    def named(self, key: str) -> str | None:
        """The text of the token that a key names by its id. Files use the id of another one, or one out of
        range, for none."""
        index = self.get(key)
        if type(index) is not int or not 0 <= index < len(self.tokens):
            return None
        return self.tokens[index]

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        return value if isinstance(value, bool) else default

    def config(self) -> TokenizerConfig:
        templates = {}
        for key, name in (("", "default"), (".tool_use", "tool_use")):
            source = self.metadata.get(f"tokenizer.chat_template{key}")
            if isinstance(source, str):
                templates[name] = source
                if len(source) > MAX_TEMPLATE_CHARS:
                    raise CheckpointError(
                        f"{self.where}: tokenizer.chat_template has more than {MAX_TEMPLATE_CHARS} characters"
                    )
        named = {name: self.named(key) for name, key in NAMED_IDS.items()}
        return TokenizerConfig(
            named_tokens={
                name: self.spec(token) for name, token in named.items() if token is not None
            },
            chat_templates=templates,
        )

    def spec(self, token: str, special: bool = True) -> TokenSpec:
        """Phi-3's special tokens, but for three, swallow the spaces that follow. The file does not say it."""
        phi3 = self.metadata.get("general.architecture") == "phi3" and self.get("model") == "llama"
        rstrip = phi3 and special and token not in ("<unk>", "<s>", "<|endoftext|>")
        return TokenSpec(token, special=special, rstrip=rstrip)


def _byte_level(parts: _Parts) -> Backend:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    name = parts.get("pre")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        raise CheckpointError(
            f"{parts.where}: tokenizer.ggml.pre is {name!r:.80}, and it is not known how it splits texts; "
            f"{REMEDY}. Known are {', '.join(PRE_TOKENIZERS)}"
        )
    backend = Backend(
        models.BPE(vocab=parts.vocab, merges=parts.pairs(), ignore_merges=pre.ignore_merges)
    )
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre.patterns))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    _add_bos_and_eos(backend, parts, bos=parts.flag("add_bos_token", pre.adds_bos))
    return backend


def _sentencepiece(parts: _Parts) -> Backend:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    unknown = next(
        (t for t, kind in zip(parts.tokens, parts.types, strict=True) if kind == UNKNOWN), None
    )
    backend = Backend(
        models.BPE(
            vocab=parts.vocab,
            merges=_merges_of_scores(parts),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    decoding: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if parts.flag("add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(decoding)
    _add_bos_and_eos(backend, parts, bos=parts.flag("add_bos_token", True))
    return backend


def _merges_of_scores(parts: _Parts) -> list[tuple[str, str]]:
    """Every way to make a token of two, best token first, in the order in which transformers converts a
    SentencePiece model."""
    vocab = parts.vocab
    merges = []
    for token, score, kind in zip(parts.tokens, parts.scores(), parts.types, strict=True):
        if kind not in (NORMAL, USER_DEFINED):
            continue
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [split for split in splits if split[0] in vocab and split[1] in vocab]
        known.sort(key=lambda split: (vocab[split[0]], vocab[split[1]]))
        merges += [(score, len(first), len(second), first, second) for first, second in known]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in merges]


def _add_tokens(backend: Backend, parts: _Parts) -> None:
    """Tokens that are found in a text before it is split."""
    from tokenizers import AddedToken

    kinds = (UNKNOWN, CONTROL, USER_DEFINED)
    added = []
    for token, kind in zip(parts.tokens, parts.types, strict=True):
        if kind in kinds:
            spec = parts.spec(token, special=kind != USER_DEFINED)
            added.append(
                AddedToken(token, special=spec.special, rstrip=spec.rstrip, normalized=False)
            )
    backend.add_tokens(added)


def _add_bos_and_eos(backend: Backend, parts: _Parts, *, bos: bool) -> None:
    from tokenizers import processors

    first = parts.named("bos_token_id") if bos else None
    last = parts.named("eos_token_id") if parts.flag("add_eos_token", False) else None
    around = {token: parts.vocab[token] for token in (first, last) if token is not None}
    if around:
        single = [token for token in (first, "$A", last) if token is not None]
        backend.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, *(token.replace("$A", "$B") for token in single)],
            special_tokens=list(around.items()),
        )
