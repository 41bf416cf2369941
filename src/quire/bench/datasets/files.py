"""Files with one JSON object per line: the user's prompts (`custom`), recorded arrivals (`timed_trace`)."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from quire.bench.datasets.base import BenchRequest, DatasetError, read_json_lines, sampled
from quire.bench.datasets.prompts import PromptMaker
from quire.bench.options import DatasetOptions

if TYPE_CHECKING:
    from quire.text import Tokenizer


def custom(options: DatasetOptions, tokenizer: Tokenizer) -> list[BenchRequest]:
    """`{"prompt": "...", "output_tokens": 64}`; output_tokens may be left out."""
    path = str(options.dataset_path)
    requests = []
    for number, entry in read_json_lines(path):
        prompt = entry.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise DatasetError(f"{path} line {number}: prompt must be a non-empty string.")
        output_len = entry.get("output_tokens", options.custom_output_len)
        if output_len == -1:
            raise DatasetError(
                f"{path} line {number} has no output_tokens, which custom_output_len -1 requires."
            )
        output_len = _count(path, number, "output_tokens", output_len, least=1)
        requests.append(BenchRequest(prompt, tokenizer.encode(prompt), output_len))
    if not options.disable_shuffle:
        random.Random(options.seed).shuffle(requests)
    return sampled(options, requests)


def timed_trace(options: DatasetOptions, tokenizer: Tokenizer) -> list[BenchRequest]:
    """`{"timestamp": 0, "input_length": 955, "output_length": 52, "hash_ids": [46, 47]}`, as in the traces
    that come with Mooncake (Qin et al. 2024, arXiv 2407.00079, section 4).

    A hash id means the next `timed_trace_chunk_hash_size` tokens of the prompt, the same tokens wherever
    it occurs, so that prefixes are shared as in the trace. Tokens beyond the ids are unique to the
    request. The first `num_prompts` entries are sent; time starts with the earliest.
    """
    path = str(options.dataset_path)
    maker = PromptMaker(tokenizer, options.seed, send_ids=options.prompt_token_ids)
    size = options.timed_trace_chunk_hash_size
    requests: list[BenchRequest] = []
    for number, entry in read_json_lines(path):
        if len(requests) == options.num_prompts:
            break
        timestamp = entry.get("timestamp")
        if isinstance(timestamp, bool) or not isinstance(timestamp, int | float):
            raise DatasetError(f"{path} line {number}: timestamp must be a number.")
        if not math.isfinite(timestamp):
            raise DatasetError(f"{path} line {number}: timestamp must be finite.")
        length = _count(path, number, "input_length", entry.get("input_length"), least=1)
        output_len = _count(path, number, "output_length", entry.get("output_length"), least=1)
        hash_ids = entry.get("hash_ids", [])
        if not isinstance(hash_ids, list) or not all(isinstance(h, int) for h in hash_ids):
            raise DatasetError(f"{path} line {number}: hash_ids must be a list of integers.")
        body: list[int] = []
        wanted = maker.body_len(length)
        for hash_id in hash_ids[: math.ceil(wanted / size)]:
            body += maker.draw(size, rng=random.Random(f"{options.seed}:{hash_id}"))
        body += maker.draw(wanted - len(body))
        text, ids = maker.prompt(body[:wanted])
        requests.append(
            BenchRequest(text, ids, output_len, timestamp * options.timed_trace_sec_multiplier)
        )
    return _from_zero(requests)


def _from_zero(requests: list[BenchRequest]) -> list[BenchRequest]:
    """The entries in order of time, with the earliest at 0."""
    timed = sorted(requests, key=lambda request: request.due or 0.0)
    first = timed[0].due or 0.0 if timed else 0.0
    return [BenchRequest(r.text, r.token_ids, r.output_len, (r.due or 0.0) - first) for r in timed]


def _count(path: str, number: int, name: str, value: object, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DatasetError(
            f"{path} line {number}: {name} must be an integer of at least {least}, got {value!r}."
        )
    return value
