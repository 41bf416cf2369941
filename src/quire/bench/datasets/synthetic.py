"""Prompts of random words: `random` (all different, or with one prefix) and `prefix_repetition`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quire.bench.datasets.base import BenchRequest
from quire.bench.datasets.prompts import PromptMaker
from quire.bench.options import DatasetOptions

if TYPE_CHECKING:
    from quire.text import Tokenizer


def random_tokens(options: DatasetOptions, tokenizer: Tokenizer) -> list[BenchRequest]:
    """Lengths are uniform around the given ones, as in vLLM: between floor(len * (1 - ratio)) and
    ceil(len * (1 + ratio)), and at least 1. The prefix is added to the input length."""
    maker = PromptMaker(tokenizer, options.seed, send_ids=options.prompt_token_ids)
    prefix = maker.draw(options.random_prefix_len)
    requests = []
    for _ in range(options.num_prompts):
        input_len = _around(maker, options.random_input_len, options.random_range_ratio)
        output_len = _around(maker, options.random_output_len, options.random_range_ratio)
        text, ids = maker.prompt(prefix + maker.draw(maker.body_len(input_len)))
        requests.append(BenchRequest(text, ids, output_len))
    return requests


def prefix_repetition(options: DatasetOptions, tokenizer: Tokenizer) -> list[BenchRequest]:
    """`num_prefixes` prefixes, each for an equal share of the requests, in shuffled order."""
    maker = PromptMaker(tokenizer, options.seed, send_ids=options.prompt_token_ids)
    prefix_len = options.prefix_repetition_prefix_len
    prefixes = [
        maker.draw(max(prefix_len - maker.num_special, 0))
        for _ in range(options.prefix_repetition_num_prefixes)
    ]
    requests = []
    for number in range(options.num_prompts):
        suffix = maker.draw(options.prefix_repetition_suffix_len)
        text, ids = maker.prompt(prefixes[number % len(prefixes)] + suffix)
        requests.append(BenchRequest(text, ids, options.prefix_repetition_output_len))
    if not options.disable_shuffle:
        maker.random.shuffle(requests)
    return requests


def _around(maker: PromptMaker, length: int, ratio: float) -> int:
    low, high = math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))
    return maker.random.randint(max(low, 1), max(high, 1))
