"""A tokenizer from a GGUF file gives the ids of the tokenizer.json that the file was made from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from quire.builtin import MODEL_DIR
from quire.errors import CheckpointError
from quire.text.gguf_tokenizer import PRE_TOKENIZERS, read_generation_config, read_tokenizer
from quire.text.tokenizer import Tokenizer
from tests.weights.gguf_writer import tokenizer_metadata

TEXTS = [
    "", " ", "  ", "Hello world", " leading", "trailing ", "two  spaces\n\n\n\tand tabs \r\n",
    "don't DON'T I'll we'VE", "12345 3.14 1,000,000 ½ ² Ⅷ ١٢٣", "Ünïcode ñandú Straße",
    "漢字とかな 한국어 русский العربية ไทย", "👩‍👩‍👧 🏳️‍🌈 e\u0301 \u00e9", "\u200b\ufeff\x00\x1f",
    "def f(x):\n    return x ** 2  # comment", "https://example.com/a?b=c&d=%20", "aaaa" * 30,
    "HTTPServerError camelCase snake_case", "\u2581 \u2581\u2581", "<0x0A>", "a/b//c\n/d",
]  # fmt: skip


def check(mine: Tokenizer, theirs: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        ids = theirs.encode(text)
        assert mine.encode(text) == ids, text
        assert mine.decode(ids) == theirs.decode(ids), text
        shown = theirs.decode(ids, skip_special_tokens=False)
        assert mine.decode(ids, skip_special_tokens=False) == shown, text


def with_specials(texts: list[str], *specials: str) -> list[str]:
    pairs = zip(itertools.cycle(specials), texts, strict=False)
    return texts + [f"{special}{text}{special} {text}" for special, text in pairs]


# ---- the built-in model's ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builtin() -> tuple[Tokenizer, Tokenizer]:
    metadata = tokenizer_metadata(MODEL_DIR, pre="smollm") | {
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    return read_tokenizer(metadata, where="x.gguf"), Tokenizer.from_directory(MODEL_DIR)


def test_the_built_in_models_ids(builtin: tuple[Tokenizer, Tokenizer]) -> None:
    mine, theirs = builtin
    check(mine, theirs, with_specials(TEXTS, "<|im_start|>", "<think>", "<|endoftext|>"))
    assert mine.vocab() == theirs.vocab()
    assert (mine.special_ids, mine.added_ids) == (theirs.special_ids, theirs.added_ids)
    assert mine.special_tokens == theirs.special_tokens
    assert mine.chat_template == "{{ messages[0].content }}"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_the_built_in_models_ids_of_any_text(
    builtin: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    check(*builtin, [text])


# ---- pre-tokenizers ----------------------------------------------------------------------------------------

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    **{
        name: [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        for name, pattern in {
            "llama-bpe": LLAMA3,
            "dbrx": LLAMA3,
            "qwen2": LLAMA3.replace("{1,3}", ""),
            "tekken": TEKKEN,
            "gpt-4o": GPT4O,
        }.items()
    },
}
"""As in the tokenizer.json of the models."""


def byte_level(directory: Path, name: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    backend.pre_tokenizer = pre_tokenizers.Sequence(PUBLISHED[name])
    backend.decoder = decoders.ByteLevel()
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|eos|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.save(str(directory / "tokenizer.json"))
    return backend


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_pre_tokenizer_by_name(name: str, tmp_path: Path) -> None:
    backend = byte_level(tmp_path, name)
    metadata = tokenizer_metadata(tmp_path, pre=name) | {"tokenizer.ggml.add_bos_token": False}
    mine = read_tokenizer(metadata, where="x.gguf")
    check(mine, Tokenizer(backend), with_specials(TEXTS, "<|bos|>", "<|eos|>"))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_name_makes_a_tokenizer_that_loses_nothing(name: str) -> None:
    metadata = tokenizer_metadata(MODEL_DIR, pre=name)
    tokenizer = read_tokenizer(metadata, where="x.gguf")
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        expected = normalizers.NFC().normalize_str(text) if PRE_TOKENIZERS[name].nfc else text
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize(
    ("pre", "keys", "ids"),
    [
        ("llama-bpe", {}, [0, 5]),
        ("smollm", {}, [5]),
        ("smollm", {"add_bos_token": True}, [0, 5]),
        ("llama-bpe", {"add_bos_token": False}, [5]),
        ("smollm", {"add_eos_token": True}, [5, 2]),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, [0, 5, 2]),
        ("smollm", {"add_bos_token": True, "bos_token_id": 2**32 - 1}, [5]),
    ],
)
def test_tokens_around_a_text(pre: str, keys: dict[str, object], ids: list[int]) -> None:
    keys = {"bos_token_id": 0, "eos_token_id": 2, **keys}
    metadata = tokenizer_metadata(MODEL_DIR, pre=pre)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    tokenizer = read_tokenizer(metadata, where="x.gguf")
    assert tokenizer.encode("<tool_call>") == ids
    assert tokenizer.encode("<tool_call>", add_special_tokens=False) == [5]
    assert tokenizer.num_special_tokens_added == len(ids) - 1


# ---- SentencePiece -----------------------------------------------------------------------------------------


def sentencepiece(*, prefix: bool) -> tuple[tokenizers.Tokenizer, dict[str, object]]:
    """As converted from a model of SentencePiece: special tokens, bytes, then pieces by falling score."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, max_token_length=8)
    trained.train_from_iterator(TEXTS * 3, trainer)
    learned = json.loads(trained.to_str())["model"]
    merged = ["".join(pair) for pair in learned["merges"]]
    merged = [piece for piece in merged if not piece.startswith("<")]
    characters = [token for token in learned["vocab"] if len(token) == 1]
    pieces = list(dict.fromkeys([*merged, *sorted(characters)]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, "<|end|>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1000.0]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        (a, b) for token in merged for a, b in splits(token, vocab)
    ]  # in the order of the scores, since these fall
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.insert(0, normalizers.Prepend("▁"))
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(decoding)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([tokenizers.AddedToken("<|end|>", normalized=False)])
    return backend, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **({} if prefix else {"tokenizer.ggml.add_space_prefix": False}),
    }


def splits(token: str, vocab: dict[str, int]) -> list[tuple[str, str]]:
    both = [(token[:i], token[i:]) for i in range(1, len(token))]
    known = [(a, b) for a, b in both if a in vocab and b in vocab]
    return sorted(known, key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool) -> None:
    backend, metadata = sentencepiece(prefix=prefix)
    mine, theirs = read_tokenizer(metadata, where="x.gguf"), Tokenizer(backend)
    check(mine, theirs, with_specials(TEXTS, "<s>", "<|end|>", "</s>"))
    assert mine.scheme == theirs.scheme and mine.scheme.kind == "sentencepiece"
    assert mine.encode("x")[0] == 1 and mine.bos_token == "<s>"
    assert mine.special_ids == {0, 1, 2}


def test_the_special_tokens_of_phi_3_swallow_spaces() -> None:
    _, metadata = sentencepiece(prefix=True)
    kinds = metadata["tokenizer.ggml.token_type"]
    assert isinstance(kinds, list)
    kinds[-1] = 3
    plain = read_tokenizer(metadata, where="x.gguf")
    phi3 = read_tokenizer(metadata | {"general.architecture": "phi3"}, where="x.gguf")
    assert plain.encode("<|end|>\nfox") != plain.encode("<|end|>fox")
    assert phi3.encode("<|end|>\nfox") == phi3.encode("<|end|>fox") == plain.encode("<|end|>fox")
    assert phi3.encode("<s> fox") == plain.encode("<s> fox")


# ---- the rest ----------------------------------------------------------------------------------------------


def test_unused_tokens_are_none() -> None:
    """Rows of the embedding that no tokenizer knows have names like [PAD151936]."""
    metadata = tokenizer_metadata(MODEL_DIR, pre="llama-bpe")
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(kinds, list)
    tokens += ["[PAD]", "[PAD]"]
    kinds += [5, 5]
    tokenizer = read_tokenizer(metadata, where="x.gguf")
    assert tokenizer.token_str(4096) is None
    assert 4096 not in tokenizer.encode("[PAD]")


def test_templates_by_name() -> None:
    metadata = tokenizer_metadata(MODEL_DIR, pre="smollm")
    metadata |= {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    tokenizer = read_tokenizer(metadata, where="x.gguf")
    assert (tokenizer.chat_template, tokenizer.tool_chat_template) == ("a", "b")


def test_the_ends_of_a_text() -> None:
    metadata: dict[str, object] = {
        "tokenizer.ggml.tokens": ["a", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|eot_id|>"],
        "tokenizer.ggml.token_type": [1, 3, 4, 3, 3],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 0,
        "general.sampling.temp": 0.6000000238418579,
        "general.sampling.top_k": 20,
    }
    assert read_generation_config(metadata) == {
        "eos_token_id": [3, 0, 1, 4],
        "temperature": 0.6,
        "top_k": 20,
    }
    assert read_generation_config({}) == {"eos_token_id": []}


def without(key: str) -> Callable[[dict[str, object]], None]:
    return lambda metadata: metadata.pop(f"tokenizer.ggml.{key}") and None


def changed(key: str, value: object) -> Callable[[dict[str, object]], None]:
    return lambda metadata: metadata.update({f"tokenizer.ggml.{key}": value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("pre", "qwen35"), r"pre is 'qwen35'.*--tokenizer.*smollm"),
        (changed("pre", "default"), r"pre is 'default'.*--tokenizer"),
        (without("pre"), r"pre is None.*--tokenizer"),
        (changed("model", "bert"), r"model is 'bert'.*gpt2 and llama.*--tokenizer"),
        (without("model"), r"model is None"),
        (without("tokens"), r"tokens has no value"),
        (changed("tokens", "abc"), r"tokens has no list"),
        (without("merges"), r"merges has no value"),
        (changed("merges", ["nonsense here"]), r"no tokenizer can be made.*--tokenizer"),
        (changed("token_type", [1]), r"token_type has 1 values for 4096 tokens"),
        (changed("tokens", ["a"] * 4096), r"tokens has 4095 of them twice"),
        (changed("model", "llama"), r"scores has no value"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(
    change: Callable[[dict[str, object]], None], message: str
) -> None:
    metadata = tokenizer_metadata(MODEL_DIR, pre="smollm")
    change(metadata)
    with pytest.raises(CheckpointError, match=rf"x\.gguf: .*{message}"):
        read_tokenizer(metadata, where="x.gguf")


def test_a_huge_template_is_refused() -> None:
    metadata = tokenizer_metadata(MODEL_DIR, pre="smollm")
    metadata["tokenizer.chat_template"] = "x" * ((1 << 20) + 1)
    with pytest.raises(CheckpointError, match="chat_template has more than"):
        read_tokenizer(metadata, where="x.gguf")
