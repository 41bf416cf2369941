"""Tiny checkpoints that can be served: a variant's model, a byte-level tokenizer, a chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers

from tests.models.variants import build_reference, save

VOCAB_SIZE = 320
SPECIAL = ["<|unk|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 3,
    "Paged attention keeps keys and values in blocks, and blocks in tables. " * 3,
]


@dataclass(frozen=True)
class ServableCheckpoint:
    name: str
    directory: Path
    reference: transformers.PreTrainedModel

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """transformers' own greedy continuation."""
        with torch.inference_mode():
            output = self.reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        return output[0, len(prompt) :].tolist()


def write_checkpoint(name: str, directory: Path, **overrides: object) -> ServableCheckpoint:
    reference = build_reference(name, vocab_size=VOCAB_SIZE, **overrides)
    save(reference, directory)
    write_tokenizer(directory)
    return ServableCheckpoint(name, directory, reference)


def write_tokenizer(directory: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def prompts(count: int, *, longest: int = 120, seed: int = 0) -> list[list[int]]:
    """Random prompts of mixed lengths, from 1 token up."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [
        torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths
    ]
