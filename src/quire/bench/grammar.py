"""Measures the cost of grammars: compiling, and a mask per token, for a few schemas and one vocabulary.

Texts are random walks through the masks. They cost more than texts of models: most of the time they are
inside strings, and there is rarely only one allowed token.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from quire.sampling_params import StructuredOutputsParams
from quire.structured.guidance import GuidanceCompiler
from quire.structured.masks import num_mask_words, tokens_of
from quire.structured.spec import to_spec
from quire.text.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["customer", "supplier", "other"]},
        "email": {"type": "string", "pattern": "^[a-z]+@[a-z]+\\.com$"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
    },
    "required": ["name", "age", "kind", "email", "tags"],
    "additionalProperties": False,
}
WIDE = {
    "anyOf": [
        {"type": "object", "properties": {f"field_{i}": PERSON}, "required": [f"field_{i}"]}
        for i in range(100)
    ]
}
TOOLS = {
    "triggers": ["<tool_call>"],
    "structures": [{"begin": "<tool_call>", "schema": PERSON, "end": "</tool_call>"}],
}
CASES: dict[str, dict[str, Any]] = {
    "json_object": {"json_object": True},
    "schema": {"json": PERSON},
    "schema, compact": {"json": PERSON, "disable_any_whitespace": True},
    "100 schemas": {"json": WIDE},
    "choice of 1000": {"choice": [f"answer number {i}" for i in range(1000)]},
    "regex": {"regex": r"[A-Z][a-z]{1,20}( [a-z]{1,20}){0,40}\."},
    "grammar": {
        "grammar": 'start: sum\nsum: product ("+" product)*\nproduct: atom ("*" atom)*\n'
        'atom: /[0-9]{1,9}/ | "(" sum ")"'
    },
    "structural tag": {"structural_tag": TOOLS},
}


def measure(
    tokenizer: Tokenizer, *, eos_token_ids: Sequence[int], num_tokens: int, repeats: int
) -> list[dict[str, object]]:
    """A row per case; the first row is the vocabulary."""
    vocab_size = tokenizer.max_token_id + 1
    started = perf_counter()
    compiler = GuidanceCompiler(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
    rows: list[dict[str, object]] = [
        {"case": f"vocabulary of {vocab_size}", "compile_ms": (perf_counter() - started) * 1e3}
    ]
    for name, params in CASES.items():
        spec = to_spec(StructuredOutputsParams(**params))
        compiles = []
        for _ in range(repeats):
            started = perf_counter()
            grammar = compiler.compile(spec)
            compiles.append((perf_counter() - started) * 1e3)
        row = np.zeros(num_mask_words(vocab_size), np.int32)
        rng = np.random.default_rng(0)
        seconds: list[float] = []
        matcher = grammar.matcher()
        while len(seconds) < num_tokens:
            started = perf_counter()
            matcher.fill_mask(row)
            seconds.append((perf_counter() - started) * 1e6)
            if matcher.is_finished or not matcher.accept(int(rng.choice(tokens_of(row)))):
                matcher = grammar.matcher()
        rows.append({"case": name, "compile_ms": statistics.median(compiles), **_figures(seconds)})
    return rows


def _figures(seconds: list[float]) -> dict[str, float]:
    return {
        "mask_mean_us": float(np.mean(seconds)),
        "mask_p50_us": float(np.percentile(seconds, 50)),
        "mask_p99_us": float(np.percentile(seconds, 99)),
        "mask_max_us": max(seconds),
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    names = ("compile_ms", "mask_mean_us", "mask_p50_us", "mask_p99_us", "mask_max_us")
    lines = [f"{'grammar':<24}" + "".join(f"{name:>14}" for name in names)]
    for row in rows:
        figures = (row.get(name) for name in names)
        cells = ("" if figure is None else f"{figure:.2f}" for figure in figures)
        lines.append(f"{row['case']:<24}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)
