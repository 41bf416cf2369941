"""ShareGPT: a reader of the file with vLLM's filtering rules, and synthetic requests with its lengths.

The file is a JSON array of `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]}`.
The first turn is the prompt; the second turn's length is the output length.
"""

from __future__ import annotations

import json
import math
import random
from typing import TYPE_CHECKING

from quire.bench.datasets.base import BenchRequest, DatasetError, read_text, sampled
from quire.bench.datasets.prompts import PromptMaker
from quire.bench.options import DatasetOptions

if TYPE_CHECKING:
    from quire.text import Tokenizer

MIN_LEN = 4
MAX_PROMPT_LEN = 1024
MAX_TOTAL_LEN = 2048

PROMPT_MEDIAN, PROMPT_SIGMA = 180.0, 1.6
OUTPUT_MEDIAN, OUTPUT_SIGMA = 113.0, 1.2
"""Parameters of the lognormals that `generate` draws from, before the filter. Fitted to the means after
the filter in a published run over the real file: 229,711 prompt and 203,068 output tokens for 1000
requests (the description of vLLM's pull request 18566, Llama 3.1's tokenizer). The vLLM paper's figure 11
(Kwon et al. 2023, section 6.1) shows both as long-tailed, with means of 161 and 338 for its own
selection. The two sigmas are our choice, not a fit: we have no percentiles of the file."""


def keeps(prompt_len: int, output_len: int, *, fixed_output: bool) -> bool:
    """vLLM's filter. The minimum output length does not apply to a fixed output length."""
    if prompt_len < MIN_LEN or (output_len < MIN_LEN and not fixed_output):
        return False
    return prompt_len <= MAX_PROMPT_LEN and prompt_len + output_len <= MAX_TOTAL_LEN


def read(options: DatasetOptions, tokenizer: Tokenizer) -> list[BenchRequest]:
    """Shuffled by the seed, filtered, cut to `num_prompts` (or repeated up to it)."""
    path = str(options.dataset_path)
    pairs = _first_turns(path)
    if not options.disable_shuffle:
        random.Random(options.seed).shuffle(pairs)
    fixed = options.sharegpt_output_len
    requests: list[BenchRequest] = []
    for prompt, answer in pairs:
        if len(requests) == options.num_prompts:
            break
        ids = tokenizer.encode(prompt)
        output_len = fixed or len(tokenizer.encode(answer, add_special_tokens=False))
        if keeps(len(ids), output_len, fixed_output=fixed is not None):
            requests.append(BenchRequest(prompt, ids, output_len))
    return sampled(options, requests)


def generate(options: DatasetOptions, tokenizer: Tokenizer) -> list[BenchRequest]:
    """Random words with ShareGPT's lengths. Unlike ShareGPT, they share no prefixes, and a model's
    answers to them are meaningless. The lengths depend on the seed alone, not on the tokenizer."""
    lengths = random.Random(options.seed)
    maker = PromptMaker(tokenizer, options.seed, send_ids=options.prompt_token_ids)
    requests: list[BenchRequest] = []
    while len(requests) < options.num_prompts:
        prompt_len = round(lengths.lognormvariate(math.log(PROMPT_MEDIAN), PROMPT_SIGMA))
        output_len = round(lengths.lognormvariate(math.log(OUTPUT_MEDIAN), OUTPUT_SIGMA))
        if not keeps(prompt_len, output_len, fixed_output=False):
            continue
        text, ids = maker.prompt(maker.draw(maker.body_len(prompt_len)))
        requests.append(BenchRequest(text, ids, options.sharegpt_output_len or output_len))
    return requests


def to_file(options: DatasetOptions, tokenizer: Tokenizer) -> str:
    """Write the requests of `generate` as a ShareGPT file for other tools."""
    maker = PromptMaker(tokenizer, options.seed + 1)
    entries = []
    for number, request in enumerate(generate(options, tokenizer)):
        answer = maker.prompt(maker.draw(request.output_len))[0]
        turns = [
            {"from": "human", "value": request.text},
            {"from": "gpt", "value": answer},
        ]
        entries.append({"id": f"synthetic-{number}", "conversations": turns})
    return json.dumps(entries, ensure_ascii=False, indent=1) + "\n"


def _first_turns(path: str) -> list[tuple[str, str]]:
    """Prompt and answer of every conversation with at least two turns."""
    try:
        entries = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path} line {error.lineno} is not JSON: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON: {error}.") from None
    if not isinstance(entries, list):
        raise DatasetError(f"{path} must be a JSON array of conversations.")
    pairs: list[tuple[str, str]] = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path} entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise DatasetError(f"{where} must be an object with a list of conversations.")
        turns = entry["conversations"][:2]
        values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) != len(turns):
            raise DatasetError(f"{where}: each turn must be an object with a text value.")
        if len(texts) == 2:
            pairs.append((texts[0], texts[1]))
    return pairs
