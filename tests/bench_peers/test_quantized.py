"""The comparison of quantized weights: its table, and which type each tensor of a mixed file gets."""

from __future__ import annotations

from bench.peers.models import _matrix_type
from bench.peers.quantized import PAIRS, markdown, specs


def sample(engine: str, workload: str, repeat: int, **measures: float) -> dict[str, object]:
    return {"engine": engine, "workload": workload, "repeat": repeat, "measures": measures}


def test_ratios_are_to_the_best_rival_and_to_our_own_bf16() -> None:
    results = {
        "title": "Llama 110M",
        "record": {"command": "python", "date": "2026-11-30", "commit": "abc"},
        "repeats": 3,
        "skipped": {"mistral.rs q4_K": "not installed"},
        "samples": [
            sample("quire bf16", "W2", 0, decode_tok_s=100),
            *(sample("quire int4", "W2", i, decode_tok_s=300 + i) for i in (-1, 0, 1, 2)),
            sample("openvino int4", "W2", 0, decode_tok_s=150),
            sample("llama.cpp q4_0", "W2", 0, decode_tok_s=200),
        ],
    }
    row = next(line for line in markdown(results).splitlines() if line.startswith("| int4"))
    assert row.split("|")[2:6] == [" 301 ", " 3.01 ", " llama.cpp q4_0 ", " 1.50 "]
    assert "mistral.rs q4_K: not installed" in markdown(results)


def test_every_engine_of_the_table_is_one_that_is_run() -> None:
    names = {spec.name for spec in specs(2)}
    assert {name for engine, rivals in PAIRS.values() for name in (engine, *rivals)} <= names


def test_a_mixed_file_gives_a_part_of_two_kinds_more_bits() -> None:
    more = [i for i in range(12) if _matrix_type(f"blk.{i}.attn_v.weight", "q4_K_M", 12) == "Q6_K"]
    assert more == [0, 3, 6, 9, 10, 11]
    assert _matrix_type("blk.0.attn_q.weight", "q4_K_M", 12) == "Q4_K"
    assert _matrix_type("token_embd.weight", "q4_0", 12) == "Q6_K"
