"""Small real tokenizers of every decoder family, trained here on text that exercises them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "def main():\n    print('hello, world')\n\treturn {'a': 1, 'b': [1, 2, 3]}\n",
    "Ünïcödé, naïve café, déjà vu; Привет, мир! Γειά σου Κόσμε.",
    "你好,世界。今日は良い天気ですね。안녕하세요 세계",
    "emoji 🙂🙃 👨‍👩‍👧‍👦 🏳️‍🌈 flags 🇩🇪🇯🇵 skin 👍🏽 done",
    "User: what is 2+2?\nAssistant: 4\n\n<think>hmm</think> 12345 67890",
] * 4
SAMPLES = [
    "",
    "hello",
    " leading space",
    "trailing space ",
    "  two  spaces  ",
    "line\n\nbreaks\tand tabs\r\n",
    "你好,世界。",
    "family 👨‍👩‍👧‍👦 and flag 🏳️‍🌈 and 👍🏽!",
    "mixed Привет 안녕 ¿qué? ñandú",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>[INST] hi [/INST]</s>",
    "a <tool call> b",
    "null \x00 and control \x1b[0m",
    "\ufffd literal replacement \ufffd",
    "zero\u200bwidth e\u0301 combining",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(*, add_bos: bool = False) -> Tokenizer:
    """GPT-2's and Llama 3's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=CHATML,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    bos = tokenizer.token_to_id("<|endoftext|>")
    if add_bos:
        template = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
        )
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), template]
        )
    return tokenizer


def sentencepiece(*, strip: bool = True) -> Tokenizer:
    """Llama 2's kind: normalizer with a prefix space, byte fallback, bos from the post-processor."""
    base = Tokenizer(models.BPE(unk_token="<unk>"))
    base.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        if strip
        else [normalizers.Replace(" ", "▁")]
    )
    base.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training only
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        limit_alphabet=60,
        special_tokens=["<unk>", "<s>", "</s>", *BYTE_TOKENS],
        show_progress=False,
    )
    base.train_from_iterator([line.replace("\n", " ") for line in CORPUS], trainer)
    spec = json.loads(base.to_str())
    spec["model"] |= {"byte_fallback": True, "fuse_unk": True}
    spec["added_tokens"] = spec["added_tokens"][:3]
    spec["pre_tokenizer"] = None
    steps: list[Mapping[str, object]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    spec["decoder"] = {"type": "Sequence", "decoders": steps}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """T5's kind, as BPE over the corpus' characters; no byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT's kind: the text of a token depends on its neighbours."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def save(
    tokenizer: Tokenizer,
    directory: Path,
    *,
    config: Mapping[str, object] | None = None,
    special_tokens_map: Mapping[str, object] | None = None,
) -> Path:
    """Write a checkpoint's tokenizer files, as `save_pretrained` lays them out."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(defaults | dict(config or {})))
    if special_tokens_map is not None:
        (directory / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))
    return directory
